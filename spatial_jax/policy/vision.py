"""The vision tower: patches -> blocks of window or frame attention -> a feature per 2x2 patches.

All arrays stay in the order of the VisionBatch (windows contiguous), from patches to features.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spatial_jax.policy import attention, rope
from spatial_jax.policy.config import QwenVLConfig, VisionConfig
from spatial_jax.policy.decoder import GatedMLP, RMSNorm, scanned
from spatial_jax.types import VisionBatch


class Geometry(NamedTuple):
  """What every block reads: rotary angles float32 [P, 1, C/2], and where windows and frames lie."""

  cos: jax.Array
  sin: jax.Array
  valid_P: jax.Array
  frame_NS: jax.Array
  slot_P: jax.Array


def _window_attention(qkv_P3HC: jax.Array, geometry: Geometry, window: int) -> jax.Array:
  """Windows as rows, by reshape. Rows are short (64 patches): plain matmuls on every platform."""
  patches, _, heads, channels = qkv_P3HC.shape
  rows = qkv_P3HC.reshape(-1, window, 3, heads, channels)
  q, k, v = (jnp.swapaxes(rows[:, :, i], 1, 2) for i in range(3))
  out = attention.attend_xla(
    q[:, :, None], k, v, geometry.valid_P.reshape(-1, window), causal=False
  )
  return jnp.swapaxes(out[:, :, 0], 1, 2).reshape(patches, heads, channels)


def _frame_attention(qkv_P3HC: jax.Array, geometry: Geometry, mesh: Mesh | None) -> jax.Array:
  """Frames as rows, gathered and put back by index."""
  patches, _, heads, channels = qkv_P3HC.shape
  rows = jnp.take(qkv_P3HC, geometry.frame_NS, axis=0, mode="fill", fill_value=0)
  q, k, v = (jnp.swapaxes(rows[:, :, i], 1, 2) for i in range(3))
  out = attention.attend(q[:, :, None], k, v, geometry.frame_NS < patches, causal=False, mesh=mesh)
  out_NSHC = jnp.swapaxes(out[:, :, 0], 1, 2)
  return jnp.take(out_NSHC.reshape(-1, heads, channels), geometry.slot_P, axis=0, mode="clip")


class VisionBlock(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); `full` chooses frames over windows."""

  cfg: VisionConfig
  dtype: jnp.dtype
  mesh: Mesh | None

  @nn.compact
  def __call__(
    self, x_PE: jax.Array, full: jax.Array, geometry: Geometry
  ) -> tuple[jax.Array, None]:
    cfg = self.cfg

    def norm(name: str) -> RMSNorm:
      return RMSNorm(cfg.norm_eps, self.dtype, name=name)

    qkv = nn.DenseGeneral((3, cfg.heads, cfg.width // cfg.heads), dtype=self.dtype, name="qkv")
    qkv_P3HC = qkv(norm("attn_norm")(x_PE))
    q, k = (rope.rotate(qkv_P3HC[:, i], geometry.cos, geometry.sin) for i in range(2))
    qkv_P3HC = jnp.stack([q, k, qkv_P3HC[:, 2]], axis=1)
    window = (cfg.window_blocks * cfg.merge_size) ** 2
    out_PHC = jax.lax.cond(
      full,
      lambda qkv: _frame_attention(qkv, geometry, self.mesh),
      lambda qkv: _window_attention(qkv, geometry, window),
      qkv_P3HC,
    )
    proj = nn.DenseGeneral(cfg.width, axis=(-2, -1), dtype=self.dtype, name="proj")
    x_PE = x_PE + proj(out_PHC)
    x_PE = x_PE + GatedMLP(cfg.mlp_width, True, self.dtype, name="mlp")(norm("mlp_norm")(x_PE))
    return x_PE, None


class VisionTower(nn.Module):
  """patches_PX -> features_MD."""

  cfg: QwenVLConfig
  dtype: jnp.dtype
  mesh: Mesh | None
  remat: bool

  @nn.compact
  def __call__(self, batch: VisionBatch) -> jax.Array:
    cfg = self.cfg.vision
    cos, sin = rope.vision_angles(jnp.asarray(batch.position_P2), cfg.width // cfg.heads)
    geometry = Geometry(
      cos[:, None], sin[:, None], *map(jnp.asarray, (batch.valid_P, batch.frame_NS, batch.slot_P))
    )
    patch = nn.Dense(cfg.width, use_bias=False, dtype=self.dtype, name="patch")
    x_PE = patch(jnp.asarray(batch.patches_PX))
    full_L = jnp.asarray([layer in cfg.full_layers for layer in range(cfg.layers)])
    blocks = scanned(VisionBlock, cfg.layers, (0, nn.broadcast), self.remat)
    x_PE, _ = blocks(cfg, self.dtype, self.mesh, name="blocks")(x_PE, full_L, geometry)
    x_PE = RMSNorm(cfg.norm_eps, self.dtype, name="merger_norm")(x_PE)
    merged = x_PE.reshape(-1, cfg.merge_size**2 * cfg.width)
    merged = nn.Dense(merged.shape[-1], dtype=self.dtype, name="merger_in")(merged)
    merged = nn.gelu(merged, approximate=False)
    return nn.Dense(self.cfg.decoder.width, dtype=self.dtype, name="merger_out")(merged)
