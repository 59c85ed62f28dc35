"""Readers of annotation files and images; every problem is one line that names the file."""

import json
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from spatial_jax.errors import DataError


def read_json(file: pathlib.Path) -> Any:
  """The contents of a JSON file; DataError if it does not exist or is not JSON."""
  check_file(file)
  try:
    return json.loads(file.read_text(encoding="utf-8-sig"))
  except (OSError, ValueError, RecursionError) as error:
    raise DataError(f"{file} cannot be read as JSON ({first_line(error)})") from error


def field(record: Any, key: str, kind: type, where: str) -> Any:
  """`record[key]`, of the type `kind`; else DataError with a message that starts with `where`."""
  if not isinstance(record, dict) or key not in record:
    raise DataError(f"{where}: field {key} is missing")
  if not isinstance(record[key], kind):
    raise DataError(f"{where}: field {key} must be a {kind.__name__}, got {str(record[key])[:80]}")
  return record[key]


def numbers(record: Any, key: str, shape: tuple[int, ...], where: str) -> np.ndarray:
  """`record[key]` as float64 of the given shape, all finite; else DataError as in `field`."""
  value = field(record, key, object, where)
  try:
    array = np.array(value, np.float64)
  except (TypeError, ValueError, OverflowError):
    array = np.array([math.nan])
  if array.shape != shape or not np.isfinite(array).all():
    wanted = f"finite numbers of shape {list(shape)}" if shape else "a finite number"
    raise DataError(f"{where}: field {key} must be {wanted}, got {str(value)[:80]}")
  return array


def read_image(path: pathlib.Path) -> Image.Image:
  """An image file as upright RGB with 8 bits per channel.

  Transparent pixels are composited on white. 16-bit pixels are scaled to 8 bits. The image is
  turned as its EXIF orientation says. Of an animation the first frame is read.

  Raises:
    DataError: if the file does not exist, is damaged, or has pixels of unknown range (32-bit
      integers, floats).
  """
  check_file(path)
  try:
    with Image.open(path) as image:
      return to_upright_rgb(image)
  except Exception as error:  # Pillow raises errors of many types for damaged files
    raise DataError(
      f"{path} cannot be read as an image ({first_line(error)}); replace it or save it again as an"
      " 8-bit PNG or JPEG"
    ) from error


def to_upright_rgb(image: Image.Image) -> Image.Image:
  """An opened image as `read_image` returns it.

  Raises:
    ValueError: if the pixels have no known range, and whatever Pillow raises for a damaged file.
  """
  _prepare(image)
  return _to_rgb(ImageOps.exif_transpose(image))


def composite_on_white(image: Image.Image) -> Image.Image:
  """The RGB image of an RGBA image on a white background."""
  return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def check_file(path: pathlib.Path) -> None:
  """Raises DataError if a path does not exist, is a folder or is empty."""
  try:
    exists, is_folder = path.exists(), path.is_dir()
    is_empty = path.is_file() and path.stat().st_size == 0
  except OSError as error:
    raise DataError(f"{path} cannot be read ({first_line(error)})") from error
  for wrong, problem in (
    (not exists, "does not exist"),
    (is_folder, "is a folder, not a file"),
    (is_empty, "is empty"),
  ):
    if wrong:
      raise DataError(f"{path} {problem}")


def first_line(error: BaseException) -> str:
  """The first line of an error's message, or its type if it has no message."""
  return next(iter(str(error).splitlines()), "") or type(error).__name__


def _prepare(image: Image.Image) -> None:
  """Refuses pixels of unknown range and corrects the transparent colour of some PNG files.

  Raises:
    ValueError: if the file does not say which value is white.
  """
  if image.format == "TIFF" and image.mode.startswith("I;16"):
    bits, photometric = image.tag_v2.get(258), image.tag_v2.get(262)  # pyright: ignore
    if bits != (16,) or photometric != 1:  # Pillow neither scales 12 bits nor inverts 16
      raise ValueError(f"grayscale TIFF with {bits} bits, photometric interpretation {photometric}")
  if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
    raise ValueError(f"pixels of mode {image.mode} have no known range")
  if image.format == "PNG" and "transparency" in image.info:
    # Pillow scales these pixels to 8 bits, but not the colour that is transparent.
    key, layout = image.info["transparency"], image.tile[0][3]  # pyright: ignore
    if layout in ("L;2", "L;4"):
      image.info["transparency"] = key * 255 // (3 if layout == "L;2" else 15)
    if layout == "RGB;16B":
      image.info["transparency"] = tuple(value >> 8 for value in key)


def _to_rgb(image: Image.Image) -> Image.Image:
  """Any mode -> RGB without loss of transparency or depth."""
  if image.mode == "I" or image.mode.startswith("I;16"):
    deep = np.asarray(image).astype(np.uint32)
    pixels = (deep * 255 + 32767) // 65535
    if "transparency" in image.info:
      pixels[deep == image.info["transparency"]] = 255
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
  if image.mode == "La":  # Pillow converts premultiplied gray to LA only
    image = image.convert("LA")
  if image.has_transparency_data:
    return composite_on_white(image.convert("RGBA"))
  return image.convert("RGB")
