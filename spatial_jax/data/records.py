"""Reads annotation files strictly: what is missing or malformed is named in one line."""

import json
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from spatial_jax.errors import DataError


def read_json(file: pathlib.Path) -> Any:
  """The contents of a JSON file.

  Raises:
    DataError: on the host, when the file is missing or no JSON.
  """
  try:
    return json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    reason = str(error).splitlines()[0]
    raise DataError(f"{file} cannot be read as JSON ({reason}): fetch the file again") from error


def field(record: Any, key: str, kind: type, where: str) -> Any:
  """`record[key]`, which must be there and of the given kind.

  Raises:
    DataError: on the host, starting with `where`.
  """
  if not isinstance(record, dict) or key not in record:
    raise DataError(f"{where}: field {key} is missing")
  if not isinstance(record[key], kind):
    raise DataError(f"{where}: field {key} must be a {kind.__name__}, got {str(record[key])[:80]}")
  return record[key]


def numbers(record: Any, key: str, shape: tuple[int, ...], where: str) -> np.ndarray:
  """`record[key]` as float64 of the given shape, all finite.

  Raises:
    DataError: on the host, starting with `where`.
  """
  value = field(record, key, object, where)
  try:
    array = np.array(value, np.float64)
  except (TypeError, ValueError):
    array = np.array([math.nan])
  if array.shape != shape or not np.isfinite(array).all():
    wanted = f"finite numbers of shape {list(shape)}" if shape else "a finite number"
    raise DataError(f"{where}: field {key} must be {wanted}, got {str(value)[:80]}")
  return array


def read_image(path: pathlib.Path) -> Image.Image:
  """An RGB picture, upright as its camera says.

  Raises:
    DataError: I/O, naming the file.
  """
  try:
    with Image.open(path) as opened:
      return ImageOps.exif_transpose(opened).convert("RGB")
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    reason = str(error).splitlines()[0]
    raise DataError(f"{path} cannot be read as a picture ({reason}): fetch it again") from error
