"""Finds the mistake in a path that should hold the weights of a policy, and names its fix.

transformers reads model.safetensors first, then model.safetensors.index.json; so does this package.
"""

import json
import os
import pathlib
import re
from typing import Any

from spatial_jax.errors import CheckpointError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_SHARD = re.compile(r".+-\d+-of-\d+\.safetensors")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PYTORCH = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.distcp")


def has_weights(folder: pathlib.Path) -> bool:
  """Returns whether the folder holds model.safetensors or the index of its shards."""
  return any((folder / name).exists() for name in (WEIGHTS, INDEX))


def has_model_config(folder: pathlib.Path) -> bool:
  """Returns whether its config.json is of a model; the work directory of a run has another one."""
  return bool({"model_type", "architectures"} & _read(folder / CONFIG).keys())


def check_folder(path: pathlib.Path) -> None:
  """Raises CheckpointError with the line of `find_mistake`, if it returns one."""
  if mistake := find_mistake(path):
    raise CheckpointError(mistake)


def find_mistake(path: pathlib.Path) -> str | None:
  """Returns one line on what is wrong with a path that should be a Hugging Face folder.

  Returns None if the folder has weights, or if it is not recognised as a model at all.
  """
  if not path.exists():
    return _missing_path(path)
  if path.is_file():
    return f"{path} is a file; give the folder that contains it"
  if any((path / name).exists() for name in _ADAPTER):
    return _adapter(path)
  if has_weights(path):
    return None
  is_run = (path / "checkpoints").is_dir()
  inner = [] if is_run else [*path.glob("*/"), *path.glob("snapshots/*/")]
  if found := sorted(folder for folder in inner if has_weights(folder)):
    return f"{path} has no {WEIGHTS}, but its folder {found[-1]} has; give that folder"
  if found := _names(path, "*.gguf"):
    return (
      f"{path} holds {found[0]}, quantised weights in GGUF; give the model's folder of safetensors"
    )
  if found := _names(path, "*.safetensors"):
    if _SHARD.fullmatch(found[0]):
      return f"{path} holds shards such as {found[0]} without {INDEX}; copy the index as well"
    return f"{path} holds {found[0]}, but no {WEIGHTS}; rename it or copy the weights"
  if found := [name for pattern in _PYTORCH for name in _names(path, pattern)]:
    return (
      f"{path} holds PyTorch weights ({found[0]}), but no {WEIGHTS}; load them in transformers "
      "and write safetensors with save_pretrained"
    )
  if has_model_config(path):
    return f"{path} has no {WEIGHTS}; copy the weights of the model into this folder"
  return None


def _missing_path(path: pathlib.Path) -> str | None:
  """A name of the hub is two words with a slash, and its first word is no folder here."""
  if _HUB_NAME.fullmatch(os.fspath(path)) is None or path.parent.exists():
    return None
  return (
    f"{path} is not a folder. Models of the hub are not downloaded; run "
    f"`hf download {path} --local-dir FOLDER` and give FOLDER"
  )


def _adapter(path: pathlib.Path) -> str:
  base = _read(path / _ADAPTER[0]).get("base_model_name_or_path")
  into = f"its base model {base}" if base else "its base model"
  return (
    f"{path} holds a PEFT adapter; merge it into {into} (merge_and_unload, then save_pretrained) "
    "and give the merged folder"
  )


def _names(path: pathlib.Path, pattern: str) -> list[str]:
  return sorted(file.name for file in path.glob(pattern))


def _read(path: pathlib.Path) -> dict[str, Any]:
  """A JSON mapping; {} if the file does not hold one."""
  try:
    record = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return record if isinstance(record, dict) else {}
