"""The modes of a decoder layer's attention, one type each.

    CausalAttention    whole rows                              prefill, hidden
    PrefixAttention    rows that continue a shared prefix      hidden_with_prefix (the update)
    MeasuredAttention  the same, and where it goes             attention_mass
    CacheAttention     new tokens of rows that are cached      append, decode

A mode holds what the attention of one layer reads besides the queries, keys and values of its new
tokens. `causal`, `with_prefix` and `with_cache` make the modes of all layers. `attend` chooses the
computation by the type of the mode; no other code does.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spatial_jax.policy import attention
from spatial_jax.policy import cache as cache_lib
from spatial_jax.policy.attention_mass import AttentionMass, attention_mass, no_mass
from spatial_jax.policy.cache import KV, Cache, Prefix, RowAssignment, Suffix
from spatial_jax.types import Array


class CausalAttention(NamedTuple):
  """Rows are whole sequences: query t attends to keys s <= t of its own segment."""

  # bool, left-aligned; or int32, several sequences in a row: the number of each, 0 for padding.
  valid_RT: jax.Array


class PrefixAttention(NamedTuple):
  """Rows continue the prefix of their group and attend to it and to themselves; differentiable."""

  valid_RT: jax.Array  # bool, left-aligned; R = B*G rows, ordered by prompt
  prefix: KV  # of this layer
  prefix_length_B: jax.Array  # int32, valid keys of each prefix


class MeasuredAttention(NamedTuple):
  """`PrefixAttention` with one prefix per row, whose attention is summed over sampled tokens."""

  valid_RT: jax.Array  # bool, left-aligned
  prefix: KV  # of this layer
  prefix_length_B: jax.Array  # int32, valid keys of the prefix of each row
  sampled_RT: jax.Array  # bool, tokens that count
  measured: jax.Array  # bool [], whether this layer is measured


class CacheAttention(NamedTuple):
  """New tokens are written to the suffix of their row and attend to it and to the prefix.

  With `prompt_R` and `row_R` None, the rows are all rows of the cache in order, and the prefixes
  are read in place.
  """

  valid_RT: jax.Array  # bool, left-aligned; only valid tokens are written
  prefix: KV  # of this layer, all prompts of the cache
  prefix_length_B: jax.Array  # int32, valid keys of each prefix that is read
  suffix: Suffix  # of this layer, all rows of the cache
  start_R: jax.Array  # int32, tokens in each suffix before the new ones
  last_offset: jax.Array  # int32 [], largest offset of a new token in a suffix
  prompt_R: jax.Array | None  # int32, the prompt of each row
  row_R: jax.Array | None  # int32, the cache row of each row
  assignment: (
    RowAssignment | None
  )  # of all rows; None if row r holds rollout r, or if `row_R` is given


AttentionMode = CausalAttention | PrefixAttention | MeasuredAttention | CacheAttention


def causal(valid_RT: Array, layers: int) -> tuple[CausalAttention, ...]:
  """The mode of every layer for whole rows."""
  return (CausalAttention(jnp.asarray(valid_RT)),) * layers


def with_prefix(valid_RT: Array, prefix: Prefix) -> tuple[PrefixAttention, ...]:
  """The mode of every layer for rows that continue a prefix."""
  valid_RT = jnp.asarray(valid_RT)
  return tuple(PrefixAttention(valid_RT, kv, prefix.length_B) for kv in prefix.layers)


def measured(
  valid_RT: Array, prefix: Prefix, sampled_RT: Array, first_layer: int
) -> tuple[MeasuredAttention, ...]:
  """The mode of every layer for rows whose attention is measured from layer `first_layer` on."""
  valid_RT, sampled_RT = jnp.asarray(valid_RT), jnp.asarray(sampled_RT)
  return tuple(
    MeasuredAttention(valid_RT, kv, prefix.length_B, sampled_RT, jnp.asarray(layer >= first_layer))
    for layer, kv in enumerate(prefix.layers)
  )


def with_cache(
  valid_RT: Array, cache: Cache, row_R: Array | None
) -> tuple[tuple[CacheAttention, ...], jax.Array]:
  """The mode of every layer for tokens that are appended to rows of a cache.

  Args:
    valid_RT: bool, left-aligned.
    cache: before the tokens are written.
    row_R: int32, the cache row of each given row. None: all rows in order.

  Returns:
    The modes, and `cache.length_R` after the tokens are written.
  """
  valid_RT = jnp.asarray(valid_RT)
  count_R = jnp.sum(valid_RT, axis=1, dtype=jnp.int32)
  prefix_length_B, start_R = cache.prefix.length_B, cache.length_R
  prompt_R, assignment = None, cache.assignment

  def last_offset(start_R: jax.Array) -> jax.Array:
    return jnp.max(jnp.where(count_R > 0, start_R + count_R - 1, 0))

  if row_R is None:
    last, length_R = last_offset(start_R), start_R + count_R
  else:
    row_R, assignment = jnp.asarray(row_R), None
    prompt_R = jnp.take(cache.prompt_R, row_R, mode="clip")
    start_R = jnp.take(cache.length_R, row_R, mode="clip")
    length_R = cache.length_R.at[row_R].add(count_R, mode="drop")
    prefix_length_B = prefix_length_B[prompt_R]
    last = last_offset(start_R)
  shared = (start_R, last, prompt_R, row_R, assignment)
  modes = tuple(
    CacheAttention(valid_RT, kv, prefix_length_B, suffix, *shared)
    for kv, suffix in zip(cache.prefix.layers, cache.layers, strict=True)
  )
  return modes, length_R


def layer_axes(mode: AttentionMode) -> Any:
  """`in_axes` of a scan over layers: keys and values differ from layer to layer."""
  per_layer = ("prefix", "suffix", "measured")
  axes: list[Any] = [0 if name in per_layer else nn.broadcast for name in mode._fields]
  return type(mode)(*axes)


def stack_layers(modes: Sequence[AttentionMode]) -> Any:
  """One mode for a scan over layers: fields that differ from layer to layer are stacked."""

  def one(axis: Any, *fields: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *fields) if axis == 0 else fields[0]

  return jax.tree.map(one, layer_axes(modes[0]), *modes)


def attend(
  mode: AttentionMode, q_RKQTC: jax.Array, new: KV, mesh: Mesh | None
) -> tuple[jax.Array, KV | Suffix | AttentionMass]:
  """Attention of new tokens in one layer.

  Args:
    mode: of this layer.
    q_RKQTC: rotated queries of the new tokens, not yet scaled.
    new: their rotated keys and values.
    mesh: as in `attention.attend`.

  Returns:
    [R, K, Q, T, C]; and `new`, or for CacheAttention the updated suffix, or for MeasuredAttention
    the mass of this layer.
  """
  if isinstance(mode, CausalAttention):
    return attention.attend(q_RKQTC, *new, mode.valid_RT, causal=True, mesh=mesh), new
  if isinstance(mode, PrefixAttention | MeasuredAttention):
    out = attention.attend_with_prefix(
      q_RKQTC, mode.prefix, mode.prefix_length_B, new, mode.valid_RT, mesh
    )
    return out, new if isinstance(mode, PrefixAttention) else _mass(mode, q_RKQTC, new)
  prefix = cache_lib.take_rows(mode.prefix, mode.prompt_R)
  suffix = cache_lib.write(mode.suffix, new, mode.row_R, mode.start_R, mode.valid_RT)
  rows = (mode.start_R, mode.last_offset, mode.row_R, mode.assignment)
  return attention.attend_cache(q_RKQTC, prefix, mode.prefix_length_B, suffix, *rows), suffix


def _mass(mode: MeasuredAttention, q_RKQTC: jax.Array, new: KV) -> AttentionMass:
  """The mass of one layer; zeros if it is not measured."""
  sizes = (q_RKQTC.shape[0], mode.prefix.k_RKSC.shape[2], q_RKQTC.shape[3])
  return jax.lax.cond(
    mode.measured,
    lambda: attention_mass(q_RKQTC, mode.prefix, mode.prefix_length_B, new, mode.sampled_RT),
    lambda: no_mass(*sizes),
  )
