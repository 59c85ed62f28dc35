"""Rollouts -> TrainBatch: the only place where trajectories become padded rows."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from spatial_jax.checks import is_ascending, is_whole
from spatial_jax.config import check_field
from spatial_jax.data.vision_packing import (
  VisionBuckets,
  bucket,
  distinct,
  pack_features,
  plan_vision,
)
from spatial_jax.errors import DataError
from spatial_jax.types import (
  FeatureBatch,
  PatchedImage,
  Rollouts,
  TokenArrays,
  TrainBatch,
  TrainRows,
  Trajectory,
  VisionBatch,
)

# One value per rollout: an array [B, G], or a list per group if groups differ in size.
PerRollout = np.ndarray | Sequence[Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Microbatches:
  """How rows are divided into microbatches; static."""

  # At most this number of rows per device in a microbatch; the greatest common divisor of it and
  # the number of rows per device is used.
  rows: int
  # Tokens, ascending. A microbatch is truncated to the first length that holds its longest row, so
  # that one long response does not make all rows long; the last must hold every row. The decoder is
  # compiled once per length, within one program.
  lengths: tuple[int, ...]

  def __post_init__(self):
    check_field(self, "rows", is_whole(self.rows, 1), "be a whole number, at least 1")
    check_field(self, "lengths", is_ascending(self.lengths, 1), "be ascending, from 1 on")


@dataclasses.dataclass(frozen=True)
class BatchConfig:
  """Static shapes of the update."""

  # Padded lengths of prefixes, ascending; a batch has the first that holds its longest prefix.
  prefix_buckets: tuple[int, ...]
  tokens: int  # padded length of rows; one length, because microbatches are truncated
  vision: VisionBuckets  # buckets of the vision tower
  window_blocks: int  # merged tokens along one side of a vision window
  vocabulary: int  # V

  def __post_init__(self):
    valid = is_ascending(self.prefix_buckets, 1)
    check_field(self, "prefix_buckets", valid, "be ascending, from 1 on")
    for name, least in (("tokens", 2), ("window_blocks", 1), ("vocabulary", 1)):
      valid = is_whole(vars(self)[name], least)
      check_field(self, name, valid, f"be a whole number, at least {least}")


class SequenceTokens(NamedTuple):
  """Some tokens of a trajectory (fields [T, ...]), or of many (fields [R, T, ...])."""

  tokens: TokenArrays
  trained: Any
  logp: Any


_ZERO, _NONE = np.array(0), np.array(-1)
_PADDING = SequenceTokens(
  TokenArrays(token_RT=_ZERO, position_RTA=_ZERO, valid_RT=np.array(False), feature_RT=_NONE),
  trained=np.array(False),
  logp=_ZERO,
)


def to_train_batch(
  groups: Rollouts,
  advantage_BG: PerRollout | None,
  cfg: BatchConfig,
  kept_BG: PerRollout | None = None,
  image_features: Mapping[str, np.ndarray] | None = None,
  weight_BG: PerRollout | None = None,
) -> tuple[TrainBatch, dict[str, np.ndarray]]:
  """Pads trajectories to rows; the vision batch contains each distinct image once.

  Args:
    groups: B groups, of rollouts of one prompt or of any trajectories about the same images. The
      common part of their prompts is computed once. A fault becomes a row that trains nothing.
    advantage_BG: float32; None: 0.
    cfg: static shapes.
    kept_BG: bool, whether a trajectory becomes a row; None: all do.
    image_features: content hash -> features, which then replace the pixels of the images.
    weight_BG: float32 >= 0, how much a trajectory counts in the loss; None: 1.

  Returns:
    A TrainBatch of NumPy arrays, and content hash -> indices of the features of each image.

  Raises:
    DataError: if a prefix or a row is longer than its largest bucket.
    ValueError: if values do not fit the groups, or a group or the batch is empty.
  """
  kept_R, kept, shown = _kept(groups, kept_BG)
  vision, feature_of = pack_images(shown, image_features, cfg)
  prefixes, suffixes = _split_at_prefix(shown, kept, feature_of)
  rows = list(itertools.chain(*kept))
  suffix = _pad(suffixes, (cfg.tokens,), "response tokens", rows)
  group_R = np.repeat(np.arange(len(groups)), [len(group) for group in kept]).astype(np.int32)
  return TrainBatch(
    prefix=_pad(prefixes, cfg.prefix_buckets, "prompt tokens", [g[0] for g in shown]).tokens,
    rows=TrainRows(
      tokens=suffix.tokens,
      trained_RT=suffix.trained,
      old_logp_RT=suffix.logp,
      advantage_R=_flat("advantage_BG", advantage_BG, groups, 0, np.float32)[kept_R],
      temperature_R=np.asarray([trajectory.temperature for trajectory in rows], np.float32),
      prefix_R=group_R,
      group_R=group_R,
      weight_R=_weights(weight_BG, groups)[kept_R],
    ),
    forbidden_V=forbidden_tokens(rows, cfg.vocabulary),
    vision=vision,
  ), feature_of


def downsample_rollouts(advantage_BG: np.ndarray, keep_fraction: float, blocks: int) -> np.ndarray:
  """Selects the rollouts with the largest absolute advantages.

  Half of the rollouts of a step hold nearly all of its squared advantages; the others contribute
  little to the gradient.

  Args:
    advantage_BG: float32, 0 for faults.
    keep_fraction: of the rollouts, in (0, 1].
    blocks: equal runs of prompts, each of which keeps the same number; divides B.

  Returns:
    bool [B, G]; of equally large advantages, the first are selected.

  Source: Xu et al., "Not All Rollouts are Useful" (arXiv:2504.13818), which selects the rewards of
  largest variance within each group; here the largest advantages over all groups are selected,
  which skips groups without differences.
  """
  size_NR = np.abs(advantage_BG).reshape(blocks, -1)
  count = kept_rows(size_NR.size, keep_fraction, blocks) // blocks
  kept_NR = np.zeros(size_NR.shape, bool)
  np.put_along_axis(kept_NR, np.argsort(-size_NR, axis=1, kind="stable")[:, :count], True, axis=1)
  return kept_NR.reshape(advantage_BG.shape)


def kept_rows(rollouts: int, keep_fraction: float, blocks: int) -> int:
  """The number of rollouts that `downsample_rollouts` selects."""
  return math.ceil(keep_fraction * (rollouts // blocks)) * blocks


def plan_images(
  images_by_row: Sequence[Sequence[PatchedImage]], cfg: BatchConfig
) -> tuple[VisionBatch, dict[str, np.ndarray]]:
  """The vision batch of all distinct images, and content hash -> feature indices."""
  images = distinct(images_by_row)
  vision, plan = plan_vision(list(images.values()), cfg.window_blocks, cfg.vision)
  return vision, dict(zip(images, plan, strict=True))


def pack_images(
  groups: Rollouts, image_features: Mapping[str, np.ndarray] | None, cfg: BatchConfig
) -> tuple[VisionBatch | FeatureBatch, dict[str, np.ndarray]]:
  """`plan_images` of the rollouts, or the given features of their images in the same form."""
  images_by_row = [trajectory.images for group in groups for trajectory in group]
  try:
    if image_features is None:
      return plan_images(images_by_row, cfg)
    images = distinct(images_by_row)
    packed = pack_features(list(images.values()), image_features, cfg.window_blocks, cfg.vision)
  except DataError as error:
    if not any(images_by_row):
      raise
    raise DataError(f"the images of this step: {error}; raise config.learn.vision") from error
  return FeatureBatch(packed[0]), dict(zip(images, packed[1], strict=True))


def _flat(
  name: str, values: PerRollout | None, groups: Rollouts, default: Any, dtype: Any
) -> np.ndarray:
  """One value per trajectory, in the order of the groups."""
  sizes = [len(group) for group in groups]
  if values is None:
    return np.full(sum(sizes), default, dtype)
  if [len(of_group) for of_group in values] != sizes:
    raise ValueError(f"{name} has {[len(v) for v in values]} values for groups of {sizes}")
  return np.concatenate([np.asarray(of_group, dtype) for of_group in values])


def _weights(weight_BG: PerRollout | None, groups: Rollouts) -> np.ndarray:
  weight_R = _flat("weight_BG", weight_BG, groups, 1, np.float32)
  if not (np.isfinite(weight_R) & (weight_R >= 0)).all():
    raise ValueError("weight_BG must be finite and at least 0")
  return weight_R


def _kept(groups: Rollouts, kept_BG: PerRollout | None) -> tuple[np.ndarray, Rollouts, Rollouts]:
  """Which trajectories become rows; these; and those whose prefix and images the batch contains."""
  for number, group in enumerate(groups):
    if not group:
      raise ValueError(f"group {number} has no trajectories; leave it out")
  kept_R = _flat("kept_BG", kept_BG, groups, True, bool)
  if not kept_R.any():
    raise ValueError("the batch has no rows: kept_BG is false for every trajectory")
  ends = np.cumsum([len(group) for group in groups])[:-1]
  pairs = zip(groups, np.split(kept_R, ends), strict=True)
  kept = [list(itertools.compress(group, keep)) for group, keep in pairs]
  # A group without rows has a prefix too, that of its first trajectory: prefixes stay in order.
  return kept_R, kept, [rows or group[:1] for rows, group in zip(kept, groups, strict=True)]


def forbidden_tokens(rows: Sequence[Trajectory], vocabulary: int) -> np.ndarray:
  """bool [V], the ids that were forbidden for all rows."""
  if len({trajectory.forbidden_ids for trajectory in rows}) != 1:
    raise ValueError("the rows of a batch were sampled with different forbidden ids")
  forbidden_V = np.zeros(vocabulary, bool)
  forbidden_V[list(rows[0].forbidden_ids)] = True
  return forbidden_V


def _split_at_prefix(
  shown: Rollouts, kept: Rollouts, feature_of: Mapping[str, np.ndarray]
) -> tuple[list[SequenceTokens], list[SequenceTokens]]:
  """The common part of each group, and the rest of each trajectory that becomes a row."""
  prefixes: list[SequenceTokens] = []
  suffixes: list[SequenceTokens] = []
  for group, rows in zip(shown, kept, strict=True):
    sequences = [sequence_tokens(trajectory, feature_of) for trajectory in group]
    shared = _common_length(sequences, min(trajectory.prompt_length for trajectory in group) - 1)
    prefixes.append(_slice(sequences[0], 0, shared))
    suffixes += [_slice(sequence, shared, None) for sequence in sequences[: len(rows)]]
  return prefixes, suffixes


def sequence_tokens(trajectory: Trajectory, feature_of: Mapping[str, np.ndarray]) -> SequenceTokens:
  """All tokens of a trajectory."""
  count = len(trajectory.token_ids_T)
  feature_T = np.full(count, -1, np.int32)
  for image, start in zip(trajectory.images, trajectory.image_start, strict=True):
    feature_T[start : start + image.tokens] = feature_of[image.content_hash]
  return SequenceTokens(
    TokenArrays(
      token_RT=trajectory.token_ids_T,
      position_RTA=trajectory.position_TA,
      valid_RT=np.ones(count, bool),
      feature_RT=feature_T,
    ),
    trained=trajectory.trained_T & (trajectory.end_reason != "fault"),
    logp=trajectory.logp_T,
  )


def _common_length(sequences: Sequence[SequenceTokens], limit: int) -> int:
  """The number of first tokens, at most `limit`, that are the same for the policy in all."""
  first = _slice(sequences[0], 0, limit).tokens
  same_T = np.ones(limit, bool)
  for sequence in sequences:
    tokens = _slice(sequence, 0, limit).tokens
    same_T &= tokens.token_RT == first.token_RT
    same_T &= (tokens.position_RTA == first.position_RTA).all(axis=1)
    same_T &= tokens.feature_RT == first.feature_RT
  return int(np.logical_and.accumulate(same_T).sum())


def _slice(sequence: SequenceTokens, start: int, end: int | None) -> SequenceTokens:
  return jax.tree.map(lambda x: x[start:end], sequence)


def _pad(
  sequences: Sequence[SequenceTokens],
  buckets: Sequence[int],
  name: str,
  trajectories: Sequence[Trajectory],
) -> SequenceTokens:
  """Sequences as rows of one array per field, padded to the first bucket that holds the longest."""
  lengths = [len(sequence.trained) for sequence in sequences]
  longest = trajectories[int(np.argmax(lengths))].task_id
  size = bucket(max(lengths), buckets, f"{name} of task {longest}")

  def pad(padding: Any, *values: np.ndarray) -> np.ndarray:
    padded = np.full((len(values), size, *values[0].shape[1:]), padding, values[0].dtype)
    for row, value in zip(padded, values, strict=True):
      row[: len(value)] = value
    return padded

  return jax.tree.map(pad, _PADDING, *sequences)
