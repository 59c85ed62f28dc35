"""The gated composition of reward signals: trajectories to Scores, and rewards of plain texts."""

import dataclasses
import inspect
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax import config
from spatial_jax.errors import DataError
from spatial_jax.grammar import Grammar
from spatial_jax.reward import compose
from spatial_jax.reward.compose import (
  reward_of_text,
  score,
  score_example,
  score_examples,
)
from spatial_jax.reward.config import RewardConfig
from spatial_jax.reward.example import plain_example
from tests.reward_fixtures import CFG, DISTANCE, DRAWING, NEAREST, answering, rollout, turn

BOTH = ("accuracy", "format")


def scores_of(*rollouts, task=DISTANCE, cfg=CFG, k=1.0):
  """Scores of one group, each [G]."""
  scores = score([list(rollouts)], [task], cfg, k)._replace(weights={})
  return jax.tree.map(lambda part_BG: part_BG[0], scores)


def test_a_wild_guess_with_right_format_has_no_format_reward():
  wild = rollout(DRAWING, DRAWING, answering("4.1"))  # 105 % off: MRA 0, SNRA 0.50
  near = rollout(DRAWING, DRAWING, answering("2.1"))
  ugly = rollout(turn(DRAWING, executable=False), answering("4.1"))
  scores = scores_of(wild, near, ugly)
  np.testing.assert_array_equal(scores.format_BG, [1, 1, 0])
  np.testing.assert_allclose(scores.score_BG, [0, 1, 0])
  assert scores.accuracy_BG[0] == pytest.approx(0.499, abs=1e-3)
  assert scores.reward_BG[0] == scores.accuracy_BG[0] == scores.reward_BG[2]
  assert scores.reward_BG[1] == pytest.approx(scores.accuracy_BG[1] + 0.5)


def test_gate_all_is_the_published_equation():
  cfg = dataclasses.replace(
    CFG,
    gated=BOTH,
    number="mra",
    score="strict_mra",
    weights=dataclasses.replace(CFG.weights, format=1.0),
  )
  group = [rollout(DRAWING, answering(text)) for text in ("2.0", "1.7", "9")]
  scores = scores_of(*group, rollout(answering("1.7").replace("Action", "")), cfg=cfg)
  np.testing.assert_allclose(scores.reward_BG, [2.0, 1.7, 0.0, 0.7], atol=1e-6)


def test_gate_all_also_gates_the_smooth_accuracy():
  scores = scores_of(rollout(answering("4.1")), cfg=dataclasses.replace(CFG, gated=BOTH))
  assert scores.reward_BG[0] == scores.accuracy_BG[0] == 0.0


def test_the_gate_opens_above_the_threshold():
  cfg = dataclasses.replace(CFG, score_threshold=0.6)
  scores = scores_of(
    rollout(answering("2.5")), rollout(answering("2.38")), cfg=cfg
  )  # 25 and 19 % off
  np.testing.assert_allclose(scores.score_BG, [0.6, 0.7], atol=1e-6)
  np.testing.assert_allclose(scores.reward_BG - scores.accuracy_BG, [0.0, 0.5], atol=1e-6)


def test_at_sharpness_1_a_wrong_choice_is_rewarded_054():
  right, wrong = rollout(answering("B"), task=NEAREST), rollout(answering("A"), task=NEAREST)
  blunt = scores_of(right, wrong, task=NEAREST, k=1.0)
  np.testing.assert_allclose(blunt.reward_BG, [1.5, 0.5379], atol=1e-4)
  np.testing.assert_array_equal(blunt.score_BG, [1, 0])
  sharp = scores_of(right, wrong, task=NEAREST, k=100.0)
  np.testing.assert_allclose(sharp.reward_BG, [1.5, 0.0], atol=1e-6)


def test_discrete_sharpness_changes_choices_only():
  cfg = dataclasses.replace(CFG, discrete_sharpness=20.0)
  wrong = rollout(answering("A"), task=NEAREST)
  for k in (1.0, 100.0):
    assert scores_of(wrong, task=NEAREST, cfg=cfg, k=k).reward_BG[0] < 1e-6
  off = rollout(answering("4.0"))
  assert scores_of(off, cfg=cfg, k=1.0).reward_BG[0] == pytest.approx(0.5379, abs=1e-4)


