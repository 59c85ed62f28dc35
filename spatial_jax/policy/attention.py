"""Attention behind three functions, with a backend per platform.

  attend         whole rows (prefill, vision frames): splash on TPU, cuDNN on GPU, XLA
  attend_with_prefix  rows behind a shared prefix, differentiable (update): the same
  attend_cache   new tokens over a shared prefix and their own cache (append, decode): XLA

The platform is that of the mesh compiled for, which is passed in: `jax.default_backend()` says
"cpu" while compiling ahead of time for a TPU.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh

from spatial_jax import sharding
from spatial_jax.policy import cache
from spatial_jax.policy.cache import KV, RowAssignment

_MASKED = -1e30  # finite, so that a row without any visible key stays finite
_SPLASH_BLOCK = 128
# Of scores that XLA holds at once, about a cache full: four times as many took 1.6 times as long to
# differentiate, sixteen times as many twice the memory. A kernel never writes them to memory.
_SCORE_BYTES = 4 << 20


class Part(NamedTuple):
  """Attention to some keys: float32 mean [R, K, T, C], log of the sum of weights [R, K, T, 1]."""

  out: jax.Array
  log_sum: jax.Array


def attend(
  q_RKQTC: jax.Array,
  k_RKSC: jax.Array,
  v_RKSC: jax.Array,
  part_RS: jax.Array,
  causal: bool,
  mesh: Mesh | None,
) -> jax.Array:
  """Softmax attention of every query over the keys of its part of the row.

  The queries are the last T of the S tokens; with `causal` query t sees keys s <= S - T + t.

  Args:
    q_RKQTC: queries, Q per KV head, not yet scaled.
    k_RKSC, v_RKSC: keys and values; S >= T.
    part_RS: bool, keys that exist; or int32, several parts in a row that do not see one another,
      0 where there is none. Queries of no part give finite, meaningless rows.
    causal: static.
    mesh: what is compiled for; static. None: one device, XLA.

  Returns:
    [R, K, Q, T, C] in the dtype of q.

  Raises:
    ValueError: at trace, on TPU when T or S is no multiple of 128 (no silent fallback).
  """
  platform = None if mesh is None else mesh.devices.flat[0].platform
  if mesh is not None and platform == "tpu":
    return _splash(q_RKQTC, k_RKSC, v_RKSC, part_RS, causal, mesh)
  if platform == "gpu":
    return _cudnn(q_RKQTC, k_RKSC, v_RKSC, part_RS, causal)
  return _by_piece(q_RKQTC, k_RKSC, v_RKSC, part_RS, causal)


def attend_with_prefix(
  q_RKQTC: jax.Array,
  prefix: tuple[jax.Array, jax.Array],
  prefix_length_B: jax.Array,
  suffix: tuple[jax.Array, jax.Array],
  valid_RT: jax.Array,
  mesh: Mesh | None,
) -> jax.Array:
  """Causal attention of rows over their group's prefix and themselves.

  Where there is a kernel, prefix and own keys become one row for it: splash has no gradient for
  parts that are merged afterwards. XLA reads the prefix in place.

  Args:
    q_RKQTC: queries, R = B*G rows ordered by prompt.
    prefix: k_BKSC, v_BKSC.
    prefix_length_B: int32, valid keys of each prefix.
    own: k_RKTC, v_RKTC.
    valid_RT: bool, left-aligned.
    mesh: as in `attend`.

  Returns:
    [R, K, Q, T, C] in the dtype of q.
  """
  rows, prompts, size = q_RKQTC.shape[0], prefix[0].shape[0], prefix[0].shape[2]
  platform = None if mesh is None else mesh.devices.flat[0].platform
  if platform not in ("tpu", "gpu"):
    start_R = jnp.zeros(rows, jnp.int32)
    return attend_cache(q_RKQTC, prefix, prefix_length_B, (suffix,), start_R, None, None, None)
  visible_BS = jnp.arange(size)[None] < prefix_length_B[:, None]
  parts = jax.tree.map(lambda x: jnp.repeat(x, rows // prompts, axis=0), (*prefix, visible_BS))
  k_RKSC, v_RKSC = (jnp.concatenate(pair, axis=2) for pair in zip(parts[:2], suffix, strict=True))
  valid_RS = jnp.concatenate([parts[2], valid_RT], axis=1)
  return attend(q_RKQTC, k_RKSC, v_RKSC, valid_RS, True, mesh)


def attend_xla(
  q_RKQTC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array, part_RS: jax.Array, causal: bool
) -> jax.Array:
  """`attend` written out; also the right form on every platform where rows are short (windows)."""
  visible = _visible(part_RS, q_RKQTC.shape[3], causal)
  return _attend(q_RKQTC, k_RKSC, v_RKSC, visible)


def _attend(
  q_RKQTC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array, visible: jax.Array
) -> jax.Array:
  """Of queries that see `visible`, bool [R, T or 1, S]."""
  rows, kv_heads, per_kv, tokens, channels = q_RKQTC.shape
  if visible.shape[1] > 1:
    visible = jnp.tile(visible, (1, per_kv, 1))  # T runs fastest in Q*T
  q_RKTC = q_RKQTC.reshape(rows, kv_heads, per_kv * tokens, channels)
  out = softmax_part(q_RKTC, k_RKSC, v_RKSC, visible).out
  return out.astype(q_RKQTC.dtype).reshape(q_RKQTC.shape)


def _by_piece(
  q_RKQTC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array, part_RS: jax.Array, causal: bool
) -> jax.Array:
  """`attend_xla` on as many queries at a time as there is room for scores, none kept for later.

  16 frames of 1,024 patches and 16 heads would have 1 GiB of scores in each layer.
  """
  rows, kv_heads, per_kv, tokens, _ = q_RKQTC.shape
  at_once = max(1, _SCORE_BYTES // (4 * kv_heads * per_kv * k_RKSC.shape[2]))  # queries
  if rows * tokens <= at_once:
    return attend_xla(q_RKQTC, k_RKSC, v_RKSC, part_RS, causal)
  pieces = -(-tokens // at_once)
  size = -(-tokens // pieces)
  behind = pieces * size - tokens

  def one(row: tuple[jax.Array, ...]) -> jax.Array:
    q_KQTC, k_KSC, v_KSC, part_S = row
    before = part_S.shape[0] - tokens
    q_KQTC = jnp.pad(q_KQTC, ((0, 0), (0, 0), (0, behind), (0, 0)))
    q_NKQTC = jnp.moveaxis(q_KQTC.reshape(kv_heads, per_kv, pieces, size, -1), 2, 0)
    query_NT = jnp.pad(part_S[before:], (0, behind)).reshape(pieces, size)
    first_N = before + size * jnp.arange(pieces)

    def piece(of: tuple[jax.Array, ...]) -> jax.Array:
      q_KQTC, query_T, first = of
      visible = _visible_from(part_S[None], query_T[None], first if causal else None)
      return _attend(q_KQTC[None], k_KSC[None], v_KSC[None], visible)[0]

    out_NKQTC = jax.lax.map(piece, (q_NKQTC, query_NT, first_N))
    return jnp.moveaxis(out_NKQTC, 0, 2).reshape(q_KQTC.shape)[:, :, :tokens]

  arrays = (q_RKQTC, k_RKSC, v_RKSC, part_RS)
  return jax.lax.map(one, arrays, batch_size=max(1, at_once // tokens))


def _visible(part_RS: jax.Array, tokens: int, causal: bool) -> jax.Array:
  """Which keys each of the last `tokens` queries sees: bool [R, T or 1, S]."""
  before = part_RS.shape[1] - tokens
  return _visible_from(part_RS, part_RS[:, before:], before if causal else None)


def _visible_from(
  part_RS: jax.Array, query_RT: jax.Array, first: int | jax.Array | None
) -> jax.Array:
  """Of queries that belong to `query_RT`; query t sees keys up to `first` + t, None: all."""
  visible = part_RS[:, None, :]
  if part_RS.dtype != jnp.bool_:
    visible = (visible == query_RT[:, :, None]) & (visible > 0)
  if first is None:
    return visible
  order_TS = jnp.arange(part_RS.shape[1])[None, :] <= first + jnp.arange(query_RT.shape[1])[:, None]
  return visible & order_TS[None]


def attend_cache(
  q_RKQTC: jax.Array,
  prefix: tuple[jax.Array, jax.Array],
  prefix_length_B: jax.Array,
  suffix: Sequence[tuple[jax.Array, jax.Array]],
  start_R: jax.Array,
  last: jax.Array | None,
  row_R: jax.Array | None,
  assignment: RowAssignment | None,
) -> jax.Array:
  """Attention of new tokens over their prompt's shared prefix and their row's own cache.

  The G rows of a prompt read one copy of its prefix: their queries stand behind one another in
  front of k_BKSC. All parts keep their own maximum and sum and are merged by log-sum-exp:

      row r, query t sees   prefix s < prefix_length[its prompt]   and   own s <= start[r] + t

  Args:
    q_RKQTC: queries of the new tokens.
    prefix: k_BKSC, v_BKSC.
    prefix_length_B: int32, valid keys of each prefix, >= 1.
    own: k_RKSC, v_RKSC of each block, the new tokens already written at start_R.
    start_R: int32, own length before the new tokens.
    last: int32 [], the last place of a new token; blocks behind it are not read. None: all are.
    row_R: int32, the rows of `own` that are read; None: all in order.
    seats: whose rows these are; None: R = B*G rows, ordered by prompt.

  Returns:
    [R, K, Q, T, C] in the dtype of q.
  """
  rows, kv_heads, per_kv, tokens, channels = q_RKQTC.shape
  seen, first = _to_prefix(q_RKQTC, prefix, prefix_length_B, assignment), 0
  q_RKTC = q_RKQTC.reshape(rows, kv_heads, per_kv * tokens, channels)
  place_RT = start_R[:, None] + jnp.arange(tokens)[None]
  place_RT = jnp.tile(place_RT, (1, per_kv))  # T runs fastest in Q*T

  def more(seen: Part, block: tuple[jax.Array, jax.Array], first: int) -> Part:
    visible_RTS = first + jnp.arange(block[0].shape[2])[None, None] <= place_RT[:, :, None]
    return _merge(seen, softmax_part(q_RKTC, *cache.rows(KV(*block), row_R), visible_RTS))

  for block in suffix:
    look = functools.partial(more, block=block, first=first)
    if last is None or first == 0:
      seen = look(seen)
    else:
      seen = jax.lax.cond(first <= last, look, lambda seen: seen, seen)
    first += block[0].shape[2]
  return seen.out.astype(q_RKQTC.dtype).reshape(q_RKQTC.shape)


def _to_prefix(
  q_RKQTC: jax.Array,
  prefix: tuple[jax.Array, jax.Array],
  prefix_length_B: jax.Array,
  assignment: RowAssignment | None,
) -> Part:
  """Attention of each group's rows to its prefix, [R, K, Q*T, C]."""
  if assignment is not None:
    # As if every rollout had a row: it is the prefix that is large, not its queries.
    q_RKQTC = jnp.take(q_RKQTC, assignment.row_BG.reshape(-1), axis=0, mode="clip")
    all_of_them = _to_prefix(q_RKQTC, prefix, prefix_length_B, None)
    return Part(*(jnp.take(x, assignment.rollout_R, axis=0, mode="clip") for x in all_of_them))
  (rows, kv_heads, per_kv, tokens, channels), prompts = q_RKQTC.shape, prefix[0].shape[0]
  group = rows // prompts

  def by_row(x: jax.Array) -> jax.Array:
    """[B, K, G*Q*T, n] -> [R, K, Q*T, n]."""
    x = x.reshape(prompts, kv_heads, group, per_kv * tokens, x.shape[-1])
    return jnp.swapaxes(x, 1, 2).reshape(rows, kv_heads, -1, x.shape[-1])

  q = q_RKQTC.reshape(prompts, group, kv_heads, per_kv * tokens, channels)
  q_BKTC = jnp.swapaxes(q, 1, 2).reshape(prompts, kv_heads, -1, channels)
  visible_BS = jnp.arange(prefix[0].shape[2])[None] < prefix_length_B[:, None]
  return Part(*map(by_row, softmax_part(q_BKTC, *prefix, visible_BS[:, None])))


