"""Rollouts -> TrainBatch: the one place where trajectories become padded rows."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

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
  PrefixBatch,
  Rollouts,
  TrainBatch,
  Trajectory,
  VisionBatch,
)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
  """Static shapes of the update.

  Attributes:
    prefix_buckets: lengths of what groups have in common, ascending; a batch takes the first that
      holds its longest.
    tokens: length of what rows have of their own; one, because microbatches are cut to what
      they need.
    vision: buckets of the vision tower.
    window_blocks: merged tokens along one side of a vision window.
    vocabulary: V.
  """

  prefix_buckets: tuple[int, ...]
  tokens: int
  vision: VisionBuckets
  window_blocks: int
  vocabulary: int


class Part(NamedTuple):
  """Some tokens of a trajectory, or of many (then [R, T]), as the update reads them."""

  token_T: Any
  position_TA: Any
  valid_T: Any
  trained_T: Any
  logp_T: Any
  feature_T: Any


_PADDING = Part(token_T=0, position_TA=0, valid_T=False, trained_T=False, logp_T=0, feature_T=-1)


def to_train_batch(
  groups: Rollouts,
  advantage_BG: np.ndarray,
  cfg: BatchConfig,
  kept_BG: np.ndarray | None = None,
  image_features: Mapping[str, np.ndarray] | None = None,
) -> tuple[TrainBatch, dict[str, np.ndarray]]:
  """Pads trajectories to rows; each distinct image (by content) is in the vision batch once.

  A trajectory that ended in a fault trains nothing; where it has a row, that shapes may hold.

  Args:
    groups: B of G trajectories each: the rollouts of one prompt, or any about the same images. As
      far as the prompts of a group agree they are run once.
    advantage_BG: float32.
    cfg: static shapes.
    kept_BG: bool, the rollouts that become rows; None: all.
    known: features of each image, by content hash, that take the place of its pixels.

  Returns:
    A TrainBatch of NumPy arrays, and where each image's features lie in it, by content hash.

  Raises:
    DataError: on the host, when a part is longer than its largest bucket (it names the task).
    ValueError: on the host, when groups are not equally large, or when rows were sampled with
      different ids forbidden.
  """
  kept_BG = np.ones(advantage_BG.shape, bool) if kept_BG is None else kept_BG
  kept, seen = _kept(groups, kept_BG)
  rows = [trajectory for group in kept for trajectory in group]
  vision, feature_of = _look(seen, image_features, cfg)
  prefixes, own = _split(seen, feature_of)
  own = [part for group, parts in zip(kept, own, strict=True) for part in parts[: len(group)]]
  prefix = _pad(prefixes, cfg.prefix_buckets, "prompt tokens", [group[0] for group in seen])
  part = _pad(own, (cfg.tokens,), "response tokens", rows)
  return TrainBatch(
    prefix=PrefixBatch(prefix.token_T, prefix.position_TA, prefix.valid_T, prefix.feature_T),
    prompt_R=np.nonzero(kept_BG)[0].astype(np.int32),
    token_RT=part.token_T,
    position_RTA=part.position_TA,
    valid_RT=part.valid_T,
    trained_RT=part.trained_T,
    old_logp_RT=part.logp_T,
    advantage_R=np.asarray(advantage_BG, np.float32)[kept_BG],
    feature_RT=part.feature_T,
    temperature_R=np.asarray([trajectory.temperature for trajectory in rows], np.float32),
    forbidden_V=_forbidden(rows, cfg.vocabulary),
    vision=vision,
  ), feature_of


def downsample_rollouts(advantage_BG: np.ndarray, keep_fraction: float, blocks: int) -> np.ndarray:
  """Which rollouts to learn from: those that say most, since an update costs more than they did.

  Half of a step's rollouts hold nearly all of its squared advantages; the gradient of the others
  is small.

  Args:
    advantage_BG: float32, 0 for faults.
    keep_fraction: of the rollouts, in (0, 1].
    blocks: equal runs of prompts, each of which keeps as many; divides B.

  Returns:
    bool [B, G]; of equally large advantages, the first.

  Source: Xu et al., "Not All Rollouts are Useful" (arXiv:2504.13818): there rewards of largest
  variance within each group; here advantages of largest size over all, which skips dull groups.
  """
  size_NR = np.abs(advantage_BG).reshape(blocks, -1)
  count = kept_rows(size_NR.size, keep_fraction, blocks) // blocks
  kept_NR = np.zeros(size_NR.shape, bool)
  np.put_along_axis(kept_NR, np.argsort(-size_NR, axis=1, kind="stable")[:, :count], True, axis=1)
  return kept_NR.reshape(advantage_BG.shape)


def kept_rows(rollouts: int, keep_fraction: float, blocks: int) -> int:
  """How many rollouts `downsample_rollouts` keeps."""
  return math.ceil(keep_fraction * (rollouts // blocks)) * blocks


def plan_images(
  images_by_row: Sequence[Sequence[PatchedImage]], cfg: BatchConfig
) -> tuple[VisionBatch, dict[str, np.ndarray]]:
  """The vision batch of all distinct images, and the feature indices of each by content hash."""
  images = distinct(images_by_row)
  vision, plan = plan_vision(list(images.values()), cfg.window_blocks, cfg.vision)
  return vision, dict(zip(images, plan, strict=True))


def _look(
  groups: Rollouts, image_features: Mapping[str, np.ndarray] | None, cfg: BatchConfig
) -> tuple[VisionBatch | FeatureBatch, dict[str, np.ndarray]]:
  """`plan_images` of the rollouts, or what is known of their images."""
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


def _kept(groups: Rollouts, kept_BG: np.ndarray) -> tuple[Rollouts, Rollouts]:
  """The rollouts that become rows, and those whose prefix and images the batch holds."""
  if {len(group) for group in groups} != {kept_BG.shape[1]}:
    raise ValueError(f"advantages {kept_BG.shape} for groups of {[len(g) for g in groups]}")
  kept = [list(itertools.compress(*pair)) for pair in zip(groups, kept_BG, strict=True)]
  # A prompt without rows has a prefix all the same: one of its rollouts shows it.
  return kept, [group or all_of[:1] for group, all_of in zip(kept, groups, strict=True)]


def _forbidden(rows: Sequence[Trajectory], vocabulary: int) -> np.ndarray:
  """bool [V], what none of the rows could sample."""
  if len({trajectory.forbidden_ids for trajectory in rows}) != 1:
    raise ValueError("rows of one batch were sampled with different ids forbidden")
  forbidden_V = np.zeros(vocabulary, bool)
  forbidden_V[list(rows[0].forbidden_ids)] = True
  return forbidden_V


def _split(
  groups: Rollouts, feature_of: Mapping[str, np.ndarray]
) -> tuple[list[Part], list[list[Part]]]:
  """What each group has in common, and what each of its rows has of its own."""
  prefixes: list[Part] = []
  own: list[list[Part]] = []
  for group in groups:
    parts = [_part(trajectory, feature_of) for trajectory in group]
    shared = _common_length(parts, min(trajectory.prompt_length for trajectory in group) - 1)
    prefixes.append(_cut(parts[0], 0, shared))
    own.append([_cut(part, shared, None) for part in parts])
  return prefixes, own


def _part(trajectory: Trajectory, feature_of: Mapping[str, np.ndarray]) -> Part:
  """All tokens of a trajectory."""
  count = len(trajectory.token_ids_T)
  feature_T = np.full(count, -1, np.int32)
  for image, start in zip(trajectory.images, trajectory.image_start, strict=True):
    feature_T[start : start + image.tokens] = feature_of[image.content_hash]
  return Part(
    token_T=trajectory.token_ids_T,
    position_TA=trajectory.position_TA,
    valid_T=np.ones(count, bool),
    trained_T=trajectory.trained_T & (trajectory.end_reason != "fault"),
    logp_T=trajectory.logp_T,
    feature_T=feature_T,
  )


def _common_length(parts: Sequence[Part], limit: int) -> int:
  """How many tokens in front, at most `limit`, are the same to the policy in all parts."""
  first = _cut(parts[0], 0, limit)
  same_T = np.ones(limit, bool)
  for part in parts:
    same_T &= part.token_T[:limit] == first.token_T
    same_T &= (part.position_TA[:limit] == first.position_TA).all(axis=1)
    same_T &= part.feature_T[:limit] == first.feature_T
  return int(np.logical_and.accumulate(same_T).sum())


def _cut(part: Part, start: int, end: int | None) -> Part:
  return Part(*(values[start:end] for values in part))


def _pad(
  parts: Sequence[Part], buckets: Sequence[int], name: str, trajectories: Sequence[Trajectory]
) -> Part:
  """Parts as rows of one array per field, as long as the first bucket that holds the longest."""
  lengths = [len(part.token_T) for part in parts]
  longest = trajectories[int(np.argmax(lengths))].task_id
  size = bucket(max(lengths), buckets, f"{name} of task {longest}")

  def rows(values: Sequence[np.ndarray], padding: Any) -> np.ndarray:
    padded = np.full((len(parts), size, *values[0].shape[1:]), padding, values[0].dtype)
    for row, value in zip(padded, values, strict=True):
      row[: len(value)] = value
    return padded

  return Part(*map(rows, zip(*parts, strict=True), _PADDING))
