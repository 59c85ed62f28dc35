"""Attention as three functions, with one backend per platform.

  attend              whole rows (prefill, vision frames): splash on TPU, cuDNN on GPU, else XLA
  attend_with_prefix  rows that continue a shared prefix, differentiable (update): the same
  attend_cache        new tokens over a shared prefix and their row's suffix (append, decode): XLA

The platform is the platform of the mesh argument. `jax.default_backend()` would be wrong: it is
"cpu" while a program is compiled ahead of time for a TPU.
"""

import functools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh

from spatial_jax import sharding
from spatial_jax.policy import cache
from spatial_jax.policy.cache import KV, RowAssignment
from spatial_jax.policy.partial_attention import PartialAttention, merge, partial_attention

_SPLASH_BLOCK = 128
# Size of the scores that XLA computes at once, about one CPU cache. With 4 times this size the
# derivative took 1.6 times as long; with 16 times it took twice the memory. The kernels of the
# other platforms never write scores to memory.
_SCORE_BYTES = 4 << 20


def attend(
  q_RKQTC: jax.Array,
  k_RKSC: jax.Array,
  v_RKSC: jax.Array,
  segment_RS: jax.Array,
  causal: bool,
  mesh: Mesh | None,
) -> jax.Array:
  """Softmax attention of every query over the keys of its own segment.

  The queries are the last T of the S tokens. With `causal`, query t attends to keys s <= S - T + t.

  Args:
    q_RKQTC: queries, Q per KV head, not yet scaled.
    k_RKSC, v_RKSC: keys and values; S >= T.
    segment_RS: bool, true for valid keys; or int32, segment of each token, 0 for padding. Output
      rows of padding queries are finite and meaningless.
    causal: static.
    mesh: mesh of the program; static. None: one device, XLA.

  Returns:
    [R, K, Q, T, C] in the dtype of q.

  Raises:
    ValueError: on TPU, if T or S is not a multiple of 128 (at trace; there is no silent fallback).
  """
  if mesh is not None and _platform(mesh) == "tpu":
    return _splash(q_RKQTC, k_RKSC, v_RKSC, segment_RS, causal, mesh)
  if _platform(mesh) == "gpu":
    return _cudnn(q_RKQTC, k_RKSC, v_RKSC, segment_RS, causal)
  return _xla_in_pieces(q_RKQTC, k_RKSC, v_RKSC, segment_RS, causal)


