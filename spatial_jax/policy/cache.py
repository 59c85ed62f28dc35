"""The key/value cache: one prefix per prompt, shared by its G rollouts, and one tail per row.

    prefix   k_BKSC  | prompt of b ........ pad |            written by prefill, read by G rows
    own      k_RKSC  | turn | observation ¦ turn ... ¦ free |  written by append, decode at length_R

A row's own part is cut into blocks (¦), so that nobody reads what no row has reached. Layers are a
tuple, so that a decode step updates each layer in place. S and C stand last: with S, K, C the TPU
compiler keeps a second copy of the cache.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax.policy.config import DecoderConfig


class KV(NamedTuple):
  """Keys (rotated) and values of one layer."""

  k_RKSC: jax.Array
  v_RKSC: jax.Array


Suffix = tuple[KV, ...]  # a layer's blocks, one behind the other along S


class Prefix(NamedTuple):
  """Keys and values of prompts; `length_B` int32 of the S places are valid."""

  layers: tuple[KV, ...]
  length_B: jax.Array


class RowAssignment(NamedTuple):
  """Which rollout has which row, where there are fewer rows than rollouts of the prompts.

  Rollout g of prompt b is b*G + g. A row that nobody has, and a rollout without a row, point
  anywhere.

  Attributes:
    rollout_R: int32, of each row.
    row_BG: int32, of each rollout.
  """

  rollout_R: jax.Array
  row_BG: jax.Array


class Cache(NamedTuple):
  """What decoding reads and writes.

  Attributes:
    prefix: the prompts.
    layers: per layer, what each row wrote behind its prompt.
    length_R: int32, own tokens of each row.
    seats: None where row r is rollout r: R = B*G, rows ordered by prompt.
  """

  prefix: Prefix
  layers: tuple[Suffix, ...]
  length_R: jax.Array
  assignment: RowAssignment | None

  @property
  def prompt_R(self) -> jax.Array:
    """int32, which prompt each row goes on behind."""
    prompts, count = self.prefix.length_B.shape[0], self.length_R.shape[0]
    if self.assignment is None:
      return jnp.arange(count, dtype=jnp.int32) // (count // prompts)
    return jnp.clip(self.assignment.rollout_R // self.assignment.row_BG.shape[1], 0, prompts - 1)

  def assignment_of(self, row_R: jax.Array) -> RowAssignment:
    """Seats of these rows alone, int32; one that there is not is padding, and nobody's."""
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
  """An empty cache.

  Args:
    cfg: of the decoder.
    prompts, group, rows: B, G, and R <= B*G.
    prefix_size: tokens of the longest prompt.
    suffix_block_sizes: of the blocks, tokens; together the longest response, observations included.
    dtype: of keys and values.

  Returns:
    The cache; a prefix length of 1 keeps the softmax of rows nobody uses finite.
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


def put_prefix(cache: Cache, prefix: Prefix, slot_B: jax.Array) -> Cache:
  """Puts freshly prefilled prompts into slots of the cache.

  Args:
    cache: with B slots.
    prefix: of b <= B prompts, of at most as many tokens as the cache has room for.
    slot_B: int32 [b], distinct; a slot >= B is dropped (padding of the prefill batch).
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
  """Writes each row's valid tokens at its own place.

  Args:
    own: a layer of the cache, blocks of [rows, K, S, C].
    new: k, v of the new tokens, [R, K, T, C].
    row_R: int32, the cache row of each new row, distinct; None for all in order; beyond the end is
      dropped.
    start_R: int32, where the first token goes.
    valid_RT: bool, left-aligned; others are not written.

  Returns:
    The layer.
  """
  rows, tokens = valid_RT.shape
  row_R = jnp.arange(rows) if row_R is None else row_R

  def put(old_RKSC: jax.Array, new_RKTC: jax.Array, place_RT: jax.Array) -> jax.Array:
    new_RTKC = jnp.swapaxes(new_RKTC, 1, 2).astype(old_RKSC.dtype)
    return old_RKSC.at[row_R[:, None], :, place_RT].set(new_RTKC, mode="drop")

  written = []
  for block, place_RT, inside_RT in _places(suffix, start_R, tokens):
    place_RT = jnp.where(inside_RT & valid_RT, place_RT, block.k_RKSC.shape[2])  # behind: dropped
    written.append(KV(*(put(old, fresh, place_RT) for old, fresh in zip(block, new, strict=True))))
  return tuple(written)


def read(suffix: Suffix, start_R: jax.Array, tokens: int) -> KV:
  """What `write` put there, [R, K, T, C]; behind the end anything."""
  found_RKTC = [jnp.zeros((), part.dtype) for part in suffix[0]]
  for block, place_RT, inside_RT in _places(suffix, start_R, tokens):
    at = jnp.clip(place_RT, 0, block.k_RKSC.shape[2] - 1)[:, None, :, None]
    here_RKTC = [jnp.take_along_axis(part, at, axis=2) for part in block]
    inside = inside_RT[:, None, :, None]
    found_RKTC = [jnp.where(inside, *pair) for pair in zip(here_RKTC, found_RKTC, strict=True)]
  return KV(*found_RKTC)


def _places(
  suffix: Suffix, start_R: jax.Array, tokens: int
) -> Iterator[tuple[KV, jax.Array, jax.Array]]:
  """Each block, the places in it of a row's tokens [R, T], and whether they are in it."""
  place_RT = start_R[:, None] + jnp.arange(tokens)[None, :]
  for block in suffix:
    size = block.k_RKSC.shape[2]
    yield block, place_RT, (place_RT >= 0) & (place_RT < size)
    place_RT = place_RT - size


def rows(block: KV, index_R: jax.Array | None) -> KV:
  """The given rows (int32, clipped to those that there are); all of them, uncopied, for None."""
  if index_R is None:
    return block
  return KV(*(jnp.take(part, index_R, axis=0, mode="clip") for part in block))


def front(suffix: Suffix, index_R: jax.Array, end: jax.Array) -> Suffix:
  """`rows` of a layer's blocks; those that begin at `end`, int32 [], or behind it are 0."""

  def taken(block: KV, first: int) -> KV:
    def nothing() -> KV:
      like = jax.eval_shape(rows, block, index_R)
      return KV(*(jnp.zeros(x.shape, x.dtype) for x in like))

    return jax.lax.cond(first < end, lambda: rows(block, index_R), nothing)

  ends = itertools.accumulate(block.k_RKSC.shape[2] for block in suffix)
  return tuple(taken(block, first) for block, first in zip(suffix, (0, *ends), strict=False))
