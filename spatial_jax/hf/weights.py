"""Reads and writes the safetensors of Hugging Face, by the strict table of `name_map`."""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (adds bfloat16 to NumPy)
import numpy as np
import safetensors
from safetensors.numpy import save_file

from spatial_jax.checks import mismatches
from spatial_jax.errors import CheckpointError, system_error
from spatial_jax.hf import config
from spatial_jax.hf.folder import CONFIG, INDEX, WEIGHTS, check_folder, has_weights
from spatial_jax.hf.name_map import Entry, name_table, short_name
from spatial_jax.policy import param_tree
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.types import Params
from spatial_jax.workdir import write_text

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FILE_BYTES = 5 << 30  # file size of the hub
_COPY_BYTES = 16 << 20
_LISTED = 6  # problems that an error lists
_FLOATS = ("F64", "F32", "F16", "BF16")
_LFS_POINTER = b"version https://git-lfs"
# Endings of tensors that GPTQ, AWQ, compressed-tensors, FP8 and bitsandbytes write.
_QUANTISED = (
  *(".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale"),
  *(".weight_scale_inv", ".SCB", ".absmax", ".quant_map"),
)
# Constants that old versions of transformers stored and new ones compute.
_IGNORED = ".inv_freq"

Tensors = dict[str, tuple[Any, str]]  # short name -> (file, name in the file)


# --- reading -----------------------------------------------------------------------------------


def read_config(directory: pathlib.Path) -> QwenVLConfig:
  """Reads the config of a Hugging Face folder.

  If config.json ties the output head to the embedding but the weights hold a head of other values,
  the head is used, as in transformers 5. The weights may be missing.

  Raises:
    CheckpointError: if config.json is missing or cannot be read, if the model is of another family
      or quantised, or if the weights cannot be read.
  """
  try:
    cfg = config.from_hf(json.loads((directory / CONFIG).read_text()))
  except FileNotFoundError as error:
    check_folder(directory)
    raise CheckpointError(f"{directory} has no {CONFIG}; give the folder of a model") from error
  except (OSError, ValueError) as error:
    reason = str(error).removeprefix("config.json: ")
    raise CheckpointError(f"{directory / CONFIG}: {reason}") from error
  if cfg.decoder.tied and has_weights(directory) and _has_own_head(directory):
    return dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, tied=False))
  return cfg


def load(
  directory: pathlib.Path,
  cfg: QwenVLConfig,
  dtype_of: Callable[[str], np.dtype],
  place: Callable[[str, tuple[int, ...]], jax.sharding.Sharding],
) -> Params:
  """Reads weights, from one file or several, each array straight to its shards.

  Args:
    directory: holds model.safetensors, or the index and its files.
    cfg: config that the tensors must fit, from `read_config`.
    dtype_of: parameter path -> dtype, to which the values are rounded as they are read.
    place: (parameter path, shape) -> sharding.

  Returns:
    Stacked parameters. The host holds at most one layer's tensor besides the shards.

  Raises:
    CheckpointError: if a file is missing or damaged, the weights are quantised, or tensors are
      unknown, missing, duplicated or of another shape. Nothing is allocated before this check.
  """
  table = name_table(cfg)
  with contextlib.ExitStack() as stack:
    tensors, duplicated = _open(directory, stack)
    _refuse_quantised(directory, tensors)
    problems = [f"{name} is there twice" for name in duplicated]
    if cfg.decoder.tied and HEAD in tensors:
      if not _head_is_embedding(tensors):
        problems.append(f"{HEAD} differs from {EMBEDDING}, but the config ties them")
      head = tensors.pop(HEAD)  # a second copy, or the only one
      tensors.setdefault(EMBEDDING, head)
    problems += _misfits(table, tensors)
    if problems:
      raise CheckpointError(f"{directory}: {_summary(problems)}; use the {CONFIG} of these weights")
    return param_tree.unflatten(
      {
        entry.path: _assemble(
          entry, tensors, np.dtype(dtype_of(entry.path)), place(entry.path, entry.full_shape)
        )
        for entry in table
      }
    )


