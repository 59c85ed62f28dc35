"""One decoder layer, for whole rows and against a cache: the same module, the same parameters."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spatial_jax.policy import attention, cache, rope
from spatial_jax.policy.cache import KV
from spatial_jax.policy.config import DecoderConfig


class Angles(NamedTuple):
  """Cosine and sine of the rotary angles, float32 [..., C/2]."""

  cos: jax.Array
  sin: jax.Array


class CacheView(NamedTuple):
  """How the rows of a call lie in the cache; the same for every layer.

  Attributes:
    prefix_length_B: int32, valid keys of the prefixes read; R = B*G rows, ordered by prompt.
    start_R: int32, own tokens before this call; None: none before, and none are kept.
    prompt_B: int32, which prefixes of the cache are read; None for all of them.
    slot_R: int32, which rows of the cache are read and extended; None for all of them.
  """

  prefix_length_B: jax.Array
  start_R: jax.Array | None
  prompt_B: jax.Array | None
  slot_R: jax.Array | None


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) in float32, rounded to the compute dtype, times scale."""

  eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
    scale = scale.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return x.astype(self.dtype) * scale


class GatedMLP(nn.Module):
  """down(silu(gate(x)) * up(x))."""

  mlp_width: int
  use_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def dense(width: int, name: str) -> nn.Dense:
      return nn.Dense(width, use_bias=self.use_bias, dtype=self.dtype, name=name)

    gate = nn.silu(dense(self.mlp_width, "gate")(x))
    return dense(x.shape[-1], "down")(gate * dense(self.mlp_width, "up")(x))


class Attention(nn.Module):
  """Grouped-query attention with rotary positions; bias on q, k, v."""

  cfg: DecoderConfig
  dtype: jnp.dtype
  mesh: Mesh | None

  @nn.compact
  def __call__(
    self,
    x_RTD: jax.Array,
    angles: Angles,
    valid_RT: jax.Array,
    view: CacheView | None,
    layer: tuple[KV, KV | None] | None,
  ) -> tuple[jax.Array, KV]:
    """Returns the output and what to keep: k, v of these tokens, or the layer's updated cache."""
    cfg = self.cfg

    def project(heads: int, name: str) -> jax.Array:
      dense = nn.DenseGeneral((heads, cfg.head_dim), dtype=self.dtype, name=name)
      return jnp.swapaxes(dense(x_RTD), 1, 2)

    cos, sin = angles.cos[:, None], angles.sin[:, None]
    q_RHTC = rope.rotate(project(cfg.heads, "q"), cos, sin)
    new = KV(rope.rotate(project(cfg.kv_heads, "k"), cos, sin), project(cfg.kv_heads, "v"))
    rows, tokens = x_RTD.shape[:2]
    q_RKQTC = q_RHTC.reshape(rows, cfg.kv_heads, -1, tokens, cfg.head_dim)
    if view is None or layer is None:
      keep = new
      out = attention.attend(q_RKQTC, *new, valid_RT, causal=True, mesh=self.mesh)
    elif view.start_R is None or layer[1] is None:
      keep = new
      out = attention.attend_behind(
        q_RKQTC, layer[0], view.prefix_length_B, new, valid_RT, self.mesh
      )
    else:
      prefix, own = (cache.rows(layer[0], view.prompt_B), layer[1])
      keep = cache.write(own, new, view.slot_R, view.start_R, valid_RT)
      own = cache.rows(keep, view.slot_R)
      out = attention.attend_cache(q_RKQTC, prefix, view.prefix_length_B, own, view.start_R)
    out_RTHC = jnp.swapaxes(out.reshape(q_RHTC.shape), 1, 2)
    dense = nn.DenseGeneral(cfg.width, axis=(-2, -1), use_bias=False, dtype=self.dtype, name="o")
    return dense(out_RTHC), keep


class DecoderLayer(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)).

  Without `view` and `layer` rows are whole sequences; with them, `layer` is this layer's prefix and
  own cache, if any. Returns x and, unless `keep` is false, the KV to keep.
  """

  cfg: DecoderConfig
  dtype: jnp.dtype
  mesh: Mesh | None
  keep: bool

  @nn.compact
  def __call__(
    self,
    x_RTD: jax.Array,
    angles: Angles,
    valid_RT: jax.Array,
    view: CacheView | None,
    layer: tuple[KV, KV | None] | None,
  ) -> tuple[jax.Array, KV | None]:
    cfg = self.cfg

    def norm(name: str) -> RMSNorm:
      return RMSNorm(cfg.norm_eps, self.dtype, name=name)

    attended, kv = Attention(cfg, self.dtype, self.mesh, name="attn")(
      norm("attn_norm")(x_RTD), angles, valid_RT, view, layer
    )
    x_RTD = x_RTD + attended
    x_RTD = x_RTD + GatedMLP(cfg.mlp_width, False, self.dtype, name="mlp")(norm("mlp_norm")(x_RTD))
    return x_RTD, kv if self.keep else None


def scanned(layer: type[nn.Module], length: int, in_axes: tuple, remat: bool) -> type[nn.Module]:
  """`layer` applied `length` times by scan over stacked parameters, optionally rematerialised."""
  body = nn.remat(layer, prevent_cse=False) if remat else layer
  return nn.scan(
    body,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=in_axes,  # pyright: ignore[reportArgumentType]  (a tuple is documented)
    length=length,
  )
