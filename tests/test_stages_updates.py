"""The updates of a step on programs that compute nothing: minibatches, epochs, KL in the reward."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.learn.advantage import advantage
from spatial_jax.learn.train_batch import BatchConfig
from spatial_jax.stages.reference import StartWithAdapters
from spatial_jax.stages.sampling import Sampled
from spatial_jax.stages.updates import UpdateConfig, Updater, minibatches
from spatial_jax.types import OtherLogprobs, Scores, TrainState
from tests import dummies
from tests.learn_fixtures import loss_config

# --- minibatches ---------------------------------------------------------------------------------


@given(st.integers(0, 9), st.integers(0, 99), st.integers(1, 6), st.integers(1, 5))
def test_minibatches_are_equal_parts_and_hold_every_prompt_once(seed, step, count, size):
  parts = minibatches(seed, step, count * size, count)
  assert [len(part) for part in parts] == [size] * count
  assert sorted(b for part in parts for b in part) == list(range(count * size))
  assert all(part == sorted(part) for part in parts)
  assert parts == minibatches(seed, step, count * size, count)


def test_minibatches_change_with_seed_and_step():
  found = [minibatches(seed, step, 16, 4) for seed in range(3) for step in range(8)]
  assert len({str(parts) for parts in found}) == len(found)


# --- the updates of a step, on programs that compute nothing -------------------------------------

PROMPTS, GROUP = 4, 2
SMALL = BatchConfig((16,), 32, VisionBuckets((16,), (16,), (16,)), 2, 100)
ADVANTAGE_BG = np.arange(1, 9, dtype=np.float32).reshape(PROMPTS, GROUP)  # names a rollout
PLAIN = UpdateConfig(loss_config(), 1.0, 1, 1, False)
REASONS = [["answer", "token_limit"], ["turn_limit"] * 2, ["no_action", "answer"], ["fault"] * 2]


class Recorder:
  """Programs that record their calls; each update adds 1 to the parameter and to its metrics."""

  local_row_shards = 1

  def __init__(self):
    self.calls: list[tuple[Any, ...]] = []

  def place(self, batch):
    return batch

  def logprobs(self, params, batch):
    self.calls.append(("reference", params["w"], batch))
    return batch.rows.old_logp_RT + gap_of(batch)

  def policy_logprobs(self, params, batch):
    self.calls.append(("trainer", params["w"], batch))
    return batch.rows.old_logp_RT - 1

  def update(self, state, batch, others):
    self.calls.append(("update", batch, others))
    number = state.params["w"] + 1
    metrics = {"loss": number, "skipped_updates": number, "logp_difference": number}
    return TrainState({"w": number}, {}, state.step + 1), metrics

  def called(self, name):
    return [call[1:] for call in self.calls if call[0] == name]


def gap_of(batch):
  """float32 [R, T], reference - policy, also where nothing is trained."""
  tokens = batch.rows.tokens.token_RT
  return (0.01 * tokens + 0.1).astype(np.float32)


def rollout(prompt, sample, end_reason="answer"):
  """A short rollout about one image."""
  generator, writer = np.random.default_rng((prompt, sample)), dummies.TrajectoryWriter()
  writer.text([prompt, 1])
  writer.image(dummies.patched(np.full((28, 28, 3), prompt, np.uint8)))
  writer.text([2])
  length = len(writer.ids)
  writer.turn("so", 2 + sample, generator)
  return writer.finish(f"task-{prompt}", sample, length, 1, end_reason)


def sampled_of(reasons=(("answer",) * GROUP,) * PROMPTS, valid_BG=True, reward_BG=0.0):
  """Rollouts that ended for these reasons, and their scores."""
  rollouts = [[rollout(b, g, reason) for g, reason in enumerate(r)] for b, r in enumerate(reasons)]
  zero_BG = np.zeros((len(rollouts), GROUP), np.float32)
  valid_BG = np.broadcast_to(valid_BG, zero_BG.shape)
  reward_BG = zero_BG + np.float32(reward_BG)
  scores = Scores(reward_BG, zero_BG, zero_BG, zero_BG, valid_BG, valid_BG, {}, {}, {})
  return Sampled([], rollouts, scores, None, None, {})


def updated(cfg, sampled, reference=None, step=3):
  """(the programs, the state and the metrics after the updates of a step)."""
  programs = Recorder()
  state = TrainState({"w": 0.0}, {}, np.int32(step))
  updater = Updater(programs, cfg, SMALL, 7, reference)
  return programs, *updater.update(state, step, sampled, ADVANTAGE_BG)


def test_each_epoch_updates_on_each_minibatch_in_the_same_order():
  cfg = dataclasses.replace(PLAIN, minibatches=2, epochs=3)
  programs, state, _ = updated(cfg, sampled_of())
  found = [batch.rows.advantage_R.tolist() for batch, _ in programs.called("update")]
  expected = [ADVANTAGE_BG[part].reshape(-1).tolist() for part in minibatches(7, 3, PROMPTS, 2)]
  assert found == expected * 3
  assert state.step == 3 + 6


def test_every_epoch_has_the_log_probabilities_of_the_sampler():
  cfg = dataclasses.replace(PLAIN, minibatches=2, epochs=3)
  sampled = sampled_of()
  programs, _, _ = updated(cfg, sampled)
  logp = {
    float(ADVANTAGE_BG[b, g]): t.logp_T[t.trained_T]
    for b, group in enumerate(sampled.rollouts)
    for g, t in enumerate(group)
  }
  for batch, others in programs.called("update"):
    assert others == OtherLogprobs(None, None)
    for r, name in enumerate(batch.rows.advantage_R.tolist()):
      old_logp_T = batch.rows.old_logp_RT[r][batch.rows.trained_RT[r]]
      np.testing.assert_array_equal(old_logp_T, logp[name])


def test_other_log_probabilities_are_computed_once_before_the_first_update():
  """Of reference and trainer, for each minibatch; every epoch reads the same."""
  loss = loss_config({"kl.weight": 0.1, "importance.kind": "token_mask"})
  cfg = dataclasses.replace(PLAIN, loss=loss, minibatches=2, epochs=2)
  programs, _, _ = updated(cfg, sampled_of(), StartWithAdapters())
  assert [call[0] for call in programs.calls] == ["reference", "trainer"] * 2 + ["update"] * 4
  for name in ("reference", "trainer"):
    assert [params for params, _ in programs.called(name)] == [0.0, 0.0], "those of the start"
  for batch, others in programs.called("update"):
    np.testing.assert_array_equal(others.ref_RT, batch.rows.old_logp_RT + gap_of(batch))
    np.testing.assert_array_equal(others.trainer_RT, batch.rows.old_logp_RT - 1)


def test_a_single_update_computes_those_of_the_trainer_itself():
  loss = loss_config({"kl.weight": 0.1, "importance.kind": "token_mask"})
  cfg = dataclasses.replace(PLAIN, loss=loss)
  programs, _, _ = updated(cfg, sampled_of(), StartWithAdapters())
  assert [call[0] for call in programs.calls] == ["reference", "update"]
  assert programs.called("update")[0][1].trainer_RT is None


def test_metrics_of_several_updates_are_means_sums_and_first_values():
  cfg = dataclasses.replace(PLAIN, minibatches=2, epochs=2)
  _, _, metrics = updated(cfg, sampled_of())
  assert metrics == {"loss": 2.5, "skipped_updates": 10, "logp_difference": 1}


def test_each_minibatch_keeps_its_largest_advantages():
  cfg = dataclasses.replace(PLAIN, minibatches=2, keep_fraction=0.5)
  programs, _, _ = updated(cfg, sampled_of())
  found = [batch.rows.advantage_R.tolist() for batch, _ in programs.called("update")]
  parts = minibatches(7, 3, PROMPTS, 2)
  assert found == [ADVANTAGE_BG[part[-1]].tolist() for part in parts]


def test_rollouts_of_weight_zero_are_selected_last():
  """Here those that a limit cut off have the largest advantages: 5, 6 and 8."""
  cfg = dataclasses.replace(PLAIN, keep_fraction=0.5, mask_truncated=True)
  programs, _, _ = updated(cfg, sampled_of(REASONS[::-1]))
  ((batch, _),) = programs.called("update")
  assert sorted(batch.rows.advantage_R.tolist()) == [2, 3, 4, 7]
  assert (batch.rows.weight_R == 1).all()


def test_rollouts_that_a_limit_cut_off_have_weight_zero_and_nothing_else_changes():
  """In every minibatch."""
  sampled = sampled_of(REASONS)
  cfg = dataclasses.replace(PLAIN, minibatches=2)
  plain, masked = (
    [batch for batch, _ in updated(one, sampled)[0].called("update")]
    for one in (cfg, dataclasses.replace(cfg, mask_truncated=True))
  )
  weight = {
    float(ADVANTAGE_BG[b, g]): float(reason not in ("token_limit", "turn_limit"))
    for b, group in enumerate(REASONS)
    for g, reason in enumerate(group)
  }
  assert 0 < sum(weight.values()) < len(weight)
  for one, other in zip(plain, masked, strict=True):
    assert other.rows.weight_R.tolist() == [weight[name] for name in other.rows.advantage_R]
    assert (one.rows.weight_R == 1).all()
    same = other._replace(rows=other.rows._replace(weight_R=one.rows.weight_R))
    jax.tree.map(np.testing.assert_array_equal, one, same)


# --- KL in the reward ----------------------------------------------------------------------------

OF_GAP = {
  "k1": lambda gap: -gap,
  "k2": lambda gap: gap**2 / 2,
  "k3": lambda gap: np.exp(gap) - gap - 1,
}


NO_KL = {"reward_BG": 0, "components": {}, "terms": {}, "weights": {}}


def in_reward(changes, sampled, reference, step=0):
  cfg = dataclasses.replace(PLAIN, loss=loss_config({"kl.weight": 0.2} | changes))
  state = TrainState({"w": 0.0}, {}, np.int32(step))
  return Updater(Recorder(), cfg, SMALL, 0, reference).with_kl_in_reward(state, sampled)


@pytest.mark.parametrize("estimate", OF_GAP)
def test_the_reward_loses_beta_times_the_divergence_of_its_rollout(estimate):
  """Summed over its sampled tokens; an invalid rollout keeps its reward of 0."""
  valid_BG = np.array([[True, True], [False, True], [True, True], [True, False]])
  reward_BG = np.where(valid_BG, ADVANTAGE_BG, 0)
  sampled = sampled_of(valid_BG=valid_BG, reward_BG=reward_BG)
  changes = {"kl.place": "reward", "kl.estimate": estimate, "kl.final_weight": 0.4, "kl.steps": 10}
  found = in_reward(changes, sampled, StartWithAdapters(), step=5).scores
  ids_BG = [[t.token_ids_T[t.trained_T] for t in group] for group in sampled.rollouts]
  kl_BG = np.array([[OF_GAP[estimate](0.01 * x + 0.1).sum() for x in group] for group in ids_BG])
  np.testing.assert_allclose(found.components["kl"], kl_BG, rtol=1e-5)
  beta = 0.3  # halfway
  np.testing.assert_allclose(found.reward_BG, np.where(valid_BG, reward_BG - beta * kl_BG, 0))
  assert found.reward_BG.dtype == np.float32
  assert found._replace(**NO_KL) == sampled.scores._replace(**NO_KL)


def test_the_divergence_is_a_term_of_the_reward():
  """So that advantages per component see it, and the report shows it."""
  sampled = sampled_of()
  terms = {"accuracy": np.zeros_like(ADVANTAGE_BG)}
  scores = sampled.scores._replace(terms=terms, weights={"accuracy": 1.0})
  sampled = dataclasses.replace(sampled, scores=scores)
  found = in_reward({"kl.place": "reward"}, sampled, StartWithAdapters()).scores
  total_BG = sum(found.weights[name] * term_BG for name, term_BG in found.terms.items())
  np.testing.assert_allclose(total_BG, found.reward_BG, rtol=1e-6)
  cfg = dataclasses.replace(dummies.ADVANTAGE, alpha=0.0, per_component=True)
  assert not np.any(advantage(scores, cfg))
  assert np.all(np.abs(advantage(found, cfg)) > 0.1)


def test_the_reward_is_left_alone_without_a_reference_or_with_kl_in_the_loss():
  sampled = sampled_of()
  assert in_reward({"kl.place": "reward"}, sampled, None) is sampled
  assert in_reward({"kl.place": "loss"}, sampled, StartWithAdapters()) is sampled
