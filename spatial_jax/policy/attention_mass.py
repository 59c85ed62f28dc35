"""How much attention the sampled tokens of a row pay to each position before them.

The attention kernels return no weights. They are computed again, for some layers, with an explicit
softmax over prefix AND suffix, for a few query tokens at a time:

    scores [R, H, chunk, S + T] ──► softmax ──► mean over heads, sum over sampled tokens [R, S + T]

At most `MASS_BYTES` of float32 scores exist at once (and three times that much during the softmax),
never [R, H, T, S + T].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax.policy.cache import KV

MASS_BYTES = 32 << 20


class AttentionMass(NamedTuple):
  """Attention summed over sampled tokens, float32; of one layer a mean over its heads."""

  prefix_RS: jax.Array
  suffix_RT: jax.Array


def no_mass(rows: int, prefix: int, suffix: int) -> AttentionMass:
  """The mass of a layer that is not measured."""
  return AttentionMass(
    jnp.zeros((rows, prefix), jnp.float32), jnp.zeros((rows, suffix), jnp.float32)
  )


def attention_mass(
  q_RKQTC: jax.Array,
  prefix: KV,
  prefix_length_R: jax.Array,
  suffix: KV,
  sampled_RT: jax.Array,
) -> AttentionMass:
  """The mass of one layer.

  Args:
    q_RKQTC: rotated queries of the rows, not yet scaled.
    prefix: k, v [R, K, S, C], one prefix per row.
    prefix_length_R: int32, valid keys of each prefix.
    suffix: k, v [R, K, T, C] of the rows.
    sampled_RT: bool, query tokens that count.
  """
  rows, kv_heads, per_kv, tokens, channels = q_RKQTC.shape
  size = prefix.k_RKSC.shape[2]
  per_token = 4 * rows * kv_heads * per_kv * (size + tokens)
  chunk = max(1, min(tokens, MASS_BYTES // per_token))
  k_RKSC = jnp.concatenate([prefix.k_RKSC, suffix.k_RKSC], axis=2)
  before_R1S = jnp.arange(size)[None, None] < prefix_length_R[:, None, None]
  scale = channels**-0.5

  def one_chunk(total_RS: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    q, sampled, first = inputs
    scores = jnp.einsum("RKQTC,RKSC->RKQTS", q, k_RKSC, preferred_element_type=jnp.float32) * scale
    own_1TS = jnp.arange(tokens)[None, None] <= first + jnp.arange(chunk)[None, :, None]
    shape = (rows, chunk)
    visible = jnp.concatenate(
      [
        jnp.broadcast_to(before_R1S, (*shape, size)),
        jnp.broadcast_to(own_1TS, (*shape, tokens)),
      ],
      axis=2,
    )
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    mean_RTS = jnp.mean(weights, axis=(1, 2))
    return total_RS + jnp.sum(jnp.where(sampled[..., None], mean_RTS, 0.0), axis=1), None

  first = chunk * jnp.arange(-(-tokens // chunk))
  inputs = (_split(q_RKQTC, 3, chunk), _split(sampled_RT, 1, chunk), first)
  zero = jnp.zeros((rows, size + tokens), jnp.float32)
  total_RS, _ = jax.lax.scan(one_chunk, zero, inputs)
  return AttentionMass(total_RS[:, :size], total_RS[:, size:])


def _split(x: jax.Array, axis: int, chunk: int) -> jax.Array:
  """Chunks of an axis, padded, along a new first axis."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % chunk)
  x = jnp.pad(x, widths)
  shape = (*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
  return jnp.moveaxis(x.reshape(shape), axis, 0)
