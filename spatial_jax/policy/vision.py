"""The vision tower: patches -> blocks of window or frame attention -> features of 2x2 patches.

    patches ──► blocks ─────────────────────────────► merger ──► stream 0
                  └─ after each layer of `deepstack` ─► merger ──► streams 1 ...    (Qwen3-VL)

All arrays, from patches to features, are in the order of the VisionBatch (windows contiguous).
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spatial_jax.policy import attention, rope
from spatial_jax.policy.config import QwenVLConfig, VisionConfig
from spatial_jax.policy.layers import GatedMLP, PlainMLP, make_norm, scanned
from spatial_jax.types import VisionBatch


class Geometry(NamedTuple):
  """Inputs of every block: rotary angles, float32 [P, 1, C/2], and the fields of VisionBatch."""

  cos: jax.Array
  sin: jax.Array
  window_P: jax.Array
  frame_P: jax.Array
  frame_NS: jax.Array
  slot_P: jax.Array


class Carry(NamedTuple):
  """State between blocks: hidden states, and the outputs of the DeepStack layers so far.

  `deepstack_YPE` is [Y - 1, P, E]; None without DeepStack.
  """

  x_PE: jax.Array
  deepstack_YPE: jax.Array | None


def _window_attention(qkv_P3HC: jax.Array, geometry: Geometry, window: int) -> jax.Array:
  """Attention within window slots, which a reshape makes rows; XLA, because rows are short."""
  patches, _, heads, channels = qkv_P3HC.shape
  rows = qkv_P3HC.reshape(-1, window, 3, heads, channels)
  q, k, v = (jnp.swapaxes(rows[:, :, i], 1, 2) for i in range(3))
  window_WS = geometry.window_P.reshape(-1, window)
  out = attention.attend_xla(q[:, :, None], k, v, window_WS, causal=False)
  return jnp.swapaxes(out[:, :, 0], 1, 2).reshape(patches, heads, channels)


def _frame_attention(qkv_P3HC: jax.Array, geometry: Geometry, mesh: Mesh | None) -> jax.Array:
  """Attention within frames, which are gathered to rows and scattered back."""
  heads, channels = qkv_P3HC.shape[2:]
  rows = jnp.take(qkv_P3HC, geometry.frame_NS, axis=0, mode="fill", fill_value=0)
  frame_NS = jnp.take(geometry.frame_P, geometry.frame_NS, mode="fill", fill_value=0)
  q, k, v = (jnp.swapaxes(rows[:, :, i], 1, 2) for i in range(3))
  out = attention.attend(q[:, :, None], k, v, frame_NS, causal=False, mesh=mesh)
  out_NSHC = jnp.swapaxes(out[:, :, 0], 1, 2)
  return jnp.take(out_NSHC.reshape(-1, heads, channels), geometry.slot_P, axis=0, mode="clip")


class VisionBlock(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)).

  `full`: attention within frames instead of windows. `stream`: index of the block's output in
  `deepstack_YPE`; out of range if the block is not a DeepStack layer.
  """

  cfg: VisionConfig
  dtype: jnp.dtype
  mesh: Mesh | None

  @nn.compact
  def __call__(
    self, carry: Carry, full: jax.Array, stream: jax.Array, geometry: Geometry
  ) -> tuple[Carry, None]:
    cfg, x_PE = self.cfg, carry.x_PE

    def norm(name: str) -> nn.Module:
      return make_norm(cfg.norm, cfg.norm_eps, self.dtype, name)

    qkv = nn.DenseGeneral((3, cfg.heads, cfg.width // cfg.heads), dtype=self.dtype, name="qkv")
    qkv_P3HC = qkv(norm("attn_norm")(x_PE))
    q, k = (rope.rotate(qkv_P3HC[:, i], geometry.cos, geometry.sin) for i in range(2))
    out_PHC = self._attend(jnp.stack([q, k, qkv_P3HC[:, 2]], axis=1), full, geometry)
    proj = nn.DenseGeneral(cfg.width, axis=(-2, -1), dtype=self.dtype, name="proj")
    x_PE = x_PE + proj(out_PHC)
    if cfg.mlp == "gated":
      mlp = GatedMLP(cfg.mlp_width, True, self.dtype, name="mlp")
    else:
      mlp = PlainMLP(cfg.mlp_width, cfg.width, cfg.mlp, self.dtype, name="mlp")
    x_PE = x_PE + mlp(norm("mlp_norm")(x_PE))
    deepstack_YPE = carry.deepstack_YPE
    if deepstack_YPE is not None:
      deepstack_YPE = deepstack_YPE.at[stream].set(x_PE, mode="drop")
    return Carry(x_PE, deepstack_YPE), None

  def _attend(self, qkv_P3HC: jax.Array, full: jax.Array, geometry: Geometry) -> jax.Array:
    if not self.cfg.window_px:
      return _frame_attention(qkv_P3HC, geometry, self.mesh)
    return jax.lax.cond(
      full,
      lambda qkv: _frame_attention(qkv, geometry, self.mesh),
      lambda qkv: _window_attention(qkv, geometry, self.cfg.window_patches),
      qkv_P3HC,
    )


class Merger(nn.Module):
  """mlp of the four concatenated patches of a token.

  `norm_merged`: the norm is applied after the concatenation, else before it.
  """

  norm: Literal["rms", "layer"]
  eps: float
  norm_merged: bool
  merged: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_PE: jax.Array) -> jax.Array:
    norm = make_norm(self.norm, self.eps, self.dtype, "norm")
    if self.norm_merged:
      x = norm(x_PE.reshape(-1, self.merged))
    else:
      x = norm(x_PE).reshape(-1, self.merged)
    return PlainMLP(self.merged, self.width, "gelu", self.dtype, name="mlp")(x)


class PositionTable(nn.Module):
  """Learned positions of a square grid, interpolated bilinearly to the size of each frame."""

  side: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, position_P4: jax.Array) -> jax.Array:
    shape = (self.side**2, self.width)
    table = self.param("embedding", nn.initializers.normal(0.02), shape, jnp.float32)
    last = self.side - 1
    index_P2, size_P2 = position_P4[:, :2], position_P4[:, 2:]
    # In float32 and in the order of the reference: the last patch maps to the last entry.
    steps_P2 = jnp.maximum(size_P2 - 1, 1).astype(jnp.float32)
    source_P2 = (index_P2 * last).astype(jnp.float32) / steps_P2
    low_P2 = jnp.minimum(source_P2.astype(jnp.int32), last)
    high_P2 = jnp.minimum(low_P2 + 1, last)
    high_weight_P2 = source_P2 - low_P2.astype(jnp.float32)
    out_PE = jnp.zeros((len(position_P4), self.width), jnp.float32)
    corners_P2 = ((low_P2, 1 - high_weight_P2), (high_P2, high_weight_P2))
    for row_P2, row_weight_P2 in corners_P2:
      for column_P2, column_weight_P2 in corners_P2:
        index_P = row_P2[:, 0] * self.side + column_P2[:, 1]
        weight_P = row_weight_P2[:, 0] * column_weight_P2[:, 1]
        out_PE += jnp.take(table, index_P, axis=0, mode="clip") * weight_P[:, None]
    return out_PE.astype(self.dtype)