@jax.custom_vjp
def softmax_part(
  q_RKTC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array, visible: jax.Array
) -> Part:
  """Softmax attention to these keys; parts of one softmax are merged by their log-sums.

      P = exp(q k / sqrt(C) - log_sum)    out = P v

  Its derivative makes the scores again, and needs neither their sum nor their mask:

      dP = dout v    dS = P (dP - sum_C(dout out) + dlog_sum)

  which on CPU took 0.6 times as long as what JAX derives from a softmax.

  Args:
    q_RKTC: queries, not yet scaled.
    k_RKSC, v_RKSC: keys and values.
    visible: bool [R, T or 1, S]. A query that sees nothing gives a finite, meaningless mean.

  Source: the backward pass of FlashAttention, arXiv:2205.14135, algorithm 4.
  """
  score = jnp.where(visible[:, None], _scores(q_RKTC, k_RKSC), _MASKED)
  maximum = jnp.max(score, axis=-1, keepdims=True)
  weight = jnp.exp(score - maximum)
  total = jnp.sum(weight, axis=-1, keepdims=True)
  weighted = jnp.einsum(
    "RKTS,RKSC->RKTC", weight.astype(v_RKSC.dtype), v_RKSC, preferred_element_type=jnp.float32
  )
  return Part(weighted / total, maximum + jnp.log(total))


