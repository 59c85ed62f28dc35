"""Attention behind two functions, with a backend per platform.

  attend           whole rows at once (update, prefill, vision frames): XLA, splash on TPU, cuDNN on GPU
  attend_cache     new tokens against a shared prefix and their own cache (append, decode): XLA

The platform is that of the mesh compiled for and is passed in: `jax.default_backend()` says "cpu" while
compiling ahead of time for a TPU.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

Platform = Literal["cpu", "gpu", "tpu"]

_MASKED = -1e30  # finite, so that a row without any visible key stays finite
_SPLASH_BLOCK = 128


def attend(
  q_RKQTC: jax.Array,
  k_RKSC: jax.Array,
  v_RKSC: jax.Array,
  valid_RS: jax.Array,
  causal: bool,
  platform: Platform,
) -> jax.Array:
  """Softmax attention of every query over the valid keys of its row; with `causal`, over s <= t.

  Args:
    q_RKQTC: queries, Q per KV head, not yet scaled.
    k_RKSC, v_RKSC: keys and values; S == T.
    valid_RS: bool, keys that exist. Queries that are not valid give finite, meaningless rows.
    causal: static.
    platform: of the mesh compiled for; static.

  Returns:
    [R, K, Q, T, C] in the dtype of q.

  Raises:
    ValueError: at trace, on TPU when T is no multiple of 128 (no silent fallback).
  """
  if platform == "tpu":
    return _splash(q_RKQTC, k_RKSC, v_RKSC, valid_RS, causal)
  if platform == "gpu":
    return _cudnn(q_RKQTC, k_RKSC, v_RKSC, valid_RS, causal)
  return attend_xla(q_RKQTC, k_RKSC, v_RKSC, valid_RS, causal)


def attend_xla(
  q_RKQTC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array, valid_RS: jax.Array, causal: bool
) -> jax.Array:
  """`attend` written out; also the right form on every platform where rows are short (windows)."""
  tokens, keys = q_RKQTC.shape[3], k_RKSC.shape[2]
  visible = valid_RS[:, None, None, None, :]
  if causal:
    order_TS = jnp.arange(keys)[None, :] <= jnp.arange(tokens)[:, None]
    visible = visible & order_TS[None, None, None]
  score = jnp.where(visible, _scores(q_RKQTC, k_RKSC), _MASKED)
  weight = jax.nn.softmax(score, axis=-1).astype(v_RKSC.dtype)
  return jnp.einsum("RKQTS,RKSC->RKQTC", weight, v_RKSC)


def _scores(q_RKQTC: jax.Array, k_RKSC: jax.Array) -> jax.Array:
  """float32 scaled products [R, K, Q, T, S]."""
  q_RKQTC = q_RKQTC * jnp.asarray(q_RKQTC.shape[-1] ** -0.5, q_RKQTC.dtype)
  return jnp.einsum("RKQTC,RKSC->RKQTS", q_RKQTC, k_RKSC, preferred_element_type=jnp.float32)


def attend_cache(
  q_RKQTC: jax.Array,
  prefix: tuple[jax.Array, jax.Array],
  prefix_length_B: jax.Array,
  own: tuple[jax.Array, jax.Array],
  start_R: jax.Array,
) -> jax.Array:
  """Attention of new tokens over their prompt's shared prefix and their row's own cache.

  The G rows of a prompt read one copy of its prefix: their queries stand behind one another in front of
  k_BKSC. Both parts keep their own maximum and sum and are merged by log-sum-exp:

      row r, query t sees   prefix s < prefix_length[r // G]   and   own s <= start[r] + t

  Args:
    q_RKQTC: queries of the new tokens, R = B*G rows ordered by prompt.
    prefix: k_BKSC, v_BKSC.
    prefix_length_B: int32, valid keys of each prefix, >= 1.
    own: k_RKSC, v_RKSC, the new tokens already written at start_R.
    start_R: int32, own length before the new tokens.

  Returns:
    [R, K, Q, T, C] in the dtype of q.
  """
  (rows, kv_heads, per_kv, tokens, channels), prompts = q_RKQTC.shape, prefix[0].shape[0]
  group = rows // prompts
  q_BGKQTC = q_RKQTC.reshape(prompts, group, kv_heads, per_kv, tokens, channels)
  q_BKGQTC = jnp.swapaxes(q_BGKQTC, 1, 2).reshape(prompts, kv_heads, -1, channels)
  prefix_S = jnp.arange(prefix[0].shape[2])
  visible = prefix_S[None, :] < prefix_length_B[:, None]
  shared = _partial(q_BKGQTC, *prefix, visible[:, None, None, :])
  shared = tuple(
    jnp.swapaxes(part.reshape(prompts, kv_heads, group, per_kv, tokens, -1), 1, 2).reshape(
      rows, kv_heads, per_kv, tokens, -1
    )
    for part in shared
  )
  last_RT = start_R[:, None] + jnp.arange(tokens)[None, :]
  visible = jnp.arange(own[0].shape[2])[None, None, :] <= last_RT[:, :, None]
  visible = jnp.broadcast_to(visible[:, None], (rows, per_kv, *visible.shape[1:]))
  flat = q_RKQTC.reshape(rows, kv_heads, per_kv * tokens, channels)
  separate = _partial(flat, *own, visible.reshape(rows, 1, per_kv * tokens, -1))
  separate = tuple(part.reshape(rows, kv_heads, per_kv, tokens, -1) for part in separate)
  return _merge(shared, separate).astype(q_RKQTC.dtype)


def _partial(
  q_RKTC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array, visible: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One part of a softmax: float32 weighted sum [R,K,T,C], sum of weights and maximum [R,K,T,1]."""
  score = _scores(q_RKTC[:, :, None], k_RKSC)[:, :, 0]
  score = jnp.where(visible, score, _MASKED)
  maximum = jnp.max(score, axis=-1, keepdims=True)
  weight = jnp.exp(score - maximum)
  total = jnp.sum(weight, axis=-1, keepdims=True)
  weighted = jnp.einsum(
    "RKTS,RKSC->RKTC", weight.astype(v_RKSC.dtype), v_RKSC, preferred_element_type=jnp.float32
  )
  return weighted, total, maximum


def _merge(
  one: tuple[jax.Array, jax.Array, jax.Array], two: tuple[jax.Array, jax.Array, jax.Array]
) -> jax.Array:
  """The softmax over both parts together."""
  maximum = jnp.maximum(one[2], two[2])
  scale_one, scale_two = jnp.exp(one[2] - maximum), jnp.exp(two[2] - maximum)
  weighted = one[0] * scale_one + two[0] * scale_two
  return weighted / (one[1] * scale_one + two[1] * scale_two)


def _splash(
  q_RKQTC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array, valid_RS: jax.Array, causal: bool
) -> jax.Array:
  """The TPU kernel; invalid keys form their own segment, which no valid query reads."""
  rows, kv_heads, per_kv, tokens, channels = q_RKQTC.shape
  if tokens % _SPLASH_BLOCK:
    raise ValueError(
      f"attention over {tokens} tokens on TPU: must be a multiple of {_SPLASH_BLOCK}"
    )
  kernel = _splash_kernel(kv_heads * per_kv, tokens, causal)
  segment_RS = valid_RS.astype(jnp.int32)
  q_RHTC = q_RKQTC.reshape(rows, kv_heads * per_kv, tokens, channels)
  q_RHTC = q_RHTC * jnp.asarray(channels**-0.5, q_RHTC.dtype)
  out = jax.vmap(kernel)(q_RHTC, k_RKSC, v_RKSC, splash.SegmentIds(segment_RS, segment_RS))
  return out.reshape(q_RKQTC.shape)


def _splash_kernel(heads: int, tokens: int, causal: bool):
  shape = (tokens, tokens)
  mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
  return splash.make_splash_mha(splash.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1)


def _cudnn(
  q_RKQTC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array, valid_RS: jax.Array, causal: bool
) -> jax.Array:
  """cuDNN flash attention; it reads [R, T, H, C], half precision, and valid keys as lengths."""
  rows, kv_heads, per_kv, tokens, channels = q_RKQTC.shape
  if q_RKQTC.dtype == jnp.float32:  # cuDNN has no float32 kernel
    return attend_xla(q_RKQTC, k_RKSC, v_RKSC, valid_RS, causal)
  lengths_R = jnp.sum(valid_RS, axis=-1, dtype=jnp.int32)
  out = jax.nn.dot_product_attention(
    jnp.swapaxes(q_RKQTC.reshape(rows, kv_heads * per_kv, tokens, channels), 1, 2),
    jnp.swapaxes(k_RKSC, 1, 2),
    jnp.swapaxes(v_RKSC, 1, 2),
    is_causal=causal,
    query_seq_lengths=lengths_R,
    key_value_seq_lengths=lengths_R,
    implementation="cudnn",
  )
  return jnp.swapaxes(out, 1, 2).reshape(q_RKQTC.shape)
