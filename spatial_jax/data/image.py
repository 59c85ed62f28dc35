"""Image or video frames -> patches: resize, normalise, cut; in NumPy and Pillow.

The result is bit-equal to the PIL image processor of transformers.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from spatial_jax.config import check_field, check_whole
from spatial_jax.errors import DataError
from spatial_jax.types import PatchedImage


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
  """Size and normalisation of patches."""

  patch_size: int  # side of a patch, pixels, >= 1
  merge_size: int  # patches per side of a merged token, >= 1
  temporal_size: int  # frames per patch, >= 1
  min_pixels: int  # bounds on the area of the resized image, 1 <= min <= max
  max_pixels: int
  mean: tuple[float, float, float]  # of each channel, for pixels scaled to [0, 1]
  std: tuple[float, float, float]  # > 0

  def __post_init__(self):
    check_whole(self, "patch_size", "merge_size", "temporal_size", "min_pixels", at_least=1)
    check_whole(self, "max_pixels", at_least=self.min_pixels)
    check_field(self, "mean", all(map(math.isfinite, self.mean)), "be finite")
    valid = all(0 < value < math.inf for value in self.std)
    check_field(self, "std", valid, "be above 0 and finite")


def smart_resize(height: int, width: int, cfg: PreprocessConfig) -> tuple[int, int]:
  """(height, width) of the resized image: multiples of patch x merge, area within bounds.

  Raises:
    DataError: if a side is empty or the aspect ratio is over 200.

  Source: Qwen2VLImageProcessorPil of transformers.
  """
  return _fit(height, width, cfg, 1, 1)


def clip_resize(frames: int, height: int, width: int, cfg: PreprocessConfig) -> tuple[int, int]:
  """`smart_resize` with bounds on the pixels of a whole clip (Qwen3-VL).

  Args:
    frames: number of frames.
    height, width: of each frame, pixels.
    cfg: bounds on frames x height x width.

  Raises:
    DataError: if there are fewer than two frames, or as in `smart_resize`.

  Source: smart_resize of transformers' Qwen3VLVideoProcessor.
  """
  if frames < cfg.temporal_size:
    raise DataError(f"a clip of {frames} frame is too short; Qwen3-VL needs 2 or more")
  factor = cfg.patch_size * cfg.merge_size
  if 0 < min(height, width) < factor:  # enlarge to one token first
    scale = max(factor / height, factor / width)
    height, width = int(height * scale), int(width * scale)
  counted = round(frames / cfg.temporal_size) * cfg.temporal_size
  return _fit(height, width, cfg, frames, counted)


def _fit(
  height: int, width: int, cfg: PreprocessConfig, frames: int, counted: int
) -> tuple[int, int]:
  """Sides as multiples of the side of a token; the bounds apply to `counted` frames."""
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
  """`patch_frames` of one image, uint8 [height, width, 3], which fills all frames of a patch."""
  return patch_frames([image] * cfg.temporal_size, cfg)


def patch_frames(
  frames: Sequence[np.ndarray], cfg: PreprocessConfig, whole_clip: bool = False
) -> PatchedImage:
  """Resizes, normalises and cuts a clip; the last frame is repeated to fill a temporal patch.

  The order of rows is time, block row, block column, row in block, column in block; the order
  within a row is channel, frame, y, x.

  Args:
    frames: uint8 [height, width, 3] each, all of one size.
    cfg: sizes and normalisation.
    whole_clip: the bounds on pixels apply to all frames together (Qwen3-VL), not to one frame.

  Returns:
    The patches, grid (ceil(frames / temporal_size), height, width).

  Raises:
    DataError: if dtype or shape is wrong, if there are no frames or frames of several sizes, or if
      `smart_resize` refuses the size.

  Source: Qwen2VLImageProcessorPil of transformers, bit-equal.
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
