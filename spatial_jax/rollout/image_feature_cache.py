"""What rollouts encode_images: features of each image once, in one buffer on the device.

image ──content hash──► in the buffer? ──no──► vision tower ──► rows of feature_buffer_MYD
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
from spatial_jax.rollout.engine import EncodeImages
from spatial_jax.rollout.profiling import Timeline
from spatial_jax.types import Array, Params, PatchedImage, Prompt

ImageFeatures = dict[
  str, np.ndarray
]  # [tokens, Y, D] of images seen with one tower, by content hash


class ImageFeatureCache:
  """The pool and who lies where in it; when it is full, the image asked for longest ago goes.

  Attributes:
    feature_buffer_MYD: features; rows that no image owns mean nothing.
    seen, asked: images that went through the tower, and that were asked for.
  """

  def __init__(
    self,
    encode_images: EncodeImages,
    params: Params,
    feature_buffer_MYD: Array,
    window_blocks: int,
    buckets: VisionBuckets,
    image_features: ImageFeatures | None,
    timeline: Timeline,
  ):
    """An empty pool.

    Args:
      encode_images: (params, feature buffer donated, VisionBatch, int32 buffer row of each feature;
        rows beyond the end are dropped) -> feature buffer, ready token.
      params: decode parameters.
      feature_buffer_MYD: donated.
      window_blocks, buckets: as in `plan_vision`.
      known: filled with what the tower saw, for whoever needs it later. None: nothing is kept.
      timeline: of the call.
    """
    self.feature_buffer_MYD, self.seen, self.asked = feature_buffer_MYD, 0, 0
    self._encode_images, self._params = encode_images, params
    self._window_blocks, self._buckets, self._known = window_blocks, buckets, image_features
    self._timeline = timeline
    self._rows: dict[str, np.ndarray] = {}  # least recently asked for first
    self._free = list(range(feature_buffer_MYD.shape[0]))

  def encode(self, images_by_row: Sequence[Sequence[PatchedImage]]) -> dict[str, np.ndarray]:
    """Rows of the pool that hold each image's tokens, in token order, by content hash.

    They stay until the next call; together the images must fit the pool (see `fitting`).
    """
    images = distinct(images_by_row)
    self.asked += sum(len(images) for images in images_by_row)
    for name in images:
      if name in self._rows:
        self._rows[name] = self._rows.pop(name)
    unseen = [image for name, image in images.items() if name not in self._rows]
    self.seen += len(unseen)
    self._make_room(sum(image.tokens for image in unseen), images.keys())
    for image in unseen:
      self._rows[image.content_hash] = np.asarray(
        [self._free.pop() for _ in range(image.tokens)], np.int32
      )
    for part in self._calls(unseen):
      vision, plan = plan_vision(part, self._window_blocks, self._buckets)
      place_M = np.full(vision.window_P.shape[0] // 4, self.feature_buffer_MYD.shape[0], np.int32)
      for image, at in zip(part, plan, strict=True):
        place_M[at] = self._rows[image.content_hash]
      self.feature_buffer_MYD, mark = self._encode_images(
        self._params, self.feature_buffer_MYD, vision, place_M
      )
      tokens = sum(image.tokens for image in part)
      self._timeline.submitted("encode_images", mark, tokens, len(place_M))
    return {name: self._rows[name] for name in images}

  def finish(self) -> None:
    """Brings what is in the pool to those who need it later."""
    if self._known is not None and self._rows.keys() - self._known.keys():
      feature_buffer_MYD = np.asarray(self.feature_buffer_MYD)
      self._known |= {name: feature_buffer_MYD[rows] for name, rows in self._rows.items()}

  def _make_room(self, tokens: int, needed: Collection[str]) -> None:
    if len(self._free) < tokens:
      self.finish()  # the whole pool in one copy: a gather of each image's rows would compile
    while len(self._free) < tokens:
      oldest = next(name for name in self._rows if name not in needed)
      self._free += self._rows.pop(oldest).tolist()

  def _calls(self, images: Sequence[PatchedImage]) -> list[list[PatchedImage]]:
    """As many images in a call of the tower as its largest bucket holds."""
    calls: list[list[PatchedImage]] = []
    frames = windows = 0
    for image in images:
      t, w = image.grid_3[0], window_layout(image.grid_3, self._window_blocks).slots
      frames, windows = frames + t, windows + w
      if not calls or frames > self._buckets.frames[-1] or windows > self._buckets.windows[-1]:
        calls.append([])
        frames, windows = t, w
      calls[-1].append(image)
    return calls


def fitting(images_by_row: Sequence[Sequence[PatchedImage]], room: int) -> int:
  """How many of these rows, from the first, have room for all their images in a pool."""
  names, tokens = set(), 0
  for count, images in enumerate(images_by_row):
    fresh = {image.content_hash: image.tokens for image in images}
    tokens += sum(size for name, size in fresh.items() if name not in names)
    names |= fresh.keys()
    if tokens > room:
      return count
  return len(images_by_row)


def check_room(prompt: Prompt, cfg: RolloutConfig, window_blocks: int) -> None:
  """A prompt's pictures, and what the policy could draw on them, have to fit pool and buckets.

  Raises:
    DataError: on the host, naming the task and saying what to raise.
  """
  where, buckets = f"of {prompt.task.task_id}; raise config.rollout", cfg.vision
  for image in prompt.images:
    time, height, width = image.grid_3
    slots = window_layout(image.grid_3, window_blocks).slots
    bucket(time, buckets.frames, f"frames in an image {where}.vision.frames: they")
    bucket(slots, buckets.windows, f"attention windows in an image {where}.vision.windows: they")
    bucket(height * width, buckets.patches, f"patches in a frame {where}.vision.patches: they")
  shown = sum(image.tokens for image in prompt.images)
  drawn = most_drawn_tokens(prompt.images, cfg.stop)
  if max(shown, drawn) > cfg.feature_buffer_tokens:
    raise DataError(
      f"{shown} visual tokens shown, up to {drawn} drawn in a rollout {where}.feature_buffer_tokens: "
      f"it is {cfg.feature_buffer_tokens}"
    )
  if drawn:
    name = f"tokens of a drawing {where}.observation_buckets: they"
    bucket(_largest_drawing(prompt.images) + 2, cfg.observation_buckets, name)  # without its words


def most_drawn(images: int, stop: StopLimits) -> int:
  """How many pictures a rollout can draw: each turn but the last may draw on all there are."""
  return max(min(stop.max_images, images * 2 ** (stop.max_turns - 1)) - images, 0)


def most_drawn_tokens(images: Sequence[PatchedImage], stop: StopLimits) -> int:
  """How many visual tokens all the pictures that a rollout draws can have.

  Args:
    images: of the prompt.
    stop: when the rollout ends.
  """
  room = max(stop.max_image_tokens - sum(image.tokens for image in images), 0)
  return min(most_drawn(len(images), stop) * _largest_drawing(images), room)


def _largest_drawing(images: Sequence[PatchedImage]) -> int:
  """Visual tokens: what is drawn on is a whole frame."""
  return max((image.tokens // image.grid_3[0] for image in images), default=0)
