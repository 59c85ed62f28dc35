"""Policy and imitation losses: gradients by hand, clipping, masks, microbatches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.learn.losses import LossConfig, effective_share, policy_loss, row_weights, sft_loss

CFG = LossConfig(clip_low=0.2, clip_high=0.3, kl_weight=0.0, normalise="token")
MODES = ("token", "sequence")


def rows(seed=0, R=6, T=7):
  """logp, old, reference, advantages and ragged masks, all random; the last row is untrained."""
  random = np.random.default_rng(seed)
  logp, old, ref = (-random.exponential(1.0, (R, T)).astype(np.float32) for _ in range(3))
  advantage = random.normal(size=R).astype(np.float32)
  length = random.integers(1, T + 1, R)
  trained = np.arange(T)[None] < length[:, None]
  trained[-1] = False
  return tuple(map(jnp.asarray, (logp, old, ref, advantage, trained)))


def test_weights_of_all_trained_tokens_sum_to_one():
  trained = jnp.array([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
  np.testing.assert_allclose(row_weights(trained, "token"), [0.25, 0.25, 0.0])
  np.testing.assert_allclose(row_weights(trained, "sequence"), [1 / 6, 1 / 2, 0.0], rtol=1e-6)
  for mode in MODES:
    weight = row_weights(trained, mode)
    assert float(jnp.sum(weight[:, None] * trained.astype(jnp.float32))) == pytest.approx(1.0)
    np.testing.assert_array_equal(row_weights(jnp.zeros((2, 3), bool), mode), np.zeros(2))


@pytest.mark.parametrize("mode", MODES)
def test_on_policy_the_gradient_is_minus_advantage(mode):
  logp, _, _, advantage, trained = rows()
  weight = row_weights(trained, mode)

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
    (1.5, 1.0, -1.3, 0.0),  # above 1 + clip_high: no more reward
    (0.5, 1.0, -0.5, -0.5),
    (1.5, -1.0, 1.5, 1.5),
    (0.85, -1.0, 0.85, 0.85),
    (0.5, -1.0, 0.8, 0.0),  # below 1 - clip_low: no more punishment
  ],
)
def test_each_side_of_the_clip(ratio, advantage, loss, gradient):
  one, old = jnp.ones((1, 1), bool), jnp.full((1, 1), -2.0, jnp.float32)
  logp = old + jnp.log(jnp.float32(ratio))

  def of(x):
    return policy_loss(x, old, jnp.array([advantage], jnp.float32), one, jnp.ones(1), CFG)

  (value, metrics), slope = jax.value_and_grad(of, has_aux=True)(logp)
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
def test_the_loss_is_the_equation(beta):
  logp, old, ref, advantage, trained = rows(1)
  cfg = dataclasses.replace(CFG, kl_weight=jnp.float32(beta))
  weight = row_weights(trained, "token")
  loss, metrics = jax.jit(policy_loss)(logp, old, advantage, trained, weight, cfg, ref)
  expected = reference_loss(logp, old, ref, advantage, trained, beta)
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  assert float(metrics["kl_ref_k3"]) > 0.0
  assert "kl_ref_k3" not in policy_loss(logp, old, advantage, trained, weight, cfg)[1]


@pytest.mark.parametrize("mode", MODES)
def test_microbatches_add_up_to_the_batch(mode):
  logp, old, ref, advantage, trained = rows(2)
  weight = row_weights(trained, mode)
  cfg = dataclasses.replace(CFG, kl_weight=0.1)

  @jax.jit
  def part(x, *others):
    def loss(x):
      old, advantage, trained, weight, ref = others
      return policy_loss(x, old, advantage, trained, weight, cfg, ref)

    return jax.value_and_grad(loss, has_aux=True)(x)

  everything = (old, advantage, trained, weight, ref)
  (whole, metrics), gradient = part(logp, *everything)
  parts = [part(logp[i : i + 2], *(x[i : i + 2] for x in everything)) for i in (0, 2, 4)]
  assert sum(float(p[0][0]) for p in parts) == pytest.approx(float(whole), rel=1e-5)
  for name, value in metrics.items():
    assert sum(float(p[0][1][name]) for p in parts) == pytest.approx(float(value), rel=1e-5), name
  np.testing.assert_allclose(jnp.concatenate([p[1] for p in parts]), gradient, rtol=1e-6)


def test_what_is_not_trained_does_not_reach_loss_or_gradient():
  logp, old, ref, advantage, trained = rows(3)
  weight = row_weights(trained, "token")
  cfg = dataclasses.replace(CFG, kl_weight=0.1)

  def loss(x, *references):
    old, ref = references
    return policy_loss(x, old, advantage, trained, weight, cfg, ref)[0]

  clean = jax.value_and_grad(loss)(logp, old, ref)
  spoilt_logp = jnp.where(trained, logp, -jnp.inf)
  spoilt_ref = jnp.where(trained, ref, -jnp.inf)
  spoilt = jax.value_and_grad(loss)(spoilt_logp, jnp.where(trained, old, 0.0), spoilt_ref)
  assert float(spoilt[0]) == float(clean[0])
  np.testing.assert_array_equal(spoilt[1], clean[1])
  assert float(sft_loss(spoilt_logp, trained, weight)) == float(sft_loss(logp, trained, weight))


def test_a_far_ratio_stays_finite():
  one = jnp.ones((1, 1), bool)
  logp, old = jnp.zeros((1, 1), jnp.float32), jnp.full((1, 1), -500.0, jnp.float32)

  def loss(x):
    return policy_loss(x, old, jnp.array([-1.0], jnp.float32), one, jnp.ones(1), CFG, old)[0]

  value, slope = jax.value_and_grad(loss)(logp)
  assert np.isfinite(value)
  assert np.isfinite(slope).all()


def test_divergences_are_zero_on_policy_and_k3_is_never_negative():
  logp, old, _, advantage, trained = rows(4)
  weight = row_weights(trained, "token")
  on = policy_loss(logp, logp, advantage, trained, weight, CFG, logp)[1]
  for name in ("kl_old_k1", "kl_old_k3", "kl_ref_k3", "logp_difference", "clip_fraction"):
    assert float(on[name]) == 0.0
  assert float(on["ratio"]) == pytest.approx(1.0)
  assert float(on["entropy_estimate"]) == pytest.approx(-float(jnp.mean(logp[trained])), rel=1e-5)
  off = policy_loss(logp, old, advantage, trained, weight, CFG)[1]
  assert float(off["kl_old_k3"]) > 0.0
  assert float(off["kl_old_k1"]) == pytest.approx(float(jnp.mean((old - logp)[trained])), rel=1e-4)


def test_the_effective_share_is_one_on_policy_and_falls_with_the_spread_of_ratios():
  logp, _, _, advantage, trained = rows(5)
  weight = row_weights(trained, "token")
  noise = jnp.asarray(np.random.default_rng(0).normal(size=logp.shape).astype(np.float32))

  def share(spread):
    old = logp + jnp.float32(spread) * noise
    found = effective_share(policy_loss(logp, old, advantage, trained, weight, CFG)[1])
    assert "ratio_square" not in found
    return float(found["effective_share"])

  assert share(0.0) == pytest.approx(1.0)
  assert 1 > share(0.1) > share(0.5) > share(1.0) > 0
  ratio = np.exp(-0.5 * np.asarray(noise)[np.asarray(trained)])
  assert share(0.5) == pytest.approx(ratio.sum() ** 2 / (ratio**2).sum() / ratio.size, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_sft_is_the_mean_negative_log_likelihood(mode):
  logp, _, _, _, trained = rows(5)
  value = float(sft_loss(logp, trained, row_weights(trained, mode)))
  kept = [np.asarray(row)[np.asarray(mask)] for row, mask in zip(logp, trained, strict=True)]
  kept = [row for row in kept if row.size]
  per_row = [row.mean() for row in kept]
  expected = np.concatenate(kept).mean() if mode == "token" else np.mean(per_row)
  assert value == pytest.approx(-float(expected), rel=1e-5)
