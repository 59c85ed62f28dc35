"""Group advantages: GRPO by hand, AP-GRPO, faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spatial_jax.learn.advantage import AdvantageConfig, advantage, ap_grpo, grpo
from spatial_jax.reward.snra import relative_squared_error, snra
from spatial_jax.types import Scores

REWARDS = np.array([[0.0, 0.25, 0.5, 1.0], [0.2, 0.2, 0.2, 0.2]], np.float32)


def test_grpo_is_the_standard_score_with_the_sample_deviation():
  row = REWARDS[0].astype(np.float64)
  expected = (row - row.mean()) / (row.std(ddof=1) + 1e-6)
  advantage_BG = jax.jit(grpo)(REWARDS)
  assert advantage_BG.dtype == jnp.float32
  np.testing.assert_allclose(advantage_BG[0], expected, rtol=1e-5)
  np.testing.assert_allclose(advantage_BG[1], np.zeros(4), atol=0.05)


@given(arrays(np.float32, (2, 5), elements=st.floats(0, 1, width=32)), st.floats(0.1, 1.0))
@settings(deadline=None, max_examples=50)
def test_without_the_deviation_a_group_counts_as_much_as_it_differs(rewards_BG, factor):
  plain = np.asarray(grpo(rewards_BG, by_std=False))
  np.testing.assert_allclose(plain, rewards_BG - rewards_BG.mean(1, keepdims=True), atol=1e-6)
  np.testing.assert_allclose(grpo(rewards_BG * factor, by_std=False), plain * factor, atol=1e-6)


def test_near_misses_under_a_sharp_reward():
  """Errors 0, 2, 5, 8 % at k = 100: a near miss below the mean keeps its sign and is damped."""
  error = relative_squared_error(np.array([[1.0, 1.02, 1.05, 1.08]], np.float32), np.ones((1, 4)))
  reward_BG = snra(error, 100.0)
  np.testing.assert_allclose(grpo(reward_BG)[0], [0.80, 0.66, -0.08, -1.38], atol=0.011)
  np.testing.assert_allclose(ap_grpo(reward_BG, 1.0)[0], [0.80, 0.65, -0.07, -0.96], atol=0.011)
  safe = ap_grpo(reward_BG, 1.0, sign_safe=True)[0]
  np.testing.assert_allclose(safe[:3], [0.80, 0.65, -0.01], atol=0.011)


def test_an_all_bad_group_keeps_its_rank_in_grpo_and_fades_in_ap_grpo():
  bad_BG = np.array([[1e-3, 2e-3, 4e-3, 0.0]], np.float32)
  assert np.abs(grpo(bad_BG)).max() > 1.0
  assert np.abs(ap_grpo(bad_BG, 1.0)).max() < 0.01
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


@pytest.mark.parametrize("by_std", [True, False])
def test_only_the_sign_safe_form_counts_against_a_failure(by_std):
  rewards_BG = np.array([[0.0, 1.0, 1.0, 0.0]], np.float32)
  assert (np.asarray(ap_grpo(rewards_BG, 1.0, by_std=by_std))[rewards_BG == 0] == 0.0).all()
  safe = np.asarray(ap_grpo(rewards_BG, 1.0, sign_safe=True, by_std=by_std))
  np.testing.assert_array_equal(safe, grpo(rewards_BG, by_std=by_std))


@pytest.mark.parametrize("sign_safe", [True, False])
def test_a_fault_changes_nothing_in_either_form(sign_safe):
  rewards_BG = np.array([[0.1, 0.9, np.nan, 0.5], [0.1, np.nan, np.nan, np.nan]], np.float32)
  found = np.asarray(ap_grpo(rewards_BG, 1.0, None, np.isfinite(rewards_BG), sign_safe=sign_safe))
  expected = ap_grpo(rewards_BG[:1, [0, 1, 3]], 1.0, sign_safe=sign_safe)
  np.testing.assert_allclose(found[:1, [0, 1, 3]], expected, rtol=1e-6)
  assert (found[~np.isfinite(rewards_BG)] == 0.0).all()
  assert found[1, 0] == 0.0


def test_a_fault_changes_nothing_for_the_others():
  valid_BG = np.array([[True, True, False, True]])
  rewards_BG = np.array([[0.1, 0.9, 123.0, 0.5]], np.float32)
  with_fault = grpo(rewards_BG, valid_BG)
  np.testing.assert_allclose(with_fault[0, [0, 1, 3]], grpo(rewards_BG[:, [0, 1, 3]])[0], rtol=1e-6)
  assert with_fault[0, 2] == 0.0


@pytest.mark.parametrize("usable", [[True, False, False], [False, False, False]])
def test_a_group_without_comparison_has_no_advantage(valid):
  rewards_BG = np.array([[0.3, 0.5, np.nan]], np.float32)
  np.testing.assert_array_equal(grpo(rewards_BG, np.array([valid])), np.zeros((1, 3)))


def test_format_stays_outside_the_factor():
  accuracy_BG = np.array([[0.9, 0.9, 0.2, 0.0]], np.float32)
  format_BG = np.array([[1.0, 0.0, 1.0, 0.0]], np.float32)
  valid_BG = np.array([[True, True, True, False]])
  reward_BG = accuracy_BG + 0.5 * format_BG
  scores = Scores(reward_BG, accuracy_BG, accuracy_BG, format_BG, valid_BG, valid_BG, {})
  result = advantage(scores, AdvantageConfig(alpha=1.0, sign_safe=False, by_std=True))
  np.testing.assert_allclose(result, grpo(reward_BG, valid_BG) * accuracy_BG, rtol=1e-6)
  raw = advantage(scores, AdvantageConfig(alpha=1.0, sign_safe=False, by_std=False))
  mean = reward_BG[0, :3].mean()
  np.testing.assert_allclose(raw[0, :3], (reward_BG[0, :3] - mean) * accuracy_BG[0, :3], rtol=1e-5)
  assert raw[0, 3] == 0.0
  safe = advantage(scores, AdvantageConfig(alpha=1.0, sign_safe=True, by_std=True))
  assert float(safe[0, 2]) == pytest.approx(0.8 * float(grpo(reward_BG, valid_BG)[0, 2]))
