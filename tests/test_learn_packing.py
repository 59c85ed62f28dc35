"""Packed rows: the same log-probabilities, gradients and updates as one sequence per row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.errors import DataError
from spatial_jax.learn.dpo import DpoLossConfig, dpo_loss
from spatial_jax.learn.packed_update import (
  by_sequence,
  packed_dpo_update,
  packed_logprobs,
  packed_sft_update,
)
from spatial_jax.learn.packing import (
  PackConfig,
  row_buckets,
  rows_of,
  sequence_weights,
  to_packed_batch,
)
from spatial_jax.learn.train_batch import Microbatches
from tests import rollout_fixtures as fixtures
from tests.learn_fixtures import sft_update
from tests.test_learn_update import (
  SGD,
  TOWER,
  assert_close,
  batch_of,
  demonstrations,
  gradient_of,
  policy_and_params,
  start,
)

MICRO = Microbatches(1, (512,))


def sequences():
  """Four demonstrations at temperature 1."""
  return [dataclasses.replace(t, temperature=1.0) for group in demonstrations() for t in group]


def shapes(pack, tokens=512):
  images = fixtures.shapes()
  return PackConfig(tokens, (2, 4), pack, images.vision, images.window_blocks, images.vocabulary)


@functools.cache
def packed(pack, by_token=True):
  found = sequences()
  return to_packed_batch(found, sequence_weights(found, by_token), shapes(pack))


def test_a_packed_row_holds_whole_sequences_and_nothing_else():
  batch, found = packed(True), sequences()
  assert batch.rows.trained_RT.shape == (2, 512)
  segments = [int(row.max()) for row in batch.rows.tokens.valid_RT]
  assert sorted(segments) == [1, 3] or sum(segments) == 4
  for n, trajectory in enumerate(found):
    mine = batch.rows.trained_RT & (batch.rows.sequence_RT == n)
    assert mine.sum() == trajectory.trained_T.sum()
    np.testing.assert_array_equal(
      batch.rows.tokens.token_RT[mine], trajectory.token_ids_T[trajectory.trained_T]
    )
  assert batch.rows.weight_RT.sum() == pytest.approx(1.0, rel=1e-5)
  assert (batch.rows.weight_RT[~batch.rows.trained_RT] == 0).all()


def test_packing_changes_no_log_probability():
  policy, params = policy_and_params()
  run = jax.jit(functools.partial(packed_logprobs, policy, MICRO))
  sums = []
  for pack in (True, False):
    batch = packed(pack)
    sums.append(by_sequence(run(params, batch), batch.rows, 4))
  np.testing.assert_allclose(sums[0], sums[1], rtol=1e-5)


@pytest.mark.parametrize(
  "by_token", [pytest.param(True, marks=pytest.mark.slow(always=True)), False]
)
def test_packing_changes_no_gradient(by_token):
  policy, _ = policy_and_params()
  update = jax.jit(functools.partial(packed_sft_update, policy, SGD, MICRO))
  states = [update(start(), packed(pack, by_token))[0] for pack in (True, False)]
  assert_close(gradient_of(states[0]), gradient_of(states[1]))


def test_packed_sft_is_sft_with_shared_prefixes():
  policy, _ = policy_and_params()
  rows = batch_of().rows._replace(temperature_R=np.ones(4, np.float32))
  grouped, expected = jax.jit(functools.partial(sft_update, policy, SGD, Microbatches(1, (256,))))(
    start(), batch_of()._replace(rows=rows)
  )
  found, metrics = jax.jit(functools.partial(packed_sft_update, policy, SGD, MICRO))(
    start(), packed(True)
  )
  np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
  assert_close(gradient_of(found), gradient_of(grouped))


def test_changing_untrained_tokens_of_another_sequence_changes_nothing():
  """A sequence does not see its neighbours in the row."""
  policy, params = policy_and_params()
  batch = packed(True)
  run = jax.jit(functools.partial(packed_logprobs, policy, MICRO))
  row = int(np.argmax(batch.rows.tokens.valid_RT.max(axis=1)))
  other = batch.rows.tokens.valid_RT[row] == 2
  token_RT = batch.rows.tokens.token_RT.copy()
  token_RT[row][other & (batch.rows.tokens.feature_RT[row] < 0)] = 7
  changed = batch.rows._replace(tokens=batch.rows.tokens._replace(token_RT=token_RT))
  one, two = (np.asarray(run(params, b)) for b in (batch, batch._replace(rows=changed)))
  np.testing.assert_array_equal(one[row][~other], two[row][~other])


def test_a_frozen_tower_and_its_features_give_the_same_update():
  policy = dataclasses.replace(policy_and_params()[0], frozen=TOWER)
  update = jax.jit(functools.partial(packed_sft_update, policy, SGD, MICRO))
  state, _ = update(start(), packed(True))
  same = jax.tree.map(np.array_equal, state.params["vision"], policy_and_params()[1]["vision"])
  assert all(jax.tree.leaves(same))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(40, 120))
def test_first_fit_places_every_sequence_once_and_no_row_is_too_long(lengths, size):
  rows = rows_of(lengths, size)
  assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
  assert all(sum(lengths[n] for n in row) <= size for row in rows)
  assert len(rows_of(lengths, 0)) == len(lengths)
  most = row_buckets(len(lengths), lengths, max(lengths), size, 1)[-1]
  assert len(rows) <= most


def test_a_sequence_that_is_too_long_is_named():
  found = sequences()
  with pytest.raises(DataError, match="tokens of task"):
    to_packed_batch(found, np.ones(4), shapes(True, tokens=64))
  with pytest.raises(DataError, match="rows of demonstrations"):
    to_packed_batch(found * 3, np.ones(12), shapes(False))


# --- DPO -----------------------------------------------------------------------------------------

PAIRS = [
  DpoLossConfig("sigmoid", 0.3, 0.0), DpoLossConfig("sigmoid", 0.3, 0.1),
  DpoLossConfig("ipo", 0.3, 0.0),
]  # fmt: skip
LOGP = np.array([-3.0, -4.0, -2.5, -2.0, -7.0, -1.0])
REF = np.array([-3.5, -3.6, -2.0, -2.6, -6.0, -1.5])
TOKENS = np.array([4.0, 5.0, 3.0, 3.0, 8.0, 2.0])


def published(logp, cfg):
  """TRL's dpo_loss: loss_type sigmoid with label_smoothing, and ipo with mean log-probabilities.

  Source: trl/trainer/dpo_trainer.py.
  """
  gain = logp - REF
  if cfg.kind == "ipo":
    gain = gain / TOKENS
    return np.mean((gain[::2] - gain[1::2] - 1 / (2 * cfg.beta)) ** 2)
  h = cfg.beta * (gain[::2] - gain[1::2])
  smooth = cfg.label_smoothing
  return np.mean((1 - smooth) * np.log1p(np.exp(-h)) + smooth * np.log1p(np.exp(h)))


@pytest.mark.parametrize("cfg", PAIRS, ids=str)
def test_the_dpo_loss_is_that_of_trl_and_its_derivative_that_of_finite_differences(cfg):
  with jax.enable_x64(True):
    arrays = (jnp.asarray(x, "float64") for x in (LOGP, REF, TOKENS))
    value, _, coefficient = dpo_loss(*arrays, cfg)
  np.testing.assert_allclose(value, published(LOGP, cfg), rtol=1e-6)
  for n in range(6):
    step = np.zeros(6)
    step[n] = 1e-6
    slope = (published(LOGP + step, cfg) - published(LOGP - step, cfg)) / 2e-6
    np.testing.assert_allclose(coefficient[n], slope, atol=1e-8)


@pytest.mark.torch
@pytest.mark.parametrize("cfg", PAIRS, ids=str)
def test_the_dpo_gradient_is_that_of_torch(cfg):
  torch = pytest.importorskip("torch")
  logp = torch.tensor(LOGP, requires_grad=True)
  gain = logp - torch.tensor(REF)
  if cfg.kind == "ipo":
    gain = gain / torch.tensor(TOKENS)
    loss = ((gain[::2] - gain[1::2] - 1 / (2 * cfg.beta)) ** 2).mean()
  else:
    h, e = cfg.beta * (gain[::2] - gain[1::2]), cfg.label_smoothing
    log_sigmoid = torch.nn.functional.logsigmoid
    loss = (-(1 - e) * log_sigmoid(h) - e * log_sigmoid(-h)).mean()
  loss.backward()
  with jax.enable_x64(True):
    value, _, coefficient = dpo_loss(*(jnp.asarray(x, "float64") for x in (LOGP, REF, TOKENS)), cfg)
  np.testing.assert_allclose(value, loss.item(), rtol=1e-9)
  np.testing.assert_allclose(coefficient, logp.grad.numpy(), rtol=1e-9)


@pytest.mark.slow(always=True)
def test_the_dpo_update_has_the_gradient_of_its_loss():
  """`jax.grad` of the loss of all sequences at once."""
  policy, params = policy_and_params()
  cfg, batch = DpoLossConfig("sigmoid", 0.5, 0.1), packed(True)
  ref_N = jnp.array([-3.0, -9.0, -8.0, -2.0])

  def loss(params):
    logp_RT = packed_logprobs(policy, Microbatches(2, (512,)), params, batch)
    logp_N = by_sequence(logp_RT, batch.rows, 4)
    tokens_N = by_sequence(batch.rows.trained_RT, batch.rows, 4)
    return dpo_loss(logp_N, ref_N, tokens_N, cfg)[0]

  value, expected = jax.jit(jax.value_and_grad(loss))(params)
  update = jax.jit(functools.partial(packed_dpo_update, policy, SGD, MICRO, cfg))
  state, metrics = update(start(), batch, ref_N)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
  assert_close(gradient_of(state), expected)


def test_at_the_reference_the_loss_is_log_two_and_no_pair_is_ranked():
  policy, params = policy_and_params()
  batch = packed(True)
  logp_RT = jax.jit(functools.partial(packed_logprobs, policy, MICRO))(params, batch)
  ref_N = by_sequence(logp_RT, batch.rows, 4)
  update = jax.jit(
    functools.partial(packed_dpo_update, policy, SGD, MICRO, DpoLossConfig("sigmoid", 0.5, 0.0))
  )
  _, metrics = update(start(), batch, ref_N)
  assert float(metrics["loss"]) == pytest.approx(np.log(2), rel=1e-5)
  assert float(metrics["margin"]) == pytest.approx(0.0, abs=1e-5)


def test_wrong_shapes_are_refused():
  with pytest.raises(ValueError, match="tokens"):
    PackConfig(1, (1,), True, VisionBuckets((1,), (1,), (4,)), 2, 10)
