"""Video files: which frames are read, their times, and decoding.

file ──sample_frames──► indices ──read_video──► Clip ──image.patch_frames──► PatchedImage
"""

import dataclasses
import io
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from spatial_jax.config import check_number, check_whole
from spatial_jax.data.records import check_file, composite_on_white, first_line
from spatial_jax.errors import DataError

if TYPE_CHECKING:
  import av

NEEDS_PYAV = "reading video files needs PyAV: pip install 'spatial_jax[video]'"


@dataclasses.dataclass(frozen=True)
class VideoConfig:
  """How the policy is shown a video."""

  # The frames are images of their own, which can be drawn on; else the video is one clip. In a
  # prompt form that draws, frames are always images.
  as_images: bool
  fps: float  # wanted frames per second, > 0
  min_frames: int  # bounds on the number of frames, 2 <= min <= max
  max_frames: int
  # Bounds on the area of the resized frames, 1 <= min <= max: of one frame, or, in a clip of
  # Qwen3-VL, of all frames together. Frames that are images have the bounds of images.
  min_pixels: int
  max_pixels: int

  def __post_init__(self):
    check_number(self, "fps", above=0)
    check_whole(self, "min_frames", at_least=2)
    check_whole(self, "max_frames", at_least=self.min_frames)
    check_whole(self, "min_pixels", at_least=1)
    check_whole(self, "max_pixels", at_least=self.min_pixels)


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
  """Frames of a video, upright, uint8 [height, width, 3] each, and their times in seconds."""

  frames: tuple[np.ndarray, ...]
  times_s: tuple[float, ...]


def sample_frames(total: int, fps: float, cfg: VideoConfig, even_grid: bool) -> np.ndarray:
  """Indices of the frames to read, ascending, of a video with `total` frames.

  Args:
    fps: frames per second of the video.
    even_grid: evenly from the first frame to the last (Qwen3-VL); else the first frame of each of
      equal parts, an even number of frames (Qwen2-VL, Qwen2.5-VL).

  Raises:
    DataError: if the video has fewer than two frames.

  Source: sample_frames of transformers' Qwen2VLVideoProcessor and Qwen3VLVideoProcessor.
  """
  wanted = total / fps * cfg.fps
  if even_grid:
    count = min(max(int(wanted), cfg.min_frames), cfg.max_frames, total)
    if count < 2:
      raise DataError(f"a video of {total} frames is too short; 2 or more are needed")
    return np.linspace(0, total - 1, count).round().astype(np.int64)
  most = min(cfg.max_frames, total) // 2 * 2
  count = math.floor(min(max(wanted, cfg.min_frames), most) / 2) * 2
  if count < 2:
    raise DataError(f"a video of {total} frames is too short; 2 or more are needed")
  # Through float32 like the reference: 29.99999999 becomes 30. Rounding may add an index after the
  # end.
  return np.arange(0, total, total / count).astype(np.float32).astype(np.int64)[:count]


def patch_times(times_s: Sequence[float], temporal_size: int) -> tuple[float, ...]:
  """The time of each temporal patch in seconds: the mean of its first and its last frame.

  An odd last frame is paired with itself, as in the patches.
  """
  padded = [*times_s, *[times_s[-1]] * (-len(times_s) % temporal_size)]
  starts = range(0, len(padded), temporal_size)
  return tuple((padded[i] + padded[i + temporal_size - 1]) / 2 for i in starts)


def seconds_per_patch(clip: Clip, temporal_size: int) -> float:
  """Seconds from one temporal patch to the next; 1 if a clip has only one frame."""
  if len(clip.times_s) < 2:
    return 1.0
  span = clip.times_s[-1] - clip.times_s[0]
  return temporal_size * span / (len(clip.times_s) - 1)


def read_video(source: pathlib.Path | bytes, cfg: VideoConfig, even_grid: bool) -> Clip:
  """Decodes a video file, or the contents of one, and returns the chosen frames.

  Frames are turned and mirrored as the display matrix of the file says. Transparent pixels are
  composited on white.

  Raises:
    DataError: if the file does not exist, is no video, is too short or cannot be decoded, or if
      PyAV (extra video) is missing.
  """
  try:
    import av
  except ImportError as error:
    raise DataError(NEEDS_PYAV) from error
  name = "a video" if isinstance(source, bytes) else str(source)
  if isinstance(source, pathlib.Path):
    check_file(source)
  try:
    file = io.BytesIO(source) if isinstance(source, bytes) else name
    with av.open(file, mode="r") as container:
      if not container.streams.video:
        raise DataError("the file has no video stream")
      stream = container.streams.video[0]
      stream.thread_type = "NONE"  # the worker processes use all cores already
      fps = float(stream.average_rate or 24)
      total = stream.frames or sum(1 for _ in container.decode(stream))
      wanted = sample_frames(total, fps, cfg, even_grid)
      chosen, decoded = _decode(container, wanted)
      if len(chosen) < len(set(wanted.tolist())):  # the header counts more frames than there are
        wanted = sample_frames(decoded, fps, cfg, even_grid)
        chosen, _ = _decode(container, wanted)
  except Exception as error:  # PyAV raises errors of many types for damaged files
    raise DataError(f"{name} cannot be read as a video ({first_line(error)})") from error
  return Clip(tuple(chosen), tuple((wanted / fps).tolist()))


def _decode(container: Any, wanted: np.ndarray) -> tuple[list[np.ndarray], int]:
  """The frames with the wanted numbers, upright, and how many frames were decoded for them."""
  container.seek(0)
  chosen, keep, decoded = [], set(wanted.tolist()), 0
  for frame in container.decode(container.streams.video[0]):
    if decoded in keep:
      chosen.append(_upright(_to_rgb(frame), _display_matrix(frame)))
    decoded += 1
    if len(chosen) == len(keep):
      break
  return chosen, decoded


def _to_rgb(frame: "av.VideoFrame") -> np.ndarray:
  """uint8 [height, width, 3] of a frame with any pixel format."""
  if not any(component.is_alpha for component in frame.format.components):
    return frame.to_ndarray(format="rgb24")
  return np.asarray(composite_on_white(Image.fromarray(frame.to_ndarray(format="rgba"))))


def _display_matrix(frame: "av.VideoFrame") -> np.ndarray:
  """The linear part [[a, b], [c, d]] of the display matrix; the identity if there is none."""
  data = frame.side_data.get("DISPLAYMATRIX")
  if data is None:
    return np.eye(2)
  return np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2] / 65536


def _upright(pixels: np.ndarray, matrix_22: np.ndarray) -> np.ndarray:
  """Turns and mirrors a frame: a pixel at (x, y) moves to (a x + c y, b x + d y).

  Raises:
    DataError: if the matrix turns by an angle that is not a multiple of 90 degrees.
  """
  (a, b), (c, d) = matrix_22
  straight, turned = max(abs(a), abs(d)), max(abs(b), abs(c))
  if min(straight, turned) > 0.01 * max(straight, turned):
    raise DataError("its display matrix turns it by an angle that is not a multiple of 90 degrees")
  if turned > straight:
    pixels, right, down = pixels.swapaxes(0, 1), c, b
  else:
    right, down = a, d
  return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1])
