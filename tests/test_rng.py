"""Named keys are reproducible, distinct, and the same for every default PRNG implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax import rng
from spatial_jax.rollout.device_inputs import SamplingArrays
from spatial_jax.rollout.sampling import sample_token


def bits(key):
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_streams_are_distinct_and_reproducible():
  keys = {bits(rng.stream(seed, name)) for seed in range(4) for name in ("init", "sample", "")}
  assert len(keys) == 12
  assert bits(rng.stream(3, "init")) == bits(rng.stream(3, "init"))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4))
def test_fold_folds_numbers_in_order(numbers):
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


# --- implementations ---------------------------------------------------------------------------

ROWS, VOCABULARY = 6, 40


def draws(key_R, rows=slice(None)):
  """30 tokens of each row, sampled uniformly, [30, R]."""
  count = len(key_R[rows])
  sampling = SamplingArrays(
    key_R=key_R[rows],
    temperature_R=jnp.ones(count),
    greedy_R=jnp.zeros(count, bool),
    top_k_R=jnp.zeros(count, jnp.int32),
    top_p_R=jnp.ones(count),
    min_p_R=jnp.zeros(count),
    limit_R=jnp.zeros(count, jnp.int32),
  )
  logits_RV, forbidden_V = jnp.zeros((count, VOCABULARY)), jnp.zeros(VOCABULARY, bool)

  def one(index):
    index_R = jnp.full(count, index, jnp.int32)
    return sample_token(logits_RV, index_R, sampling, forbidden_V, False)[0]

  return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(30)))


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_implementation_sample(implementation):
  tokens = draws(jax.random.split(jax.random.key(0, impl=implementation), ROWS))
  assert tokens.min() >= 0
  assert tokens.max() < VOCABULARY
  assert len(np.unique(tokens, axis=1).T) == ROWS, "rows draw different tokens"
  assert len(np.unique(tokens, axis=0)) == 30, "and so do positions"


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_streams_do_not_depend_on_the_default_implementation(implementation):
  """A row draws the same numbers with other rows and alone, which rbg keys do not."""
  expected = bits(rng.fold(rng.stream(3, "sample"), 1, 2))
  with jax.default_prng_impl(implementation):
    assert bits(rng.fold(rng.stream(3, "sample"), 1, 2)) == expected
    key_R = jax.random.split(rng.stream(3, "sample"), ROWS)
    np.testing.assert_array_equal(draws(key_R)[:, 2:4], draws(key_R, slice(2, 4)))
    key_data_R2 = np.asarray(jax.random.key_data(key_R))
    assert list(map(bits, rng.wrap(key_data_R2))) == list(map(bits, key_R))
