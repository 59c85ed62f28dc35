"""Image features of one call of `generate_rollouts`: an image is encoded once while it is kept.

image ──content hash──► in the feature buffer? ──no──► vision tower ──► rows of feature_buffer_MYD
"""

from collections.abc import Collection, Sequence

import numpy as np

from spatial_jax.data.vision_packing import (
  VisionBuckets,
  bucket,
  distinct,
  plan_vision,
  window_layout,
)
from spatial_jax.drawing.termination import StopLimits
from spatial_jax.errors import DataError
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.engine import RolloutPrograms
from spatial_jax.rollout.profiling import Timeline
from spatial_jax.types import Params, PatchedImage, Prompt

# [tokens, Y, D] of images that one vision tower encoded, by content hash.
ImageFeatures = dict[str, np.ndarray]


class ImageFeatureCache:
  """The feature buffer on the devices; when it is full, the least recently used images leave.

  Attributes:
    feature_buffer_MYD: features; rows that no image has are arbitrary.
    requested, encoded: number of images that were asked for, and that the vision tower encoded.
  """

  def __init__(
    self,
    programs: RolloutPrograms,
    params: Params,
    window_blocks: int,
    buckets: VisionBuckets,
    image_features: ImageFeatures | None,
    timeline: Timeline,
  ):
    """Allocates an empty buffer.

    Args:
      window_blocks, buckets: as in `plan_vision`.
      image_features: filled with the features of every encoded image; None: they are not kept.
    """
    self.feature_buffer_MYD = programs.empty_feature_buffer()
    self.requested = self.encoded = 0
    self._programs, self._params = programs, params
    self._window_blocks, self._buckets = window_blocks, buckets
    self._image_features, self._timeline = image_features, timeline
    self._rows: dict[str, np.ndarray] = {}  # the least recently used image is first
    self._free = list(range(self.feature_buffer_MYD.shape[0]))

  def encode(self, images_by_row: Sequence[Sequence[PatchedImage]]) -> dict[str, np.ndarray]:
    """Encodes images that are not in the buffer yet.

    Args:
      images_by_row: images of each prompt or observation; together they must fit into the buffer
        (see `count_fitting`).

    Returns:
      Buffer rows of the tokens of each image, in token order, by content hash. They are valid until
      the next call.
    """
    images = distinct(images_by_row)
    self.requested += sum(len(images) for images in images_by_row)
    for name in images:
      if name in self._rows:
        self._rows[name] = self._rows.pop(name)
    missing = [image for name, image in images.items() if name not in self._rows]
    self.encoded += len(missing)
    self._make_room(sum(image.tokens for image in missing), images.keys())
    for image in missing:
      self._rows[image.content_hash] = np.asarray(
        [self._free.pop() for _ in range(image.tokens)], np.int32
      )
    for batch in self._split_by_bucket(missing):
      vision, plan = plan_vision(batch, self._window_blocks, self._buckets)
      size = self.feature_buffer_MYD.shape[0]
      buffer_row_M = np.full(vision.window_P.shape[0] // 4, size, np.int32)
      for image, feature_indices in zip(batch, plan, strict=True):
        buffer_row_M[feature_indices] = self._rows[image.content_hash]
      self.feature_buffer_MYD, ready_token = self._programs.encode_images(
        self._params, self.feature_buffer_MYD, vision, buffer_row_M
      )
      tokens = sum(image.tokens for image in batch)
      self._timeline.submitted("encode_images", ready_token, tokens, len(buffer_row_M))
    return {name: self._rows[name] for name in images}

  def collect_features(self) -> None:
    """Copies the features in the buffer to `image_features`."""
    kept = self._image_features
    if kept is not None and self._rows.keys() - kept.keys():
      feature_buffer_MYD = np.asarray(self.feature_buffer_MYD)
      kept |= {name: feature_buffer_MYD[rows] for name, rows in self._rows.items()}

  def _make_room(self, tokens: int, needed: Collection[str]) -> None:
    if len(self._free) < tokens:
      # One copy of the whole buffer: gathering the rows of each image would compile a program.
      self.collect_features()
    while len(self._free) < tokens:
      oldest = next(name for name in self._rows if name not in needed)
      self._free += self._rows.pop(oldest).tolist()

  def _split_by_bucket(self, images: Sequence[PatchedImage]) -> list[list[PatchedImage]]:
    """Consecutive images, in batches that the largest buckets of the vision tower hold."""
    batches: list[list[PatchedImage]] = []
    frames = windows = 0
    for image in images:
      t, w = image.grid_3[0], window_layout(image.grid_3, self._window_blocks).slots
      frames, windows = frames + t, windows + w
      if not batches or frames > self._buckets.frames[-1] or windows > self._buckets.windows[-1]:
        batches.append([])
        frames, windows = t, w
      batches[-1].append(image)
    return batches


def count_fitting(images_by_row: Sequence[Sequence[PatchedImage]], buffer_tokens: int) -> int:
  """Returns how many rows, from the first, have images that fit into the buffer together."""
  names, tokens = set(), 0
  for count, images in enumerate(images_by_row):
    sizes = {image.content_hash: image.tokens for image in images}
    tokens += sum(size for name, size in sizes.items() if name not in names)
    names |= sizes.keys()
    if tokens > buffer_tokens:
      return count
  return len(images_by_row)


def check_room(prompt: Prompt, cfg: RolloutConfig, window_blocks: int) -> None:
  """Checks that the images of a prompt, and all that can be drawn on them, fit the config.

  Raises:
    DataError: if they do not; the message names the task and the key to raise.
  """
  where, buckets = f"of {prompt.task.task_id}; raise config.rollout", cfg.vision
  for image in prompt.images:
    time, height, width = image.grid_3
    windows = window_layout(image.grid_3, window_blocks).slots
    bucket(time, buckets.frames, f"frames in an image {where}.vision.frames: they")
    bucket(windows, buckets.windows, f"windows in an image {where}.vision.windows: they")
    bucket(height * width, buckets.patches, f"patches in a frame {where}.vision.patches: they")
  shown = sum(image.tokens for image in prompt.images)
  drawn = max_drawn_tokens(prompt.images, cfg.stop) if prompt.grammar.draws else 0
  if max(shown, drawn) > cfg.feature_buffer_tokens:
    raise DataError(
      f"{shown} visual tokens in the prompt and up to {drawn} in drawn images "
      f"{where}.feature_buffer_tokens: it is {cfg.feature_buffer_tokens}"
    )
  if drawn:
    name = f"tokens of a drawn image {where}.observation_buckets: they"
    # The text of the observation is not counted here; <|vision_start|> and <|vision_end|> are.
    bucket(_largest_drawing(prompt.images) + 2, cfg.observation_buckets, name)


def max_drawn_images(images: int, stop: StopLimits) -> int:
  """Returns how many images a rollout can draw: every turn but the last may draw on all images."""
  return max(min(stop.max_images, images * 2 ** (stop.max_turns - 1)) - images, 0)


def max_drawn_tokens(images: Sequence[PatchedImage], stop: StopLimits) -> int:
  """Returns how many visual tokens the drawn images of a rollout can have together."""
  left = max(stop.max_image_tokens - sum(image.tokens for image in images), 0)
  return min(max_drawn_images(len(images), stop) * _largest_drawing(images), left)


def _largest_drawing(images: Sequence[PatchedImage]) -> int:
  """Visual tokens of the largest image that can be drawn: one frame of an image."""
  return max((image.tokens // image.grid_3[0] for image in images), default=0)
