"""Named random keys: adding a stream never shifts another one.

Sampling keys are fold_in(seed, step, prompt number, draw, count of tokens sampled before): they
depend on what is sampled, never on where or when it is computed.
"""

import zlib

import jax


def stream(seed: int, name: str) -> jax.Array:
  """The root key of one named use of randomness ("sample", "init", ...)."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def fold(key: jax.Array, *numbers: int | jax.Array) -> jax.Array:
  """Folds several numbers into a key, in order."""
  for number in numbers:
    key = jax.random.fold_in(key, number)
  return key