def _part_forward(q_RKTC, k_RKSC, v_RKSC, visible):
  part = softmax_part(q_RKTC, k_RKSC, v_RKSC, visible)
  return part, (q_RKTC, k_RKSC, v_RKSC, visible, part)


def _part_backward(kept, grads: Part):
  q_RKTC, k_RKSC, v_RKSC, visible, part = kept
  dtype = v_RKSC.dtype
  weight = jnp.exp(_scores(q_RKTC, k_RKSC) - part.log_sum)
  weight = jnp.where(visible[:, None], weight, 0.0)
  dout_RKTC = grads.out.astype(dtype)
  dweight = jnp.einsum("RKTC,RKSC->RKTS", dout_RKTC, v_RKSC, preferred_element_type=jnp.float32)
  mean = jnp.sum(grads.out * part.out, axis=-1, keepdims=True) - grads.log_sum
  dscore = (weight * (dweight - mean)).astype(dtype)
  scale = jnp.asarray(q_RKTC.shape[-1] ** -0.5, dtype)
  return (
    jnp.einsum("RKTS,RKSC->RKTC", dscore, k_RKSC) * scale,
    jnp.einsum("RKTS,RKTC->RKSC", dscore, q_RKTC) * scale,
    jnp.einsum("RKTS,RKTC->RKSC", weight.astype(dtype), dout_RKTC),
    None,
  )