def _open(directory: pathlib.Path, stack: contextlib.ExitStack) -> tuple[Tensors, list[str]]:
  """Opens all files. Returns their tensors and the names that occur more than once."""
  tensors: Tensors = {}
  counts = Counter()
  for path in _files(directory):
    try:
      file = stack.enter_context(safetensors.safe_open(path, "np"))
    except (safetensors.SafetensorError, OSError) as error:
      raise CheckpointError(_damage(path, error)) from error
    for name in file.keys():  # noqa: SIM118  (not a dict)
      if not name.endswith(_IGNORED):
        tensors[short_name(name)] = (file, name)
        counts[short_name(name)] += 1
  return tensors, [name for name, count in counts.items() if count > 1]


def _damage(path: pathlib.Path, error: Exception) -> str:
  """One line on a file that is no whole safetensors file."""
  if path.is_file():
    with path.open("rb") as file:
      if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
        return f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
  return f"{path} is damaged or incomplete ({error}); copy or download it again"


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
  check_folder(directory)
  if not has_weights(directory):
    raise CheckpointError(f"{directory} has no {WEIGHTS}; give the folder of a model")
  if (directory / WEIGHTS).exists():
    return [directory / WEIGHTS]
  names = sorted(set(_weight_map(directory).values()))
  missing = [name for name in names if not (directory / name).exists()]
  if missing:
    raise CheckpointError(
      f"{directory} has no {missing[0]}: {len(missing)} of the {len(names)} files of {INDEX} are "
      "missing; copy or download them"
    )
  return [directory / name for name in names]


