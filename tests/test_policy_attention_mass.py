"""The measured attention equals a plain softmax over prefix and suffix, in small memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.learn.attention import batch_attention
from spatial_jax.learn.train_batch import Microbatches
from spatial_jax.policy import attention_mass as module
from spatial_jax.policy.attention_mass import attention_mass
from spatial_jax.policy.cache import KV
from spatial_jax.reward.config import AttentionConfig
from tests.test_learn_update import batch_of, policy_and_params

R, K, Q, T, S, C = 3, 2, 2, 10, 6, 8
LENGTH = np.array([6, 4, 1])


def inputs():
  random = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(random.normal(size=shape), jnp.float32)

  prefix, suffix = (
    KV(normal(R, K, S, C), normal(R, K, S, C)),
    KV(normal(R, K, T, C), normal(R, K, T, C)),
  )
  sampled = jnp.asarray(random.uniform(size=(R, T)) < 0.5)
  return normal(R, K, Q, T, C), prefix, jnp.asarray(LENGTH), suffix, sampled


def naive(q, prefix, length, suffix, sampled):
  """Token by token, head by head, in float64."""
  q, keys = np.asarray(q, np.float64), np.concatenate([prefix.k_RKSC, suffix.k_RKSC], axis=2)
  total = np.zeros((R, S + T))
  for r in range(R):
    for t in np.flatnonzero(np.asarray(sampled)[r]):
      visible = np.concatenate([np.arange(S) < LENGTH[r], np.arange(T) <= t])
      for k in range(K):
        for head in range(Q):
          score = keys[r, k] @ q[r, k, head, t] / np.sqrt(C)
          weight = np.where(visible, np.exp(score - score[visible].max()), 0)
          total[r] += weight / weight.sum() / (K * Q)
  return total


@pytest.mark.parametrize("limit", [1 << 30, 1])
def test_the_mass_is_that_of_a_plain_softmax(monkeypatch, limit):
  """All tokens at once, and one after the other."""
  monkeypatch.setattr(module, "MASS_BYTES", limit)
  found = attention_mass(*inputs())
  total = np.concatenate(found, axis=1)
  np.testing.assert_allclose(total, naive(*inputs()), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(total.sum(axis=1), np.asarray(inputs()[4]).sum(axis=1), rtol=1e-5)


def test_scores_of_all_tokens_never_exist_at_once(monkeypatch):
  monkeypatch.setattr(module, "MASS_BYTES", 4 * R * K * Q * (S + T) * 2)
  text = str(jax.make_jaxpr(attention_mass)(*inputs()))
  assert f"f32[{R},{K},{Q},2,{S + T}]" in text
  assert f"f32[{R},{K},{Q},{T},{S + T}]" not in text


@pytest.mark.slow(always=True)
def test_the_reward_is_between_0_and_1_and_depends_on_the_layers():
  policy, params = policy_and_params()
  batch = batch_of()
  found = []
  for cfg in (
    AttentionConfig(1.0, 0.0, 0.0, 1.0, False, 1.0),
    AttentionConfig(1.0, 0.0, 0.0, 1.0, False, 0.1),
    AttentionConfig(0.0, 0.5, 0.5, 1.0, False, 1 / 3),
  ):
    run = jax.jit(functools.partial(batch_attention, policy, Microbatches(2, (256,)), cfg))
    found.append(np.asarray(run(params, batch)))
  for reward_R in found:
    assert reward_R.shape == (4,)
    assert ((reward_R > 0) & (reward_R <= 1)).all()
  assert not np.allclose(found[0], found[1], rtol=1e-3)
  one_by_one = jax.jit(functools.partial(batch_attention, policy, Microbatches(1, (128, 256)), cfg))
  np.testing.assert_allclose(one_by_one(params, batch), found[2], rtol=1e-4, atol=1e-6)
