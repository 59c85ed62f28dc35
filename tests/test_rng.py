"""Named keys: the same for the same name, apart for another, in any program."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax import rng


def bits(key):
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_streams_are_apart():
  keys = {bits(rng.stream(seed, name)) for seed in range(4) for name in ("init", "sample", "")}
  assert len(keys) == 12
  assert bits(rng.stream(3, "init")) == bits(rng.stream(3, "init"))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4))
def test_fold_is_in_order(numbers):
  root = rng.stream(0, "sample")
  key = root
  for number in numbers:
    key = jax.random.fold_in(key, number)
  assert bits(rng.fold(root, *numbers)) == bits(key)


def test_order_and_number_matter():
  root = rng.stream(0, "sample")
  paths = [(), (0,), (1,), (0, 1), (1, 0), (0, 0)]
  assert len({bits(rng.fold(root, *path)) for path in paths}) == len(paths)


def test_a_key_is_the_same_inside_and_outside_a_program():
  root = rng.stream(0, "sample")
  numbers = np.arange(5, dtype=np.int32)
  inside = jax.jit(jax.vmap(lambda number: rng.fold(root, number, 7)))(numbers)
  assert [bits(key) for key in inside] == [bits(rng.fold(root, n, 7)) for n in range(5)]
