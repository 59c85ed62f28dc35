"""One decoder layer, for whole rows and against a cache: the same module, the same parameters."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spatial_jax.policy import attention, cache, rope
from spatial_jax.policy.cache import KV, RowAssignment, Suffix
from spatial_jax.policy.config import DecoderConfig
from spatial_jax.policy.layers import GatedMLP, RMSNorm, scanned


class Angles(NamedTuple):
  """Cosine and sine of the rotary angles, float32 [..., C/2]."""

  cos: jax.Array
  sin: jax.Array


class CacheView(NamedTuple):
  """How the rows of a call lie in the cache; the same for every layer.

  Attributes:
    prefix_length_B: int32, valid keys of the prefixes read.
    start_R: int32, own tokens before this call; None: none before, and none are kept.
    last: int32 [], the last place that a token of this call goes to; None as `start_R`.
    prompt_B: int32, which prefixes of the cache are read; None for all of them.
    row_R: int32, which rows of the cache are read and extended; None for all of them.
    seats: whose rows these are; None: R = B*G rows, ordered by prompt.
  """

  prefix_length_B: jax.Array
  start_R: jax.Array | None
  last: jax.Array | None
  prompt_B: jax.Array | None
  row_R: jax.Array | None
  assignment: RowAssignment | None


class Seen(NamedTuple):
  """What DeepStack adds behind the first layers, at the tokens that stand for pictures.

  Attributes:
    features_MYD: stream 1 + l is added behind layer l.
    feature_RT: int32, row of `features_MYD` of each token, -1 for text.
  """

  features_MYD: jax.Array
  feature_RT: jax.Array

  def add(self, x_RTD: jax.Array, layer: jax.Array) -> jax.Array:
    """x_RTD behind the layer of that number, int32 []."""
    streams = self.features_MYD.shape[1]

    def more(x_RTD: jax.Array) -> jax.Array:
      stream_MD = jnp.take(self.features_MYD, layer + 1, axis=1, mode="clip")
      seen_RTD = jnp.take(stream_MD, self.feature_RT, axis=0, mode="clip").astype(x_RTD.dtype)
      return x_RTD + jnp.where(self.feature_RT[..., None] >= 0, seen_RTD, 0)

    return jax.lax.cond(layer + 1 < streams, more, lambda x_RTD: x_RTD, x_RTD)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

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
    layer: tuple[KV, Suffix | None] | None,
  ) -> tuple[jax.Array, KV | Suffix]:
    """Returns the output and what to keep: k, v of these tokens, or the layer's updated cache."""
    cfg = self.cfg

    def project(heads: int, name: str) -> jax.Array:
      shape = (heads, cfg.head_dim)
      dense = nn.DenseGeneral(shape, use_bias=cfg.qkv_bias, dtype=self.dtype, name=name)
      return jnp.swapaxes(dense(x_RTD), 1, 2)

    def turned(heads: int, name: str) -> jax.Array:
      x_RHTC = project(heads, name)
      if cfg.qk_norm:
        x_RHTC = RMSNorm(cfg.norm_eps, self.dtype, name=f"{name}_norm")(x_RHTC)
      return rope.rotate(x_RHTC, angles.cos[:, None], angles.sin[:, None])

    q_RHTC = turned(cfg.heads, "q")
    new = KV(turned(cfg.kv_heads, "k"), project(cfg.kv_heads, "v"))
    rows, tokens = x_RTD.shape[:2]
    q_RKQTC = q_RHTC.reshape(rows, cfg.kv_heads, -1, tokens, cfg.head_dim)
    if view is None or layer is None:
      keep = new
      out = attention.attend(q_RKQTC, *new, valid_RT, causal=True, mesh=self.mesh)
    elif view.start_R is None or layer[1] is None:
      keep = new
      out = attention.attend_with_prefix(
        q_RKQTC, layer[0], view.prefix_length_B, new, valid_RT, self.mesh
      )
    else:
      prefix = cache.rows(layer[0], view.prompt_B)
      keep = cache.write(layer[1], new, view.row_R, view.start_R, valid_RT)
      where = (view.start_R, view.last, view.row_R, view.assignment)
      out = attention.attend_cache(q_RKQTC, prefix, view.prefix_length_B, keep, *where)
    out_RTHC = jnp.swapaxes(out.reshape(q_RHTC.shape), 1, 2)
    dense = nn.DenseGeneral(cfg.width, axis=(-2, -1), use_bias=False, dtype=self.dtype, name="o")
    return dense(out_RTHC), keep


class DecoderLayer(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), then what DeepStack adds.

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
    seen: Seen | None,
    view: CacheView | None,
    layer: tuple[KV, Suffix | None] | None,
    number: jax.Array,
  ) -> tuple[jax.Array, KV | Suffix | None]:
    cfg = self.cfg

    def norm(name: str) -> RMSNorm:
      return RMSNorm(cfg.norm_eps, self.dtype, name=name)

    attended, kv = Attention(cfg, self.dtype, self.mesh, name="attn")(
      norm("attn_norm")(x_RTD), angles, valid_RT, view, layer
    )
    x_RTD = x_RTD + attended
    x_RTD = x_RTD + GatedMLP(cfg.mlp_width, False, self.dtype, name="mlp")(norm("mlp_norm")(x_RTD))
    x_RTD = seen.add(x_RTD, number) if seen is not None else x_RTD
    return x_RTD, kv if self.keep else None


class DecoderStack(nn.Module):
  """All layers by scan: stacked parameters under "layers", stacked `layer`; see DecoderLayer."""

  cfg: DecoderConfig
  dtype: jnp.dtype
  mesh: Mesh | None
  keep: bool
  remat: bool

  @nn.compact
  def __call__(
    self,
    x_RTD: jax.Array,
    angles: Angles,
    valid_RT: jax.Array,
    seen: Seen | None,
    view: CacheView | None,
    layer: tuple[KV, Suffix | None] | None,
  ) -> tuple[jax.Array, KV | Suffix | None]:
    in_axes = (*(nn.broadcast,) * 4, 0, 0)
    layers = scanned(DecoderLayer, self.cfg.layers, in_axes, self.remat)
    numbers = jnp.arange(self.cfg.layers)
    return layers(self.cfg, self.dtype, self.mesh, self.keep, name="layers")(
      x_RTD, angles, valid_RT, seen, view, layer, numbers
    )
