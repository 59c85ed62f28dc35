"""Pixels to patches to the vision tower's batch, in NumPy and Pillow.

image ──patch_image──► PatchedImage ──plan_vision──► VisionBatch (windows contiguous) + indices
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from spatial_jax.data.windows import MERGE, first_fit, window_layout
from spatial_jax.errors import DataError
from spatial_jax.types import PatchedImage, VisionBatch


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
  """How pictures become patches.

  Attributes:
    patch_size: side of a patch, pixels.
    merge_size: patches per side of a merged token; 2.
    temporal_size: frames per patch; 2.
    min_pixels, max_pixels: bounds on the area of the resized picture, pixels.
    mean, std: of each channel, for pixels scaled to [0, 1].
  """

  patch_size: int
  merge_size: int
  temporal_size: int
  min_pixels: int
  max_pixels: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class VisionBuckets:
  """Sizes a VisionBatch may take, ascending: the first that fits is taken, one trace per triple.

  Attributes:
    windows: W, slots of one attention window or several cut by a border.
    frames: N, rows of frames (an image is one frame, a clip one per pair of pictures); a row of S
      patches may hold several.
    patches: S, patches of the largest frame.
  """

  windows: tuple[int, ...]
  frames: tuple[int, ...]
  patches: tuple[int, ...]


def smart_resize(height: int, width: int, cfg: PreprocessConfig) -> tuple[int, int]:
  """The size a picture is resized to: multiples of patch x merge, area within bounds, aspect kept.

  Args:
    height, width: pixels.
    cfg: bounds and factor.

  Returns:
    (height, width) in pixels.

  Raises:
    DataError: on the host, when a side is empty or the aspect ratio is over 200.

  Source: Qwen2VLImageProcessorPil of transformers.
  """
  return _fit(height, width, cfg, frames=1, counted=1)


def clip_resize(frames: int, height: int, width: int, cfg: PreprocessConfig) -> tuple[int, int]:
  """`smart_resize` of a clip whose pixels are bounded as a whole, Qwen3-VL's rule.

  Args:
    frames: how many.
    height, width: of each, pixels.
    cfg: bounds on frames x height x width.

  Returns:
    (height, width) in pixels.

  Raises:
    DataError: on the host, for fewer than two frames, or as `smart_resize`.

  Source: smart_resize of transformers' Qwen3VLVideoProcessor.
  """
  if frames < cfg.temporal_size:
    raise DataError(f"a clip of {frames} frame is too short; Qwen3-VL looks at 2 or more")
  factor = cfg.patch_size * cfg.merge_size
  if 0 < min(height, width) < factor:  # first up to one token
    scale = max(factor / height, factor / width)
    height, width = int(height * scale), int(width * scale)
  counted = round(frames / cfg.temporal_size) * cfg.temporal_size
  return _fit(height, width, cfg, frames, counted)


def _fit(
  height: int, width: int, cfg: PreprocessConfig, frames: int, counted: int
) -> tuple[int, int]:
  """Sides as multiples of a token's; `counted` frames are held against the bounds."""
  if min(height, width) < 1:
    raise DataError(f"image of {height} x {width} pixels is empty")
  if max(height, width) / min(height, width) > 200:
    raise DataError(f"image of {height} x {width} pixels has an aspect ratio over 200; crop it")
  factor = cfg.patch_size * cfg.merge_size
  new_height = round(height / factor) * factor
  new_width = round(width / factor) * factor
  if counted * new_height * new_width > cfg.max_pixels:
    shrink = math.sqrt(frames * height * width / cfg.max_pixels)
    new_height = max(factor, math.floor(height / shrink / factor) * factor)
    new_width = max(factor, math.floor(width / shrink / factor) * factor)
  elif counted * new_height * new_width < cfg.min_pixels:
    grow = math.sqrt(cfg.min_pixels / (frames * height * width))
    new_height = math.ceil(height * grow / factor) * factor
    new_width = math.ceil(width * grow / factor) * factor
  return new_height, new_width


def patch_image(image: np.ndarray, cfg: PreprocessConfig) -> PatchedImage:
  """Resizes, normalises and cuts one picture; bit-equal to Qwen2VLImageProcessorPil.

  Args:
    image: uint8 [height, width, 3].
    cfg: sizes and normalisation.

  Returns:
    The patches, grid (1, height, width).

  Raises:
    DataError: on the host, for a wrong dtype or shape or a size `smart_resize` refuses.
  """
  # One picture fills all frames of a temporal patch.
  return patch_frames([image] * cfg.temporal_size, cfg)


