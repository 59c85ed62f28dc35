"""Hugging Face safetensors <-> parameters, by the strict table of `names`."""

import contextlib
import json
import math
import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 only once this is imported)
import numpy as np
import safetensors
from safetensors.numpy import save_file

from spatial_jax.errors import CheckpointError
from spatial_jax.hf import config
from spatial_jax.hf.name_map import Entry, name_table, short_name
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.types import Params

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_FILE_BYTES = 5 << 30  # as the hub's own files
_COPY_BYTES = 16 << 20


# --- reading -----------------------------------------------------------------------------------


def read_config(directory: pathlib.Path) -> QwenVLConfig:
  """The config of a Hugging Face checkpoint.

  Raises:
    CheckpointError: on the host, I/O: no config.json, not JSON, or another kind of model.
  """
  try:
    return config.from_hf(json.loads((directory / CONFIG).read_text()))
  except (OSError, ValueError) as error:
    raise CheckpointError(f"{directory / CONFIG}: {error}") from error


def load(
  directory: pathlib.Path,
  cfg: QwenVLConfig,
  dtype: np.dtype,
  place: Callable[[str, tuple[int, ...]], jax.sharding.Sharding],
) -> Params:
  """Reads a checkpoint, single file or sharded, each array straight to its shards.

  Args:
    directory: holds model.safetensors, or the index and its files.
    cfg: what the tensors must fit.
    dtype: of the parameters.
    place: (parameter path, shape) -> sharding.

  Returns:
    Stacked parameters. No more than one layer's tensor is held on the host beside the shards.

  Raises:
    CheckpointError: on the host, I/O; lists every unknown, missing, doubled and misshapen tensor.
  """
  table = name_table(cfg)
  with contextlib.ExitStack() as stack:
    tensors, doubled = _open(directory, stack)
    problems = [f"{name} is there twice" for name in doubled] + _misfits(table, tensors)
    if problems:
      raise CheckpointError(f"{directory}: " + "; ".join(problems))
    params: Params = {}
    for entry in table:
      array = _assemble(entry, tensors, np.dtype(dtype), place(entry.path, entry.full_shape))
      insert(params, entry.path, array)
    return params


def _open(directory: pathlib.Path, stack: contextlib.ExitStack) -> tuple[dict, list[str]]:
  """Short tensor name -> (file, its name there), and names that occur more than once."""
  tensors, names = {}, Counter()
  for path in _files(directory):
    try:
      file = stack.enter_context(safetensors.safe_open(path, "np"))
    except safetensors.SafetensorError as error:
      raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    for name in file.keys():  # noqa: SIM118  (not a dict)
      tensors[short_name(name)] = (file, name)
      names[short_name(name)] += 1
  return tensors, [name for name, count in names.items() if count > 1]


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
  if (directory / INDEX).exists():
    try:
      names = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
      raise CheckpointError(f"{directory / INDEX} has no readable weight_map: {error}") from error
  else:
    names = [WEIGHTS]
  missing = [name for name in names if not (directory / name).exists()]
  if missing:
    raise CheckpointError(f"{directory} has no {', '.join(missing)}: is it a checkpoint directory?")
  return [directory / name for name in names]


def _misfits(table: list[Entry], tensors: dict) -> list[str]:
  expected = {short_name(name): entry.file_shape for entry in table for name in entry.names}
  problems = [f"{name} is unknown" for name in tensors if name not in expected]
  for name, shape in expected.items():
    if name not in tensors:
      problems.append(f"{name} is missing")
      continue
    file, there = tensors[name]
    found = tuple(file.get_slice(there).get_shape())
    if found != shape:
      problems.append(f"{name}: expected {list(shape)}, file has {list(found)}")
  return problems


