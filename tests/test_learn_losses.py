"""Losses: gradients by hand, clipping, masks, weights, microbatches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.config import ConfigError
from spatial_jax.learn.losses import effective_share, nll, policy_loss, token_weights
from tests.learn_fixtures import loss_config

CFG = loss_config(normalise="token")
NORMALISE = ("token", "sequence")


def rows(seed=0, R=6, T=7):
  """Random logp, old, reference, advantages, and masks of random lengths; row 5 is not trained."""
  random = np.random.default_rng(seed)
  logp, old, ref = (-random.exponential(1.0, (R, T)).astype(np.float32) for _ in range(3))
  advantage = random.normal(size=R).astype(np.float32)
  length = random.integers(1, T + 1, R)
  trained = np.arange(T)[None] < length[:, None]
  trained[-1] = False
  return tuple(map(jnp.asarray, (logp, old, ref, advantage, trained)))


def test_the_weights_of_all_trained_tokens_sum_to_one():
  trained = jnp.array([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
  np.testing.assert_allclose(token_weights(trained, "token"), [0.25, 0.25, 0.0])
  np.testing.assert_allclose(token_weights(trained, "sequence"), [1 / 6, 1 / 2, 0.0], rtol=1e-6)
  for normalise in NORMALISE:
    weight = token_weights(trained, normalise)
    assert float(jnp.sum(weight[:, None] * trained.astype(jnp.float32))) == pytest.approx(1.0)
    np.testing.assert_array_equal(token_weights(jnp.zeros((2, 3), bool), normalise), np.zeros(2))


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_a_row_of_weight_two_counts_like_two_rows(normalise, scale):
  """Only the ratio of weights matters; a row of weight 0 is not counted."""
  trained = jnp.array([[1, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 0]], bool)
  weight_R = jnp.array([2, 1, 0], jnp.float32) * jnp.float32(scale)
  found = token_weights(trained, normalise, weight_R)
  twice = token_weights(trained[jnp.array([0, 0, 1])], normalise)
  np.testing.assert_allclose(found, [twice[0] + twice[1], twice[2], 0.0], rtol=1e-6)
  assert float(jnp.sum(found[:, None] * trained.astype(jnp.float32))) == pytest.approx(1.0)
  equal = token_weights(trained, normalise, jnp.ones(3))
  np.testing.assert_array_equal(equal, token_weights(trained, normalise))
  none = token_weights(trained, normalise, jnp.zeros(3))
  np.testing.assert_array_equal(none, np.zeros(3))


@pytest.mark.parametrize("normalise", NORMALISE)
def test_on_policy_the_gradient_is_the_negative_advantage(normalise):
  logp, _, _, advantage, trained = rows()
  weight = token_weights(trained, normalise)

  def loss(x):
    return policy_loss(x, logp, advantage, trained, weight, CFG)[0]

  expected = -(weight * advantage)[:, None] * trained.astype(jnp.float32)
  np.testing.assert_allclose(jax.grad(loss)(logp), expected, rtol=1e-6)
  total = jnp.sum(weight * advantage * jnp.sum(trained, axis=1).astype(jnp.float32))
  assert float(loss(logp)) == pytest.approx(-float(total), rel=1e-5)


@pytest.mark.parametrize(
  ("ratio", "advantage", "loss", "gradient"),
  [
    (1.0, 1.0, -1.0, -1.0),
    (1.25, 1.0, -1.25, -1.25),
    (1.5, 1.0, -1.3, 0.0),  # above 1 + clip_high: no gradient
    (0.5, 1.0, -0.5, -0.5),
    (1.5, -1.0, 1.5, 1.5),
    (0.85, -1.0, 0.85, 0.85),
    (0.5, -1.0, 0.8, 0.0),  # below 1 - clip_low: no gradient
  ],
)
def test_both_sides_of_the_clip_range(ratio, advantage, loss, gradient):
  one, old = jnp.ones((1, 1), bool), jnp.full((1, 1), -2.0, jnp.float32)
  logp = old + jnp.log(jnp.float32(ratio))

  def loss_of(x):
    return policy_loss(x, old, jnp.array([advantage], jnp.float32), one, jnp.ones(1), CFG)

  (value, metrics), slope = jax.value_and_grad(loss_of, has_aux=True)(logp)
  assert float(value) == pytest.approx(loss, abs=1e-5)
  assert float(slope[0, 0]) == pytest.approx(gradient, abs=1e-5)
  assert float(metrics["clip_fraction"]) == float(gradient == 0.0)
  assert float(metrics["ratio"]) == pytest.approx(ratio, rel=1e-5)


def reference_loss(logp, old, ref, advantage, trained, beta):
  """The equation in NumPy float64, token by token."""
  logp, old, ref, advantage = (np.asarray(x, np.float64) for x in (logp, old, ref, advantage))
  total, count = 0.0, int(np.sum(trained))
  for r, t in zip(*np.nonzero(np.asarray(trained)), strict=True):
    ratio = np.exp(logp[r, t] - old[r, t])
    clipped = min(max(ratio, 0.8), 1.3)
    gap = ref[r, t] - logp[r, t]
    total += -min(ratio * advantage[r], clipped * advantage[r]) + beta * (np.exp(gap) - gap - 1)
  return total / count


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_policy_loss_is_its_equation(beta):
  logp, old, ref, advantage, trained = rows(1)
  weight = token_weights(trained, "token")
  run = jax.jit(policy_loss, static_argnames="cfg")
  loss, metrics = run(logp, old, advantage, trained, weight, CFG, beta, ref)
  expected = reference_loss(logp, old, ref, advantage, trained, beta)
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  assert float(metrics["kl_ref_k3"]) > 0.0
  assert "kl_ref_k3" not in policy_loss(logp, old, advantage, trained, weight, CFG)[1]


@pytest.mark.parametrize("normalise", NORMALISE)
def test_microbatches_add_up_to_the_batch(normalise):
  logp, old, ref, advantage, trained = rows(2)
  weight = token_weights(trained, normalise)

  @jax.jit
  def part(x, *others):
    def loss(x):
      old, advantage, trained, weight, ref = others
      return policy_loss(x, old, advantage, trained, weight, CFG, 0.1, ref)

    return jax.value_and_grad(loss, has_aux=True)(x)

  everything = (old, advantage, trained, weight, ref)
  (whole, metrics), gradient = part(logp, *everything)
  parts = [part(logp[i : i + 2], *(x[i : i + 2] for x in everything)) for i in (0, 2, 4)]
  assert sum(float(p[0][0]) for p in parts) == pytest.approx(float(whole), rel=1e-5)
  for name, value in metrics.items():
    assert sum(float(p[0][1][name]) for p in parts) == pytest.approx(float(value), rel=1e-5), name
  np.testing.assert_allclose(jnp.concatenate([p[1] for p in parts]), gradient, rtol=1e-6)


def test_untrained_tokens_do_not_change_loss_and_gradient():
  logp, old, ref, advantage, trained = rows(3)
  weight = token_weights(trained, "token")

  def loss(x, *references):
    old, ref = references
    return policy_loss(x, old, advantage, trained, weight, CFG, 0.1, ref)[0]

  expected = jax.value_and_grad(loss)(logp, old, ref)
  infinite_logp = jnp.where(trained, logp, -jnp.inf)
  infinite_ref = jnp.where(trained, ref, -jnp.inf)
  found = jax.value_and_grad(loss)(infinite_logp, jnp.where(trained, old, 0.0), infinite_ref)
  assert float(found[0]) == float(expected[0])
  np.testing.assert_array_equal(found[1], expected[1])
  assert float(nll(infinite_logp, trained, weight)) == float(nll(logp, trained, weight))


def test_loss_and_gradient_of_a_huge_ratio_are_finite():
  one = jnp.ones((1, 1), bool)
  logp, old = jnp.zeros((1, 1), jnp.float32), jnp.full((1, 1), -500.0, jnp.float32)

  def loss(x):
    return policy_loss(x, old, jnp.array([-1.0], jnp.float32), one, jnp.ones(1), CFG, 0.0, old)[0]

  value, slope = jax.value_and_grad(loss)(logp)
  assert np.isfinite(value)
  assert np.isfinite(slope).all()


def test_divergences_are_zero_on_policy_and_k3_is_never_negative():
  logp, old, _, advantage, trained = rows(4)
  weight = token_weights(trained, "token")
  on = policy_loss(logp, logp, advantage, trained, weight, CFG, 0.0, logp)[1]
  for name in ("kl_old_k1", "kl_old_k3", "kl_ref_k3", "logp_difference", "clip_fraction"):
    assert float(on[name]) == 0.0
  assert float(on["ratio"]) == pytest.approx(1.0)
  assert float(on["entropy_estimate"]) == pytest.approx(-float(jnp.mean(logp[trained])), rel=1e-5)
  off = policy_loss(logp, old, advantage, trained, weight, CFG)[1]
  assert float(off["kl_old_k3"]) > 0.0
  assert float(off["kl_old_k1"]) == pytest.approx(float(jnp.mean((old - logp)[trained])), rel=1e-4)


def test_the_effective_share_is_one_on_policy_and_falls_as_ratios_spread():
  logp, _, _, advantage, trained = rows(5)
  weight = token_weights(trained, "token")
  noise = jnp.asarray(np.random.default_rng(0).normal(size=logp.shape).astype(np.float32))

  def share(spread):
    old = logp + jnp.float32(spread) * noise
    found = effective_share(policy_loss(logp, old, advantage, trained, weight, CFG)[1])
    assert "sample_weight_square" not in found
    return float(found["effective_share"])

  assert share(0.0) == pytest.approx(1.0)
  assert 1 > share(0.1) > share(0.5) > share(1.0) > 0
  ratio = np.exp(-0.5 * np.asarray(noise)[np.asarray(trained)])
  assert share(0.5) == pytest.approx(ratio.sum() ** 2 / (ratio**2).sum() / ratio.size, rel=1e-4)


def test_the_effective_share_is_that_of_the_importance_weights():
  """Before the first update the ratio is 1: the trainer's log-probabilities are the old ones."""
  logp, _, _, advantage, trained = rows(6)
  weight = token_weights(trained, "token")
  noise = jnp.asarray(np.random.default_rng(1).normal(size=logp.shape).astype(np.float32))
  cfg = loss_config({"importance.kind": "token_mask", "importance.cap": 2.0}, normalise="token")
  scored = (logp, logp, advantage, trained, weight, cfg)
  found = effective_share(policy_loss(*scored, sampler_logp_RT=logp - noise)[1])
  assert float(found["ratio"]) == pytest.approx(1.0)
  w = np.exp(np.asarray(noise)[np.asarray(trained)])
  w[(w > 2.0) | (w < cfg.importance.floor)] = 0.0
  expected = w.sum() ** 2 / (w.size * (w**2).sum())
  assert 0 < expected < 0.95
  assert float(found["effective_share"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("normalise", NORMALISE)
def test_nll_is_the_mean_negative_log_likelihood(normalise):
  logp, _, _, _, trained = rows(5)
  value = float(nll(logp, trained, token_weights(trained, normalise)))
  kept = [np.asarray(row)[np.asarray(mask)] for row, mask in zip(logp, trained, strict=True)]
  kept = [row for row in kept if row.size]
  per_row = [row.mean() for row in kept]
  expected = np.concatenate(kept).mean() if normalise == "token" else np.mean(per_row)
  assert value == pytest.approx(-float(expected), rel=1e-5)


# --- config --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("clip_low", -0.1),
    ("clip_low", 1.0),
    ("clip_low", float("nan")),
    ("clip_high", -0.1),
    ("clip_high", float("inf")),
    ("dual_clip", 0.5),
    ("sapo_positive", 0.0),
    ("length_constant", -1),
    ("kind", "ppo"),
    ("normalise", "batch"),
  ],
)
def test_a_config_value_out_of_range_is_refused(key, value):
  with pytest.raises(ConfigError, match=rf"^{key} is {value!r} and must be"):
    dataclasses.replace(CFG, **{key: value})
