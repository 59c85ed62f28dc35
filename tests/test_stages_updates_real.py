"""A real step of a small policy: several updates, importance, attention, a moving average."""

import copy
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax import compiled
from spatial_jax.compiled import LearnPrograms
from spatial_jax.learn.attention import batch_attention
from spatial_jax.learn.losses import ImportanceConfig, importance_weights
from spatial_jax.learn.optimizer import make_optimizer, moving_average
from spatial_jax.learn.train_batch import Microbatches, to_train_batch
from spatial_jax.policy import param_tree
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.stages.reference import MovingAverage
from spatial_jax.stages.replaced import ReplacedTasks
from spatial_jax.stages.sampling import Sampled, Sampler
from spatial_jax.stages.updates import UpdateConfig, Updater
from spatial_jax.types import OtherLogprobs, TrainState
from tests import dummies, step_fixtures
from tests.learn_fixtures import loss_config
from tests.test_sharded import COMPILED

pytestmark = pytest.mark.slow(always=True)

# The feed-forward layers alone are trained, which compiles faster.
FROZEN = ("^vision/", "^decoder/(embed|norm)", "^decoder/layers/(attn|mlp_norm)")
DECAY = 0.8
OPTIMIZER = make_optimizer(
  dataclasses.replace(step_fixtures.OPTIMIZER, frozen=FROZEN, ema_decay=DECAY)
)
SHAPES = dataclasses.replace(step_fixtures.SHAPES, prefix_buckets=(48,), tokens=64)
MICRO = Microbatches(1, (64,))
LOSS = loss_config({"normalise": "token", "kl.weight": 0.1, "kl.reference": "average"})
REWARD = dataclasses.replace(
  dummies.REWARD, weights=dataclasses.replace(dummies.REWARD.weights, attention=0.5)
)
ADVANTAGE_BG = np.random.default_rng(1).normal(size=(4, 2)).astype(np.float32)
HALF = slice(0, 2)  # prompts of one minibatch


class Lab(NamedTuple):
  """A policy at its start, and the rollouts of a step."""

  policy: Policy
  programs: LearnPrograms
  state: TrainState  # never donated: see `fresh`
  sampled: Sampled

  def fresh(self) -> TrainState:
    return jax.tree.map(jnp.copy, self.state)

  def half(self) -> Sampled:
    """The rollouts of the first prompts, as many as a minibatch has."""
    sampled = self.sampled
    return dataclasses.replace(
      sampled, prompts=sampled.prompts[HALF], rollouts=sampled.rollouts[HALF]
    )

  def half_batch(self):
    features = self.sampled.image_features
    batch, _ = to_train_batch(
      self.sampled.rollouts[HALF], ADVANTAGE_BG[HALF], SHAPES, image_features=features
    )
    return batch


@pytest.fixture(scope="module")
def lab():
  with pytest.MonkeyPatch.context() as monkeypatch:
    step_fixtures.make_rollouts_draw(monkeypatch)
    setup = step_fixtures.step_setup(1, 1, 1)
    policy = dataclasses.replace(setup.policy, frozen=FROZEN)
    programs = compiled.LearnPrograms(policy, OPTIMIZER, LOSS, MICRO, REWARD.attention)
    sampler = Sampler(
      engine=setup.engine,
      decode_params=setup.decode_params,
      keep_features=True,
      reward=REWARD,
      shapes=SHAPES,
      batches=lambda step: [range(step_fixtures.ROLLOUT.prompts)],
      seed=0,
      max_refills=0,
      refill=None,
      replaced=ReplacedTasks(),
      place=programs.place,
      attention=programs.attention,
    )
    prompts = [setup.engine.conversation.prompt(task) for task in step_fixtures.tasks(0)]
    state = compiled.init_state(policy, OPTIMIZER, setup.state.params, setup.mesh)
    yield Lab(policy, programs, state, sampler.sample(state.params, 0, prompts, 2.0))
  jax.clear_caches()  # no other test uses these shapes


class Ran(NamedTuple):
  """Two minibatches, used twice."""

  params: list[Any]  # after each update
  averages: list[Any]
  metrics: list[dict[str, Any]]
  gaps: list[float]  # between the reference of each update and the start
  state: TrainState
  joined: dict[str, Any]
  compiled: dict[str, int]


def updater(lab, programs, loss, count=1, epochs=1):
  cfg = UpdateConfig(loss, 1.0, count, epochs, False)
  return Updater(programs, cfg, SHAPES, 0, MovingAverage(FROZEN))


@pytest.fixture(scope="module")
def ran(lab):
  params, averages, metrics, gaps = [], [], [], []

  def update(state, batch, others):
    start_RT = lab.programs.policy_logprobs(lab.state.params, batch)
    gaps.append(float(jnp.abs(others.ref_RT - start_RT).max()))
    state, found = lab.programs.update(state, batch, others)
    average = moving_average(state.opt_state, state.params, FROZEN)
    params.append(jax.tree.map(np.array, state.params))
    averages.append(jax.tree.map(np.array, average))
    metrics.append(jax.device_get(found))
    return state, found

  watched = copy.copy(lab.programs)
  watched.update = update
  COMPILED.clear()
  run = updater(lab, watched, LOSS, 2, 2)
  state, joined = run.update(lab.fresh(), 0, lab.sampled, ADVANTAGE_BG)
  names = ("_update", "_policy_logprobs")
  counts = {name: COMPILED[f"jit({name})"] for name in names}
  return Ran(params, averages, metrics, gaps, state, joined, counts)


def close(one, other, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), one, other)


