"""Prompts, rollouts and observations as the arrays that a program reads, NumPy on the host."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spatial_jax.data.vision_packing import bucket
from spatial_jax.rollout.config import SamplingParams
from spatial_jax.rollout.conversation import TokenSegment
from spatial_jax.rollout.device import ObservationBatch, PromptBatch
from spatial_jax.rollout.request import Row
from spatial_jax.rollout.sampling import SamplingArrays
from spatial_jax.types import PatchedImage, Prompt


def prompt_batch(
  prompts: Sequence[Prompt],
  slots: Sequence[int],
  feature_of: Mapping[str, np.ndarray],
  counts: Sequence[int],
  all_slots: int,
  buckets: Sequence[int],
) -> PromptBatch:
  """Prompts for some slots.

  Args:
    prompts, slots: at most `counts[-1]` of each.
    feature_of: rows of the pool, by content hash.
    counts: ascending, rows of the batch.
    all_slots: how many there are: padding rows are for slots behind them.
    buckets: padded lengths.
  """
  count = bucket(len(prompts), counts, "prompts")
  size = bucket(max(len(p.token_ids_T) for p in prompts), buckets, "tokens in a prompt")
  batch = PromptBatch(
    slot_B=np.arange(all_slots, all_slots + count, dtype=np.int32),
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
    _point(np.asarray(batch.feature_BT)[b], prompt.images, prompt.image_start, feature_of)
  return batch


class RowSampling(NamedTuple):
  """How a rollout samples: data of its key uint32 [2], most tokens of its first turn, mode."""

  key_2: np.ndarray
  limit: int
  mode: SamplingParams


def sampling_batch(samplings: Sequence[RowSampling | None]) -> SamplingArrays:
  """Of each row; None where it does not matter."""
  there = [one for one in samplings if one is not None]
  filled = [there[0] if one is None else one for one in samplings]
  sampling_params = [one.mode for one in filled]

  def each(values: Iterable[float], dtype: type[np.generic]) -> np.ndarray:
    return np.array(list(values), dtype)

  return SamplingArrays(
    key_R2=np.stack([one.key_2 for one in filled]),
    temperature_R=each((1.0 if m.greedy else m.temperature for m in sampling_params), np.float32),
    greedy_R=each((m.greedy for m in sampling_params), np.bool_),
    top_k_R=each((m.top_k for m in sampling_params), np.int32),
    top_p_R=each((m.top_p for m in sampling_params), np.float32),
    min_p_R=each((m.min_p for m in sampling_params), np.float32),
    limit_R=each((one.limit for one in filled), np.int32),
  )


def observation_batch(
  observed: Sequence[tuple[int, Row, TokenSegment]],
  feature_of: Mapping[str, np.ndarray],
  counts: Sequence[int],
  all_rows: int,
  buckets: Sequence[int],
) -> ObservationBatch:
  """What some rows of the cache look at, behind what they said.

  Args:
    observed: (row of the cache, its rollout, the observation that was added to it), at most
      `counts[-1]`.
    feature_of, counts, all_rows, buckets: as in `prompt_batch`.
  """
  count = bucket(len(observed), counts, "observations")
  longest = max(len(piece.token_ids_T) for _, _, piece in observed)
  size = bucket(longest, buckets, "tokens in an observation")
  zero_R = np.zeros(count, np.int32)
  batch = ObservationBatch(
    row_R=np.full(count, all_rows, np.int32),
    start_R=zero_R.copy(),
    count_R=zero_R.copy(),
    limit_R=zero_R.copy(),
    token_RT=np.zeros((count, size), np.int32),
    position_RTA=np.zeros((count, size, 3), np.int32),
    valid_RT=np.zeros((count, size), bool),
    feature_RT=np.full((count, size), -1, np.int32),
    next_position_R=zero_R.copy(),
  )
  for i, (r, row, piece) in enumerate(observed):
    t, following = len(piece.token_ids_T), row.episode.next_position
    batch.row_R[i] = r
    batch.start_R[i] = row.tokens - t
    batch.count_R[i] = row.sampled
    batch.limit_R[i] = row.sampled + row.limit
    batch.token_RT[i, :t] = piece.token_ids_T
    batch.position_RTA[i, :t] = piece.position_TA + (following - piece.next_position)
    batch.valid_RT[i, :t] = True
    batch.next_position_R[i] = following
    _point(np.asarray(batch.feature_RT)[i], piece.images, piece.image_start, feature_of)
  return batch


def _point(
  feature_T: np.ndarray,
  images: Sequence[PatchedImage],
  starts: Sequence[int],
  feature_of: Mapping[str, np.ndarray],
) -> None:
  """Writes where the features of each image's tokens lie."""
  for image, start in zip(images, starts, strict=True):
    feature_T[start : start + image.tokens] = feature_of[image.content_hash]
