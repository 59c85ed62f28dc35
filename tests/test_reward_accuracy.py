"""Mean relative accuracy at its boundaries, exact match, ratio rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.evaluate.benchmarks import vsi_bench
from spatial_jax.reward.accuracy import exact_match, mean_relative_accuracy, ratio


@pytest.mark.parametrize(
  ("answer", "truth", "loose", "strict"),
  [
    (4.0, 4.0, 1.0, 1.0),
    (3.0, 4.0, 0.6, 0.5),  # 25 %: exactly on a tolerance
    (2.0, 4.0, 0.1, 0.0),  # 50 %
    (6.0, 4.0, 0.1, 0.0),
    (1.0, 4.0, 0.0, 0.0),
    (10.4, 10.0, 1.0, 1.0),
    (10.7, 10.0, 0.9, 0.9),
    (-4.0, 4.0, 0.0, 0.0),
    (-4.0, -4.0, 1.0, 1.0),
    (0.0, 0.0, 1.0, 1.0),
    (0.1, 0.0, 0.0, 0.0),
  ],
)
def test_mra_counts_tolerances_with_and_without_equality(answer, truth, loose, strict):
  assert float(mean_relative_accuracy(answer, truth)) == pytest.approx(loose)
  assert float(mean_relative_accuracy(answer, truth, strict=True)) == pytest.approx(strict)


def published_in_float32(answer, truth):
  """ViLaSR's reward, its torch.arange written as a list, in float32."""
  error = np.abs(np.float32(answer) - np.float32(truth)) / np.abs(np.float32(truth))
  thresholds = [np.float32(0.5 + 0.05 * i) for i in range(10)]
  return sum(error < np.float32(1) - c for c in thresholds) / 10


@given(st.integers(1, 60), st.integers(1, 60))
@settings(deadline=None, max_examples=200)
def test_strict_mra_equals_the_published_code_and_loose_mra_the_benchmark(answer, truth):
  strict = float(mean_relative_accuracy(float(answer), float(truth), strict=True))
  assert strict == pytest.approx(published_in_float32(answer, truth))
  benchmark = vsi_bench.score(str(answer), str(truth), "object_counting")
  assert abs(float(mean_relative_accuracy(float(answer), float(truth))) - benchmark) < 0.101


def test_mra_has_the_shape_of_its_input_under_jit_and_vmap():
  answer = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
  truth = jnp.full((2, 3), 4.0, jnp.float32)
  whole = jax.jit(mean_relative_accuracy)(answer, truth)
  lifted = jax.vmap(jax.vmap(mean_relative_accuracy))(answer, truth)
  assert whole.shape == (2, 3)
  assert whole.dtype == jnp.float32
  np.testing.assert_array_equal(whole, lifted)


def test_exact_match_is_one_for_equal_options():
  match = exact_match(
    jnp.array([0.0, 1.0, 3.0], jnp.float32), jnp.array([0.0, 2.0, 3.0], jnp.float32)
  )
  np.testing.assert_array_equal(match, np.array([1, 0, 1], np.float32))


@pytest.mark.parametrize(
  ("form", "at_150_percent", "at_three_times"),
  [("linear", 0.5, 0.0), ("inverse", 2 / 3, 1 / 3), ("exponential", np.exp(-0.5), np.exp(-2.0))],
)
def test_ratio_is_equal_for_over_and_underestimates(form, at_150_percent, at_three_times):
  assert float(ratio(2.0, 2.0, form)) == 1.0
  for answer, truth in ((3.0, 2.0), (2.0, 3.0)):
    assert float(ratio(answer, truth, form)) == pytest.approx(at_150_percent)
  assert float(ratio(1.0, 3.0, form)) == pytest.approx(at_three_times)
  assert float(ratio(0.0, 3.0, form)) == 0.0
  assert float(ratio(-3.0, 3.0, form)) == 0.0
  assert float(ratio(0.0, 0.0, form)) == 1.0


def test_ratio_is_linear_by_default():
  assert float(ratio(3.0, 2.0)) == 0.5
