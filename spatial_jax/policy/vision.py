"""The vision tower: patches -> blocks of window or frame attention -> features per 2x2 patches.

    patches ──► blocks ─────────────────────────────► merger ──► stream 0
                  └─ after each layer of `deepstack` ─► merger ──► streams 1 ...    (Qwen3-VL)

All arrays stay in the order of the VisionBatch (windows contiguous), from patches to features.
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
  """What every block reads: rotary angles float32 [P, 1, C/2], and where windows and frames lie."""

  cos: jax.Array
  sin: jax.Array
  window_P: jax.Array
  frame_P: jax.Array
  frame_NS: jax.Array
  slot_P: jax.Array


class Carry(NamedTuple):
  """What goes from block to block: the patches, and those kept for DeepStack, [Y - 1, P, E]."""

  x_PE: jax.Array
  kept_YPE: jax.Array | None


def _window_attention(qkv_P3HC: jax.Array, geometry: Geometry, window: int) -> jax.Array:
  """Slots as rows, by reshape. Rows are short (64 patches): plain matmuls on every platform."""
  patches, _, heads, channels = qkv_P3HC.shape
  rows = qkv_P3HC.reshape(-1, window, 3, heads, channels)
  q, k, v = (jnp.swapaxes(rows[:, :, i], 1, 2) for i in range(3))
  window_WS = geometry.window_P.reshape(-1, window)
  out = attention.attend_xla(q[:, :, None], k, v, window_WS, causal=False)
  return jnp.swapaxes(out[:, :, 0], 1, 2).reshape(patches, heads, channels)


def _frame_attention(qkv_P3HC: jax.Array, geometry: Geometry, mesh: Mesh | None) -> jax.Array:
  """Frames as rows, gathered and put back by index."""
  heads, channels = qkv_P3HC.shape[2:]
  rows = jnp.take(qkv_P3HC, geometry.frame_NS, axis=0, mode="fill", fill_value=0)
  number_NS = jnp.take(geometry.frame_P, geometry.frame_NS, mode="fill", fill_value=0)
  q, k, v = (jnp.swapaxes(rows[:, :, i], 1, 2) for i in range(3))
  out = attention.attend(q[:, :, None], k, v, number_NS, causal=False, mesh=mesh)
  out_NSHC = jnp.swapaxes(out[:, :, 0], 1, 2)
  return jnp.take(out_NSHC.reshape(-1, heads, channels), geometry.slot_P, axis=0, mode="clip")


class VisionBlock(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)).

  Called with the carry, whether the block sees `full` frames or windows, and the `keep_slot` of
  its output among those kept (one behind the last: not kept).
  """

  cfg: VisionConfig
  dtype: jnp.dtype
  mesh: Mesh | None

  @nn.compact
  def __call__(
    self, carry: Carry, full: jax.Array, keep_slot: jax.Array, geometry: Geometry
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
    kept_YPE = carry.kept_YPE
    if kept_YPE is not None:
      kept_YPE = kept_YPE.at[keep_slot].set(x_PE, mode="drop")
    return Carry(x_PE, kept_YPE), None

  def _attend(self, qkv_P3HC: jax.Array, full: jax.Array, geometry: Geometry) -> jax.Array:
    if not self.cfg.window_px:
      return _frame_attention(qkv_P3HC, geometry, self.mesh)
    window = (self.cfg.window_blocks * self.cfg.merge_size) ** 2
    return jax.lax.cond(
      full,
      lambda qkv: _frame_attention(qkv, geometry, self.mesh),
      lambda qkv: _window_attention(qkv, geometry, window),
      qkv_P3HC,
    )


class Merger(nn.Module):
  """mlp of the four patches of a token side by side; the norm comes before or after they are."""

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


class Table(nn.Module):
  """Learned positions of a square, bilinearly interpolated so that its corners are a frame's."""

  side: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, position_P4: jax.Array) -> jax.Array:
    shape = (self.side**2, self.width)
    table = self.param("embedding", nn.initializers.normal(0.02), shape, jnp.float32)
    last = self.side - 1
    place_P2, size_P2 = position_P4[:, :2], position_P4[:, 2:]
    # In float32 and in this order, as the reference: the last patch falls on the last entry.
    steps_P2 = jnp.maximum(size_P2 - 1, 1).astype(jnp.float32)
    source_P2 = (place_P2 * last).astype(jnp.float32) / steps_P2
    low_P2 = jnp.minimum(source_P2.astype(jnp.int32), last)
    high_P2 = jnp.minimum(low_P2 + 1, last)
    far_P2 = source_P2 - low_P2.astype(jnp.float32)
    out_PE = jnp.zeros((len(position_P4), self.width), jnp.float32)
    for row_P, by_row_P in ((low_P2[:, 0], 1 - far_P2[:, 0]), (high_P2[:, 0], far_P2[:, 0])):
      for col_P, by_col_P in ((low_P2[:, 1], 1 - far_P2[:, 1]), (high_P2[:, 1], far_P2[:, 1])):
        corner_PE = jnp.take(table, row_P * self.side + col_P, axis=0, mode="clip")
        out_PE += corner_PE * (by_row_P * by_col_P)[:, None]
    return out_PE.astype(self.dtype)


