"""Prompts, rollouts and observations as NumPy arrays, the inputs of the rollout programs."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from spatial_jax import rng
from spatial_jax.data.vision_packing import bucket
from spatial_jax.rollout.config import RolloutConfig, SamplingParams
from spatial_jax.rollout.conversation import TokenSegment
from spatial_jax.types import Array, Prompt, Prompts, TokenArrays


class PromptBatch(NamedTuple):
  """Padded prompts, each for one slot."""

  slot_B: Array  # int32; a slot >= the number of slots is padding, its results are dropped
  tokens: TokenArrays  # B rows; padding prompts have one valid token
  next_position_B: Array  # int32, rotary position of the token after the prompt


class ObservationBatch(NamedTuple):
  """Padded observations, each for one row of the cache."""

  row_R: Array  # int32; a row >= the number of rows is padding, its results are dropped
  start_R: Array  # int32, tokens of the suffix before the observation
  count_R: Array  # int32, how many of these tokens were sampled
  limit_R: Array  # int32, the next turn ends when the rollout has sampled this number of tokens
  tokens: TokenArrays  # R rows; padding rows have no valid token
  next_position_R: Array  # int32, rotary position of the token after the observation


class SamplingArrays(NamedTuple):
  """How each row samples. All values are arrays, so other values do not recompile."""

  key_R: Array  # typed PRNG keys
  temperature_R: Array  # float32 > 0; log-probabilities are those at this temperature
  greedy_R: Array  # bool, takes the most likely token instead of drawing one
  top_k_R: Array  # int32, only this number of most likely tokens is drawn from; 0: all
  top_p_R: Array  # float32 in (0, 1], probability mass of the nucleus; 1: all
  min_p_R: Array  # float32 in [0, 1), least probability as a fraction of the largest; 0: any
  # int32, the turn ends when the rollout has sampled this number of tokens (`count_R`).
  limit_R: Array


def prompt_batch(
  prompts: Sequence[Prompt],
  slots: Sequence[int],
  buffer_rows: Mapping[str, np.ndarray],
  cfg: RolloutConfig,
) -> PromptBatch:
  """Pads prompts to the inputs of one call of the prefill program.

  Args:
    prompts: at most `cfg.prefill[-1]`.
    buffer_rows: rows of the feature buffer, by content hash of the image.
  """
  count = bucket(len(prompts), cfg.prefill, "prompts")
  longest = max(len(prompt.token_ids_T) for prompt in prompts)
  size = bucket(longest, cfg.prompt_buckets, "tokens in a prompt")
  batch = PromptBatch(
    # Padding prompts have slots that do not exist, so their results are dropped.
    slot_B=np.arange(cfg.slots, cfg.slots + count, dtype=np.int32),
    tokens=_empty_tokens(count, size),
    next_position_B=np.zeros(count, np.int32),
  )
  batch.tokens.valid_RT[:, 0] = True
  for b, (slot, prompt) in enumerate(zip(slots, prompts, strict=True)):
    batch.slot_B[b], batch.next_position_B[b] = slot, prompt.next_position
    _write_row(batch.tokens, b, prompt, prompt.position_TA, buffer_rows)
  return batch


class RowSampling(NamedTuple):
  """How a rollout samples."""

  key_2: np.ndarray  # uint32, data of its key
  turn_limit: int  # limit of its first turn, tokens
  params: SamplingParams  # temperature and truncation


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


class Observed(NamedTuple):
  """An observation that was added to the rollout of a row.

  Attributes:
    row: of the cache.
    segment: its tokens.
    start, limit, next_position: as in `ObservationBatch`.
    sampled: its count_R.
  """

  row: int
  segment: TokenSegment
  start: int
  sampled: int
  limit: int
  next_position: int


def observation_batch(
  observed: Sequence[Observed],
  buffer_rows: Mapping[str, np.ndarray],
  cfg: RolloutConfig,
) -> ObservationBatch:
  """Pads observations to the inputs of one call of the append program.

  Args:
    observed: at most `cfg.append[-1]`.
    buffer_rows, cfg: as in `prompt_batch`.
  """
  count = bucket(len(observed), cfg.append, "observations")
  longest = max(len(one.segment.token_ids_T) for one in observed)
  size = bucket(longest, cfg.observation_buckets, "tokens in an observation")
  zero_R = np.zeros(count, np.int32)
  batch = ObservationBatch(
    # Padding observations have a row that does not exist, so their results are dropped.
    row_R=np.full(count, cfg.row_count, np.int32),
    start_R=zero_R.copy(),
    count_R=zero_R.copy(),
    limit_R=zero_R.copy(),
    tokens=_empty_tokens(count, size),
    next_position_R=zero_R.copy(),
  )
  for i, (row, segment, start, sampled, limit, next_position) in enumerate(observed):
    batch.row_R[i], batch.start_R[i], batch.count_R[i] = row, start, sampled
    batch.limit_R[i], batch.next_position_R[i] = limit, next_position
    position_TA = segment.position_TA + (next_position - segment.next_position)
    _write_row(batch.tokens, i, segment, position_TA, buffer_rows)
  return batch


def _empty_tokens(rows: int, size: int) -> TokenArrays:
  return TokenArrays(
    token_RT=np.zeros((rows, size), np.int32),
    position_RTA=np.zeros((rows, size, 3), np.int32),
    valid_RT=np.zeros((rows, size), bool),
    feature_RT=np.full((rows, size), -1, np.int32),
  )


def _write_row(
  tokens: TokenArrays,
  row: int,
  segment: Prompt | TokenSegment,
  position_TA: np.ndarray,
  buffer_rows: Mapping[str, np.ndarray],
) -> None:
  """Writes the tokens of a prompt or observation into a row."""
  length = len(segment.token_ids_T)
  tokens.token_RT[row, :length] = segment.token_ids_T
  tokens.position_RTA[row, :length] = position_TA
  tokens.valid_RT[row, :length] = True
  feature_T = np.asarray(tokens.feature_RT)[row]
  for image, start in zip(segment.images, segment.image_start, strict=True):
    feature_T[start : start + image.tokens] = buffer_rows[image.content_hash]


# --- sampling keys -------------------------------------------------------------------------------
#
# key of a token = fold_in(stream(seed, "sample"), step, task number, sample index, token index)
#
# A key does not depend on where the task is in the batch, nor on slots, rows or chunks.


def sample_indices(sampling_params: Sequence[SamplingParams]) -> list[int]:
  """Returns the sample index of each rollout of a group, for its key.

  Rollouts with equal parameters are numbered 0, 1, ... and draw different numbers. Rollouts with
  other parameters draw the same numbers again, so that they can be compared.
  """
  params = list(sampling_params)
  return [params[:g].count(one) for g, one in enumerate(params)]


def task_number(prompt: Prompt) -> int:
  """Returns the number of a task in [0, 2^31), a hash of its id."""
  return zlib.crc32(prompt.task.task_id.encode()) & 0x7FFFFFFF


def sampling_keys(
  seed: int, step: int, prompts: Prompts, sample_index: Sequence[int]
) -> np.ndarray:
  """Returns the key data of all rollouts, uint32 [B, G, 2].

  Args:
    sample_index: G indices, from `sample_indices`.
  """
  root = rng.fold(rng.stream(seed, "sample"), step)
  number_B = np.zeros(1 << (len(prompts) - 1).bit_length(), np.int32)  # few sizes, few traces
  number_B[: len(prompts)] = [task_number(prompt) for prompt in prompts]
  return np.asarray(_fold_all(root, number_B, np.asarray(sample_index, np.int32)))[: len(prompts)]


@jax.jit
def _fold_all(root: jax.Array, number_B: jax.Array, sample_index_G: jax.Array) -> jax.Array:
  def one(number: jax.Array, sample_index: jax.Array) -> jax.Array:
    return jax.random.key_data(rng.fold(root, number, sample_index))

  return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(number_B, sample_index_G)
