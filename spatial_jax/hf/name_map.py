"""The table of names: each parameter of the policy and its tensors in a Hugging Face checkpoint.

model.layers.{i}.self_attn.q_proj.weight  [H*C, D]         in the file, one tensor per layer
decoder/layers/attn/q/kernel              [L, D, H, C]     the parameter, stacked over layers
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from spatial_jax.policy.config import DecoderConfig, Family, QwenVLConfig, VisionConfig

# Files use both prefixes: the short ones are those of transformers 4, the long ones of 5.
_LONG, _SHORT = ("model.language_model.", "model.visual."), ("model.", "visual.")


def short_name(name: str) -> str:
  """Returns the name of a tensor with the short prefix; files are compared by these names."""
  return _with_prefix(name, _LONG, _SHORT)


def _with_prefix(name: str, old: Sequence[str], new: Sequence[str]) -> str:
  pairs = zip(old, new, strict=True)
  return next((to + name.removeprefix(of) for of, to in pairs if name.startswith(of)), name)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter and its tensors in the file."""

  path: str  # of the parameter, "decoder/layers/attn/q/kernel"
  name: str  # of the tensor, with "{}" for the layer if stacked
  file_shape: tuple[int, ...]  # of each tensor
  shape: tuple[int, ...]  # of the parameter without the layer axis
  layers: int  # number of stacked tensors; 0 if the parameter is not stacked
  kernel: bool  # the tensor is [out, in], the parameter [in, out]; either may be several axes

  @property
  def names(self) -> list[str]:
    """Names of the tensors in the file."""
    return [self.name.format(i) for i in range(self.layers)] if self.layers else [self.name]

  @property
  def full_shape(self) -> tuple[int, ...]:
    """Shape of the parameter with its layer axis."""
    return (self.layers, *self.shape) if self.layers else self.shape

  def read(self, tensor: np.ndarray) -> np.ndarray:
    """Returns a tensor of the file in the layout of the parameter."""
    if self.kernel:
      tensor = tensor.reshape(tensor.shape[0], -1).T
    return tensor.reshape(self.shape)

  def write(self, array: np.ndarray) -> np.ndarray:
    """Returns a layer of the parameter in the layout of the file; the inverse of `read`."""
    transposed = array.reshape(-1, self.file_shape[0]).T if self.kernel else array
    return np.ascontiguousarray(transposed).reshape(self.file_shape)


def _kernel(path: str, name: str, inputs: tuple, outputs: tuple, layers: int = 0) -> list[Entry]:
  file_shape = (int(np.prod(outputs)), int(np.prod(inputs)))
  return [Entry(f"{path}/kernel", f"{name}.weight", file_shape, inputs + outputs, layers, True)]


def _bias(path: str, name: str, shape: tuple, layers: int = 0) -> list[Entry]:
  size = (int(np.prod(shape)),)
  return [Entry(f"{path}/bias", f"{name}.bias", size, shape, layers, False)]


def _dense(path: str, name: str, inputs: tuple, outputs: tuple, layers: int = 0) -> list[Entry]:
  return _kernel(path, name, inputs, outputs, layers) + _bias(path, name, outputs, layers)


def _plain(path: str, name: str, shape: tuple, layers: int = 0) -> list[Entry]:
  return [Entry(path, name, shape, shape, layers, False)]


def _scale(path: str, name: str, width: int, layers: int = 0) -> list[Entry]:
  return _plain(f"{path}/scale", f"{name}.weight", (width,), layers)


def _decoder_table(cfg: DecoderConfig) -> list[Entry]:
  D, H, K, C, F, L = (
    *(cfg.width, cfg.heads, cfg.kv_heads),
    *(cfg.head_dim, cfg.mlp_width, cfg.layers),
  )
  path, name = "decoder/layers", "model.layers.{}"
  table = _plain("decoder/embed/embedding", "model.embed_tokens.weight", (cfg.vocabulary, D))
  table += _scale("decoder/norm", "model.norm", D)
  if not cfg.tied:
    table += _plain("decoder/head/embedding", "lm_head.weight", (cfg.vocabulary, D))
  table += _scale(f"{path}/attn_norm", f"{name}.input_layernorm", D, L)
  table += _scale(f"{path}/mlp_norm", f"{name}.post_attention_layernorm", D, L)
  project = _dense if cfg.qkv_bias else _kernel
  for part, heads in (("q", H), ("k", K), ("v", K)):
    table += project(f"{path}/attn/{part}", f"{name}.self_attn.{part}_proj", (D,), (heads, C), L)
  for part in ("q_norm", "k_norm") if cfg.qk_norm else ():
    table += _scale(f"{path}/attn/{part}", f"{name}.self_attn.{part}", C, L)
  table += _kernel(f"{path}/attn/o", f"{name}.self_attn.o_proj", (H, C), (D,), L)
  for part, inputs, outputs in (("gate", D, F), ("up", D, F), ("down", F, D)):
    table += _kernel(f"{path}/mlp/{part}", f"{name}.mlp.{part}_proj", (inputs,), (outputs,), L)
  return table


