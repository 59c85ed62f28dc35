"""Media of a task -> pixels: image files, contents of files, arrays, video files, lists of frames.

    ImageRef ──read_pixels──► uint8 [height, width, 3]
    VideoRef ──read_clip────► Clip

Nothing is decoded before it is needed: a data set of references is small, and workers decode.
"""

import io
import pathlib

import numpy as np
from PIL import Image, ImageDraw

from spatial_jax.data.records import check_file, first_line, to_upright_rgb
from spatial_jax.data.video import Clip, VideoConfig, read_video, sample_frames
from spatial_jax.errors import DataError
from spatial_jax.types import ImageRef, Mark, VideoRef

# An image with more pixels is refused: it takes a gigabyte to decode and is never needed.
MAX_PIXELS = 80_000_000
_MARK_WIDTH = 1 / 150  # width of the line of a mark, as a fraction of the longer side
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF tag, and values that swap height and width


def read_pixels(ref: ImageRef) -> np.ndarray:
  """Returns an image as upright RGB, uint8 [height, width, 3], with its marks drawn.

  Raises:
    DataError: if a file is missing, damaged or too large, or an array is not uint8 RGB.
  """
  if isinstance(ref.data, np.ndarray):
    _check_array(ref.data)
    return draw_marks(ref.data, ref.marks)
  try:
    with _open(ref.data) as image:
      _check_size(image)
      return draw_marks(np.asarray(to_upright_rgb(image)), ref.marks)
  except DataError:
    raise
  except Exception as error:  # Pillow raises errors of many types for damaged files
    raise _unreadable(ref.data, error) from error


def image_size(ref: ImageRef) -> tuple[int, int]:
  """Returns (height, width) of an upright image; of a file only the header is read.

  Raises:
    DataError: as `read_pixels`, but damage after the header is not found.
  """
  if isinstance(ref.data, np.ndarray):
    _check_array(ref.data)
    return ref.data.shape[0], ref.data.shape[1]
  try:
    with _open(ref.data) as image:
      _check_size(image)
      turned = image.getexif().get(_ORIENTATION) in _TURNED
      return image.size if turned else (image.height, image.width)
  except DataError:
    raise
  except Exception as error:
    raise _unreadable(ref.data, error) from error


def draw_marks(pixels: np.ndarray, marks: tuple[Mark, ...]) -> np.ndarray:
  """Returns the image with boxes and points drawn on a copy of it."""
  if not marks:
    return pixels
  image = Image.fromarray(pixels)
  pen, width = ImageDraw.Draw(image), max(2, round(max(image.size) * _MARK_WIDTH))
  for mark in marks:
    if mark.shape == "box":
      x1, y1, x2, y2 = mark.points
      box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
      pen.rectangle(box, outline=mark.color, width=width)
    else:
      x, y = mark.points
      pen.circle((x, y), 2 * width, fill=mark.color)
  return np.asarray(image)


def read_clip(ref: VideoRef, cfg: VideoConfig, even_grid: bool) -> Clip:
  """Returns the frames of a video that `sample_frames` chooses, and their times.

  Args:
    even_grid: as in `sample_frames`.

  Raises:
    DataError: if a file cannot be read, or the frames have several sizes.
  """
  if isinstance(ref.data, str | bytes):
    source = pathlib.Path(ref.data) if isinstance(ref.data, str) else ref.data
    return read_video(source, cfg, even_grid)
  times_s = ref.times_s or tuple(i / cfg.fps for i in range(len(ref.data)))
  span_s = times_s[-1] - times_s[0]
  fps = (len(times_s) - 1) / span_s if span_s > 0 else cfg.fps
  chosen = [int(i) for i in sample_frames(len(ref.data), fps, cfg, even_grid)]
  frames = tuple(read_pixels(ref.data[i]) for i in chosen)
  if len({frame.shape for frame in frames}) > 1:
    sizes = sorted({f"{frame.shape[1]} x {frame.shape[0]}" for frame in frames})
    raise DataError(f"the frames of a video have several sizes ({', '.join(sizes)})")
  return Clip(frames, tuple(times_s[i] for i in chosen))


def _open(data: str | bytes) -> Image.Image:
  if isinstance(data, bytes):
    return Image.open(io.BytesIO(data))
  check_file(pathlib.Path(data))
  return Image.open(data)


def _check_array(pixels: np.ndarray) -> None:
  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
    given = f"{pixels.dtype} {pixels.shape}"
    raise DataError(f"image must be uint8 [height, width, 3], got {given}")


def _check_size(image: Image.Image) -> None:
  if image.width * image.height > MAX_PIXELS:
    raise DataError(
      f"an image of {image.width} x {image.height} pixels is larger than {MAX_PIXELS:,} pixels; "
      "make it smaller"
    )


def _unreadable(data: str | bytes, error: Exception) -> DataError:
  name = data if isinstance(data, str) else f"the contents of an image ({len(data)} bytes)"
  return DataError(f"{name} cannot be read as an image ({first_line(error)}); replace it")
