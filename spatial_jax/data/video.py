"""Clips: which frames are looked at, when they were taken, and how a file is read.

file ──sample_frames──► indices ──read_video──► Clip ──vision.patch_frames──► PatchedImage
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from spatial_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """How many frames of a clip are looked at.

  Attributes:
    even_grid: Qwen3-VL: evenly from the first frame to the last; else (Qwen2-VL, Qwen2.5-VL) the
      first of each of equal parts, an even number of them.
    fps: frames per second that are wanted.
    min_frames, max_frames: bounds on their number.
  """

  even_grid: bool
  fps: float
  min_frames: int
  max_frames: int


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
  """Chosen frames of a video, uint8 [height, width, 3] each, and the second each was taken at."""

  frames: tuple[np.ndarray, ...]
  times_s: tuple[float, ...]


def sample_frames(total: int, fps: float, cfg: SampleConfig) -> np.ndarray:
  """Indices of the frames to look at, ascending.

  Args:
    total: frames of the video.
    fps: of the video, frames per second.
    cfg: see there.

  Raises:
    DataError: on the host, for a video of fewer frames than fill one temporal patch.

  Source: sample_frames of transformers' Qwen2VLVideoProcessor and Qwen3VLVideoProcessor.
  """
  wanted = total / fps * cfg.fps
  if cfg.even_grid:
    count = min(max(int(wanted), cfg.min_frames), cfg.max_frames, total)
    if count < 2:
      raise DataError(f"a video of {total} frames is too short; Qwen3-VL looks at 2 or more")
    return np.linspace(0, total - 1, count).round().astype(np.int64)
  most = min(cfg.max_frames, total) // 2 * 2
  count = math.floor(min(max(wanted, cfg.min_frames), most) / 2) * 2
  if count < 2:
    raise DataError(f"a video of {total} frames is too short; 2 or more are looked at")
  # By way of float32, as the reference: 29.99999999 is the thirtieth frame. Rounding may give one
  # more, behind the end.
  return np.arange(0, total, total / count).astype(np.float32).astype(np.int64)[:count]


def patch_times(times_s: Sequence[float], temporal_size: int = 2) -> tuple[float, ...]:
  """The second that stands for each temporal patch: the middle of its first and last frame.

  An odd last frame is its own partner, as in the patches.
  """
  padded = [*times_s, *[times_s[-1]] * (-len(times_s) % temporal_size)]
  return tuple(
    (padded[i] + padded[i + temporal_size - 1]) / 2 for i in range(0, len(padded), temporal_size)
  )


def seconds_per_patch(clip: Clip, temporal_size: int = 2) -> float:
  """Seconds from one temporal patch to the next; 1 where a clip has but one frame."""
  if len(clip.times_s) < 2:
    return 1.0
  span = clip.times_s[-1] - clip.times_s[0]
  return temporal_size * span / (len(clip.times_s) - 1)


def read_video(path: pathlib.Path, cfg: SampleConfig) -> Clip:
  """Decodes a video file from its begin and keeps the frames that are looked at.

  Raises:
    DataError: I/O, when the file is no video, or too short; when PyAV (extra video) is missing.
  """
  try:
    import av
    import av.error
  except ImportError as error:
    raise DataError("reading video files needs PyAV: pip install 'spatial_jax[video]'") from error
  try:
    with av.open(str(path)) as container:
      stream = container.streams.video[0]
      stream.thread_type = "NONE"  # workers share their cores already
      fps = float(stream.average_rate or 24)
      total = stream.frames or sum(1 for _ in container.decode(stream))
      wanted = sample_frames(total, fps, cfg)
      container.seek(0)
      chosen, keep = [], set(wanted.tolist())
      for number, frame in enumerate(container.decode(stream)):
        if number in keep:
          chosen.append(frame.to_ndarray(format="rgb24"))
        if len(chosen) == len(keep):
          break
  except (av.error.FFmpegError, OSError, IndexError) as error:
    raise DataError(f"{path} cannot be read as a video: {error}") from error
  if len(chosen) < len(keep):
    raise DataError(f"{path} holds {total} frames by its header, but fewer could be decoded")
  return Clip(tuple(chosen), tuple((wanted / fps).tolist()))