def patch_frames(
  frames: Sequence[np.ndarray], cfg: PreprocessConfig, whole_clip: bool = False
) -> PatchedImage:
  """Cuts a clip: pairs of frames become temporal patches, the last frame repeated to fill.

  Rows are ordered time, block row, block column, row in block, column in block; a row holds
  channel, frame, y, x.

  Args:
    frames: uint8 [height, width, 3] each, all of one size.
    cfg: sizes and normalisation.
    whole_clip: the bounds on pixels are those of the clip (Qwen3-VL), else of one frame.

  Returns:
    The patches, grid (ceil(frames / temporal_size), height, width).

  Raises:
    DataError: on the host, for no frames, unequal frames, or what `patch_image` refuses.
  """
  for frame in frames:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
      raise DataError(f"image must be uint8 [height, width, 3], got {frame.dtype} {frame.shape}")
  if len({frame.shape for frame in frames}) != 1:
    raise DataError(f"a clip needs frames of one size, got {[frame.shape for frame in frames]}")
  height, width = frames[0].shape[:2]
  if whole_clip:
    height, width = clip_resize(len(frames), height, width, cfg)
  else:
    height, width = smart_resize(height, width, cfg)
  distinct = {id(frame): frame for frame in frames}  # an image is the same frame twice: resize once
  resized = {key: _resize(frame, height, width) for key, frame in distinct.items()}
  normal = {key: _normalise(frame, cfg) for key, frame in resized.items()}
  missing = -len(frames) % cfg.temporal_size
  order = [id(frame) for frame in [*frames, *[frames[-1]] * missing]]
  video = np.stack([normal[key] for key in order])
  digest = hashlib.sha256(np.array([len(order), height, width]).tobytes())
  for key in order:
    digest.update(resized[key].tobytes())
  return PatchedImage(
    content_hash=digest.hexdigest(),
    patches_PX=_cut(video, cfg),
    grid_3=(len(order) // cfg.temporal_size, height // cfg.patch_size, width // cfg.patch_size),
    pixels=resized[order[0]],
  )


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  if image.shape[:2] == (height, width):
    return np.ascontiguousarray(image)
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _normalise(image: np.ndarray, cfg: PreprocessConfig) -> np.ndarray:
  # The rounding steps of the reference: scale in float64, round to float32, normalise in float32.
  scaled = (image.astype(np.float64) * (1 / 255)).astype(np.float32)
  return (scaled - np.asarray(cfg.mean, np.float32)) / np.asarray(cfg.std, np.float32)


def _cut(video: np.ndarray, cfg: PreprocessConfig) -> np.ndarray:
  """float32 [frames, height, width, 3] -> patches_PX, 2x2 blocks contiguous."""
  frames, height, width, _ = video.shape
  t, p, m = cfg.temporal_size, cfg.patch_size, cfg.merge_size
  blocks = video.reshape(frames // t, t, height // p // m, m, p, width // p // m, m, p, 3)
  return blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * t * p * p)


# --- planning the tower's batch ----------------------------------------------------------------


def bucket(count: int, sizes: Sequence[int], name: str) -> int:
  """The first of the ascending `sizes` that holds `count`.

  Raises:
    DataError: on the host, when none does; `name` says what was counted.
  """
  for size in sizes:
    if size >= count:
      return size
  raise DataError(f"{count} {name} exceed the largest bucket {sizes[-1]}")


def geometric_buckets(smallest: int, largest: int) -> tuple[int, ...]:
  """Ascending sizes smallest * (1, 1.5, 2, 3, 4, 6, ...), the last one >= largest."""
  sizes, power = [smallest], smallest
  while sizes[-1] < largest:
    middle, power = power * 3 // 2, power * 2
    sizes += [middle] if sizes[-1] < middle else []
    sizes += [power] if sizes[-1] < largest else []
  return tuple(sizes)


def distinct(images_by_row: Sequence[Sequence[PatchedImage]]) -> dict[str, PatchedImage]:
  """Each image once, by content hash, in order of appearance."""
  return {image.content_hash: image for images in images_by_row for image in images}


def plan_vision(
  images: Sequence[PatchedImage], window_blocks: int, buckets: VisionBuckets
) -> tuple[VisionBatch, tuple[np.ndarray, ...]]:
  """Packs images into one VisionBatch, in the order the tower computes (and returns) them.

  One frame of 3 x 5 merged tokens under windows of 2 x 2, and the window each token falls into:

      1 1 | 2 2 | 3        slots    1 1 1 1    2 2 2 2    3 3 4 4    5 5 6 -
      1 1 | 2 2 | 3
      ----+-----+--        windows cut by the border share the slots of whole ones;
      4 4 | 5 5 | 6        a token is 4 patches, so a slot is 16 rows of patches_PX

  Frames are rows for the layers that see all of one; small ones share the row of a large one.
  Features come out in the order of slots; the second result tells where each image's tokens lie, so
  that the decoder gathers them by index and nothing is permuted back.

  Args:
    images: each distinct image once, at least one.
    window_blocks: side of an attention window in merged tokens.
    buckets: sizes to round up to.

  Returns:
    The batch (NumPy), and for each image int32 [tokens]: the rows of features_MYD that hold its
    tokens, in token order.

  Raises:
    DataError: on the host, without images or when they exceed the largest bucket.
  """
  if not images:
    raise DataError("no images to plan a vision batch for; a batch of text needs none")
  window = window_blocks**2 * MERGE**2
  layouts = [window_layout(image.grid_3, window_blocks) for image in images]
  first_slot = np.cumsum([0] + [layout.slots for layout in layouts])
  token_of = tuple(
    (layout.place_T + first * window_blocks**2).astype(np.int32)
    for layout, first in zip(layouts, first_slot[:-1], strict=True)
  )
  sizes = [h * w for t, h, w in (image.grid_3 for image in images) for _ in range(t)]
  windows = bucket(int(first_slot[-1]), buckets.windows, "attention windows")
  patches = bucket(max(sizes), buckets.patches, "patches in one frame")
  places, rows = first_fit(sizes, patches)
  frames = bucket(rows, buckets.frames, "frames")
  batch = _empty_batch(windows * window, frames, patches, images[0].patches_PX.shape[1])
  frame = 0
  for image, tokens, layout in zip(images, token_of, layouts, strict=True):
    end = frame + image.grid_3[0]
    _place(batch, image, tokens, places[frame:end], frame)
    batch.window_P.reshape(-1, MERGE**2)[tokens] = layout.window_T[:, None]
    frame = end
  return batch, token_of


def pack_features(
  images: Sequence[PatchedImage],
  known: Mapping[str, np.ndarray],
  window_blocks: int,
  buckets: VisionBuckets,
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
  """Features that are known already, of one image behind the other: no tower is run.

  Args:
    images: each distinct image once, at least one.
    known: [tokens, Y, D] by content hash.
    window_blocks, buckets: as in `plan_vision`, which could have given as many features.

  Returns:
    [M, Y, D], and the rows of each image, as `plan_vision` tells them.

  Raises:
    DataError: on the host, without images or when they exceed the largest bucket.
  """
  if not images:
    raise DataError("no images to pack features of; a batch of text needs none")
  parts = [known[image.content_hash] for image in images]
  ends = np.cumsum([len(part) for part in parts], dtype=np.int32)
  windows = bucket(-(-int(ends[-1]) // window_blocks**2), buckets.windows, "attention windows")
  packed_MYD = np.zeros((windows * window_blocks**2, *parts[0].shape[1:]), parts[0].dtype)
  packed_MYD[: ends[-1]] = np.concatenate(parts)
  return packed_MYD, tuple(np.split(np.arange(ends[-1], dtype=np.int32), ends[:-1]))


def _empty_batch(patches: int, frames: int, frame_patches: int, values: int) -> VisionBatch:
  return VisionBatch(
    patches_PX=np.zeros((patches, values), np.float32),
    position_P4=np.ones((patches, 4), np.int32),
    window_P=np.zeros(patches, np.int32),
    frame_P=np.zeros(patches, np.int32),
    frame_NS=np.full((frames, frame_patches), patches, np.int32),
    slot_P=np.zeros(patches, np.int32),
  )


def _place(
  batch: VisionBatch,
  image: PatchedImage,
  tokens: np.ndarray,
  places: Sequence[tuple[int, int]],
  frame: int,
) -> None:
  """Writes one image into the (NumPy) arrays of the batch; `places` are (row, start) per frame."""
  time, height, width = image.grid_3
  _, row, column = np.indices((time, height // MERGE, width // MERGE)).reshape(3, -1, 1)
  inner = np.arange(MERGE**2)  # patch within its 2x2 block
  index_P = (tokens[:, None] * MERGE**2 + inner).reshape(-1)
  batch.patches_PX[index_P] = image.patches_PX
  batch.position_P4[index_P, 0] = (row * MERGE + inner // MERGE).reshape(-1)
  batch.position_P4[index_P, 1] = (column * MERGE + inner % MERGE).reshape(-1)
  batch.position_P4[index_P, 2:] = (height, width)
  patches = height * width
  for number, (index_S, (at, start)) in enumerate(
    zip(index_P.reshape(time, patches), places, strict=True), frame + 1
  ):
    batch.frame_P[index_S] = number
    batch.frame_NS[at, start : start + patches] = index_S
    batch.slot_P[index_S] = at * batch.frame_NS.shape[1] + start + np.arange(patches)
