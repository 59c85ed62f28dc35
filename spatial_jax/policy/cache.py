"""The key/value cache: one prefix per prompt, shared by its G rollouts, and one suffix per row.

    prefix   k_BKSC  | prompt b ........ pad |                  prefill writes it, G rows read it
    suffix   k_RKSC  | turn | observation ¦ turn ... ¦ free |   append, decode write at length_R

A row's suffix is stored in blocks (¦) along S, so that a decode step skips the blocks that no row
has reached. Layers are a tuple, so that a decode step updates each layer in place. S and C are the
last axes: with S, K, C the TPU compiler keeps a second copy of the cache.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spatial_jax import sharding
from spatial_jax.policy.config import DecoderConfig


class KV(NamedTuple):
  """Rotated keys and values of one layer: of whole prompts, or of one block of suffixes."""

  k_RKSC: jax.Array
  v_RKSC: jax.Array


Suffix = tuple[KV, ...]  # the blocks of one layer, consecutive along S


class Prefix(NamedTuple):
  """Keys and values of prompts in every layer; the first `length_B` (int32) of S are valid."""

  layers: tuple[KV, ...]
  length_B: jax.Array


class RowAssignment(NamedTuple):
  """Which row holds which rollout, when there are fewer rows than rollouts.

  Rollout g of prompt b has the number b*G + g. Entries of unused rows and of rollouts without a row
  are arbitrary.
  """

  rollout_R: jax.Array  # int32, the rollout of each row
  row_BG: jax.Array  # int32, the row of each rollout


class Cache(NamedTuple):
  """The keys and values that decoding reads and extends."""

  prefix: Prefix  # of the prompts
  layers: tuple[Suffix, ...]  # for each layer, the suffixes of the rows
  length_R: jax.Array  # int32, tokens in the suffix of each row
  assignment: RowAssignment | None  # None: row r holds rollout r (R = B*G rows, ordered by prompt)

  @property
  def prompt_R(self) -> jax.Array:
    """int32, the prompt of each row."""
    prompts, count = self.prefix.length_B.shape[0], self.length_R.shape[0]
    if self.assignment is None:
      return jnp.arange(count, dtype=jnp.int32) // (count // prompts)
    return jnp.clip(self.assignment.rollout_R // self.assignment.row_BG.shape[1], 0, prompts - 1)

  def assignment_of(self, row_R: jax.Array) -> RowAssignment:
    """The assignment of the given rows (int32); an index >= R is padding without a rollout."""
    prompts, count = self.prefix.length_B.shape[0], self.length_R.shape[0]
    rollout_R, group = row_R, count // prompts
    if self.assignment is not None:
      rollout_R = jnp.take(self.assignment.rollout_R, row_R, mode="clip")
      group = self.assignment.row_BG.shape[1]
    rollout_R = jnp.where(row_R < count, rollout_R, prompts * group)
    new_R = jnp.arange(row_R.size, dtype=jnp.int32)
    row_BG = jnp.zeros(prompts * group, jnp.int32).at[rollout_R].set(new_R, mode="drop")
    return RowAssignment(rollout_R, row_BG.reshape(prompts, group))


def init_cache(
  cfg: DecoderConfig,
  prompts: int,
  group: int,
  rows: int,
  prefix_size: int,
  suffix_block_sizes: Sequence[int],
  dtype: jnp.dtype,
) -> Cache:
  """An empty cache. Prefix lengths are 1, which keeps the softmax of unused rows finite.

  Args:
    cfg: shape of the decoder.
    prompts, group, rows: B, G, and R <= B*G.
    prefix_size: tokens of the longest prompt.
    suffix_block_sizes: tokens of each block; their sum is the longest response, including
      observations.
    dtype: of keys and values.
  """

  def block(count: int, size: int) -> KV:
    shape = (count, cfg.kv_heads, size, cfg.head_dim)
    return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  assignment = None
  if rows < prompts * group:
    assignment = RowAssignment(jnp.zeros(rows, jnp.int32), jnp.zeros((prompts, group), jnp.int32))
  shared = tuple(block(prompts, prefix_size) for _ in range(cfg.layers))
  suffix = tuple(tuple(block(rows, size) for size in suffix_block_sizes) for _ in range(cfg.layers))
  prefix = Prefix(shared, jnp.ones(prompts, jnp.int32))
  return Cache(prefix, suffix, jnp.zeros(rows, jnp.int32), assignment)


def rollout_shardings(tree: Any, mesh: Mesh) -> Any:
  """Shardings of rollout arrays: rows over `data`, KV heads over `tensor`, each only if it divides.

  The leading axis of the (abstract) arrays is prompts or rows. Keys and values are recognised by
  their type, `KV`.
  """

  def one(node: Any) -> Any:
    if isinstance(node, KV):
      place: Any = sharding.kv_sharding(mesh, *node.k_RKSC.shape[:2])
      return KV(place, place)
    return sharding.row_sharding(mesh, node.shape[0])

  return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, KV))


def put_prefix(cache: Cache, prefix: Prefix, slot_B: jax.Array) -> Cache:
  """The cache with new prompts, not longer than its prefix size, in some of its B slots.

  `slot_B` is int32, distinct; a slot >= B is dropped (padding of the prefill batch).
  """

  def put(old_BKSC: jax.Array, new_BKSC: jax.Array) -> jax.Array:
    return old_BKSC.at[slot_B, :, : new_BKSC.shape[2]].set(
      new_BKSC.astype(old_BKSC.dtype), mode="drop", unique_indices=True
    )

  layers = jax.tree.map(put, cache.prefix.layers, prefix.layers)
  length_B = cache.prefix.length_B.at[slot_B].set(prefix.length_B, mode="drop")
  return cache._replace(prefix=Prefix(layers, length_B))


def write(
  suffix: Suffix, new: KV, row_R: jax.Array | None, start_R: jax.Array, valid_RT: jax.Array
) -> Suffix:
  """The suffixes of one layer with new tokens written at each row's own offset.

  Args:
    suffix: blocks of [rows, K, S, C].
    new: k, v of the new tokens, [R, K, T, C].
    row_R: int32, the cache row of each new row, distinct; an index beyond the cache is dropped.
      None: all rows in order.
    start_R: int32, offset of the first new token in its row's suffix.
    valid_RT: bool, left-aligned; only valid tokens are written, and none beyond the last block.
  """
  rows, tokens = valid_RT.shape
  row_R = jnp.arange(rows) if row_R is None else row_R

  def put(old_RKSC: jax.Array, new_RKTC: jax.Array, offset_RT: jax.Array) -> jax.Array:
    new_RTKC = jnp.swapaxes(new_RKTC, 1, 2).astype(old_RKSC.dtype)
    return old_RKSC.at[row_R[:, None], :, offset_RT].set(new_RTKC, mode="drop")

  written = []
  for block, offset_RT, inside_RT in _offsets_in_blocks(suffix, start_R, tokens):
    size = block.k_RKSC.shape[2]
    offset_RT = jnp.where(inside_RT & valid_RT, offset_RT, size)  # out of range: dropped
    written.append(KV(*(put(old, part, offset_RT) for old, part in zip(block, new, strict=True))))
  return tuple(written)


def read(suffix: Suffix, start_R: jax.Array, tokens: int) -> KV:
  """Keys and values of each row at offsets `start_R` + t, [R, K, T, C]: the inverse of `write`.

  Beyond the last block they are arbitrary.
  """
  found_RKTC = [jnp.zeros((), part.dtype) for part in suffix[0]]
  for block, offset_RT, inside_RT in _offsets_in_blocks(suffix, start_R, tokens):
    at = jnp.clip(offset_RT, 0, block.k_RKSC.shape[2] - 1)[:, None, :, None]
    block_RKTC = [jnp.take_along_axis(part, at, axis=2) for part in block]
    inside = inside_RT[:, None, :, None]
    found_RKTC = [jnp.where(inside, *pair) for pair in zip(block_RKTC, found_RKTC, strict=True)]
  return KV(*found_RKTC)


def _offsets_in_blocks(
  suffix: Suffix, start_R: jax.Array, tokens: int
) -> Iterator[tuple[KV, jax.Array, jax.Array]]:
  """Each block, the offsets in it of a row's tokens [R, T], and which of them are inside it."""
  offset_RT = start_R[:, None] + jnp.arange(tokens)[None, :]
  for block in suffix:
    size = block.k_RKSC.shape[2]
    yield block, offset_RT, (offset_RT >= 0) & (offset_RT < size)
    offset_RT = offset_RT - size


def take_rows(block: KV, row_R: jax.Array | None) -> KV:
  """The given rows (int32, clipped to the valid range); None: all rows, without a copy."""
  if row_R is None:
    return block
  return KV(*(jnp.take(part, row_R, axis=0, mode="clip") for part in block))


def take_rows_until(suffix: Suffix, row_R: jax.Array, end: jax.Array) -> Suffix:
  """`take_rows` of every block of a layer; blocks that start at or after `end` (int32 []) are 0."""

  def take(block: KV, first: int) -> KV:
    def zeros() -> KV:
      like = jax.eval_shape(take_rows, block, row_R)
      return KV(*(jnp.zeros(x.shape, x.dtype) for x in like))

    return jax.lax.cond(first < end, lambda: take_rows(block, row_R), zeros)

  ends = itertools.accumulate(block.k_RKSC.shape[2] for block in suffix)
  return tuple(take(block, first) for block, first in zip(suffix, (0, *ends), strict=False))
