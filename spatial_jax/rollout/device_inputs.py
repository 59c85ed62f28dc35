"""Prompts, rollouts and observations as NumPy arrays, the inputs of the rollout programs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spatial_jax import rng
from spatial_jax.data.vision_packing import bucket
from spatial_jax.rollout.config import RolloutConfig, SamplingParams
from spatial_jax.rollout.conversation import TokenSegment
from spatial_jax.rollout.device import ObservationBatch, PromptBatch
from spatial_jax.rollout.request import Request
from spatial_jax.rollout.sampling import SamplingArrays
from spatial_jax.types import PatchedImage, Prompt


def prompt_batch(
  prompts: Sequence[Prompt],
  slots: Sequence[int],
  buffer_rows: Mapping[str, np.ndarray],
  cfg: RolloutConfig,
) -> PromptBatch:
  """Pads prompts to the inputs of one call of the prefill program.

  Args:
    prompts: at most `cfg.prefill[-1]`.
    slots: one per prompt.
    buffer_rows: rows of the feature buffer, by content hash of the image.
    cfg: buckets.
  """
  count = bucket(len(prompts), cfg.prefill, "prompts")
  longest = max(len(prompt.token_ids_T) for prompt in prompts)
  size = bucket(longest, cfg.prompt_buckets, "tokens in a prompt")
  batch = PromptBatch(
    # Padding prompts have slots that do not exist, so their results are dropped.
    slot_B=np.arange(cfg.slots, cfg.slots + count, dtype=np.int32),
    token_BT=np.zeros((count, size), np.int32),
    position_BTA=np.zeros((count, size, 3), np.int32),
    valid_BT=np.zeros((count, size), bool),
    feature_BT=np.full((count, size), -1, np.int32),
    next_position_B=np.zeros(count, np.int32),
  )
  batch.valid_BT[:, 0] = True
  for b, (slot, prompt) in enumerate(zip(slots, prompts, strict=True)):
    t = len(prompt.token_ids_T)
    batch.slot_B[b] = slot
    batch.token_BT[b, :t] = prompt.token_ids_T
    batch.position_BTA[b, :t] = prompt.position_TA
    batch.valid_BT[b, :t] = True
    batch.next_position_B[b] = prompt.next_position
    feature_T = np.asarray(batch.feature_BT)[b]
    _write_buffer_rows(feature_T, prompt.images, prompt.image_start, buffer_rows)
  return batch


class RowSampling(NamedTuple):
  """How a rollout samples.

  Attributes:
    key_2: uint32, data of its key.
    turn_limit: limit of its first turn, tokens.
    params: temperature and truncation.
  """

  key_2: np.ndarray
  turn_limit: int
  params: SamplingParams


def sampling_arrays(samplings: Sequence[RowSampling | None]) -> SamplingArrays:
  """Returns the arrays of all rows; those of a row with None are arbitrary."""
  given = [one for one in samplings if one is not None]
  filled = [given[0] if one is None else one for one in samplings]
  params = [one.params for one in filled]

  def array(values: Iterable[float], dtype: type[np.generic]) -> np.ndarray:
    return np.array(list(values), dtype)

  return SamplingArrays(
    key_R=rng.wrap(np.stack([one.key_2 for one in filled])),
    temperature_R=array((1.0 if p.greedy else p.temperature for p in params), np.float32),
    greedy_R=array((p.greedy for p in params), np.bool_),
    top_k_R=array((p.top_k for p in params), np.int32),
    top_p_R=array((p.top_p for p in params), np.float32),
    min_p_R=array((p.min_p for p in params), np.float32),
    limit_R=array((one.turn_limit for one in filled), np.int32),
  )


def observation_batch(
  observed: Sequence[tuple[int, Request, TokenSegment]],
  buffer_rows: Mapping[str, np.ndarray],
  cfg: RolloutConfig,
) -> ObservationBatch:
  """Pads observations to the inputs of one call of the append program.

  Args:
    observed: (row, its request, the observation that was added to the request), at most
      `cfg.append[-1]`.
    buffer_rows, cfg: as in `prompt_batch`.
  """
  count = bucket(len(observed), cfg.append, "observations")
  longest = max(len(observation.token_ids_T) for _, _, observation in observed)
  size = bucket(longest, cfg.observation_buckets, "tokens in an observation")
  zero_R = np.zeros(count, np.int32)
  batch = ObservationBatch(
    # Padding observations have a row that does not exist, so their results are dropped.
    row_R=np.full(count, cfg.row_count, np.int32),
    start_R=zero_R.copy(),
    count_R=zero_R.copy(),
    limit_R=zero_R.copy(),
    token_RT=np.zeros((count, size), np.int32),
    position_RTA=np.zeros((count, size, 3), np.int32),
    valid_RT=np.zeros((count, size), bool),
    feature_RT=np.full((count, size), -1, np.int32),
    next_position_R=zero_R.copy(),
  )
  for i, (r, request, observation) in enumerate(observed):
    t, next_position = len(observation.token_ids_T), request.builder.next_position
    batch.row_R[i] = r
    batch.start_R[i] = request.response_tokens - t
    batch.count_R[i] = request.sampled_tokens
    batch.limit_R[i] = request.sampled_tokens + request.turn_limit
    batch.token_RT[i, :t] = observation.token_ids_T
    batch.position_RTA[i, :t] = observation.position_TA + (
      next_position - observation.next_position
    )
    batch.valid_RT[i, :t] = True
    batch.next_position_R[i] = next_position
    feature_T = np.asarray(batch.feature_RT)[i]
    _write_buffer_rows(feature_T, observation.images, observation.image_start, buffer_rows)
  return batch


def _write_buffer_rows(
  feature_T: np.ndarray,
  images: Sequence[PatchedImage],
  starts: Sequence[int],
  buffer_rows: Mapping[str, np.ndarray],
) -> None:
  """Writes the buffer rows of each image over the positions of its tokens."""
  for image, start in zip(images, starts, strict=True):
    feature_T[start : start + image.tokens] = buffer_rows[image.content_hash]
