"""Group advantages: GRPO by hand, AP-GRPO, equal rewards, rollouts that are not valid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spatial_jax.config import ConfigError
from spatial_jax.learn.advantage import AdvantageConfig, advantage, ap_grpo, grpo
from spatial_jax.reward.snra import relative_squared_error, snra
from spatial_jax.types import Scores

REWARDS = np.array([[0.0, 0.25, 0.5, 1.0], [0.2, 0.2, 0.2, 0.2]], np.float32)
AP_GRPO = AdvantageConfig(
  alpha=1.0, sign_safe=False, by_std=True, baseline="mean", per_component=False
)
JIT = jax.jit(ap_grpo, static_argnames=("sign_safe", "by_std"))
# Few sizes, because each is compiled.
MASKS = st.sampled_from((1, 2, 3, 7, 8, 16)).flatmap(lambda group: arrays(bool, (2, group)))


def test_grpo_is_the_standard_score_with_the_sample_deviation():
  row = REWARDS[0].astype(np.float64)
  expected = (row - row.mean()) / (row.std(ddof=1) + 1e-6)
  advantage_BG = jax.jit(grpo)(REWARDS)
  assert advantage_BG.dtype == jnp.float32
  np.testing.assert_allclose(advantage_BG[0], expected, rtol=1e-5)


@given(st.floats(width=32), MASKS)
@settings(deadline=None, max_examples=200)
def test_equal_rewards_have_advantage_exactly_zero(reward, valid_BG):
  """For every float32, infinite and NaN too, every group size and every mask."""
  rewards_BG = np.full(valid_BG.shape, reward, np.float32)
  for alpha in (0.0, 1.0):
    np.testing.assert_array_equal(JIT(rewards_BG, alpha, None, valid_BG), 0.0)
  np.testing.assert_array_equal(JIT(rewards_BG, 0.0, None, valid_BG, by_std=False), 0.0)


@given(st.floats(0.0625, 2, width=32), MASKS)
@settings(deadline=None, max_examples=100)
def test_rewards_that_differ_by_one_rounding_step_have_the_exact_deviations(reward, higher_BG):
  """The rounding error of a mean, divided by 1e-6, would be as large as the difference."""
  rewards_BG = np.full(higher_BG.shape, reward, np.float32)
  rewards_BG[higher_BG] = np.nextafter(np.float32(reward), np.float32(4))
  exact_BG = rewards_BG.astype(np.float64)
  exact_BG -= exact_BG.mean(axis=1, keepdims=True)
  found_BG = JIT(rewards_BG, 0.0, None, None, by_std=False)
  np.testing.assert_allclose(found_BG, exact_BG, rtol=1e-5, atol=1e-12)


@given(arrays(np.float32, (2, 5), elements=st.floats(0, 1, width=32)), st.floats(0.1, 1.0))
@settings(deadline=None, max_examples=50)
def test_without_the_deviation_the_advantage_is_the_difference_from_the_mean(rewards_BG, factor):
  plain = np.asarray(grpo(rewards_BG, by_std=False))
  np.testing.assert_allclose(plain, rewards_BG - rewards_BG.mean(1, keepdims=True), atol=1e-6)
  np.testing.assert_allclose(grpo(rewards_BG * factor, by_std=False), plain * factor, atol=1e-6)


def test_nearly_right_answers_under_a_sharp_reward():
  """Errors 0, 2, 5, 8 % at k = 100: one below the mean keeps its sign and is weakened."""
  error = relative_squared_error(np.array([[1.0, 1.02, 1.05, 1.08]], np.float32), np.ones((1, 4)))
  reward_BG = snra(error, 100.0)
  np.testing.assert_allclose(grpo(reward_BG)[0], [0.80, 0.66, -0.08, -1.38], atol=0.011)
  np.testing.assert_allclose(ap_grpo(reward_BG, 1.0)[0], [0.80, 0.65, -0.07, -0.96], atol=0.011)
  safe = ap_grpo(reward_BG, 1.0, sign_safe=True)[0]
  np.testing.assert_allclose(safe[:3], [0.80, 0.65, -0.01], atol=0.011)


def test_a_group_of_wrong_answers_has_large_advantages_in_grpo_and_small_ones_in_ap_grpo():
  wrong_BG = np.array([[1e-3, 2e-3, 4e-3, 0.0]], np.float32)
  assert np.abs(grpo(wrong_BG)).max() > 1.0
  assert np.abs(ap_grpo(wrong_BG, 1.0)).max() < 0.01
  noise_BG = np.array([[1e-7, 2e-7, 0.0, 0.0]], np.float32)
  assert np.abs(grpo(noise_BG)).max() < 0.2


@given(arrays(np.float32, (2, 5), elements=st.floats(0, 1, width=32)))
@settings(deadline=None, max_examples=50)
def test_alpha_zero_is_grpo(rewards_BG):
  expected = grpo(rewards_BG)
  np.testing.assert_array_equal(ap_grpo(rewards_BG, 0.0), expected)
  np.testing.assert_array_equal(ap_grpo(rewards_BG, 0.0, sign_safe=True), expected)


@pytest.mark.parametrize("alpha", [0, 1, 2])
def test_the_factor_is_the_accuracy_to_the_power_of_alpha(alpha):
  scale_BG = np.array([[0.1, 0.5, 0.9, 1.0], [0.3, 0.3, 0.3, 0.3]], np.float32)
  plain = jax.jit(ap_grpo)(REWARDS, alpha, scale_BG)
  np.testing.assert_allclose(plain, grpo(REWARDS) * scale_BG**alpha, rtol=1e-5, atol=1e-7)
  safe = ap_grpo(REWARDS, alpha, scale_BG, sign_safe=True)
  base = np.asarray(grpo(REWARDS))
  factor = np.where(base < 0, 1 - scale_BG, scale_BG) ** alpha
  np.testing.assert_allclose(safe, base * factor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sign_safe", [True, False])
def test_a_scale_just_outside_its_range_is_limited(sign_safe):
  """A fractional power of a negative number would be NaN."""
  outside_BG = np.array([[-1e-7, 1.0000001, 0.5, 1.5]], np.float32)
  found = ap_grpo(REWARDS[:1], 0.5, outside_BG, sign_safe=sign_safe)
  expected = ap_grpo(REWARDS[:1], 0.5, np.clip(outside_BG, 0, 1), sign_safe=sign_safe)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("by_std", [True, False])
def test_only_the_sign_safe_form_has_negative_advantages_at_accuracy_zero(by_std):
  rewards_BG = np.array([[0.0, 1.0, 1.0, 0.0]], np.float32)
  assert (np.asarray(ap_grpo(rewards_BG, 1.0, by_std=by_std))[rewards_BG == 0] == 0.0).all()
  safe = np.asarray(ap_grpo(rewards_BG, 1.0, sign_safe=True, by_std=by_std))
  np.testing.assert_array_equal(safe, grpo(rewards_BG, by_std=by_std))


# --- rollouts that are not valid -----------------------------------------------------------------

NO_NUMBER = [np.nan, np.inf, -np.inf, np.float32(3e38), np.float32(-3e38)]


@pytest.mark.parametrize("bad", NO_NUMBER)
@pytest.mark.parametrize("sign_safe", [True, False])
@pytest.mark.parametrize("place", [0, 2])
def test_a_reward_that_is_not_finite_costs_one_rollout(bad, sign_safe, place):
  """The others have the advantages of the group without it, wherever it is in the group."""
  sound = np.array([[0.1, 0.9, 0.5]], np.float32)
  rewards_BG = np.insert(sound, place, bad, axis=1).astype(np.float32)
  others = np.arange(4) != place
  expected = ap_grpo(sound, 1.0, sign_safe=sign_safe)
  found = np.asarray(JIT(rewards_BG, 1.0, sound_scale(rewards_BG), sign_safe=sign_safe))
  np.testing.assert_allclose(found[:, others], expected, rtol=1e-6)
  assert found[0, place] == 0.0
  np.testing.assert_allclose(np.asarray(grpo(rewards_BG))[:, others], grpo(sound), rtol=1e-6)


def sound_scale(rewards_BG):
  return np.where(np.abs(rewards_BG) < 2, rewards_BG, 0.3).astype(np.float32)


@pytest.mark.parametrize("bad", NO_NUMBER[:3])
def test_a_scale_that_is_not_finite_costs_one_rollout(bad):
  rewards_BG = np.array([[0.1, 0.9, 0.7, 0.5]], np.float32)
  scale_BG = np.array([[0.1, 0.9, bad, 0.5]], np.float32)
  found = np.asarray(ap_grpo(rewards_BG, 1.0, scale_BG))
  expected = ap_grpo(rewards_BG[:, [0, 1, 3]], 1.0, scale_BG[:, [0, 1, 3]])
  np.testing.assert_allclose(found[:, [0, 1, 3]], expected, rtol=1e-6)
  assert found[0, 2] == 0.0


@given(
  arrays(np.float32, (3, 4), elements=st.floats(width=32)),
  arrays(np.float32, (3, 4), elements=st.floats(width=32)),
  st.floats(0, 3),
  st.booleans(),
  st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_advantages_are_finite_for_any_rewards(rewards_BG, scale_BG, alpha, sign_safe, by_std):
  found = JIT(rewards_BG, alpha, scale_BG, sign_safe=sign_safe, by_std=by_std)
  assert np.isfinite(found).all()


def test_a_fault_does_not_change_the_advantages_of_the_others():
  valid_BG = np.array([[True, True, False, True]])
  rewards_BG = np.array([[0.1, 0.9, 123.0, 0.5]], np.float32)
  with_fault = grpo(rewards_BG, valid_BG)
  np.testing.assert_allclose(with_fault[0, [0, 1, 3]], grpo(rewards_BG[:, [0, 1, 3]])[0], rtol=1e-6)
  assert with_fault[0, 2] == 0.0


@pytest.mark.parametrize("valid", [[True, False, False], [False, False, False]])
def test_a_group_with_fewer_than_two_valid_rollouts_has_advantage_zero(valid):
  rewards_BG = np.array([[0.3, 0.5, np.nan]], np.float32)
  np.testing.assert_array_equal(grpo(rewards_BG, np.array([valid])), np.zeros((1, 3)))
  np.testing.assert_array_equal(grpo(rewards_BG[:, :1]), np.zeros((1, 1)))


# --- of scores -----------------------------------------------------------------------------------


def test_format_is_not_part_of_the_accuracy_factor():
  accuracy_BG = np.array([[0.9, 0.9, 0.2, 0.0]], np.float32)
  format_BG = np.array([[1.0, 0.0, 1.0, 0.0]], np.float32)
  valid_BG = np.array([[True, True, True, False]])
  reward_BG = accuracy_BG + 0.5 * format_BG
  scores = Scores(reward_BG, accuracy_BG, accuracy_BG, format_BG, valid_BG, valid_BG, {}, {}, {})
  result = advantage(scores, AP_GRPO)
  np.testing.assert_allclose(result, grpo(reward_BG, valid_BG) * accuracy_BG, rtol=1e-6)
  raw = advantage(scores, dataclasses.replace(AP_GRPO, by_std=False))
  mean = reward_BG[0, :3].mean()
  np.testing.assert_allclose(raw[0, :3], (reward_BG[0, :3] - mean) * accuracy_BG[0, :3], rtol=1e-5)
  assert raw[0, 3] == 0.0
  safe = advantage(scores, dataclasses.replace(AP_GRPO, sign_safe=True))
  assert float(safe[0, 2]) == pytest.approx(0.8 * float(grpo(reward_BG, valid_BG)[0, 2]))


@pytest.mark.parametrize(
  ("key", "value"),
  [("alpha", np.nan), ("alpha", -1.0), ("alpha", np.inf), ("sign_safe", 1), ("by_std", "yes")],
)
def test_a_config_value_out_of_range_is_refused(key, value):
  with pytest.raises(ConfigError, match=rf"^{key} is {value!r} and must"):
    dataclasses.replace(AP_GRPO, **{key: value})
