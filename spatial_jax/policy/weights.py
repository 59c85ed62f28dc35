"""Hugging Face safetensors <-> parameters, by one strict table of names.

model.layers.{i}.self_attn.q_proj.weight  [H*C, D]         in the file, per layer
decoder/layers/attn/q/kernel              [L, D, H, C]     here, stacked
"""

import contextlib
import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 only once this is imported)
import numpy as np
import safetensors
from safetensors.numpy import save_file

from spatial_jax.errors import CheckpointError
from spatial_jax.policy import config as config_lib
from spatial_jax.policy.config import DecoderConfig, QwenVLConfig, VisionConfig
from spatial_jax.types import Params

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

# Files written by transformers 5 in memory order name the two halves of the model in full.
_ALIASES = (("model.language_model.", "model."), ("model.visual.", "visual."))


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter and the tensors of the file it is made of.

  Attributes:
    path: ours, "decoder/layers/attn/q/kernel".
    name: the file's, with "{}" for the layer when stacked.
    file_shape: of each tensor in the file.
    shape: ours, without the layer axis.
    layers: how many tensors are stacked; 0 when the parameter is not stacked.
    kernel: the file holds [out, in], ours is [in, out] (either side may be several axes).
  """

  path: str
  name: str
  file_shape: tuple[int, ...]
  shape: tuple[int, ...]
  layers: int
  kernel: bool

  @property
  def names(self) -> list[str]:
    """The tensors in the file."""
    return [self.name.format(i) for i in range(self.layers)] if self.layers else [self.name]

  @property
  def full_shape(self) -> tuple[int, ...]:
    """Of the parameter, with its layer axis."""
    return (self.layers, *self.shape) if self.layers else self.shape

  def read(self, tensor: np.ndarray) -> np.ndarray:
    """A tensor of the file in our layout."""
    return (_matrix(tensor).T if self.kernel else tensor).reshape(self.shape)

  def write(self, array: np.ndarray) -> np.ndarray:
    """The inverse of `read`."""
    flipped = array.reshape(-1, self.file_shape[0]).T if self.kernel else array
    return np.ascontiguousarray(flipped).reshape(self.file_shape)


def _matrix(tensor: np.ndarray) -> np.ndarray:
  return tensor.reshape(tensor.shape[0], -1)


def _kernel(path: str, name: str, inputs: tuple, outputs: tuple, layers: int = 0) -> list[Entry]:
  file_shape = (int(np.prod(outputs)), int(np.prod(inputs)))
  return [Entry(f"{path}/kernel", f"{name}.weight", file_shape, inputs + outputs, layers, True)]


def _bias(path: str, name: str, shape: tuple, layers: int = 0) -> list[Entry]:
  size = (int(np.prod(shape)),)
  return [Entry(f"{path}/bias", f"{name}.bias", size, shape, layers, False)]


def _plain(path: str, name: str, shape: tuple, layers: int = 0) -> list[Entry]:
  return [Entry(path, name, shape, shape, layers, False)]


def _decoder_table(cfg: DecoderConfig) -> list[Entry]:
  D, H, K, C, F, L = (
    *(cfg.width, cfg.heads, cfg.kv_heads),
    *(cfg.head_dim, cfg.mlp_width, cfg.layers),
  )
  ours, theirs = "decoder/layers", "model.layers.{}"
  table = _plain("decoder/embed/embedding", "model.embed_tokens.weight", (cfg.vocabulary, D))
  table += _plain("decoder/norm/scale", "model.norm.weight", (D,))
  if not cfg.tied:
    table += _plain("decoder/head/embedding", "lm_head.weight", (cfg.vocabulary, D))
  table += _plain(f"{ours}/attn_norm/scale", f"{theirs}.input_layernorm.weight", (D,), L)
  table += _plain(f"{ours}/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight", (D,), L)
  for one, heads in (("q", H), ("k", K), ("v", K)):
    name = f"{theirs}.self_attn.{one}_proj"
    table += _kernel(f"{ours}/attn/{one}", name, (D,), (heads, C), L)
    table += _bias(f"{ours}/attn/{one}", name, (heads, C), L)
  table += _kernel(f"{ours}/attn/o", f"{theirs}.self_attn.o_proj", (H, C), (D,), L)
  for one, inputs, outputs in (("gate", D, F), ("up", D, F), ("down", F, D)):
    table += _kernel(f"{ours}/mlp/{one}", f"{theirs}.mlp.{one}_proj", (inputs,), (outputs,), L)
  return table


def _vision_table(cfg: VisionConfig, decoder_width: int) -> list[Entry]:
  E, H, F, L, p = cfg.width, cfg.heads, cfg.mlp_width, cfg.layers, cfg.patch_size
  C, merged = E // H, E * cfg.merge_size**2
  ours, theirs = "vision/blocks", "visual.blocks.{}"
  conv = (E, 3, cfg.temporal_size, p, p)
  name = "visual.patch_embed.proj.weight"
  table = [Entry("vision/patch/kernel", name, conv, (cfg.patch_values, E), 0, True)]
  table += _plain(f"{ours}/attn_norm/scale", f"{theirs}.norm1.weight", (E,), L)
  table += _plain(f"{ours}/mlp_norm/scale", f"{theirs}.norm2.weight", (E,), L)
  table += _kernel(f"{ours}/qkv", f"{theirs}.attn.qkv", (E,), (3, H, C), L)
  table += _bias(f"{ours}/qkv", f"{theirs}.attn.qkv", (3, H, C), L)
  table += _kernel(f"{ours}/proj", f"{theirs}.attn.proj", (H, C), (E,), L)
  table += _bias(f"{ours}/proj", f"{theirs}.attn.proj", (E,), L)
  for one, inputs, outputs in (("gate", E, F), ("up", E, F), ("down", F, E)):
    table += _kernel(f"{ours}/mlp/{one}", f"{theirs}.mlp.{one}_proj", (inputs,), (outputs,), L)
    table += _bias(f"{ours}/mlp/{one}", f"{theirs}.mlp.{one}_proj", (outputs,), L)
  table += _plain("vision/merger_norm/scale", "visual.merger.ln_q.weight", (E,))
  for path, name, outputs in (("in", "0", merged), ("out", "2", decoder_width)):
    path, name = f"vision/merger_{path}", f"visual.merger.mlp.{name}"
    table += _kernel(path, name, (merged,), (outputs,)) + _bias(path, name, (outputs,))
  return table


def name_table(cfg: QwenVLConfig) -> list[Entry]:
  """Every parameter of the policy and its name in a Hugging Face checkpoint."""
  return _decoder_table(cfg.decoder) + _vision_table(cfg.vision, cfg.decoder.width)


# --- reading -----------------------------------------------------------------------------------


def read_config(directory: pathlib.Path) -> QwenVLConfig:
  """The config of a Hugging Face checkpoint.

  Raises:
    CheckpointError: on the host, I/O: no config.json, not JSON, or another kind of model.
  """
  try:
    return config_lib.from_hf(json.loads((directory / CONFIG).read_text()))
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
  """Tensor name -> (file, its name there), and names that occur more than once."""
  tensors, names = {}, Counter()
  for path in _files(directory):
    try:
      file = stack.enter_context(safetensors.safe_open(path, "np"))
    except safetensors.SafetensorError as error:
      raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    for name in file.keys():  # noqa: SIM118  (not a dict)
      plain = name
      for alias, short in _ALIASES:
        plain = short + plain[len(alias) :] if plain.startswith(alias) else plain
      tensors[plain] = (file, name)
      names[plain] += 1
  return tensors, [name for name, count in names.items() if count > 1]


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
  if (directory / INDEX).exists():
    names = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
  else:
    names = [WEIGHTS]
  missing = [name for name in names if not (directory / name).exists()]
  if missing:
    raise CheckpointError(f"{directory} has no {', '.join(missing)}: is it a checkpoint directory?")
  return [directory / name for name in names]


def _misfits(table: list[Entry], tensors: dict) -> list[str]:
  expected = {name: entry.file_shape for entry in table for name in entry.names}
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
  def tensor(name: str) -> np.ndarray:
    file, there = tensors[name]
    return entry.read(file.get_tensor(there))

  def shard(index: Any) -> np.ndarray:
    if not entry.layers:
      return tensor(entry.name)[index].astype(dtype)
    names = entry.names[index[0]]
    return np.stack([tensor(name)[index[1:]].astype(dtype) for name in names])

  return jax.make_array_from_callback(entry.full_shape, sharding, shard)


def insert(params: Params, path: str, array: jax.Array) -> None:
  """Puts an array at "a/b/c" of a nested dict, making the dicts on the way."""
  *folders, leaf = path.split("/")
  for folder in folders:
    params = params.setdefault(folder, {})
  params[leaf] = array


# --- writing -----------------------------------------------------------------------------------


def save(params: Params, cfg: QwenVLConfig, directory: pathlib.Path) -> None:
  """Writes config.json and model.safetensors, in the parameters' dtype; `load` gives the same bits.

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
  tensors = dict(pair for entry in table for pair in _tensors(entry, np.asarray(flat[entry.path])))
  directory.mkdir(parents=True, exist_ok=True)
  save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})  # transformers asks for "pt"
  (directory / CONFIG).write_text(json.dumps(config_lib.to_hf(cfg), indent=2) + "\n")


def _tensors(entry: Entry, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
  if not entry.layers:
    yield entry.name, entry.write(array)
    return
  for name, layer in zip(entry.names, array, strict=True):
    yield name, entry.write(layer)
