"""Pairs for DPO, kept rollouts, and the rows that are written of them."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.config import ConfigError, build
from spatial_jax.data.files import FilesConfig, open_files
from spatial_jax.drawing.parser import WIDE_LIMITS
from spatial_jax.errors import DataError, UserError
from spatial_jax.reward.parse import check_truth, read
from spatial_jax.rollout.demonstration import Demonstrator, SequenceLimits
from spatial_jax.stages.collect import Collector, row_of
from spatial_jax.stages.pairs import answers_by_type, wrong_answer
from spatial_jax.stages.reject import KeepConfig, best_and_worst, keep, passes
from spatial_jax.synthetic.oracle import DemonstrationConfig, demonstrate
from spatial_jax.synthetic.solver import Solver, SolverConfig
from spatial_jax.types import DemonstratedTurn, Operation, Scores, ScriptTurn, Turn
from tests import rollout_fixtures as fixtures
from tests.reward_fixtures import DISTANCE, NEAREST, answering, rollout

ALL = KeepConfig(min_score=0.5, executable=True, reflective=True, min_turns=1, per_task=1)
FILES = FilesConfig((), "", 0.0, (), "shuffled", 0.0, True)


# --- wrong answers -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.floats(0.1, 5000).map(lambda x: f"{x:.1f}"), st.integers(0, 99))
def test_a_wrong_number_differs_and_has_the_decimals_of_the_truth(truth, seed):
  task = dataclasses.replace(DISTANCE, answer=truth)
  wrong = wrong_answer(task, {}, np.random.default_rng(seed))
  assert float(wrong) != float(truth)
  assert float(wrong) > 0
  assert len(wrong.partition(".")[2]) == 1


def test_wrong_choices_and_words():
  rng = np.random.default_rng(0)
  found = {wrong_answer(NEAREST, {}, rng) for _ in range(50)}
  assert found == {"A", "C", "D"}
  words = dataclasses.replace(NEAREST, answer_kind="words", answer="left", options=None)
  other = dataclasses.replace(words, answer="right")
  table = answers_by_type([words, other, DISTANCE])
  assert table == {NEAREST.question_type: ("left", "right")}
  assert wrong_answer(words, table, rng) == "right"
  with pytest.raises(DataError, match="no other answer"):
    wrong_answer(words, {NEAREST.question_type: ("left",)}, rng)


# --- what is kept --------------------------------------------------------------------------------


def drawn(*boxes):
  return Turn(0, 0, "draw", tuple(Operation("box", 1, b, "chair") for b in boxes), (), True, ())


ONE, TWO = (0.0, 0.0, 5.0, 5.0), (1.0, 0.0, 5.0, 5.0)
REFLECTIVE = rollout(drawn(ONE), drawn(TWO), answering("2.0"))
PLAIN = rollout(answering("2.0"))


def test_each_test_can_fail_alone():
  good = {"correct": True, "executable": True, "reflective": True, "long_enough": True}
  assert passes(ALL, REFLECTIVE, 1.0, True) == good
  assert not passes(ALL, REFLECTIVE, 0.5, True)["correct"]
  assert not passes(ALL, REFLECTIVE, 1.0, False)["executable"]
  assert not passes(ALL, PLAIN, 1.0, True)["reflective"]
  cold = dataclasses.replace(ALL, reflective=False, min_turns=3)
  assert passes(cold, PLAIN, 1.0, True) == good | {"long_enough": False}
  early = rollout(drawn(ONE), drawn(TWO), end_reason="token_limit")
  assert not passes(ALL, early, 1.0, True)["correct"]


def scores(values, formats=1.0):
  value_BG = np.array([values], np.float32)
  one_BG = np.ones_like(value_BG)
  return Scores(value_BG, value_BG, value_BG, formats * one_BG, one_BG > 0, one_BG > 0, {}, {}, {})


def prompt_of(task):
  prompt = fixtures.conversation().prompt(fixtures.task("t", ((24, 24),), "How far?"))
  return dataclasses.replace(prompt, task=task)


def test_the_best_rollouts_of_a_task_are_kept_and_counted_by_type(tmp_path):
  group = [REFLECTIVE, REFLECTIVE, PLAIN, REFLECTIVE]
  found, counts = keep(ALL, [prompt_of(DISTANCE)], [group], scores([0.6, 0.9, 1.0, 0.2]), tmp_path)
  assert [row["id"] for row in found] == ["distance#1"]
  name = DISTANCE.question_type
  assert counts == Counter({
    (name, "sampled"): 4, (name, "correct"): 3, (name, "executable"): 4,
    (name, "reflective"): 3, (name, "long_enough"): 4, (name, "kept"): 1,
  })  # fmt: skip


def test_the_pair_of_a_task_is_its_best_and_its_worst_answer(tmp_path):
  group = [PLAIN, rollout(answering("9")), rollout("no", end_reason="no_action")]
  prompts = [prompt_of(DISTANCE)]
  rows, _ = best_and_worst(0.1, prompts, [group], scores([1.0, 0.2, 0.0]), tmp_path)
  assert rows[0]["turns"] == [answering("2.0")]
  assert rows[0]["rejected"] == [answering("9")]
  assert not best_and_worst(0.9, prompts, [group], scores([1.0, 0.2, 0.0]), tmp_path)[0]


def test_nothing_kept_is_an_error_with_the_counts(tmp_path):
  collector = Collector(None, None, None, None, 1, 0, tmp_path)
  record = {"rows": [], "counts": [["size", "sampled", 8]], "replaced": 0}
  (tmp_path / "chunk_00000.json").write_text(json.dumps(record))
  with pytest.raises(UserError, match="nothing was kept of 8 rollouts"):
    collector.run(dict)


@pytest.mark.parametrize(
  ("key", "value"), [("min_score", 1.0), ("min_turns", 0), ("per_task", 0), ("reflective", 1)]
)
def test_filters_out_of_range_are_refused(key, value):
  with pytest.raises(ConfigError, match=key):
    build(KeepConfig, dataclasses.asdict(ALL) | {key: value})


# --- demonstrations as data ----------------------------------------------------------------------


def demonstrator(solver=None, sizes=None):
  conversation = fixtures.conversation()
  return Demonstrator(conversation, fixtures.STYLE, WIDE_LIMITS, solver, sizes)


def drawing_task():
  return fixtures.task("a", ((24, 24),), "How far is the chair?")


def drawing_trajectory():
  solver = Solver(SolverConfig(1.0, 0.0, 3))
  return demonstrator(solver)(drawing_task())


def test_a_row_of_a_trajectory_gives_the_same_trajectory_again(tmp_path):
  """Texts, drawn images and tokens survive the data file."""
  task, trajectory = drawing_task(), drawing_trajectory()
  assert len(trajectory.images) == 2
  row = row_of(task, "a#0", tmp_path, {"turns": trajectory})
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(row) + "\n")
  source = open_files([path], FILES, check_truth)
  again = demonstrator()(source.batch(0, 0, 1)[0])
  np.testing.assert_array_equal(again.token_ids_T, trajectory.token_ids_T)
  np.testing.assert_array_equal(again.position_TA, trajectory.position_TA)
  np.testing.assert_array_equal(again.trained_T, trajectory.trained_T)
  for one, other in zip(again.images, trajectory.images, strict=True):
    np.testing.assert_array_equal(one.pixels, other.pixels)
    np.testing.assert_array_equal(one.patches_PX, other.patches_PX)


def test_turns_without_images_are_drawn(tmp_path):
  task, trajectory = drawing_task(), drawing_trajectory()
  turns = tuple(DemonstratedTurn(turn.text, None, None) for turn in trajectory.turns)
  again = demonstrator()(dataclasses.replace(task, turns=turns))
  np.testing.assert_array_equal(again.token_ids_T, trajectory.token_ids_T)
  np.testing.assert_array_equal(again.images[1].pixels, trajectory.images[1].pixels)


@pytest.mark.parametrize(
  ("turns", "message"),
  [
    ((answering("2.0").replace("<answer>", ""),), "the last turn has no answer"),
    (("<think> I look. </think> Action: Object Mapper", answering("2.0")), "draws nothing"),
    ((answering("2 <|im_start|>"),), "special token"),
    ((), "has no turns to imitate"),
  ],
)
def test_a_demonstration_that_cannot_be_imitated_is_named(turns, message):
  task = dataclasses.replace(
    drawing_task(), turns=tuple(DemonstratedTurn(text, None, None) for text in turns)
  )
  with pytest.raises(DataError, match=message):
    demonstrator()(task)


def test_a_task_with_a_solution_is_imitated_with_it():
  task = dataclasses.replace(drawing_task(), unit="m", extra={"solution": "d = 2 m."})
  text = demonstrator()(task).text
  assert text == "<think> d = 2 m. </think> Action: Answer\n<answer> 2.1 m </answer>"
  tagged = dataclasses.replace(task, extra={"solution": "<answer> 2 </answer>"})
  with pytest.raises(DataError, match="its solution cannot be imitated"):
    demonstrator()(tagged)


@pytest.mark.parametrize(
  ("limit", "message"),
  [
    ({"tokens": 16}, r"\d+ tokens, at most 16 fit; raise the tokens of the stage"),
    ({"windows": 1}, r"\d+ windows of images, at most 1 fit; lower config\.preprocess\.max_pixels"),
    ({"frames": 0}, r"1 images and frames, at most 0 fit; leave some out"),
    ({"patches": 16}, r"36 patches in one image, at most 16 fit; lower config\.preprocess"),
  ],
)
def test_a_demonstration_that_does_not_fit_is_named(limit, message):
  sizes = dataclasses.replace(SequenceLimits(9999, 99, 99, 999), **limit)
  solver = Solver(SolverConfig(0.0, 0.0, 3))
  with pytest.raises(DataError, match=rf"^task a: its demonstration has {message}"):
    demonstrator(solver, sizes)(drawing_task())
  assert demonstrator(solver, SequenceLimits(9999, 99, 99, 999))(drawing_task()).task_id == "a"


def test_a_pair_shares_its_prompt():
  turn = DemonstratedTurn(answering("2.0"), None, None)
  other = DemonstratedTurn(answering("9"), None, None)
  task = dataclasses.replace(drawing_task(), turns=(turn,), rejected=(other,))
  chosen, rejected = demonstrator().pair(task)
  length = chosen.prompt_length
  np.testing.assert_array_equal(chosen.token_ids_T[:length], rejected.token_ids_T[:length])
  with pytest.raises(DataError, match="no rejected response"):
    demonstrator().pair(dataclasses.replace(task, rejected=()))


# --- the solver ----------------------------------------------------------------------------------


def test_the_solver_corrects_its_mistakes_and_always_answers_right():
  task = drawing_task()
  script = Solver(SolverConfig(1.0, 1.0, 3))(task)
  assert [turn.answer is None for turn in script] == [True, True, False]
  wrong, right = script[0].operations[0], script[1].operations[0]
  assert wrong.label == right.label
  assert wrong.points_4 != right.points_4
  assert (
    right.points_4
    == demonstrate(task, np.random.default_rng(0), DemonstrationConfig(1.0, 3))[0]
    .operations[0]
    .points_4
  )
  assert read(script[-1].answer, task) == check_truth(task)
  assert Solver(SolverConfig(1.0, 1.0, 3))(task) == script, "always the same"
  assert isinstance(script[0], ScriptTurn)
