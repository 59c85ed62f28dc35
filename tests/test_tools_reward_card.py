"""The reward card of a config: curves, deviations and equal groups against NumPy."""

import io
import types

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from configs import common, reward_study, smooth_operator, vsgrpo
from spatial_jax.config import build
from spatial_jax.errors import UserError
from spatial_jax.learn.advantage import AdvantageConfig
from spatial_jax.report.reward_card import EXAMPLE_ERRORS
from spatial_jax.reward.config import RewardConfig
from spatial_jax.reward.snra import sharpness, snra
from spatial_jax.tools import reward_card
from spatial_jax.tools.reward_card import SPREADS, card_steps, draw, show

STEPS = (0, 30, 50, 100)
ERROR = np.array(EXAMPLE_ERRORS)


def reward(**changes):
  """The default reward with dotted keys changed."""
  cfg = common.reward()
  cfg.update_from_flattened_dict(changes)
  return build(RewardConfig, cfg.to_dict())


def advantage(**changes):
  return build(AdvantageConfig, {**common.advantage().to_dict(), **changes})


ACCURACY = reward(**{"weights.format": 0.0})
GRPO = advantage(alpha=0.0)


def card(cfg=ACCURACY, by=GRPO, steps=STEPS, group=8):
  return card_steps(cfg, by, steps, 100, group)


def sigmoid_schedule(step):
  """k of the default schedule, 1 to 100."""
  return 1 + 99 / (1 + np.exp(-10 * (step / 100 - 0.5)))


# --- curves --------------------------------------------------------------------------------------


def test_rewards_are_those_of_the_library_at_the_sharpness_of_each_step():
  schedule = ACCURACY.schedule
  for one in card():
    assert one.sharpness == pytest.approx(float(sharpness(one.step / 100, schedule)))
    assert one.sharpness == pytest.approx(sigmoid_schedule(one.step), rel=1e-5)
    expected = np.asarray(snra(np.float32(ERROR**2), one.sharpness))
    np.testing.assert_allclose(one.reward_Z, expected, atol=1e-5)
    by_hand = 2 / (1 + np.exp(one.sharpness * ERROR**2))
    np.testing.assert_allclose(one.reward_Z, by_hand, atol=1e-5)


def test_steps_are_in_the_given_order_and_grow_sharper():
  found = card()
  assert [one.step for one in found] == list(STEPS)
  at_20_percent = [one.reward_Z[EXAMPLE_ERRORS.index(0.2)] for one in found]
  assert at_20_percent == sorted(at_20_percent, reverse=True)


def test_a_gated_format_is_paid_while_the_score_is_above_zero():
  (plain,), (gated,) = card(steps=(50,)), card(reward(), steps=(50,))
  paid = np.array([error < 0.5 for error in EXAMPLE_ERRORS])
  difference = gated.reward_Z - plain.reward_Z
  np.testing.assert_allclose(difference[paid], 0.2, atol=1e-6)
  assert difference[EXAMPLE_ERRORS.index(1.0)] == 0


@pytest.mark.parametrize(
  ("changes", "by_hand"),
  [
    ({"number": "tolerance"}, lambda e: e <= 0.05 + 1e-6),
    ({"number": "ratio"}, lambda e: 1 - e),
    (
      {"schedule.kind": "constant", "schedule.k_max": 400.0},
      lambda e: 2 / (1 + np.exp(400 * e**2)),
    ),
  ],
)
def test_other_rewards_do_not_change_during_the_run(changes, by_hand):
  for one in card(reward(**{"weights.format": 0.0, **changes})):
    np.testing.assert_allclose(one.reward_Z, by_hand(ERROR), atol=1e-5)


# --- groups --------------------------------------------------------------------------------------


def test_deviation_and_advantage_are_those_of_the_answers_as_one_group():
  for one in card():
    values = 2 / (1 + np.exp(one.sharpness * ERROR**2))
    assert one.std == pytest.approx(np.std(values, ddof=1), abs=1e-5)
    expected = (values - values.mean()) / np.std(values, ddof=1)
    np.testing.assert_allclose(one.advantage_Z, expected, atol=1e-3)
  (scaled,) = card(by=advantage(alpha=1.0), steps=(50,))
  (plain,) = card(steps=(50,))
  np.testing.assert_allclose(scaled.advantage_Z, plain.advantage_Z * plain.reward_Z, atol=1e-5)


