"""Named random keys: a new name never changes the keys of other names.

The key of a sampled token folds in the seed, the step, the task, the sample index and the token
index (see rollout/device_inputs.py), never the row or the time of its computation.

Keys are typed and always threefry, for every value of `jax_default_prng_impl`: with rbg, the
numbers that `vmap` draws for one row depend on the other rows.
"""

import zlib

import jax
import jax.numpy as jnp

from spatial_jax.types import Array

_IMPLEMENTATION = "threefry2x32"


def stream(seed: int, name: str) -> jax.Array:
  """The root key of one named use of randomness ("sample", "init", ...)."""
  root = jax.random.key(seed, impl=_IMPLEMENTATION)
  return jax.random.fold_in(root, zlib.crc32(name.encode()))


def fold(key: jax.Array, *numbers: int | jax.Array) -> jax.Array:
  """The key with several numbers folded in, in order."""
  for number in numbers:
    key = jax.random.fold_in(key, number)
  return key


def wrap(data: Array) -> jax.Array:
  """Typed keys from the `jax.random.key_data` of keys of `stream`, uint32 [..., 2]."""
  return jax.random.wrap_key_data(jnp.asarray(data), impl=_IMPLEMENTATION)