def _assemble(
  entry: Entry, tensors: dict, dtype: np.dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
  """One parameter: each tensor is read once and cut into the shards of this process' devices."""

  index_of = sharding.addressable_devices_indices_map(entry.full_shape)
  distinct = {str(index): index for index in index_of.values() if index is not None}
  shape = sharding.shard_shape(entry.full_shape)
  parts = {key: _aligned(shape, dtype) for key in distinct}
  for layer, name in enumerate(entry.names):
    file, there = tensors[short_name(name)]
    if not entry.layers and not entry.kernel:
      for key, index in distinct.items():
        _copy(file.get_slice(there), index, parts[key])
      continue
    array = entry.read(file.get_tensor(there))
    for key, index in distinct.items():
      layers = range(entry.layers)[index[0]] if entry.layers else ()
      if not entry.layers:
        parts[key][...] = array[index]
      elif layer in layers:
        parts[key][layers.index(layer)] = array[index[1:]]
  shards = [jax.device_put(parts[str(index)], device) for device, index in index_of.items()]
  return jax.make_array_from_single_device_arrays(entry.full_shape, sharding, shards)


def _copy(source: Any, index: tuple[slice, ...], out: np.ndarray) -> None:
  """A cut of a tensor that is kept as the file has it, some rows at a time: tables are large."""
  rows = max(1, _COPY_BYTES // max(out[0].nbytes, 1))
  first = index[0].start or 0
  for i in range(0, len(out), rows):
    end = min(i + rows, len(out))
    out[i:end] = source[(slice(first + i, first + end), *index[1:])]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Uninitialised, on a boundary of 64 bytes, so that a CPU device takes it as it is."""
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)


def insert(params: Params, path: str, array: jax.Array) -> None:
  """Puts an array at "a/b/c" of a nested dict, making the dicts on the way."""
  *folders, leaf = path.split("/")
  for folder in folders:
    params = params.setdefault(folder, {})
  params[leaf] = array


# --- writing -----------------------------------------------------------------------------------


def save(
  params: Params, cfg: QwenVLConfig, directory: pathlib.Path, file_bytes: int = _FILE_BYTES
) -> None:
  """Writes config.json and the tensors, in the parameters' dtype; `load` gives the same bits.

  Args:
    params: stacked.
    cfg: what they fit.
    directory: made when missing.
    file_bytes: what one file may hold; more are numbered and named in model.safetensors.index.json.

  Raises:
    CheckpointError: on the host, when a parameter is missing, unknown or misshapen.
  """
  flat = {
    "/".join(str(key.key) for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  table = name_table(cfg)
  expected = {entry.path: entry.full_shape for entry in table}
  problems = [f"{path} is unknown" for path in flat if path not in expected]
  problems += [f"{path} is missing" for path in expected if path not in flat]
  problems += [
    f"{path}: expected {list(expected[path])}, got {list(leaf.shape)}"
    for path, leaf in flat.items()
    if path in expected and leaf.shape != expected[path]
  ]
  if problems:
    raise CheckpointError("cannot save parameters: " + "; ".join(problems))
  directory.mkdir(parents=True, exist_ok=True)
  groups = _file_groups(table, flat, file_bytes)
  names = [WEIGHTS]
  if len(groups) > 1:
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
  where, total = {}, 0
  for name, group in zip(names, groups, strict=True):
    tensors = {}
    for entry in group:
      tensors |= _tensors(entry, np.asarray(flat[entry.path]))
    save_file(tensors, directory / name, metadata={"format": "pt"})  # transformers asks for "pt"
    where |= dict.fromkeys(tensors, name)
    total += sum(tensor.nbytes for tensor in tensors.values())
  if len(groups) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
  hf = {**config.to_hf(cfg), "torch_dtype": str(flat[table[0].path].dtype)}
  (directory / CONFIG).write_text(json.dumps(hf, indent=2) + "\n")


def _file_groups(table: list[Entry], flat: Params, file_bytes: int) -> list[list[Entry]]:
  """The parameters of each file, in order; one that is larger than a file gets one alone."""
  groups, room = [], 0
  for entry in table:
    size = flat[entry.path].nbytes
    if not groups or size > room:
      groups.append([])
      room = file_bytes
    groups[-1].append(entry)
    room -= size
  return groups


def _tensors(entry: Entry, array: np.ndarray) -> dict[str, np.ndarray]:
  if not entry.layers:
    return {entry.name: entry.write(array)}
  layers = (entry.write(layer) for layer in array)
  return dict(zip(entry.names, layers, strict=True))
