"""Losses, advantages and KL estimates against the formulas of TRL and verl, in float64 and float32.

The references are written here in NumPy, token by token, from:

  TRL   trl/trainer/grpo_trainer.py (commit d2b69d7 and the releases after it): clip and delta,
        importance_sampling_level, cispo, sapo, dr_grpo, importance sampling of the sampler,
        multi_objective_aggregation
  verl  verl/trainer/ppo/core_algos.py (commit 26b5d6b and after): dual clip, gspo, cispo,
        kl_penalty, agg_loss, compute_rloo_outcome_advantage
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.learn.advantage import gdpo, grpo, leave_one_out
from spatial_jax.learn.losses import (
  ImportanceConfig,
  importance_weights,
  kl_estimate,
  policy_loss,
  token_weights,
)
from tests.learn_fixtures import loss_config

R, T = 6, 9
DTYPES = [pytest.param("float64", 1e-6, id="float64"), pytest.param("float32", 1e-5, id="float32")]


def inputs():
  """Log-probabilities of policy, old policy and reference, advantages, mask; float64."""
  random = np.random.default_rng(3)
  logp = -random.exponential(1.0, (R, T))
  old, ref = (logp + random.normal(0, 0.4, (R, T)) for _ in range(2))
  advantage = random.normal(size=R)
  mask = np.arange(T)[None] < random.integers(2, T + 1, R)[:, None]
  return logp, np.minimum(old, 0), np.minimum(ref, 0), advantage, mask


def aggregate(loss, mask, normalise, constant=12):
  """verl's agg_loss: token-mean, seq-mean-token-mean, seq-mean-token-sum-norm."""
  if normalise == "token":
    return loss[mask].sum() / mask.sum()
  if normalise == "sequence":
    return np.mean([row[m].sum() / m.sum() for row, m in zip(loss, mask, strict=True)])
  return np.mean([row[m].sum() for row, m in zip(loss, mask, strict=True)]) / constant


def clip(logp, old, advantage, mask, low, high, delta):
  """TRL's two-sided clip, with verl's lower bound of the loss for negative advantages."""
  ratio = np.exp(logp - old)
  one, two = -advantage * ratio, -advantage * np.clip(ratio, 1 - low, 1 + high)
  loss = np.maximum(one, two)
  return np.where(advantage < 0, np.minimum(loss, -advantage * delta), loss) if delta else loss


def gspo(logp, old, advantage, mask, low, high, delta):
  """The ratio of a sequence is that of the geometric mean of its tokens."""
  mean = (np.where(mask, logp - old, 0).sum(1) / mask.sum(1))[:, None]
  ratio = np.exp(mean) * np.ones_like(logp)
  return np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 1 - low, 1 + high))


def cispo(logp, old, advantage, mask, low, high, delta):
  """The clipped ratio weighs the log-likelihood."""
  return -np.clip(np.exp(logp - old), 1 - low, 1 + high) * advantage * logp


def sapo(logp, old, advantage, mask, low, high, delta):
  """TRL's get_sapo_token_loss, with temperatures 1 and 1.05."""
  tau = np.where(advantage > 0, 1.0, 1.05)
  ratio = np.exp(logp - old)
  return -(4 / tau) / (1 + np.exp(-tau * (ratio - 1))) * advantage