@pytest.mark.parametrize(
  ("number", "choice", "off", "wrong"),
  [
    ("sigmoid", "smooth", 0.8756, 0.5379),
    ("tanh", "smooth", 0.7551, 0.2384),
    ("mra", "smooth", 0.1, 0.5379),
    ("ratio", "exact", 0.5, 0.0),
    ("sigmoid", "exact", 0.8756, 0.0),
  ],
)
def test_each_kind_of_accuracy_has_its_curve(number, choice, off, wrong):
  cfg = dataclasses.replace(CFG, number=number, choice=choice)
  assert scores_of(rollout(answering("3.0")), cfg=cfg).accuracy_BG[0] == pytest.approx(
    off, abs=1e-4
  )
  scores = scores_of(rollout(answering("A"), task=NEAREST), task=NEAREST, cfg=cfg)
  assert scores.accuracy_BG[0] == pytest.approx(wrong, abs=1e-4)


@pytest.mark.parametrize("text", ["", "two or three", "2 or 3", "B", "2 m²", "nan"])
def test_an_unreadable_answer_has_reward_0_and_is_not_parsed(text):
  scores = scores_of(rollout(DRAWING, answering(text)))
  assert not scores.parsed_BG[0]
  assert scores.valid_BG[0]
  assert scores.reward_BG[0] == scores.accuracy_BG[0] == scores.score_BG[0] == 0.0


def test_a_rollout_that_ended_early_has_reward_0_even_if_option_0_is_right():
  """An unread answer has the value 0, which must not equal a truth of 0."""
  first = dataclasses.replace(NEAREST, answer="A")
  scores = scores_of(rollout(answering("A"), task=first, end_reason="token_limit"), task=first)
  assert scores.reward_BG[0] == scores.score_BG[0] == 0.0


def test_a_fault_is_not_valid():
  scores = scores_of(rollout(answering("2"), end_reason="fault"), rollout(answering("2")))
  np.testing.assert_array_equal(scores.valid_BG, [False, True])
  np.testing.assert_array_equal(scores.parsed_BG, [False, True])
  assert scores.reward_BG[0] == 0.0


def test_units_are_converted_to_the_unit_of_the_question():
  scores = scores_of(*(rollout(answering(text)) for text in ("200 cm", "2", "about 2.0 meters.")))
  np.testing.assert_array_equal(scores.score_BG, [1, 1, 1])


def test_numbers_and_choices_share_a_batch():
  groups = [
    [rollout(answering("2")), rollout(answering("9"))],
    [rollout(answering("chair"), task=NEAREST), rollout(answering("2"), task=NEAREST)],
  ]
  scores = score(groups, [DISTANCE, NEAREST], CFG, jnp.float32(100.0))._replace(weights={})
  np.testing.assert_allclose(scores.reward_BG, [[1.5, 0.0], [1.5, 0.0]], atol=1e-6)
  np.testing.assert_array_equal(scores.parsed_BG, [[True, True], [True, False]])
  for part in jax.tree.leaves(scores):
    assert isinstance(part, np.ndarray)
    assert part.shape == (2, 2)
  assert {part.dtype for part in jax.tree.leaves(scores)} == {np.dtype(np.float32), np.dtype(bool)}


def test_a_task_without_a_readable_truth_is_named():
  for broken in (
    dataclasses.replace(DISTANCE, answer=""),
    dataclasses.replace(NEAREST, answer="E"),
  ):
    with pytest.raises(DataError, match=f"task {broken.task_id}: "):
      score([[rollout(answering("2"), task=broken)]], [broken], CFG, 1.0)
  with pytest.raises(ValueError, match="nearest"):
    score([[rollout(answering("2"))]], [NEAREST], CFG, 1.0)


def test_sharpness_never_recompiles():
  traces = []

  @jax.jit
  def one(answer, sharpness):
    traces.append(1)
    return score_example(answer, sharpness, CFG).reward

  answer = plain_example(3.0, 2.0, True, True, 1.0, True)
  assert float(one(answer, jnp.float32(1.0))) > float(one(answer, jnp.float32(50.0)))
  assert len(traces) == 1


def test_built_from_a_config():
  mapping = dataclasses.asdict(CFG)
  assert config.build(RewardConfig, mapping) == CFG
  with pytest.raises(config.ConfigError, match="gated"):
    config.build(RewardConfig, mapping | {"gated": ("size",)})