class VisionTower(nn.Module):
  """VisionBatch -> features_MYD: stream 0 from the last block, the others from `deepstack`."""

  cfg: QwenVLConfig
  dtype: jnp.dtype
  mesh: Mesh | None
  remat: bool

  @nn.compact
  def __call__(self, batch: VisionBatch) -> jax.Array:
    cfg = self.cfg.vision
    position_P4 = jnp.asarray(batch.position_P4)
    cos, sin = rope.vision_angles(position_P4[:, :2], cfg.width // cfg.heads)
    indices = (batch.window_P, batch.frame_P, batch.frame_NS, batch.slot_P)
    geometry = Geometry(cos[:, None], sin[:, None], *map(jnp.asarray, indices))
    patch = nn.Dense(cfg.width, use_bias=cfg.patch_bias, dtype=self.dtype, name="patch")
    x_PE = patch(jnp.asarray(batch.patches_PX))
    if cfg.table_side:
      table = PositionTable(cfg.table_side, cfg.width, self.dtype, name="position")
      x_PE = x_PE + table(position_P4)
    deepstack_YPE = jnp.zeros((cfg.streams - 1, *x_PE.shape), x_PE.dtype) if cfg.deepstack else None
    full_L = np.asarray([layer in cfg.full_layers for layer in range(cfg.layers)])
    stream_L = np.full(cfg.layers, cfg.streams - 1, np.int32)
    stream_L[list(cfg.deepstack)] = np.arange(cfg.streams - 1)
    blocks = scanned(VisionBlock, cfg.layers, (0, 0, nn.broadcast), self.remat)
    carry, _ = blocks(cfg, self.dtype, self.mesh, name="blocks")(
      Carry(x_PE, deepstack_YPE), jnp.asarray(full_L), jnp.asarray(stream_L), geometry
    )
    return self._merge(carry)

  def _merge(self, carry: Carry) -> jax.Array:
    cfg, width = self.cfg.vision, self.cfg.decoder.width
    shape = (cfg.merge_size**2 * cfg.width, width, self.dtype)
    last_MD = Merger(cfg.norm, cfg.norm_eps, False, *shape, name="merger")(carry.x_PE)
    if carry.deepstack_YPE is None:
      return last_MD[:, None]
    each = nn.vmap(
      Merger, in_axes=0, out_axes=1, variable_axes={"params": 0}, split_rngs={"params": True}
    )
    stack_MYD = each(cfg.norm, cfg.norm_eps, True, *shape, name="deepstack")(carry.deepstack_YPE)
    return jnp.concatenate([last_MD[:, None], stack_MYD], axis=1)
