"""Rules on the metrics of a run, the check for blindness, and what ends a run."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import common
from spatial_jax.config import ConfigError, build
from spatial_jax.data import vision_packing as packing
from spatial_jax.errors import UserError
from spatial_jax.metrics import LogConfig, Metrics
from spatial_jax.stages import loop
from spatial_jax.stages.health import (
  BlindCheck,
  Health,
  HealthConfig,
  blind_finding,
  exchangeable,
  findings,
)
from spatial_jax.stages.loop import LoopConfig
from spatial_jax.stages.sampling import Sampled
from spatial_jax.types import TrainState
from tests import rollout_fixtures as fixtures
from tests.test_learn_update import demonstrations, policy_and_params, score

CFG = build(HealthConfig, common.health().to_dict())
GOOD = {
  "zero_variance_groups": 0.1, "kl_ref_k3": 0.01, "kl_old_k3": 0.0, "end_token_limit": 0.0,
  "response_tokens": 100.0, "drawing_share": 0.4, "skipped_updates": 0,
}  # fmt: skip


def rules(first, **changes):
  found = findings(CFG, [first] * 5, [GOOD | changes] * 5)
  return [finding.rule for finding in found]


def test_a_healthy_run_has_no_finding():
  assert rules(GOOD) == []


@pytest.mark.parametrize(
  ("changes", "rule"),
  [
    ({"skipped_updates": 1}, "not finite"),
    ({"zero_variance_groups": 1.0}, "equal rewards"),
    ({"kl_ref_k3": 0.9}, "divergence"),
    ({"kl_old_k3": 0.9}, "divergence"),
    ({"end_token_limit": 0.5}, "length"),
    ({"response_tokens": 500.0}, "length"),
    ({"drawing_share": 0.02}, "drawing"),
  ],
)
def test_each_rule_finds_its_fault_and_names_a_remedy(changes, rule):
  assert rules(GOOD, **changes) == [rule]
  [finding] = findings(CFG, [GOOD] * 5, [GOOD | changes] * 5)
  assert any(word in finding.message for word in ("learn.", "rollout."))
  assert "\n" not in finding.message


def test_a_run_that_never_drew_is_not_warned_about_drawing():
  assert rules(GOOD | {"drawing_share": 0.0}, drawing_share=0.0) == []


def test_a_warning_is_not_repeated_at_once_and_survives_a_resume(tmp_path):
  health = Health(CFG, tmp_path)
  bad = GOOD | {"zero_variance_groups": 1.0}
  found = [len(health.check(step, bad)) for step in range(40)]
  assert sum(found) == 2
  assert found[4] == found[24] == 1
  log = LogConfig(False, False)
  with Metrics(tmp_path, "grpo", 0, 10, log) as metrics:
    for step in range(5):
      metrics.write(step, GOOD)
  resumed = Health(CFG, tmp_path)
  later = [resumed.check(step, GOOD | {"response_tokens": 900.0}) for step in range(5, 10)]
  found = [finding.rule for step in later for finding in step]
  assert found == ["length"], "compared with the first steps of the run"


@pytest.mark.parametrize("changes", [{"zero_variance_groups": 1.0}, {"kl_old_k3": 9.0}])
def test_a_run_that_was_stopped_has_a_whole_window_after_its_resume(tmp_path, changes):
  """Steps after the checkpoint, which run again, are not counted either."""
  cfg, bad = dataclasses.replace(CFG, stop=True), GOOD | changes
  with Metrics(tmp_path, "grpo", 0, 20, LogConfig(False, False)) as metrics:
    for step in range(10):
      metrics.write(step, GOOD if step < 2 else bad)
  resumed = Health(cfg, tmp_path)
  stops = [resumed.monitor(step, bad)[1] for step in range(8, 13)]
  assert stops == [False] * 4 + [True]


def test_the_start_of_a_run_is_without_steps_that_run_again(tmp_path):
  with Metrics(tmp_path, "grpo", 0, 20, LogConfig(False, False)) as metrics:
    for step in range(5):
      metrics.write(step, GOOD | {"response_tokens": 9.0})
  resumed = Health(CFG, tmp_path)
  assert [resumed.check(step, GOOD) for step in range(12)] == [[]] * 12


def test_health_can_stop_a_run_with_a_checkpoint(tmp_path):
  cfg = dataclasses.replace(CFG, stop=True)

  def step_of(first):
    return lambda state, step: (state._replace(step=state.step + 1), GOOD | {"skipped_updates": 1})

  state = TrainState({"w": jax.numpy.zeros(3)}, {}, jax.numpy.int32(0))
  settings = LoopConfig(9, 9, 0, 1, LogConfig(False, False))
  with pytest.raises(UserError, match="stopped after step 1, which is saved"):
    loop.run(
      tmp_path, settings, "grpo", state, step_of, None, None, {}, Health(cfg, tmp_path).monitor
    )
  assert int(loop.resume(tmp_path, state)[0]) == 1


@pytest.mark.parametrize(
  ("key", "value"), [("blind_rows", 1), ("max_length_factor", 1.0), ("max_truncated", 2.0)]
)
def test_limits_out_of_range_are_refused(key, value):
  with pytest.raises(ConfigError, match=key):
    dataclasses.replace(CFG, **{key: value})


# --- blindness -----------------------------------------------------------------------------------


def sampled():
  """One group about one image, one about two, and another one about the same two."""
  one, two = demonstrations()
  other = [dataclasses.replace(trajectory, task_id="other") for trajectory in two]
  return Sampled([], [one, two, other], None, None, None, {})


def check(logprobs):
  return BlindCheck(CFG, fixtures.shapes(), 1, lambda batch: batch, logprobs)


def test_images_are_exchanged_between_prompts_of_the_same_sizes_only():
  rollouts = [group[0] for group in sampled().rollouts]
  assert exchangeable(rollouts, 8, 1) == [], "the same images twice, and other sizes"
  moved = dataclasses.replace(
    rollouts[1],
    images=tuple(
      dataclasses.replace(image, content_hash=f"{i:04x}", patches_PX=image.patches_PX + 0.5)
      for i, image in enumerate(rollouts[1].images)
    ),
  )
  pairs = exchangeable([rollouts[0], rollouts[1], moved], 8, 1)
  assert [(one.task_id, other.task_id) for one, other in pairs] == [("bb", "bb"), ("bb", "bb")]
  assert exchangeable([rollouts[0], rollouts[1], moved], 8, 4) == []


def two_pictures():
  """Two rollouts of different images of one size."""
  first = demonstrations()[1][0]
  moved = dataclasses.replace(
    first,
    images=tuple(
      dataclasses.replace(image, content_hash=f"{i:04x}", patches_PX=image.patches_PX + 0.5)
      for i, image in enumerate(first.images)
    ),
  )
  return Sampled([], [[first], [moved]], None, None, None, {})


def test_a_policy_that_sees_changes_its_log_probabilities():
  _, params = policy_and_params()
  found = check(score()).measure(params, two_pictures())
  assert found["blind_change"] > CFG.min_blind_change
  assert blind_finding(CFG, found) is None


def test_a_policy_whose_features_never_arrive_is_found():
  """The decoder reads text alone: feature indices are dropped."""
  _, params = policy_and_params()

  def blind(params, batch):
    rows = batch.rows
    none = np.full_like(batch.prefix.feature_RT, -1)
    prefix = batch.prefix._replace(feature_RT=none)
    tokens = rows.tokens._replace(feature_RT=np.full_like(rows.tokens.feature_RT, -1))
    return score()(params, batch._replace(prefix=prefix, rows=rows._replace(tokens=tokens)))

  found = check(blind).measure(params, two_pictures())
  assert found["blind_change"] == 0.0
  assert "does not see its images" in blind_finding(CFG, found).message


def test_as_many_rollouts_are_checked_as_fit_a_minibatch():
  first = demonstrations()[1][0]
  twins = [
    [dataclasses.replace(
      first, images=tuple(dataclasses.replace(x, content_hash=f"{i}{x.content_hash}")
                          for x in first.images),
    )]
    for i in range(4)
  ]  # fmt: skip
  rows = []

  def logprobs(_, batch):
    rows.append(batch.rows.trained_RT.shape[0])
    return np.zeros(batch.rows.trained_RT.shape, np.float32)

  needed = sum(
    packing.window_layout(x.grid_3, fixtures.shapes().window_blocks).slots for x in first.images
  )
  found = Sampled([], twins, None, None, None, {})
  for most, expected in ((4, [4, 4]), (3, [3, 3]), (1, [])):
    vision = dataclasses.replace(fixtures.shapes().vision, windows=(most * needed,))
    shapes = dataclasses.replace(fixtures.shapes(), vision=vision)
    rows.clear()
    BlindCheck(CFG, shapes, 1, lambda batch: batch, logprobs).measure({}, found)
    assert rows == expected


def test_a_check_without_a_pair_says_nothing():
  _, params = policy_and_params()
  assert check(score()).measure(params, sampled()) == {}
  assert blind_finding(CFG, {}) is None