def _norm(cfg: VisionConfig, path: str, name: str, width: int, layers: int = 0) -> list[Entry]:
  bias = _bias(path, name, (width,), layers) if cfg.norm == "layer" else []
  return _scale(path, name, width, layers) + bias


def _vision_table(cfg: VisionConfig, family: Family, decoder_width: int) -> list[Entry]:
  E, H, F, L, p = cfg.width, cfg.heads, cfg.mlp_width, cfg.layers, cfg.patch_size
  path, name = "vision/blocks", "visual.blocks.{}"
  conv, patch = (E, 3, cfg.temporal_size, p, p), "visual.patch_embed.proj"
  table = [Entry("vision/patch/kernel", f"{patch}.weight", conv, (cfg.patch_values, E), 0, True)]
  table += _bias("vision/patch", patch, (E,)) if cfg.patch_bias else []
  if cfg.table_side:
    shape = (cfg.table_side**2, E)
    table += _plain("vision/position/embedding", "visual.pos_embed.weight", shape)
  table += _norm(cfg, f"{path}/attn_norm", f"{name}.norm1", E, L)
  table += _norm(cfg, f"{path}/mlp_norm", f"{name}.norm2", E, L)
  table += _dense(f"{path}/qkv", f"{name}.attn.qkv", (E,), (3, H, E // H), L)
  table += _dense(f"{path}/proj", f"{name}.attn.proj", (H, E // H), (E,), L)
  gated = (("gate", "gate_proj", E, F), ("up", "up_proj", E, F), ("down", "down_proj", F, E))
  first, second = ("fc1", "fc2") if family == "qwen2_vl" else ("linear_fc1", "linear_fc2")
  two_layers = (("up", first, E, F), ("down", second, F, E))
  for part, file_part, inputs, outputs in gated if cfg.mlp == "gated" else two_layers:
    table += _dense(f"{path}/mlp/{part}", f"{name}.mlp.{file_part}", (inputs,), (outputs,), L)
  return table + _merger_table(cfg, family, decoder_width)


def _merger_table(cfg: VisionConfig, family: Family, decoder_width: int) -> list[Entry]:
  E, merged, later = cfg.width, cfg.width * cfg.merge_size**2, cfg.streams - 1
  names = (
    ("norm", "linear_fc1", "linear_fc2") if family == "qwen3_vl" else ("ln_q", "mlp.0", "mlp.2")
  )
  norm, up, down = (f"visual.merger.{name}" for name in names)
  table = _norm(cfg, "vision/merger/norm", norm, E)
  table += _dense("vision/merger/mlp/up", up, (merged,), (merged,))
  table += _dense("vision/merger/mlp/down", down, (merged,), (decoder_width,))
  if later:
    path, name = "vision/deepstack", "visual.deepstack_merger_list.{}"
    table += _norm(cfg, f"{path}/norm", f"{name}.norm", merged, later)
    table += _dense(f"{path}/mlp/up", f"{name}.linear_fc1", (merged,), (merged,), later)
    table += _dense(f"{path}/mlp/down", f"{name}.linear_fc2", (merged,), (decoder_width,), later)
  return table


def name_table(cfg: QwenVLConfig) -> list[Entry]:
  """Returns an entry for each parameter of a policy, with the names of its family."""
  table = _decoder_table(cfg.decoder) + _vision_table(cfg.vision, cfg.family, cfg.decoder.width)
  if cfg.family != "qwen3_vl":
    return table
  return [
    dataclasses.replace(entry, name=_with_prefix(entry.name, _SHORT, _LONG)) for entry in table
  ]
