"""Smooth rewards: values, shape of the curve, input outside the range, schedules, tracing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax import config
from spatial_jax.reward.snra import Schedule, relative_squared_error, sharpness, shifted_tanh, snra

KINDS = ("sigmoid", "linear", "cosine", "geometric", "constant")
RELATIVE_ERRORS = np.array([0.02, 0.05, 0.10, 0.20, 0.30, 0.50, 1.00, 2.00], np.float32)
TABLE = {  # sharpness -> rewards at these errors
  1.0: (1.000, 0.999, 0.995, 0.980, 0.955, 0.876, 0.538, 0.036),
  5.0: (0.999, 0.994, 0.975, 0.900, 0.779, 0.445, 0.013, 0.000),
  20.0: (0.996, 0.975, 0.900, 0.620, 0.284, 0.013, 0.000, 0.000),
  100.0: (0.980, 0.876, 0.538, 0.036, 0.000, 0.000, 0.000, 0.000),
  400.0: (0.920, 0.538, 0.036, 0.000, 0.000, 0.000, 0.000, 0.000),
}


def schedule(kind):
  return Schedule(kind=kind, k_min=1.0, k_max=100.0, midpoint=0.5, steepness=10.0)


@pytest.mark.parametrize("k", TABLE)
def test_rewards_are_those_of_the_table(k):
  error = relative_squared_error(3.0 * (1.0 + RELATIVE_ERRORS), np.full(8, 3.0, np.float32))
  np.testing.assert_allclose(snra(error, k), TABLE[k], atol=6e-4)


@pytest.mark.parametrize("k", [1.0, 5.0, 20.0, 100.0, 400.0])
def test_the_reward_is_one_half_at_log_3_over_k(k):
  assert float(snra(np.log(3.0) / k, k)) == pytest.approx(0.5, abs=1e-6)


@given(
  st.floats(0, 100, width=32),
  st.floats(0, 100, width=32),
  st.floats(0.125, 400, width=32),
  st.floats(0.125, 400, width=32),
)
@settings(deadline=None, max_examples=60)
def test_the_reward_falls_with_error_and_sharpness(error_a, error_b, k_a, k_b):
  less, more = sorted((error_a, error_b))
  blunt, sharp = sorted((k_a, k_b))
  assert 1.0 >= float(snra(less, blunt)) >= float(snra(more, blunt)) >= 0.0
  assert float(snra(less, blunt)) >= float(snra(less, sharp))


def test_no_error_is_rewarded_exactly_one():
  k = jnp.array([0.1, 1.0, 400.0], jnp.float32)
  np.testing.assert_array_equal(snra(jnp.zeros(3, jnp.float32), k), np.ones(3, np.float32))
  np.testing.assert_array_equal(shifted_tanh(jnp.zeros(3, jnp.float32), k), np.ones(3, np.float32))


def test_shifted_tanh_is_the_sigmoid_at_twice_the_sharpness():
  error = jnp.linspace(0.0, 4.0, 101, dtype=jnp.float32)
  np.testing.assert_allclose(shifted_tanh(error, 0.5), snra(error, 1.0), atol=3e-7)
  np.testing.assert_allclose(shifted_tanh(error, 10.0), snra(error, 20.0), atol=3e-7)


def test_huge_errors_have_reward_0_and_finite_gradients():
  answers = np.array([1e3, 3e38, -3e38], np.float32)
  error = relative_squared_error(answers, np.full(3, 1e-3, np.float32))
  np.testing.assert_array_equal(snra(error, 400.0), np.zeros(3, np.float32))
  np.testing.assert_array_equal(shifted_tanh(error, 400.0), np.zeros(3, np.float32))
  gradient = jax.grad(lambda e: snra(e, 400.0))(jnp.float32(1e30))
  assert np.isfinite(gradient)


def test_a_truth_of_zero_does_not_divide_by_zero():
  assert float(relative_squared_error(0.0, 0.0)) == 0.0
  assert float(snra(relative_squared_error(0.5, 0.0), 1.0)) == 0.0
  assert float(relative_squared_error(-2.0, -4.0)) == pytest.approx(0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_grow_between_their_bounds(kind):
  k = np.asarray(sharpness(jnp.linspace(0.0, 1.0, 21, dtype=jnp.float32), schedule(kind)))
  assert k.dtype == np.float32
  assert (np.diff(k) >= 0).all()
  assert (k >= 1.0 - 1e-5).all()
  assert (k <= 100.0 + 1e-3).all()


@pytest.mark.parametrize(
  ("kind", "expected"),
  [
    (
      "sigmoid",
      (1 + 99 / (1 + np.exp(5)), 1 + 99 / (1 + np.exp(2.5)), 50.5, 1 + 99 / (1 + np.exp(-5))),
    ),
    ("linear", (1.0, 25.75, 50.5, 100.0)),
    ("cosine", (1.0, 1 + 99 * (1 - np.sqrt(0.5)) / 2, 50.5, 100.0)),
    ("geometric", (1.0, 100**0.25, 10.0, 100.0)),
    ("constant", (100.0, 100.0, 100.0, 100.0)),
  ],
)
def test_schedule_values(kind, expected):
  k = [float(sharpness(u, schedule(kind))) for u in (0.0, 0.25, 0.5, 1.0)]
  np.testing.assert_allclose(k, expected, rtol=1e-5)
  assert float(sharpness(-1, schedule(kind))) == k[0]
  assert float(sharpness(7, schedule(kind))) == k[-1]


def test_sharpness_and_schedule_numbers_never_recompile():
  traces = []

  @jax.jit
  def reward(error_B, progress, curve):
    traces.append(1)
    return jax.vmap(snra, (0, None))(error_B, sharpness(progress, curve))

  error_B = jnp.array([0.0, 0.01, 1.0], jnp.float32)
  for step, k_max in ((0.0, 50.0), (0.5, 100.0), (1.0, 400.0)):
    curve = Schedule("linear", *(jnp.float32(x) for x in (1.0, k_max, 0.5, 10.0)))
    reward_B = reward(error_B, jnp.float32(step), curve)
    expected = snra(error_B, 1.0 + (k_max - 1.0) * step)
    np.testing.assert_allclose(reward_B, expected, rtol=1e-5, atol=1e-7)
  assert len(traces) == 1


def test_built_from_a_config():
  mapping = {"kind": "cosine", "k_min": 1, "k_max": 100.0, "midpoint": 0.5, "steepness": 10}
  assert config.build(Schedule, mapping) == schedule("cosine")
  with pytest.raises(config.ConfigError, match="kind"):
    config.build(Schedule, mapping | {"kind": "step"})


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("kind", "step"), ("k_min", 0.0), ("k_min", -1.0), ("k_min", np.nan), ("k_max", np.inf),
    ("k_max", 0.5), ("k_max", "100"), ("midpoint", -0.1), ("midpoint", 1.5), ("midpoint", np.nan),
    ("steepness", 0.0), ("steepness", np.nan), ("steepness", True),
  ],
)  # fmt: skip
def test_a_schedule_out_of_range_is_refused(field, value):
  with pytest.raises(config.ConfigError, match=f"^{field} is .* and must be "):
    dataclasses.replace(schedule("sigmoid"), **{field: value})


def test_a_constant_schedule_ignores_k_min():
  constant = Schedule("constant", k_min=50.0, k_max=20.0, midpoint=0.5, steepness=10.0)
  assert float(sharpness(0.0, constant)) == 20.0


@pytest.mark.parametrize("reward", [snra, shifted_tanh])
def test_a_negative_error_counts_as_no_error(reward):
  errors = np.array([-np.inf, -1e30, -1.0, -1e-30, -0.0], np.float32)
  for k in (0.1, 10.0, 400.0):
    np.testing.assert_array_equal(reward(errors, k), np.ones(5, np.float32))


@pytest.mark.parametrize("reward", [snra, shifted_tanh])
def test_a_nan_error_has_a_nan_reward(reward):
  result = np.asarray(reward(np.array([np.nan, 0.0], np.float32), 10.0))
  np.testing.assert_array_equal(np.isnan(result), [True, False])


def test_the_slope_at_no_error_is_minus_half_the_sharpness():
  assert float(jax.grad(lambda error: snra(error, 8.0))(jnp.float32(0.0))) == pytest.approx(-4.0)
