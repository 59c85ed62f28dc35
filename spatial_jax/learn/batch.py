"""Rollouts -> TrainBatch: the one place where trajectories become padded rows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from spatial_jax.data.vision import VisionBuckets, bucket, plan_vision
from spatial_jax.types import PatchedImage, TrainBatch, Trajectory, VisionBatch


@dataclasses.dataclass(frozen=True)
class BatchConfig:
  """Static shapes of the update.

  Attributes:
    token_buckets: row lengths, ascending; a batch takes the first that holds its longest row.
    vision: buckets of the vision tower.
    window_blocks: merged tokens along one side of a vision window.
    vocabulary: V.
  """

  token_buckets: tuple[int, ...]
  vision: VisionBuckets
  window_blocks: int
  vocabulary: int


def to_train_batch(
  trajectories: Sequence[Trajectory], advantage_R: np.ndarray, cfg: BatchConfig
) -> tuple[TrainBatch, dict[str, np.ndarray]]:
  """Pads trajectories to rows; each distinct image (by content) is in the vision batch once.

  A trajectory that ended in a fault keeps its row, so that shapes hold, and trains nothing.

  Args:
    trajectories: R of them, group after group.
    advantage_R: float32.
    cfg: static shapes.

  Returns:
    A TrainBatch of NumPy arrays, and where each image's features lie in it, by content hash.

  Raises:
    ValueError: on the host, when a row is longer than the largest bucket (it names the task), or
      when rows were sampled with different ids forbidden.
  """
  if len({trajectory.forbidden_ids for trajectory in trajectories}) != 1:
    raise ValueError("rows of one batch were sampled with different ids forbidden")
  longest = max(trajectories, key=lambda trajectory: len(trajectory.token_ids_T))
  length = bucket(len(longest.token_ids_T), cfg.token_buckets, f"tokens of task {longest.task_id}")
  vision, feature_of = plan_images([t.images for t in trajectories], cfg)
  batch = _empty(trajectories, advantage_R, length, vision, cfg.vocabulary)
  for r, trajectory in enumerate(trajectories):
    t = len(trajectory.token_ids_T)
    batch.token_RT[r, :t] = trajectory.token_ids_T
    batch.position_RTA[r, :t] = trajectory.position_TA
    batch.valid_RT[r, :t] = True
    batch.trained_RT[r, :t] = trajectory.trained_T & (trajectory.end_reason != "fault")
    batch.old_logp_RT[r, :t] = trajectory.logp_T
    for image, start in zip(trajectory.images, trajectory.image_start, strict=True):
      batch.feature_RT[r, start : start + image.tokens] = feature_of[image.content_hash]
  return batch, feature_of


def _empty(
  trajectories: Sequence[Trajectory],
  advantage_R: np.ndarray,
  length: int,
  vision: VisionBatch,
  vocabulary: int,
) -> Any:
  """Rows of padding, in NumPy; what is known per row is filled in."""
  rows = len(trajectories)
  forbidden_V = np.zeros(vocabulary, bool)
  forbidden_V[list(trajectories[0].forbidden_ids)] = True
  return TrainBatch(
    token_RT=np.zeros((rows, length), np.int32),
    position_RTA=np.zeros((rows, length, 3), np.int32),
    valid_RT=np.zeros((rows, length), bool),
    trained_RT=np.zeros((rows, length), bool),
    old_logp_RT=np.zeros((rows, length), np.float32),
    advantage_R=np.asarray(advantage_R, np.float32),
    feature_RT=np.full((rows, length), -1, np.int32),
    temperature_R=np.asarray([t.temperature for t in trajectories], np.float32),
    forbidden_V=forbidden_V,
    vision=vision,
  )


def plan_images(
  images_by_row: Sequence[Sequence[PatchedImage]], cfg: BatchConfig
) -> tuple[VisionBatch, dict[str, np.ndarray]]:
  """The vision batch of all distinct images, and the feature indices of each by content hash."""
  distinct = {image.content_hash: image for images in images_by_row for image in images}
  vision, plan = plan_vision(list(distinct.values()), cfg.window_blocks, cfg.vision)
  return vision, dict(zip(distinct, plan, strict=True))
