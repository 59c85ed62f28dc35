"""Converts between the processor files of Hugging Face and PreprocessConfig.

    processor_config.json            "image_processor" and "video_processor" (transformers 5)
    preprocessor_config.json         images
    video_preprocessor_config.json   videos

transformers reads the nested file first; so does this module.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from spatial_jax.data.image import PreprocessConfig
from spatial_jax.errors import DataError

IMAGE_FILE, VIDEO_FILE = "preprocessor_config.json", "video_preprocessor_config.json"
NESTED_FILE = "processor_config.json"
_BICUBIC = 3  # of Pillow


def processor_file(directory: pathlib.Path) -> pathlib.Path | None:
  """Returns the file with the image settings of a Hugging Face folder, None without one."""
  if "image_processor" in nested_settings(directory):
    return directory / NESTED_FILE
  return directory / IMAGE_FILE if (directory / IMAGE_FILE).exists() else None


def read_processor(directory: pathlib.Path, video: bool = False) -> PreprocessConfig:
  """Reads how the processor of a Hugging Face folder makes patches.

  With `video` it reads the settings of videos; without any, those of images.

  Raises:
    DataError: if the file is missing, is not JSON, lacks a key or has an unsupported setting; the
      message names the file and the key.
  """
  path, record = _find(directory, video)
  try:
    return from_hf(record)
  except KeyError as error:
    raise DataError(f"{path}: {error.args[0]!r} is missing") from error
  except (AttributeError, ValueError, TypeError) as error:
    raise DataError(f"{path} cannot be used: {error}") from error


def nested_settings(directory: pathlib.Path) -> dict[str, Any]:
  """Returns the content of processor_config.json, {} without the file.

  transformers 4 wrote other things into it, so each of the two keys may be missing.
  """
  path = directory / NESTED_FILE
  record = _read(path) if path.exists() else {}
  return record if isinstance(record, dict) else {}


def _find(directory: pathlib.Path, video: bool) -> tuple[pathlib.Path, Any]:
  """The first file with these settings, and the settings."""
  nested, key = nested_settings(directory), "video_processor" if video else "image_processor"
  if key in nested:
    return directory / NESTED_FILE, nested[key]
  if video and (directory / VIDEO_FILE).exists():
    return directory / VIDEO_FILE, _read(directory / VIDEO_FILE)
  if video:
    return _find(directory, video=False)
  return directory / IMAGE_FILE, _read(directory / IMAGE_FILE)


def _read(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise DataError(f"{path} cannot be read ({error}); copy or download it again") from error


def from_hf(hf: Mapping[str, Any]) -> PreprocessConfig:
  """Reads parsed settings; `min_pixels` and `max_pixels` override `size`, as in transformers.

  Raises:
    KeyError: if a key is missing.
    ValueError: if pixels are not resized bicubically, scaled by 1 / 255 and normalised.
  """
  _check_fixed(hf)
  size = hf.get("size") or {}
  least, most = hf.get("min_pixels"), hf.get("max_pixels")
  if least is None:
    least = size["shortest_edge"] if "shortest_edge" in size else hf["min_pixels"]
  if most is None:
    most = size["longest_edge"] if "longest_edge" in size else hf["max_pixels"]
  mean, std = (tuple(float(x) for x in hf[key]) for key in ("image_mean", "image_std"))
  if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
    raise ValueError(f"image_mean {mean} and image_std {std} must be three numbers, std above 0")
  if not 0 < least <= most:
    raise ValueError(f"the bounds {least} and {most} on pixels must be positive and ascending")
  return PreprocessConfig(
    patch_size=int(hf["patch_size"]),
    merge_size=int(hf["merge_size"]),
    temporal_size=int(hf["temporal_patch_size"]),
    min_pixels=int(least),
    max_pixels=int(most),
    mean=(mean[0], mean[1], mean[2]),
    std=(std[0], std[1], std[2]),
  )


def _check_fixed(hf: Mapping[str, Any]) -> None:
  """Refuses settings that PreprocessConfig does not have."""
  for key in ("do_resize", "do_rescale", "do_normalize"):
    if hf.get(key, True) is False:
      raise ValueError(f"{key} is false and must be true")
  scale = hf.get("rescale_factor", 1 / 255)
  if not math.isclose(scale, 1 / 255, rel_tol=1e-6):
    raise ValueError(f"rescale_factor is {scale} and must be 1 / 255")
  if hf.get("resample", _BICUBIC) != _BICUBIC:
    raise ValueError(f"resample is {hf['resample']} and must be {_BICUBIC} (bicubic)")


def to_hf(cfg: PreprocessConfig) -> dict[str, Any]:
  """Writes the settings as a `preprocessor_config.json` of transformers."""
  return {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": cfg.patch_size,
    "merge_size": cfg.merge_size,
    "temporal_patch_size": cfg.temporal_size,
    "size": {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels},
    "image_mean": list(cfg.mean),
    "image_std": list(cfg.std),
  }
