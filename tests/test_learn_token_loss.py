"""Losses that are sums over tokens: values and gradients in one pass over the logits."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.learn.losses import Importance, Surrogate, policy_loss
from spatial_jax.learn.token_loss import Head, Targets, masked, sum_of_token_losses
from spatial_jax.learn.update import is_sum_of_tokens
from spatial_jax.policy import param_tree
from tests import policy_fixtures as fixtures
from tests.learn_fixtures import loss_config

ROWS, TOKENS = 2, 8


def arguments(policy):
  """Random hidden states and targets; the untrained token is a forbidden one."""
  random = np.random.default_rng(0)
  vocabulary = policy.cfg.decoder.vocabulary
  table = random.standard_normal((vocabulary, policy.cfg.decoder.width), np.float32)
  hidden_RTD = random.standard_normal((ROWS, TOKENS, policy.cfg.decoder.width), np.float32)
  token_RT = random.integers(0, vocabulary - 6, (ROWS, TOKENS)).astype(np.int32)
  token_RT[1, 3] = vocabulary - 1
  targets = Targets(
    token_RT,
    token_RT < vocabulary - 6,
    np.array([0.5, 1.3], np.float32),
    np.arange(vocabulary) >= vocabulary - 6,
  )
  others = {
    "old_RT": random.standard_normal((ROWS, TOKENS)).astype(np.float32),
    "weight_R": np.array([1.0, 2.0], np.float32),
  }
  return param_tree.unflatten({policy.head_path: table}), hidden_RTD, targets, others


def loss(scores, others):
  """Not linear, of the log-probability and the entropy."""
  value_RT = jnp.square(scores.logp_RT - others["old_RT"]) + jnp.sin(scores.entropy_RT)
  value_RT = jnp.where(scores.logp_RT < 0, value_RT * others["weight_R"][:, None], 0.0)
  return 3.0 * jnp.sum(value_RT), {"logp": jnp.sum(scores.logp_RT)}


def expected(policy, params, hidden_RTD, targets, others):
  """The same by `Policy.logprobs`."""
  later = jax.tree.map(lambda x: x[:, 1:] if x.ndim > 1 else x, (targets._asdict(), others))
  target, others = later
  inputs = (target["token_RT"], target["temperature_R"], targets.forbidden_V, True)
  scores = policy.logprobs(params, hidden_RTD[:, :-1], *inputs)
  return loss(masked(scores, target["trained_RT"]), others)


@pytest.mark.parametrize(("tied", "chunk"), [(True, 3), (False, 256)])
def test_the_gradient_is_that_of_log_probabilities(tied, chunk):
  """For chunks that do not divide the row, with a frozen head too."""
  policy = dataclasses.replace(fixtures.small_policy(tied), logprob_chunk=chunk)
  params, hidden_RTD, targets, others = arguments(policy)

  def found(trained, hidden_RTD, frozen):
    head = Head(policy, frozen, trained)
    return sum_of_token_losses(head, hidden_RTD, targets, others, loss, with_entropy=True)

  def reference(params, hidden_RTD):
    return expected(policy, params, hidden_RTD, targets, others)

  differentiate = {"argnums": (0, 1), "has_aux": True}
  one = jax.jit(jax.value_and_grad(found, **differentiate))(params, hidden_RTD, {})
  other = jax.jit(jax.value_and_grad(reference, **differentiate))(params, hidden_RTD)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), one, other)
  assert np.abs(other[1][1]).max() > 0.1
  frozen = jax.jit(jax.value_and_grad(found, **differentiate))({}, hidden_RTD, params)
  np.testing.assert_allclose(frozen[1][1], other[1][1], rtol=2e-5, atol=2e-5)


def test_logits_exist_once_and_in_chunks():
  """Three matrix products for each chunk: its logits, the gradients of table and hidden states."""
  policy = dataclasses.replace(fixtures.small_policy(True), logprob_chunk=4)
  params, hidden_RTD, targets, others = arguments(policy)

  def value(params, hidden_RTD):
    head = Head(policy, {}, params)
    return sum_of_token_losses(head, hidden_RTD, targets, others, loss, with_entropy=True)[0]

  text = str(jax.make_jaxpr(jax.grad(value, argnums=(0, 1)))(params, jnp.asarray(hidden_RTD)))
  vocabulary = policy.cfg.decoder.vocabulary
  assert text.count("dot_general") == 3
  assert f"f32[{ROWS},4,{vocabulary}]" in text
  assert f"f32[{ROWS},{TOKENS},{vocabulary}]" not in text


KINDS = [("kind", kind) for kind in typing.get_args(Surrogate)]
KINDS += [("importance.kind", kind) for kind in typing.get_args(Importance)]


@pytest.mark.parametrize(("field", "kind"), KINDS)
def test_a_loss_is_a_sum_of_tokens_if_its_parts_add_up(field, kind):
  """Half the tokens of each row at a time, for every surrogate and every importance weight."""
  cfg = loss_config({field: kind, "normalise": "sequence"})
  random = np.random.default_rng(0)
  logp_RT, old_RT, sampler_RT = random.normal(-1.0, 0.3, (3, 4, 6)).astype(np.float32)
  advantage_R = random.normal(size=4).astype(np.float32)

  def loss(first, last):
    logp, old, sampler, trained = (
      x[:, first:last] for x in (logp_RT, old_RT, sampler_RT, np.ones((4, 6), bool))
    )
    scored = (logp, old, advantage_R, trained, np.full(4, 0.1, np.float32), cfg)
    return policy_loss(*scored, sampler_logp_RT=sampler)[0]

  difference = abs(float(loss(0, 6)) - float(loss(0, 3)) - float(loss(3, 6)))
  assert (difference < 1e-6) == is_sum_of_tokens(cfg)