softmax_part.defvjp(_part_forward, _part_backward)


def _scores(q_RKTC: jax.Array, k_RKSC: jax.Array) -> jax.Array:
  """float32 scaled products [R, K, T, S]."""
  q_RKTC = q_RKTC * jnp.asarray(q_RKTC.shape[-1] ** -0.5, q_RKTC.dtype)
  return jnp.einsum("RKSC,RKTC->RKTS", k_RKSC, q_RKTC, preferred_element_type=jnp.float32)


def _merge(one: Part, two: Part) -> Part:
  """The softmax over both parts together."""
  log_sum = jnp.logaddexp(one.log_sum, two.log_sum)
  out = one.out * jnp.exp(one.log_sum - log_sum) + two.out * jnp.exp(two.log_sum - log_sum)
  return Part(out, log_sum)


def _splash(
  q_RKQTC: jax.Array,
  k_RKSC: jax.Array,
  v_RKSC: jax.Array,
  part_RS: jax.Array,
  causal: bool,
  mesh: Mesh,
) -> jax.Array:
  """The TPU kernel, each device on its rows and heads; parts are its segments, padding is one."""
  rows, kv_heads, per_kv, tokens, channels = q_RKQTC.shape
  keys = k_RKSC.shape[2]
  if tokens % _SPLASH_BLOCK or keys % _SPLASH_BLOCK:
    raise ValueError(
      f"attention of {tokens} over {keys} tokens on TPU: pad to a multiple of {_SPLASH_BLOCK}"
    )

  def local(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> jax.Array:
    heads = q.shape[1] * per_kv
    shape = (tokens, keys)
    mask = splash.CausalMask(shape, keys - tokens) if causal else splash.FullMask(shape)
    kernel = splash.make_splash_mha(
      splash.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1
    )
    q_RHTC = q.reshape(-1, heads, tokens, channels)
    ids = splash.SegmentIds(segment[:, keys - tokens :], segment)
    out = jax.vmap(kernel)(q_RHTC, k, v, ids)
    return cast(jax.Array, out).reshape(q.shape)

  heads_spec, rows_spec = sharding.attention_specs(mesh, rows, kv_heads)
  call = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(heads_spec, heads_spec, heads_spec, rows_spec),
    out_specs=heads_spec,
    check_vma=False,
  )
  q_RKQTC = q_RKQTC * jnp.asarray(channels**-0.5, q_RKQTC.dtype)
  return call(q_RKQTC, k_RKSC, v_RKSC, part_RS.astype(jnp.int32))


def _cudnn(
  q_RKQTC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array, part_RS: jax.Array, causal: bool
) -> jax.Array:
  """cuDNN flash attention; it reads [R, T, H, C], half precision.

  Valid keys of whole rows are a length; behind a padded prefix, and of parts, they are a mask.
  """
  (rows, kv_heads, per_kv, tokens, channels), keys = q_RKQTC.shape, k_RKSC.shape[2]
  if q_RKQTC.dtype == jnp.float32:  # cuDNN has no float32 kernel
    return attend_xla(q_RKQTC, k_RKSC, v_RKSC, part_RS, causal)
  whole = tokens == keys and part_RS.dtype == jnp.bool_
  lengths_R = jnp.sum(part_RS, axis=-1, dtype=jnp.int32) if whole else None
  out = jax.nn.dot_product_attention(
    jnp.swapaxes(q_RKQTC.reshape(rows, kv_heads * per_kv, tokens, channels), 1, 2),
    jnp.swapaxes(k_RKSC, 1, 2),
    jnp.swapaxes(v_RKSC, 1, 2),
    mask=None if whole else _visible(part_RS, tokens, causal)[:, None],
    is_causal=causal and whole,
    query_seq_lengths=lengths_R,
    key_value_seq_lengths=lengths_R,
    implementation="cudnn",
  )
  return jnp.swapaxes(out, 1, 2).reshape(q_RKQTC.shape)