def test_components_are_the_signals_before_weights_and_gate():
  cfg = dataclasses.replace(CFG, gated=BOTH)
  scores = scores_of(rollout(answering("4.1")), rollout(answering("2.1")), cfg=cfg)
  assert set(scores.components) == {"accuracy", "score", "format"}
  assert scores.components["accuracy"][0] > 0 == scores.accuracy_BG[0]
  np.testing.assert_array_equal(scores.components["format"], [1, 1])
  np.testing.assert_array_equal(scores.components["format"], scores.format_BG)
  np.testing.assert_array_equal(scores.components["score"], scores.score_BG)


def examples_of(format_BG):
  """Exact answers with the given format signal."""
  one_BG = np.ones_like(format_BG)
  return plain_example(2 * one_BG, 2 * one_BG, one_BG > 0, one_BG > 0, format_BG, one_BG > 0)


@pytest.mark.parametrize("gated", [("format",), BOTH])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_makes_one_rollout_invalid(bad, gated):
  cfg = dataclasses.replace(CFG, gated=gated)
  format_BG = np.array([[1, bad, 0], [1, 1, 1]], np.float32)
  scores = score_examples(examples_of(format_BG), cfg, 10.0)
  np.testing.assert_array_equal(scores.valid_BG, [[True, False, True], [True, True, True]])
  assert all(np.isfinite(part).all() for part in jax.tree.leaves(scores))
  assert scores.reward_BG[0, 1] == scores.accuracy_BG[0, 1] == 0.0
  finite_BG = np.where(np.isfinite(format_BG), format_BG, 0).astype(np.float32)
  expected = score_examples(examples_of(finite_BG), cfg, 10.0)
  np.testing.assert_array_equal(scores.reward_BG[:, [0, 2]], expected.reward_BG[:, [0, 2]])


@pytest.mark.parametrize("k", [np.nan, np.inf, 0.0, -1.0])
def test_a_sharpness_that_is_not_a_positive_number_is_refused(k):
  with pytest.raises(ValueError, match="sharpness is"):
    scores_of(rollout(answering("2")), k=k)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("number", "square"), ("choice", "soft"), ("scorer", "judge"),
    ("tolerance", 1.0), ("tolerance", -0.1),
    ("discrete_sharpness", 0.0), ("discrete_sharpness", -1.0), ("discrete_sharpness", np.nan),
    ("score_threshold", 1.0), ("score_threshold", np.nan), ("score_threshold", None),
  ],
)  # fmt: skip
def test_a_reward_config_out_of_range_is_refused(field, value):
  with pytest.raises(config.ConfigError, match=f"^{field} is .* and must be "):
    dataclasses.replace(CFG, **{field: value})


def test_the_full_key_of_a_wrong_reward_value_is_named():
  mapping = dataclasses.asdict(CFG) | {"tolerance": -1.0}
  mapping["schedule"] = dict(mapping["schedule"], k_min=-2.0)
  with pytest.raises(config.ConfigError) as raised:
    config.build(RewardConfig, mapping, "config.learn.reward")
  assert "config.learn.reward.schedule.k_min is -2.0 and must be" in str(raised.value)


# --- rewards of plain texts ----------------------------------------------------------------------

TEXTS = [
  answering("2.1"), answering("200 cm"), answering("chair"), answering("(B)"), answering("2 or 3"),
  answering("5") + " Yes.", "<answer> 2.4 </answer>", "2.0", "", "<think> <answer> 2 </answer>",
  "<think> 2 </think> Action: Answer <answer> 3 </answer> <answer> 2 m </answer>",
]  # fmt: skip


@pytest.mark.parametrize("gated", [("format",), BOTH])
@pytest.mark.parametrize(
  ("task", "form"), [(DISTANCE, {"unit": "meters"}), (NEAREST, {"options": NEAREST.options})]
)
def test_the_reward_of_a_text_is_the_reward_of_its_rollout(task, form, gated):
  cfg = dataclasses.replace(CFG, gated=gated)
  scores = scores_of(*(rollout(text, task=task) for text in TEXTS), task=task, cfg=cfg, k=7.0)
  for g, text in enumerate(TEXTS):
    result = reward_of_text(text, task.answer, cfg, 7.0, **form)
    parts = {"reward": scores.reward_BG, "parsed": scores.parsed_BG, **scores.components}
    assert result == {name: float(part_G[g]) for name, part_G in parts.items()}