def equal_share(spread, k, group):
  """Another sample of groups: errors are half normal, and rewards equal to 0.01."""
  error = np.random.default_rng(1).normal(0, spread, (20_000, group))
  return np.mean((2 / (1 + np.exp(k * error**2))).std(axis=1) < 0.01)


@pytest.mark.parametrize("group", [2, 8])
def test_the_share_of_equal_groups_is_that_of_a_direct_computation(group):
  for one in card(group=group):
    assert list(one.zero_variance) == list(SPREADS)
    for spread, share in one.zero_variance.items():
      # 2,000 groups: the standard error of a share is at most 0.011.
      assert share == pytest.approx(equal_share(spread, one.sharpness, group), abs=0.045)


def test_a_flat_curve_gives_more_equal_groups_than_a_steep_one():
  start, *_, end = (one.zero_variance for one in card())
  assert start[0.05] > 0.9 > 0.1 > end[0.05]


def test_a_reward_of_the_format_alone_teaches_nothing():
  only = {"weights.accuracy": 0.0, "weights.format": 1.0, "gated": ()}
  for one in card(reward(**only)):
    assert one.std == 0
    np.testing.assert_array_equal(one.advantage_Z, 0)
    assert set(one.zero_variance.values()) == {1.0}


def test_the_same_config_always_has_the_same_card():
  first, again = card(), card()
  assert [one.zero_variance for one in first] == [one.zero_variance for one in again]


# --- output --------------------------------------------------------------------------------------


def test_the_tables_show_the_numbers_of_the_card():
  found, console = card(reward()), Console(file=io.StringIO(), width=120)
  show(found, reward(), console)
  text = console.file.getvalue()
  assert "reward = 1 x accuracy + 0.2 x format where the score is above 0" in text
  for title in ("reward of an answer", "advantage of an answer", "share of groups"):
    assert title in text
  last = found[-1]
  for number in (f"{last.sharpness:.3g}", f"{last.reward_Z[3]:.2f}", f"{last.advantage_Z[0]:.2f}"):
    assert number in text
  assert f"{last.zero_variance[0.3]:.0%}" in text


@pytest.fixture
def run(monkeypatch, capsys):
  """Runs the command with a config and flags; gives what it prints."""

  def command(config, steps=(), out=""):
    for name, value in (("CONFIG", config), ("STEPS", list(steps)), ("OUT", str(out))):
      monkeypatch.setattr(reward_card, name, types.SimpleNamespace(value=value), raising=False)
    reward_card.main([])
    return capsys.readouterr().out

  before = jax.config.jax_platforms
  yield command
  jax.config.update("jax_platforms", before)


def test_the_command_draws_the_card_of_each_condition(run, tmp_path):
  out = run(smooth_operator.get_config("tiny"), ("0", "24"), tmp_path / "card.png")
  for name in ("ap_grpo", "grpo", "constant_400"):
    path = tmp_path / f"card-{name}.png"
    assert f"condition {name}" in out
    assert f"wrote {path}" in out
    with Image.open(path) as image:
      image.load()
      assert image.format == "PNG"
      assert min(image.size) > 300
      assert len(np.unique(np.asarray(image.convert("L")))) > 10, "not blank"


def test_conditions_without_rewards_have_no_card(run):
  out = run(reward_study.get_config("tiny"), ("0",))
  assert "condition accuracy" in out
  assert "warm_up" not in out
  assert "condition sft" not in out


def test_the_command_takes_five_steps_of_the_run_unless_they_are_given(run):
  out = run(vsgrpo.get_config("2b"))
  for step in (0, 250, 500, 750, 1000):
    assert f" {step} " in out
  assert "wrote" not in out


@pytest.mark.parametrize("step", ["-1", "1001", "a", "1.5", ""])
def test_a_step_outside_the_run_is_refused(run, step):
  with pytest.raises(UserError, match=rf"--steps has {step}; the run has steps 0 to 1000"):
    run(vsgrpo.get_config("2b"), ("0", step))


def test_a_drawing_may_have_another_format(tmp_path):
  draw(card(steps=(0, 100)), ACCURACY, tmp_path / "card.svg")
  assert "<svg" in (tmp_path / "card.svg").read_text()