class VisionTower(nn.Module):
  """VisionBatch -> features_MYD: stream 0 behind the last block, the others behind `deepstack`."""

  cfg: QwenVLConfig
  dtype: jnp.dtype
  mesh: Mesh | None
  remat: bool

  @nn.compact
  def __call__(self, batch: VisionBatch) -> jax.Array:
    cfg = self.cfg.vision
    position_P4 = jnp.asarray(batch.position_P4)
    cos, sin = rope.vision_angles(position_P4[:, :2], cfg.width // cfg.heads)
    places = (batch.window_P, batch.frame_P, batch.frame_NS, batch.slot_P)
    geometry = Geometry(cos[:, None], sin[:, None], *map(jnp.asarray, places))
    patch = nn.Dense(cfg.width, use_bias=cfg.patch_bias, dtype=self.dtype, name="patch")
    x_PE = patch(jnp.asarray(batch.patches_PX))
    if cfg.table_side:
      x_PE = x_PE + Table(cfg.table_side, cfg.width, self.dtype, name="position")(position_P4)
    kept_YPE = jnp.zeros((cfg.streams - 1, *x_PE.shape), x_PE.dtype) if cfg.deepstack else None
    full_L = np.asarray([layer in cfg.full_layers for layer in range(cfg.layers)])
    slot_L = np.full(cfg.layers, cfg.streams - 1, np.int32)
    slot_L[list(cfg.deepstack)] = np.arange(cfg.streams - 1)
    blocks = scanned(VisionBlock, cfg.layers, (0, 0, nn.broadcast), self.remat)
    carry, _ = blocks(cfg, self.dtype, self.mesh, name="blocks")(
      Carry(x_PE, kept_YPE), jnp.asarray(full_L), jnp.asarray(slot_L), geometry
    )
    return self._merge(carry)

  def _merge(self, carry: Carry) -> jax.Array:
    cfg, width = self.cfg.vision, self.cfg.decoder.width
    shape = (cfg.merge_size**2 * cfg.width, width, self.dtype)
    last_MD = Merger(cfg.norm, cfg.norm_eps, False, *shape, name="merger")(carry.x_PE)
    if carry.kept_YPE is None:
      return last_MD[:, None]
    each = nn.vmap(
      Merger, in_axes=0, out_axes=1, variable_axes={"params": 0}, split_rngs={"params": True}
    )
    stack_MYD = each(cfg.norm, cfg.norm_eps, True, *shape, name="deepstack")(carry.kept_YPE)
    return jnp.concatenate([last_MD[:, None], stack_MYD], axis=1)
