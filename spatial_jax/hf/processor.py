"""Hugging Face `preprocessor_config.json` <-> PreprocessConfig."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from spatial_jax.data.image import PreprocessConfig
from spatial_jax.errors import DataError

IMAGES, CLIPS = "preprocessor_config.json", "video_preprocessor_config.json"


def read_processor(directory: pathlib.Path, clips: bool = False) -> PreprocessConfig:
  """How a checkpoint's own processor cuts pictures.

  Args:
    directory: Hugging Face folder.
    clips: read what it says of videos; where it has no file for them, they are cut like images.

  Raises:
    DataError: I/O, when the file is missing, not JSON, or lacks a key; names file and key.
  """
  path = directory / CLIPS
  if not clips or not path.exists():
    path = directory / IMAGES
  try:
    return from_hf(json.loads(path.read_text()))
  except KeyError as error:
    raise DataError(f"{path}: {error.args[0]!r} is missing") from error
  except (OSError, ValueError, TypeError) as error:
    raise DataError(f"{path} cannot be read: {error}") from error


def from_hf(hf: Mapping[str, Any]) -> PreprocessConfig:
  """The config of a parsed file; bounds are named `size` (transformers 5) or min and max pixels.

  Raises:
    KeyError: on the host, for a key that is missing.
  """
  size = hf.get("size") or {}
  least = size["shortest_edge"] if "shortest_edge" in size else hf["min_pixels"]
  most = size["longest_edge"] if "longest_edge" in size else hf["max_pixels"]
  mean, std = (tuple(float(x) for x in hf[key]) for key in ("image_mean", "image_std"))
  return PreprocessConfig(
    patch_size=int(hf["patch_size"]),
    merge_size=int(hf["merge_size"]),
    temporal_size=int(hf["temporal_patch_size"]),
    min_pixels=int(least),
    max_pixels=int(most),
    mean=(mean[0], mean[1], mean[2]),
    std=(std[0], std[1], std[2]),
  )


def to_hf(cfg: PreprocessConfig) -> dict[str, Any]:
  """The file that transformers loads an image processor from."""
  return {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": cfg.patch_size,
    "merge_size": cfg.merge_size,
    "temporal_patch_size": cfg.temporal_size,
    "size": {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels},
    "image_mean": list(cfg.mean),
    "image_std": list(cfg.std),
  }