def test_two_minibatches_and_two_epochs_take_one_trace(ran):
  assert ran.compiled == {"_update": 1, "_policy_logprobs": 1}
  assert len(ran.metrics) == 4
  assert int(ran.state.step) == 4
  for name, value in ran.joined.items():
    values = [metrics[name] for metrics in ran.metrics]
    expected = {"skipped_updates": sum(values), "logp_difference": values[0]}
    assert value == pytest.approx(expected.get(name, np.mean(values)), rel=1e-6), name


def test_only_the_first_update_is_on_policy(ran):
  first, second, *later = (metrics["logp_difference"] for metrics in ran.metrics)
  assert first < 1e-5
  assert min(second, *later) > 1e-4
  assert float(ran.joined["logp_difference"]) == float(first)


def test_the_reference_is_that_of_before_the_first_update(ran):
  """In every epoch; its divergence is 0 in the first update and grows with the policy."""
  assert ran.gaps == [0.0] * 4
  found = [metrics["kl_ref_k3"] for metrics in ran.metrics]
  assert abs(found[0]) < 1e-9
  assert min(found[1:]) > 1e-7


def test_the_moving_average_changes_by_its_decay_with_every_update(lab, ran):
  expected = jax.tree.map(np.array, lab.state.params)
  for params, average in zip(ran.params, ran.averages, strict=True):
    expected = jax.tree.map(lambda old, new: DECAY * old + (1 - DECAY) * new, expected, params)
    close(average, expected, rtol=1e-5, atol=1e-6)
  moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), ran.averages[-1], lab.state.params)
  for path, size in param_tree.flatten(moved).items():
    assert (size > 1e-4) != param_tree.matches(path, FROZEN), path


def test_the_next_step_is_compared_with_the_average(lab, ran):
  batch = lab.programs.place(lab.half_batch())
  of = functools.partial(lab.programs.policy_logprobs, batch=batch)
  found = MovingAverage(FROZEN).logprobs(lab.programs, ran.state, batch)
  np.testing.assert_array_equal(found, of(ran.averages[-1]))
  for other in (lab.state.params, ran.state.params):
    assert np.abs(np.asarray(found) - np.asarray(of(other))).max() > 1e-4


@pytest.fixture(scope="module")
def single(lab):
  """The update of all rollouts at once, without an Updater."""
  batch = lab.programs.place(lab.half_batch())
  ref_RT = lab.programs.policy_logprobs(lab.state.params, batch)
  return lab.programs.update(lab.fresh(), batch, OtherLogprobs(ref_RT, None))


def test_one_minibatch_is_the_single_update_bit_for_bit(lab, single):
  run = updater(lab, lab.programs, LOSS)
  found = run.update(lab.fresh(), 0, lab.half(), ADVANTAGE_BG[HALF])
  jax.tree.map(np.testing.assert_array_equal, found, single)


KINDS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def importance(kind):
  return ImportanceConfig(kind, cap=2.0, floor=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_importance_weights_are_one_where_sampler_and_trainer_agree(lab, kind):
  """And only there: another sampler has other weights."""
  batch = lab.half_batch()
  rows = batch.rows
  logp_RT = lab.programs.policy_logprobs(lab.state.params, lab.programs.place(batch))
  weigh = functools.partial(importance_weights, trained_RT=rows.trained_RT, cfg=importance(kind))
  np.testing.assert_allclose(weigh(logp_RT, rows.old_logp_RT), 1, rtol=1e-4)
  off_RT = np.where(rows.trained_RT, rows.old_logp_RT + 1, 0).astype(np.float32)
  assert (np.asarray(weigh(logp_RT, off_RT))[rows.trained_RT] < 0.4).all()


@pytest.mark.parametrize("kind", ["token_mask", "sequence_truncate"])
def test_a_step_with_importance_weights_of_one_is_the_plain_step(lab, single, kind):
  loss = dataclasses.replace(LOSS, importance=importance(kind))
  programs = compiled.LearnPrograms(lab.policy, OPTIMIZER, loss, MICRO)
  run = updater(lab, programs, loss)
  state, metrics = run.update(lab.fresh(), 0, lab.half(), ADVANTAGE_BG[HALF])
  assert metrics["importance"] == pytest.approx(1.0, abs=1e-5)
  assert metrics["importance_masked"] == 0
  for name, value in single[1].items():
    assert metrics[name] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
  close(state.params, single[0].params, rtol=0, atol=2e-6)
  up, start = (
    x["decoder"]["layers"]["mlp"]["up"]["kernel"] for x in (state.params, lab.state.params)
  )
  assert np.abs(up - start).max() > 1e-4, "far more than the tolerance"


def test_the_attention_reward_of_a_step_is_that_of_each_rollout_alone(lab):
  rollouts, scores = lab.sampled.rollouts, lab.sampled.scores
  run = jax.jit(functools.partial(batch_attention, lab.policy, MICRO, REWARD.attention))

  def alone(trajectory):
    features = lab.sampled.image_features
    batch, _ = to_train_batch([[trajectory]], None, SHAPES, image_features=features)
    return float(run(lab.state.params, batch)[0])

  attention_BG = [[alone(trajectory) for trajectory in group] for group in rollouts]
  found_BG = scores.components["attention"]
  np.testing.assert_allclose(found_BG, attention_BG, rtol=1e-4)
  assert (found_BG > 0).all()
  assert (found_BG <= 1).all()
  assert np.ptp(found_BG) > 1e-3
  np.testing.assert_allclose(scores.reward_BG, 0.5 * found_BG, rtol=1e-5)
