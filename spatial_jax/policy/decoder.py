"""One decoder layer and the stack of all layers; one module serves every mode of attention."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spatial_jax.policy import attention_modes, rope
from spatial_jax.policy.attention_mass import AttentionMass
from spatial_jax.policy.attention_modes import AttentionMode
from spatial_jax.policy.cache import KV, Suffix
from spatial_jax.policy.config import DecoderConfig
from spatial_jax.policy.layers import GatedMLP, RMSNorm, scanned


class Angles(NamedTuple):
  """Cosine and sine of the rotary angles, float32 [..., C/2]."""

  cos: jax.Array
  sin: jax.Array


class DeepStackFeatures(NamedTuple):
  """Image features that are added to the hidden states after the first layers."""

  features_MYD: jax.Array  # stream 1 + l is added after layer l
  feature_RT: jax.Array  # int32, row of `features_MYD` for each token, -1 for text

  def add(self, x_RTD: jax.Array, layer: jax.Array) -> jax.Array:
    """The output of the layer with index `layer` (int32 []) plus the features of its stream."""
    streams = self.features_MYD.shape[1]

    def add_stream(x_RTD: jax.Array) -> jax.Array:
      stream_MD = jnp.take(self.features_MYD, layer + 1, axis=1, mode="clip")
      feature_RTD = jnp.take(stream_MD, self.feature_RT, axis=0, mode="clip").astype(x_RTD.dtype)
      return x_RTD + jnp.where(self.feature_RT[..., None] >= 0, feature_RTD, 0)

    return jax.lax.cond(layer + 1 < streams, add_stream, lambda x_RTD: x_RTD, x_RTD)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  cfg: DecoderConfig
  dtype: jnp.dtype
  mesh: Mesh | None

  @nn.compact
  def __call__(
    self, x_RTD: jax.Array, angles: Angles, mode: AttentionMode
  ) -> tuple[jax.Array, KV | Suffix | AttentionMass]:
    """The output, and the keys and values as `attention_modes.attend` returns them."""
    cfg = self.cfg

    def project(heads: int, name: str) -> jax.Array:
      shape = (heads, cfg.head_dim)
      dense = nn.DenseGeneral(shape, use_bias=cfg.qkv_bias, dtype=self.dtype, name=name)
      return jnp.swapaxes(dense(x_RTD), 1, 2)

    def project_and_rotate(heads: int, name: str) -> jax.Array:
      x_RHTC = project(heads, name)
      if cfg.qk_norm:
        x_RHTC = RMSNorm(cfg.norm_eps, self.dtype, name=f"{name}_norm")(x_RHTC)
      return rope.rotate(x_RHTC, angles.cos[:, None], angles.sin[:, None])

    q_RHTC = project_and_rotate(cfg.heads, "q")
    new = KV(project_and_rotate(cfg.kv_heads, "k"), project(cfg.kv_heads, "v"))
    rows, tokens = x_RTD.shape[:2]
    q_RKQTC = q_RHTC.reshape(rows, cfg.kv_heads, -1, tokens, cfg.head_dim)
    out, kv = attention_modes.attend(mode, q_RKQTC, new, self.mesh)
    out_RTHC = jnp.swapaxes(out.reshape(q_RHTC.shape), 1, 2)
    dense = nn.DenseGeneral(cfg.width, axis=(-2, -1), use_bias=False, dtype=self.dtype, name="o")
    return dense(out_RTHC), kv


class DecoderLayer(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), then x + DeepStack features.

  Returns x, and keys and values as `Attention` returns them (None unless `return_kv`).
  """

  cfg: DecoderConfig
  dtype: jnp.dtype
  mesh: Mesh | None
  return_kv: bool

  @nn.compact
  def __call__(
    self,
    x_RTD: jax.Array,
    angles: Angles,
    deepstack: DeepStackFeatures | None,
    mode: AttentionMode,
    layer: jax.Array,
  ) -> tuple[jax.Array, KV | Suffix | AttentionMass | None]:
    cfg = self.cfg

    def norm(name: str) -> RMSNorm:
      return RMSNorm(cfg.norm_eps, self.dtype, name=name)

    attended, kv = Attention(cfg, self.dtype, self.mesh, name="attn")(
      norm("attn_norm")(x_RTD), angles, mode
    )
    x_RTD = x_RTD + attended
    x_RTD = x_RTD + GatedMLP(cfg.mlp_width, False, self.dtype, name="mlp")(norm("mlp_norm")(x_RTD))
    x_RTD = deepstack.add(x_RTD, layer) if deepstack is not None else x_RTD
    return x_RTD, kv if self.return_kv else None


class DecoderStack(nn.Module):
  """All layers by scan: parameters are stacked under "layers", `mode` by `stack_layers`."""

  cfg: DecoderConfig
  dtype: jnp.dtype
  mesh: Mesh | None
  return_kv: bool
  remat: bool

  @nn.compact
  def __call__(
    self, x_RTD: jax.Array, angles: Angles, deepstack: DeepStackFeatures | None, mode: AttentionMode
  ) -> tuple[jax.Array, KV | Suffix | AttentionMass | None]:
    in_axes = (nn.broadcast, nn.broadcast, attention_modes.layer_axes(mode), 0)
    layers = scanned(DecoderLayer, self.cfg.layers, in_axes, self.remat)
    return layers(self.cfg, self.dtype, self.mesh, self.return_kv, name="layers")(
      x_RTD, angles, deepstack, mode, jnp.arange(self.cfg.layers)
    )