def test_the_reward_of_a_text_refuses_wrong_truths_and_units():
  with pytest.raises(DataError, match="'two and a half' cannot be read as a number"):
    reward_of_text(answering("2"), "two and a half", CFG, 1.0)
  with pytest.raises(DataError, match="'E' cannot be read as one of the options"):
    reward_of_text(answering("A"), "E", CFG, 1.0, options=NEAREST.options)
  with pytest.raises(ValueError, match="a choice has no unit"):
    reward_of_text(answering("A"), "A", CFG, 1.0, unit="m", options=NEAREST.options)
  with pytest.raises(ValueError, match="'parsec' is not a unit"):
    reward_of_text(answering("2"), "2", CFG, 1.0, unit="parsec")


def test_the_reward_of_a_text_refuses_scorers_of_whole_rollouts():
  with pytest.raises(ValueError, match="'phyx' reads whole rollouts"):
    reward_of_text(answering("2"), "2.0", dataclasses.replace(CFG, scorer="phyx"), 10.0)


@pytest.mark.parametrize(("noun", "right"), [(None, 1.0), ("chair(s)", 1.0), ("table(s)", 0.0)])
def test_a_count_of_a_text_may_have_a_noun(noun, right):
  result = reward_of_text(answering("4 chairs"), "4", CFG, 1.0, unit="count", noun=noun)
  assert result["score"] == result["parsed"] == right


@pytest.mark.parametrize(
  ("text", "reward", "parsed"), [("the Sofa.", 1.5, 1), ("a bed", 0.0, 1), ("?", 0.0, 0)]
)
@pytest.mark.parametrize("choice", ["smooth", "exact"])
def test_words_are_rewarded_like_a_choice(text, reward, parsed, choice):
  words = dataclasses.replace(
    DISTANCE, question="What is next to the lamp?", answer="sofa", answer_kind="words"
  )
  cfg = dataclasses.replace(CFG, choice=choice)
  scores = scores_of(rollout(answering(text), task=words), task=words, cfg=cfg, k=50.0)
  assert scores.reward_BG[0] == pytest.approx(reward, abs=1e-3)
  assert scores.parsed_BG[0] == parsed
  result = reward_of_text(answering(text), "sofa", cfg, 50.0, words=True)
  assert result["reward"] == scores.reward_BG[0]
  assert result["parsed"] == parsed


def test_words_have_no_unit_and_no_options():
  for form in ({"unit": "m"}, {"options": NEAREST.options}):
    with pytest.raises(ValueError, match="words has no unit"):
      reward_of_text(answering("A"), "A", CFG, 1.0, words=True, **form)


@pytest.mark.parametrize(
  ("response", "grammar", "format_"),
  [
    ("2", Grammar("", False, "", False), 1.0),
    ("<answer> 2 </answer>", Grammar("", False, "answer", False), 1.0),
    ("<think> a </think><answer> 2 </answer>", Grammar("think", False, "answer", False), 1.0),
    ("<answer> 2 </answer>", Grammar("think", False, "answer", False), 0.0),
  ],
)
def test_a_text_is_rewarded_by_its_grammar(response, grammar, format_):
  result = reward_of_text(response, "2", CFG, 1.0, grammar=grammar)
  assert (result["score"], result["format"]) == (1.0, format_)
  scores = scores_of(rollout(response, grammar=grammar), k=1.0)
  assert scores.reward_BG[0] == result["reward"]


def test_the_example_of_the_documentation_runs():
  lines = inspect.getdoc(reward_of_text).split("\n\n")[1]
  assert len(lines.splitlines()) == 5
  names = {}
  exec(textwrap.dedent(lines), names)
  assert names["result"]["score"] == names["result"]["format"] == 1.0
  assert names["result"]["reward"] == pytest.approx(1.2, abs=0.05)


def test_rewards_import_no_model_library():
  script = "import sys, spatial_jax.reward.compose; print(*sys.modules)"
  command = [sys.executable, "-c", script]
  modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
  roots = {module.partition(".")[0] for module in modules}
  assert compose.__name__ in modules
  assert not roots & {
    "flax",
    "optax",
    "transformers",
    "tokenizers",
    "orbax",
    "PIL",
    "torch",
    "rich",
  }