def attend_with_prefix(
  q_RKQTC: jax.Array,
  prefix: tuple[jax.Array, jax.Array],
  prefix_length_B: jax.Array,
  suffix: tuple[jax.Array, jax.Array],
  valid_RT: jax.Array,
  mesh: Mesh | None,
) -> jax.Array:
  """Causal attention of rows over the prefix of their group and over themselves.

  For splash and cuDNN, prefix and suffix are concatenated to one row, because splash has no
  gradient for parts that are merged afterwards. XLA reads the prefix in place.

  Args:
    q_RKQTC, mesh: as in `attend`; R = B*G rows, ordered by prompt.
    prefix: k_BKSC, v_BKSC.
    prefix_length_B: int32, valid keys of each prefix, >= 1.
    suffix: k_RKTC, v_RKTC of the rows.
    valid_RT: bool, left-aligned.
  """
  rows, prompts, size = q_RKQTC.shape[0], prefix[0].shape[0], prefix[0].shape[2]
  if _platform(mesh) not in ("tpu", "gpu"):
    start_R = jnp.zeros(rows, jnp.int32)
    return attend_cache(q_RKQTC, prefix, prefix_length_B, (suffix,), start_R, None, None, None)
  visible_BS = jnp.arange(size)[None] < prefix_length_B[:, None]
  parts = jax.tree.map(lambda x: jnp.repeat(x, rows // prompts, axis=0), (*prefix, visible_BS))
  k_RKSC, v_RKSC = (jnp.concatenate(pair, axis=2) for pair in zip(parts[:2], suffix, strict=True))
  valid_RS = jnp.concatenate([parts[2], valid_RT], axis=1)
  return attend(q_RKQTC, k_RKSC, v_RKSC, valid_RS, True, mesh)


def _platform(mesh: Mesh | None) -> str | None:
  return None if mesh is None else mesh.devices.flat[0].platform


def attend_xla(
  q_RKQTC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array, segment_RS: jax.Array, causal: bool
) -> jax.Array:
  """`attend` in plain XLA; the faster form on every platform if rows are short (windows)."""
  return _attend(q_RKQTC, k_RKSC, v_RKSC, _visible(segment_RS, q_RKQTC.shape[3], causal))


def _attend(
  q_RKQTC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array, visible: jax.Array
) -> jax.Array:
  """Attention with an explicit mask `visible`, bool [R, T or 1, S]."""
  if visible.shape[1] > 1:
    visible = jnp.tile(visible, (1, q_RKQTC.shape[2], 1))  # T runs fastest in Q*T
  out = partial_attention(_join_queries(q_RKQTC), k_RKSC, v_RKSC, visible).out
  return out.astype(q_RKQTC.dtype).reshape(q_RKQTC.shape)


def _join_queries(q_RKQTC: jax.Array) -> jax.Array:
  """[R, K, Q, T, C] -> [R, K, Q*T, C]: the queries of a KV head read it as one sequence."""
  return q_RKQTC.reshape(*q_RKQTC.shape[:2], -1, q_RKQTC.shape[-1])


def _xla_in_pieces(
  q_RKQTC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array, segment_RS: jax.Array, causal: bool
) -> jax.Array:
  """`attend_xla` in pieces: 16 frames of 1,024 patches and 16 heads would have 1 GiB of scores."""
  rows, kv_heads, per_kv, tokens, _ = q_RKQTC.shape
  queries_at_once = max(1, _SCORE_BYTES // (4 * kv_heads * per_kv * k_RKSC.shape[2]))
  if rows * tokens <= queries_at_once:
    return attend_xla(q_RKQTC, k_RKSC, v_RKSC, segment_RS, causal)
  pieces = -(-tokens // queries_at_once)
  size = -(-tokens // pieces)
  padding = pieces * size - tokens

  def one_row(row: tuple[jax.Array, ...]) -> jax.Array:
    q_KQTC, k_KSC, v_KSC, segment_S = row
    before = segment_S.shape[0] - tokens
    q_KQTC = jnp.pad(q_KQTC, ((0, 0), (0, 0), (0, padding), (0, 0)))
    q_NKQTC = jnp.moveaxis(q_KQTC.reshape(kv_heads, per_kv, pieces, size, -1), 2, 0)
    segment_NT = jnp.pad(segment_S[before:], (0, padding)).reshape(pieces, size)
    first_N = before + size * jnp.arange(pieces)

    def one_piece(piece: tuple[jax.Array, ...]) -> jax.Array:
      q_KQTC, segment_T, first = piece
      visible = _mask(segment_S[None], segment_T[None], first if causal else None)
      return _attend(q_KQTC[None], k_KSC[None], v_KSC[None], visible)[0]

    out_NKQTC = jax.lax.map(one_piece, (q_NKQTC, segment_NT, first_N))
    return jnp.moveaxis(out_NKQTC, 0, 2).reshape(q_KQTC.shape)[:, :, :tokens]

  arrays = (q_RKQTC, k_RKSC, v_RKSC, segment_RS)
  return jax.lax.map(one_row, arrays, batch_size=max(1, queries_at_once // tokens))


def _visible(segment_RS: jax.Array, tokens: int, causal: bool) -> jax.Array:
  """Mask of the last `tokens` queries over all keys: bool [R, T or 1, S]."""
  before = segment_RS.shape[1] - tokens
  return _mask(segment_RS, segment_RS[:, before:], before if causal else None)


def _mask(
  key_segment_RS: jax.Array, query_segment_RT: jax.Array, first: int | jax.Array | None
) -> jax.Array:
  """bool [R, T or 1, S]: same segment and, unless `first` is None, key s <= first + t."""
  visible = key_segment_RS[:, None, :]
  if key_segment_RS.dtype != jnp.bool_:
    visible = (visible == query_segment_RT[:, :, None]) & (visible > 0)
  if first is None:
    return visible
  key_1S = jnp.arange(key_segment_RS.shape[1])[None, :]
  causal_TS = key_1S <= first + jnp.arange(query_segment_RT.shape[1])[:, None]
  return visible & causal_TS[None]


def attend_cache(
  q_RKQTC: jax.Array,
  prefix: tuple[jax.Array, jax.Array],
  prefix_length_B: jax.Array,
  suffix: Sequence[tuple[jax.Array, jax.Array]],
  start_R: jax.Array,
  last_offset: jax.Array | None,
  row_R: jax.Array | None,
  assignment: RowAssignment | None,
) -> jax.Array:
  """Attention of new tokens over the shared prefix of their prompt and the suffix of their row.

  The G rows of a prompt read one copy of its prefix: their queries are concatenated along T for
  k_BKSC. Every part keeps its own maximum and sum; the parts are merged by log-sum-exp.

      query t of row r attends to   prefix  s < prefix_length[prompt of r]
                                    suffix  s <= start[r] + t

  Args:
    q_RKQTC, prefix, prefix_length_B: as in `attend_with_prefix`.
    suffix: k_RKSC, v_RKSC of each block, with the new tokens already written at start_R.
    start_R: int32, tokens in each suffix before the new ones.
    last_offset: int32 [], largest offset of a new token; blocks after it are not read. None: all
      blocks are read.
    row_R: int32, the rows of `suffix` to read. None: all rows in order.
    assignment: rollouts of these rows. None: R = B*G rows, ordered by prompt.
  """
  merged, first = _attend_prefix(q_RKQTC, prefix, prefix_length_B, assignment), 0
  q_RKTC, (per_kv, tokens) = _join_queries(q_RKQTC), q_RKQTC.shape[2:4]
  offset_RT = start_R[:, None] + jnp.arange(tokens)[None]
  offset_RT = jnp.tile(offset_RT, (1, per_kv))  # T runs fastest in Q*T

  def add_block(
    merged: PartialAttention, block: tuple[jax.Array, jax.Array], first: int
  ) -> PartialAttention:
    visible_RTS = first + jnp.arange(block[0].shape[2])[None, None] <= offset_RT[:, :, None]
    part = partial_attention(q_RKTC, *cache.take_rows(KV(*block), row_R), visible_RTS)
    return merge(merged, part)

  for block in suffix:
    add = functools.partial(add_block, block=block, first=first)
    if last_offset is None or first == 0:
      merged = add(merged)
    else:
      merged = jax.lax.cond(first <= last_offset, add, lambda merged: merged, merged)
    first += block[0].shape[2]
  return merged.out.astype(q_RKQTC.dtype).reshape(q_RKQTC.shape)


def _attend_prefix(
  q_RKQTC: jax.Array,
  prefix: tuple[jax.Array, jax.Array],
  prefix_length_B: jax.Array,
  assignment: RowAssignment | None,
) -> PartialAttention:
  """Attention of each group's rows to its prefix, [R, K, Q*T, C]."""
  if assignment is not None:
    # Computed as if every rollout had a row: queries are small, copies of the prefix are not.
    q_RKQTC = jnp.take(q_RKQTC, assignment.row_BG.reshape(-1), axis=0, mode="clip")
    by_rollout = _attend_prefix(q_RKQTC, prefix, prefix_length_B, None)
    by_row = (jnp.take(x, assignment.rollout_R, axis=0, mode="clip") for x in by_rollout)
    return PartialAttention(*by_row)
  (rows, kv_heads, per_kv, tokens, channels), prompts = q_RKQTC.shape, prefix[0].shape[0]
  group, queries = rows // prompts, per_kv * tokens

  def split_group(x: jax.Array) -> jax.Array:
    """[B, K, G*Q*T, n] -> [R, K, Q*T, n]."""
    x = x.reshape(prompts, kv_heads, group, queries, x.shape[-1])
    return jnp.swapaxes(x, 1, 2).reshape(rows, kv_heads, -1, x.shape[-1])

  q_BGKTC = q_RKQTC.reshape(prompts, group, kv_heads, queries, channels)
  q_BKTC = jnp.swapaxes(q_BGKTC, 1, 2).reshape(prompts, kv_heads, -1, channels)
  visible_BS = jnp.arange(prefix[0].shape[2])[None] < prefix_length_B[:, None]
  return PartialAttention(
    *map(split_group, partial_attention(q_BKTC, *prefix, visible_BS[:, None]))
  )


def _splash(
  q_RKQTC: jax.Array,
  k_RKSC: jax.Array,
  v_RKSC: jax.Array,
  segment_RS: jax.Array,
  causal: bool,
  mesh: Mesh,
) -> jax.Array:
  """The TPU kernel; each device computes its own rows and heads. Padding is a segment too."""
  rows, kv_heads, per_kv, tokens, channels = q_RKQTC.shape
  keys = k_RKSC.shape[2]
  if tokens % _SPLASH_BLOCK or keys % _SPLASH_BLOCK:
    raise ValueError(
      f"attention of {tokens} queries over {keys} keys on TPU: pad both to a multiple of "
      f"{_SPLASH_BLOCK}"
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
  return call(q_RKQTC, k_RKSC, v_RKSC, segment_RS.astype(jnp.int32))


def _cudnn(
  q_RKQTC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array, segment_RS: jax.Array, causal: bool
) -> jax.Array:
  """cuDNN flash attention on [R, T, H, C] in half precision.

  The valid keys of whole rows are given as lengths; otherwise (a padded prefix, several segments in
  a row) as a mask.
  """
  (rows, kv_heads, per_kv, tokens, channels), keys = q_RKQTC.shape, k_RKSC.shape[2]
  if q_RKQTC.dtype == jnp.float32:  # cuDNN has no float32 kernel
    return attend_xla(q_RKQTC, k_RKSC, v_RKSC, segment_RS, causal)
  whole = tokens == keys and segment_RS.dtype == jnp.bool_
  lengths_R = jnp.sum(segment_RS, axis=-1, dtype=jnp.int32) if whole else None
  out = jax.nn.dot_product_attention(
    jnp.swapaxes(q_RKQTC.reshape(rows, kv_heads * per_kv, tokens, channels), 1, 2),
    jnp.swapaxes(k_RKSC, 1, 2),
    jnp.swapaxes(v_RKSC, 1, 2),
    mask=None if whole else _visible(segment_RS, tokens, causal)[:, None],
    is_causal=causal and whole,
    query_seq_lengths=lengths_R,
    key_value_seq_lengths=lengths_R,
    implementation="cudnn",
  )
  return jnp.swapaxes(out, 1, 2).reshape(q_RKQTC.shape)