def _weight_map(directory: pathlib.Path) -> dict[str, str]:
  """Tensor name -> file, from the index."""
  try:
    return dict(json.loads((directory / INDEX).read_text())["weight_map"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise CheckpointError(
      f"{directory / INDEX} has no readable weight_map ({error!r}); copy or download it again"
    ) from error


def _has_own_head(directory: pathlib.Path) -> bool:
  """Whether the weights hold an output head that differs from the embedding."""
  if not (directory / WEIGHTS).exists() and HEAD not in _weight_map(directory):
    return False
  with contextlib.ExitStack() as stack:
    tensors, _ = _open(directory, stack)
    _refuse_quantised(directory, tensors)
    return HEAD in tensors and not _head_is_embedding(tensors)


def _head_is_embedding(tensors: Tensors) -> bool:
  """Whether the output head has the values of the embedding, or is the only copy of it."""
  if EMBEDDING not in tensors:
    return True
  embedding, head = (file.get_slice(name) for file, name in (tensors[EMBEDDING], tensors[HEAD]))
  if embedding.get_shape() != head.get_shape():
    return False
  count, width = embedding.get_shape()
  rows = max(1, _COPY_BYTES // (4 * width))
  parts = (slice(i, min(i + rows, count)) for i in range(0, count, rows))
  return all(np.array_equal(embedding[part], head[part]) for part in parts)


def _refuse_quantised(directory: pathlib.Path, tensors: Tensors) -> None:
  for name, (file, stored_name) in tensors.items():
    dtype = file.get_slice(stored_name).get_dtype()
    if name.endswith(_QUANTISED) or dtype not in _FLOATS:
      raise CheckpointError(
        f"{directory}: the weights are quantised ({name} is stored as {dtype}), which cannot be "
        "trained; give the model's folder without quantisation"
      )


def _misfits(table: list[Entry], tensors: Tensors) -> list[str]:
  expected = {short_name(name): list(entry.file_shape) for entry in table for name in entry.names}
  found = {name: file.get_slice(stored).get_shape() for name, (file, stored) in tensors.items()}
  return mismatches(expected, found, "file")


def _summary(problems: list[str]) -> str:
  """The first problems; a whole model has hundreds."""
  more = len(problems) - _LISTED
  return "; ".join(problems[:_LISTED]) + (f"; and {more} more such tensors" if more > 0 else "")


def _assemble(
  entry: Entry, tensors: Tensors, dtype: np.dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
  """One parameter: each tensor is read once and cut into the shards of this process' devices."""
  index_of = sharding.addressable_devices_indices_map(entry.full_shape)
  distinct = {str(index): index for index in index_of.values() if index is not None}
  shape = sharding.shard_shape(entry.full_shape)
  parts = {key: _aligned(shape, dtype) for key in distinct}
  for layer, name in enumerate(entry.names):
    file, stored_name = tensors[short_name(name)]
    if not entry.layers and not entry.kernel:
      for key, index in distinct.items():
        _copy(file.get_slice(stored_name), index, parts[key])
      continue
    array = entry.read(file.get_tensor(stored_name))
    for key, index in distinct.items():
      layers = range(entry.layers)[index[0]] if entry.layers else ()
      if not entry.layers:
        parts[key][...] = array[index]
      elif layer in layers:
        parts[key][layers.index(layer)] = array[index[1:]]
  shards = [jax.device_put(parts[str(index)], device) for device, index in index_of.items()]
  return jax.make_array_from_single_device_arrays(entry.full_shape, sharding, shards)


def _copy(source: Any, index: tuple[slice, ...], out: np.ndarray) -> None:
  """Copies a slice of a tensor into `out`, some rows at a time, because tables are large."""
  rows = max(1, _COPY_BYTES // max(out[0].nbytes, 1))
  first = index[0].start or 0
  for i in range(0, len(out), rows):
    end = min(i + rows, len(out))
    out[i:end] = source[(slice(first + i, first + end), *index[1:])]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An uninitialised array aligned to 64 bytes, which a CPU device takes without a copy."""
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)


# --- writing -----------------------------------------------------------------------------------


def save(
  params: Params, cfg: QwenVLConfig, directory: pathlib.Path, file_bytes: int = _FILE_BYTES
) -> None:
  """Writes config.json and the tensors in the dtype of the parameters; `load` returns equal bits.

  Args:
    params: stacked.
    cfg: config of the policy.
    directory: created if missing; weights in it are replaced.
    file_bytes: size of one file. More files are numbered and listed in the index.

  Raises:
    CheckpointError: if a parameter is missing, unknown or of another shape than in `cfg`.
    UserError: I/O, e.g. if the disk is full.
  """
  table = name_table(cfg)
  flat = _checked(params, table)
  directory.mkdir(parents=True, exist_ok=True)
  for name in (WEIGHTS, INDEX):  # the first would hide new shards, the second names old ones
    (directory / name).unlink(missing_ok=True)
  groups = _file_groups(table, flat, file_bytes)
  names = [WEIGHTS]
  if len(groups) > 1:
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
  file_of, total = {}, 0
  for name, group in zip(names, groups, strict=True):
    tensors = {}
    for entry in group:
      tensors |= _tensors(entry, np.asarray(flat[entry.path]))
    _write(tensors, directory / name)
    file_of |= dict.fromkeys(tensors, name)
    total += sum(tensor.nbytes for tensor in tensors.values())
  if len(groups) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")
  hf = {**config.to_hf(cfg), "torch_dtype": str(flat[table[0].path].dtype)}
  write_text(directory / CONFIG, json.dumps(hf, indent=2) + "\n")


def _write(tensors: dict[str, np.ndarray], path: pathlib.Path) -> None:
  try:
    save_file(tensors, path, metadata={"format": "pt"})  # transformers requires "pt"
  except safetensors.SafetensorError as error:  # the code of the system is in its text alone
    code = re.search(r"\(os error (\d+)\)", str(error))
    line = system_error(OSError(int(code[1]), ""), path) if code else None
    if line is None:
      raise
    raise line from error
  path.chmod(0o644)  # the library creates files that only the owner can read


def _checked(params: Params, table: list[Entry]) -> dict[str, jax.Array]:
  """Path -> parameter, all of the shapes in the table."""
  flat = param_tree.flatten(params)
  expected = {entry.path: list(entry.full_shape) for entry in table}
  found = {path: list(leaf.shape) for path, leaf in flat.items()}
  if problems := mismatches(expected, found, "policy"):
    raise CheckpointError("cannot save parameters: " + _summary(problems))
  return flat


def _file_groups(
  table: list[Entry], flat: dict[str, jax.Array], file_bytes: int
) -> list[list[Entry]]:
  """The parameters of each file, in order. A parameter larger than a file has its own file."""
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