PUBLISHED = {
  "clip": (clip, {}),
  "dual": (clip, {"dual_clip": 1.2}),
  "gspo": (gspo, {"kind": "gspo", "clip_low": 0.05, "clip_high": 0.05}),
  "gspo_token": (gspo, {"kind": "gspo_token", "clip_low": 0.05, "clip_high": 0.05}),
  "cispo": (cispo, {"kind": "cispo", "clip_low": 1.0, "clip_high": 0.3}),
  "sapo": (sapo, {"kind": "sapo"}),
}


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("normalise", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_loss_is_the_published_one(name, normalise, dtype, tolerance):
  published, changes = PUBLISHED[name]
  if name == "gspo" and normalise != "sequence":
    pytest.skip("GSPO is a mean over sequences")
  constant = 12 if normalise == "constant" else 0
  cfg = loss_config(changes, normalise=normalise, length_constant=constant)
  logp, old, ref, advantage, mask = inputs()
  loss = published(logp, old, advantage[:, None], mask, cfg.clip_low, cfg.clip_high, cfg.dual_clip)
  gap = ref - logp
  expected = aggregate(loss + 0.3 * (np.exp(gap) - gap - 1), mask, normalise)
  weight = np.asarray(token_weights(mask, normalise, length_constant=constant))
  with jax.enable_x64(dtype == "float64"):
    x, o, r, a, weight = (jnp.asarray(v, dtype) for v in (logp, old, ref, advantage, weight))
    found, _ = policy_loss(x, o, a, mask, weight, cfg, 0.3, r)
  np.testing.assert_allclose(found, expected, rtol=tolerance)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_gradient_is_that_of_finite_differences(name):
  """Where a gradient is stopped, the stopped value is held fixed in the differences too."""
  _, changes = PUBLISHED[name]
  cfg = loss_config(changes, normalise="sequence")
  logp, old, _, advantage, mask = inputs()
  step = 1e-6
  weight = np.asarray(token_weights(mask, "sequence"))
  with jax.enable_x64(True):
    weight = jnp.asarray(weight, "float64")
    fixed = (jnp.asarray(old), jnp.asarray(advantage), mask, weight, cfg)
    gradient = jax.grad(lambda x: policy_loss(x, *fixed)[0])(jnp.asarray(logp))
    if name in ("gspo_token", "cispo"):
      ratio = np.exp(logp - old)
      if name == "cispo":
        scale = np.clip(ratio, 0.0, 1.3)
      else:
        mean = (np.where(mask, logp - old, 0).sum(1) / mask.sum(1))[:, None]
        scale = np.exp(mean) * np.ones_like(logp)
        rising = advantage[:, None] > 0
        scale = scale * ~((rising & (scale > 1.05)) | (~rising & (scale < 0.95)))
      expected = -scale * advantage[:, None] * np.asarray(weight)[:, None] * mask
      np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)
      return
    for r, t in ((0, 0), (1, 1), (3, 0), (5, 1)):
      ends = []
      for sign in (1, -1):
        moved = logp.copy()
        moved[r, t] += sign * step
        ends.append(float(policy_loss(jnp.asarray(moved), *fixed)[0]))
      np.testing.assert_allclose(gradient[r, t], (ends[0] - ends[1]) / (2 * step), atol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_kl_estimates_are_those_of_verl(kind, dtype, tolerance):
  """kl_penalty: "kl", "mse" and "low_var_kl"."""
  logp, _, ref, _, mask = inputs()
  gap = ref - logp
  expected = {"k1": -gap, "k2": 0.5 * gap**2, "k3": np.exp(gap) - gap - 1}[kind]
  with jax.enable_x64(dtype == "float64"):
    found = kl_estimate(jnp.asarray(logp, dtype), jnp.asarray(ref, dtype), mask, kind)
  np.testing.assert_allclose(found, np.where(mask, expected, 0), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("form", ["truncate", "mask"])
def test_the_importance_weights_are_those_of_trl(level, form):
  """vllm_importance_sampling_mode: token_truncate, token_mask, sequence_truncate, sequence_mask."""
  old, sampled, _, _, mask = inputs()
  ratio = np.where(mask, old - sampled, 0)
  ratio = np.exp(
    ratio.sum(1, keepdims=True) * np.ones_like(ratio) if level == "sequence" else ratio
  )
  expected = np.minimum(ratio, 1.3)
  if form == "mask":
    expected = np.where((ratio <= 1.3) & (ratio >= 0.6), ratio, 0)
  cfg = ImportanceConfig(f"{level}_{form}", 1.3, 0.6)
  found = importance_weights(*(jnp.asarray(x, jnp.float32) for x in (old, sampled)), mask, cfg)
  np.testing.assert_allclose(np.where(mask, found, 0), np.where(mask, expected, 0), rtol=1e-5)


def test_importance_weights_scale_the_surrogate_and_not_the_kl_term():
  logp, old, ref, advantage, mask = inputs()
  cfg = loss_config({"importance.kind": "token_truncate", "importance.cap": 1.1})
  sampled = old + 0.2
  weight = token_weights(mask, "sequence")
  arrays = [jnp.asarray(x, jnp.float32) for x in (logp, old, advantage)]
  ref, sampled = (jnp.asarray(x, jnp.float32) for x in (ref, sampled))
  plain, _ = policy_loss(*arrays, mask, weight, loss_config())
  both, _ = policy_loss(*arrays, mask, weight, loss_config(), 0.5, ref)
  found, metrics = policy_loss(*arrays, mask, weight, cfg, 0.5, ref, sampled)
  factor = float(np.exp(-0.2))
  np.testing.assert_allclose(found, factor * plain + (both - plain), rtol=1e-5)
  assert float(metrics["importance"]) == pytest.approx(factor, rel=1e-5)
  off, _ = policy_loss(*arrays, mask, weight, dataclasses.replace(loss_config()), 0.5, ref, sampled)
  np.testing.assert_allclose(off, both, rtol=1e-6)


def test_the_entropy_bonus_stops_at_its_target():
  logp, old, _, advantage, mask = inputs()
  arrays = [jnp.asarray(x, jnp.float32) for x in (logp, old, advantage)]
  weight = token_weights(mask, "token")
  cfg = loss_config({"entropy.weight": 0.1, "entropy.target": 1.0}, normalise="token")
  entropy = jnp.asarray(np.random.default_rng(0).uniform(0, 2, (R, T)), jnp.float32)
  plain, _ = policy_loss(*arrays, mask, weight, cfg)

  def loss(entropy):
    return policy_loss(*arrays, mask, weight, cfg, entropy_RT=entropy)[0]

  value, slope = jax.value_and_grad(loss)(entropy)
  expected = plain - 0.1 * np.minimum(np.asarray(entropy), 1.0)[mask].mean()
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert (np.asarray(slope)[np.asarray(entropy) > 1.0] == 0).all()
  assert (np.asarray(slope)[mask & (np.asarray(entropy) < 1.0)] < 0).all()


# --- advantages ----------------------------------------------------------------------------------


def rewards():
  return np.random.default_rng(4).uniform(0, 1, (5, 8))


def test_leave_one_out_is_verls_and_has_no_bias():
  """compute_rloo_outcome_advantage: r_i n / (n - 1) - mean n / (n - 1)."""
  reward = rewards()
  expected = reward - (reward.sum(1, keepdims=True) - reward) / 7
  np.testing.assert_allclose(leave_one_out(reward.astype(np.float32)), expected, atol=1e-6)
  valid = np.ones_like(reward, bool)
  valid[:, -1] = False
  expected = reward - (reward[:, :7].sum(1, keepdims=True) - reward) / 6
  found = leave_one_out(reward.astype(np.float32), valid)
  np.testing.assert_allclose(found[:, :7], expected[:, :7], atol=1e-6)
  assert (np.asarray(found)[:, -1] == 0).all()


def test_gdpo_is_that_of_trl():
  """multi_objective_aggregation="normalize_then_sum", with its epsilon of 1e-4."""
  random = np.random.default_rng(5)
  terms = {"accuracy": rewards(), "format": (random.uniform(size=(5, 8)) < 0.8).astype(float)}
  weights = {"accuracy": 1.0, "format": 0.3}
  total = 0
  for name, term in terms.items():
    std = term.std(axis=1, ddof=1, keepdims=True)
    total = total + weights[name] * (term - term.mean(1, keepdims=True)) / (std + 1e-4)
  expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
  found = gdpo({k: v.astype(np.float32) for k, v in terms.items()}, weights, epsilon=1e-4)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_groups_without_differences_have_advantage_zero_in_every_form():
  equal = {"accuracy": np.full((2, 4), 0.7, np.float32), "format": np.ones((2, 4), np.float32)}
  equal["accuracy"][1] = [0, 0.5, 0.5, 1]
  found = np.asarray(gdpo(equal, {"accuracy": 1.0, "format": 0.5}))
  assert (found[0] == 0).all()
  assert (found[1] != 0).any()
  assert (np.asarray(leave_one_out(equal["accuracy"]))[0] == 0).all()
  assert (np.asarray(grpo(equal["accuracy"]))[0] == 0).all()
