"""Trajectories -> PackedBatch: several whole sequences in a row, for SFT and DPO.

    row 0    | sequence 0 ............... | sequence 3 ..... | padding |
    row 1    | sequence 1 .......... | sequence 2 ..... | padding ..... |

Tokens attend to their own sequence. GRPO shares the prefix of a group instead (`train_batch`).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from spatial_jax.checks import is_ascending, is_whole
from spatial_jax.config import check_field
from spatial_jax.data.vision_packing import VisionBuckets, bucket, first_fit
from spatial_jax.learn.train_batch import (
  BatchConfig,
  forbidden_tokens,
  pack_images,
  sequence_tokens,
)
from spatial_jax.types import PackedBatch, PackedRows, TokenArrays, Trajectory

_RANDOM_BATCHES = 16  # of measured lengths


@dataclasses.dataclass(frozen=True)
class PackConfig:
  """Static shapes of packed rows."""

  tokens: int  # length of a row; the longest sequence fits
  rows: tuple[int, ...]  # numbers of rows, ascending; a batch has the first that holds it
  pack: bool  # False: one sequence per row
  vision: VisionBuckets
  window_blocks: int  # merged tokens along one side of a vision window
  vocabulary: int  # V

  def __post_init__(self):
    check_field(self, "tokens", is_whole(self.tokens, 2), "be a whole number, at least 2")
    check_field(self, "rows", is_ascending(self.rows, 1), "be ascending, from 1 on")
    check_field(self, "pack", isinstance(self.pack, bool), "be True or False")

  @property
  def images(self) -> BatchConfig:
    """The part that says how images are packed."""
    return BatchConfig((1,), 2, self.vision, self.window_blocks, self.vocabulary)


def to_packed_batch(
  trajectories: Sequence[Trajectory],
  weight_N: Sequence[float] | np.ndarray,
  cfg: PackConfig,
  image_features: Mapping[str, np.ndarray] | None = None,
) -> PackedBatch:
  """Packs whole trajectories into rows; the vision batch contains each distinct image once.

  Args:
    trajectories: N sequences.
    weight_N: weight of each trained token of a sequence, from `sequence_weights`.
    cfg: static shapes.
    image_features: content hash -> features, which then replace the pixels of the images.

  Returns:
    NumPy arrays.

  Raises:
    DataError: if a sequence is longer than a row, or there are more rows than the largest bucket.
  """
  vision, feature_of = pack_images([list(trajectories)], image_features, cfg.images)
  lengths = [len(t.token_ids_T) for t in trajectories]
  longest = int(np.argmax(lengths))
  bucket(lengths[longest], (cfg.tokens,), f"tokens of task {trajectories[longest].task_id}")
  placed = rows_of(lengths, cfg.tokens if cfg.pack else 0)
  count = bucket(len(placed), cfg.rows, "rows of demonstrations")
  shape = (count, cfg.tokens)
  tokens = _no_tokens(shape)
  trained_RT, sequence_RT = np.zeros(shape, bool), np.zeros(shape, np.int32)
  weight_RT = np.zeros(shape, np.float32)
  for row, members in enumerate(placed):
    start = 0
    for segment, n in enumerate(members, 1):
      one = sequence_tokens(trajectories[n], feature_of)
      place = (row, slice(start, start + len(one.trained)))
      tokens.token_RT[place] = one.tokens.token_RT
      tokens.position_RTA[place] = one.tokens.position_RTA
      tokens.valid_RT[place] = segment
      tokens.feature_RT[place] = one.tokens.feature_RT
      trained_RT[place], sequence_RT[place] = one.trained, n
      weight_RT[place] = np.where(one.trained, weight_N[n], 0)
      start += len(one.trained)
  return PackedBatch(
    rows=PackedRows(tokens, trained_RT, sequence_RT, weight_RT),
    forbidden_V=forbidden_tokens(trajectories, cfg.vocabulary),
    vision=vision,
  )


def _no_tokens(shape: tuple[int, int]) -> TokenArrays:
  """Padding alone."""
  return TokenArrays(
    token_RT=np.zeros(shape, np.int32),
    position_RTA=np.zeros((*shape, 3), np.int32),
    valid_RT=np.zeros(shape, np.int32),
    feature_RT=np.full(shape, -1, np.int32),
  )


def rows_of(lengths: Sequence[int], size: int) -> list[list[int]]:
  """Indices of the sequences of each row, in their order in the row, see `first_fit`.

  `size` is the length of a row; 0: every sequence has its own row.
  """
  places, count = first_fit(lengths, size)
  rows: list[list[int]] = [[] for _ in range(count)]
  for n in sorted(range(len(lengths)), key=lambda n: places[n][1]):
    rows[places[n][0]].append(n)
  return rows


def sequence_weights(trajectories: Sequence[Trajectory], by_token: bool) -> np.ndarray:
  """The weight of a trained token of each sequence; the weights of all tokens sum to 1.

  Args:
    by_token: every token counts the same; else every sequence does.

  Returns:
    float32 [N].
  """
  tokens_N = np.array([t.trained_T.sum() for t in trajectories], np.float64)
  if by_token:
    return np.full(len(tokens_N), 1 / max(tokens_N.sum(), 1), np.float32)
  return (1 / (len(tokens_N) * np.maximum(tokens_N, 1))).astype(np.float32)


def row_buckets(
  sequences: int, lengths: Sequence[int], longest: int, tokens: int, multiple: int
) -> tuple[int, ...]:
  """Numbers of rows that batches of demonstrations need: a usual one, and the largest possible.

  Args:
    sequences: in a batch.
    lengths: of some sequences, tokens; the usual number is the largest of random batches of them.
    longest: length that is allowed for, tokens.
    tokens: length of a row.
    multiple: devices that rows are sharded over, and rows of a microbatch.
  """
  rng = np.random.default_rng(0)
  batches = [rng.choice(lengths, sequences).tolist() for _ in range(_RANDOM_BATCHES)]
  usual = max(len(rows_of(batch, tokens)) for batch in batches)
  most = -(-sequences // max(1, tokens // longest))
  return tuple(sorted({-(-count // multiple) * multiple for count in (usual, most)}))
