"""The result table, on made-up predictions."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from spatial_jax.errors import DataError
from spatial_jax.evaluate import results
from spatial_jax.evaluate.behaviour import behaviour
from spatial_jax.evaluate.benchmarks.summary import heading, vsi_score, vsi_sentence
from spatial_jax.evaluate.comparison import PredictionSet, result_table
from spatial_jax.evaluate.console import show, show_behaviour
from spatial_jax.evaluate.evaluator import gallery_tasks, write
from spatial_jax.evaluate.predictions import Prediction
from spatial_jax.evaluate.results import ResultColumn, headline, read_results
from spatial_jax.types import Operation, OperationError, Turn
from tests import dummies

TYPES = {"object_counting": "number", "object_abs_distance": "number", "left_right": "choice"}
# Column -> mean score of a run that learned.
MEANS = {
  "start_greedy": 0.50,
  "start_sampled": 0.45,
  "start_best_temperature": 0.48,
  "end_greedy": 0.58,
  "end_sampled": 0.55,
  "median": 0.44,
  "start_fitted_factor": 0.56,
  "start_other_image": 0.45,
  "end_other_image": 0.46,
}
BOX = Operation("box", 1, (1.0, 2.0, 3.0, 4.0), "chair")


def turn(operations=(), errors=(), produced=(), text="a text"):
  return Turn(0, 1, text, operations, errors, not errors, produced)


def make_prediction(number, score, reward=None, **changes):
  kind = list(TYPES)[number % len(TYPES)]
  plain = Prediction(
    task_id=f"task-{number}",
    question_type=kind,
    answer_kind=TYPES[kind],
    question="How many?",
    truth="2",
    benchmark=None,
    answer="2",
    score=score,
    reward=score if reward is None else reward,
    parsed=True,
    end_reason="answer",
    turns=(turn(),),
    tokens=5,
    logp=-1.0,
    images=1,
  )
  return dataclasses.replace(plain, **changes)


def prediction_set(key, scores, **changes):
  predictions = [make_prediction(i, float(s), **changes) for i, s in enumerate(scores)]
  return PredictionSet(ResultColumn(key, key.replace("_", " ")), predictions)


def all_sets(means=MEANS, count=90):
  """Scores around the mean of each column, correlated by question."""
  generator = np.random.default_rng(0)
  ease = generator.normal(0, 0.05, count)
  return [
    prediction_set(key, np.clip(mean + ease + generator.normal(0, 0.02, count), 0, 1))
    for key, mean in means.items()
  ]


@pytest.fixture(scope="module")
def sets_and_table():
  sets = all_sets()
  return sets, result_table(sets, 10.0, ("[a note]",), "MRA")


def by_label(table):
  return {paired.label: paired for paired in table.paired}


def test_means_are_in_the_right_cells(sets_and_table):
  sets, table = sets_and_table
  assert [column.key for column in table.columns] == list(MEANS)
  assert [(row.question_type, row.n) for row in table.rows] == [(name, 30) for name in TYPES]
  scores = np.array([p.score for p in sets[3].predictions])
  assert table.overall["end_greedy"].mean == pytest.approx(scores.mean())
  assert table.rows[1].cells["end_greedy"].mean == pytest.approx(scores[1::3].mean())
  numbers, choices, reward = table.summary
  assert (numbers.n, choices.n, reward.n) == (60, 30, 90)
  numeric = np.delete(scores, np.s_[2::3])
  assert numbers.cells["end_greedy"].mean == pytest.approx(numeric.mean())
  assert choices.cells["end_greedy"].mean == pytest.approx(scores[2::3].mean())
  assert reward.question_type == "reward (sharpness 10)"
  assert table.parsed == dict.fromkeys(MEANS, 1.0)


def test_the_share_of_parsed_answers_is_reported_per_column():
  sets = [prediction_set("end_greedy", [1, 0, 1]), prediction_set("median", [0, 0, 0])]
  unread = dataclasses.replace(sets[0].predictions[1], parsed=False)
  changed = [sets[0].predictions[0], unread, sets[0].predictions[2]]
  sets[0] = PredictionSet(sets[0].column, changed)
  table = result_table(sets, 10.0, (), "MRA")
  assert table.parsed == {"end_greedy": pytest.approx(2 / 3), "median": 1.0}


def test_differences_are_paired_by_question(sets_and_table):
  _, table = sets_and_table
  found = by_label(table)
  assert len(found) == len(results.COMPARISONS)
  gain = found["greedy score, end - start"]
  assert gain.mean == pytest.approx(0.08, abs=0.01)
  assert gain.high - gain.low < 0.015  # questions differ by 0.05, pairs by 0.03
  assert (gain.after, gain.before, gain.measure) == ("end_greedy", "start_greedy", "score")
  assert found["sampled reward, end - start"].measure == "reward"


@pytest.mark.parametrize(
  ("end", "verb"), [(0.58, "rose"), (0.50, "shows no clear change"), (0.44, "fell")]
)
def test_the_headline_names_direction_values_and_interval(end, verb):
  scores = np.tile(np.linspace(0.2, 0.6, 10), 3)
  noise = np.tile([0.03, -0.03], 15)
  start = prediction_set("start_greedy", scores)
  after = prediction_set("end_greedy", scores + (end - 0.5) + noise)
  table = result_table([start, after], 10.0, (), "MRA")
  sentence = headline(table) or ""
  after = f"{end - 0.1:.3f}"
  values = (
    f"(0.400 at the start, {after} at the end)" if "no clear" in verb else f"from 0.400 to {after}"
  )
  assert f"the greedy score {verb} {values}: {end - 0.5:+.3f}, 95 % interval " in sentence


def test_a_policy_without_a_start_is_compared_with_the_baselines():
  sets = [s for s in all_sets() if "start" not in s.column.key]
  table = result_table(sets, 10.0, (), "MRA")
  assert [paired.label for paired in table.paired] == [
    "greedy score, end - median answer",
    "greedy score, end - end on other images",
  ]
  assert "the greedy score is 0.58" in (headline(table) or "")
  assert headline(result_table(sets[2:3], 10.0, (), "MRA")) is None


def test_the_row_of_exact_matches_names_its_kinds():
  choices = prediction_set("end_greedy", [1, 0, 0.5])
  words = [dataclasses.replace(p, answer_kind="words") for p in choices.predictions]
  for found, label in ((choices.predictions, "choices"), (words, "choices and words")):
    table = result_table([PredictionSet(choices.column, found)], 10.0, (), "MRA")
    assert f"{label}, exact match" in [row.question_type for row in table.summary]


def test_a_fault_removes_its_question_from_every_column():
  sets = [prediction_set("end_greedy", [1, 0, 0.5, 1]), prediction_set("median", [0, 0, 0, 0])]
  predictions = list(sets[0].predictions)
  predictions[1] = dataclasses.replace(predictions[1], end_reason="fault")
  table = result_table([PredictionSet(sets[0].column, predictions), sets[1]], 10.0, (), "MRA")
  assert sum(row.n for row in table.rows) == 3
  assert table.overall["end_greedy"].mean == pytest.approx(2.5 / 3)
  assert table.paired[0].mean == pytest.approx(2.5 / 3)
  assert "1 questions are left out: drawing failed" in table.notes[-1]


def test_questions_that_could_not_be_asked_are_counted_with_the_first_reason():
  end = prediction_set("end_greedy", [1, 0, 0.5])
  fault = {"end_reason": "fault", "problem": "task a: b.jpg does not exist"}
  predictions = [dataclasses.replace(p, **fault) for p in end.predictions]
  some = PredictionSet(end.column, [end.predictions[0], *predictions[1:]])
  (note,) = result_table([some], 10.0, (), "MRA").notes
  assert note == (
    "2 questions could not be asked and are left out; the first: task a: b.jpg does not exist."
  )
  with pytest.raises(DataError, match=r"no question is left to evaluate: 3 questions could not"):
    result_table([PredictionSet(end.column, predictions)], 10.0, (), "MRA")


def test_rollouts_of_the_page_are_of_questions_without_a_fault():
  tasks = [dummies.number_task(np.random.default_rng(i)) for i in range(3)]
  good = [make_prediction(i, 1.0) for i in range(3)]
  bad = dataclasses.replace(good[1], end_reason="fault")
  assert gallery_tasks(tasks, [good, [good[0], bad, good[2]]], 3) == [tasks[0], tasks[2]]


# --- behaviour and benchmark -------------------------------------------------------------------


def test_behaviour_counts_drawings_turns_and_ends():
  drawing = turn((BOX, BOX), (), ("a1",))
  wrong = turn((BOX,), (OperationError("no_such_image", "9"),), ())
  found = behaviour(
    [
      make_prediction(0, 1.0, turns=(drawing, turn()), tokens=11, images=2),
      make_prediction(1, 0.0, turns=(wrong,), parsed=False, end_reason="no_action"),
      make_prediction(2, 0.0, turns=(turn(),), end_reason="answer"),
      make_prediction(3, 0.0, turns=(drawing,), end_reason="fault"),
    ]
  )
  assert found == {
    "drawing_share": pytest.approx(1 / 3),
    "operations": 1.0,
    "boxes": 1.0,
    "lines": 0.0,
    "reflections": 0.0,
    "executable_share": 0.5,
    "turns": pytest.approx(4 / 3),
    "tokens": 7.0,
    "images": pytest.approx(4 / 3),
    "parsed_share": pytest.approx(2 / 3),
    "faults": 1.0,
    "end/answer": pytest.approx(2 / 3),
    "end/no_action": pytest.approx(1 / 3),
  }


def test_the_heading_says_whether_training_used_the_benchmark():
  plain = dummies.number_task(np.random.default_rng(0))
  room = dataclasses.replace(plain, benchmark="vsi-bench")
  assert heading([plain], "vsi-bench") is None
  assert "TRAINED" in (heading([plain, room], "vsi-bench") or "")
  assert "not trained" in (heading([room], None) or "")


def test_vsi_score_is_the_average_of_the_benchmark():
  benchmark = {"benchmark": "vsi-bench"}
  right = make_prediction(0, 0.0, **benchmark)  # object_counting
  near = make_prediction(1, 0.0, answer="2.2", **benchmark)  # object_abs_distance, 10 % off
  wordy = make_prediction(0, 0.0, answer="about 2", **benchmark)
  foreign = make_prediction(2, 0.0, **benchmark)  # not a type of the benchmark
  assert vsi_score([right, near, foreign]) == pytest.approx(100 * (1.0 + 0.8) / 2, abs=5.01)
  assert (vsi_score([right, wordy, near]) or 0) < (vsi_score([right, near]) or 0)
  assert vsi_score([make_prediction(0, 1.0)]) is None
  sentence = vsi_sentence({"greedy": [right], "sampled": [wordy]})
  assert sentence == (
    "VSI-Bench's own average of its tasks, in percent: greedy 100.0; sampled 0.0."
  )
  assert vsi_sentence({"greedy": [make_prediction(0, 1.0)]}) is None


# --- output ------------------------------------------------------------------------------------


def test_files_contain_the_table_and_every_prediction(tmp_path):
  sets = all_sets(count=6)
  table = result_table(sets, 10.0, ("a note",), "MRA")
  write(tmp_path / "new", sets, table, {"seed": 3}, {"end": 0.5})
  assert read_results(tmp_path / "new") == table
  record = json.loads((tmp_path / "new" / "results.json").read_text())
  assert (record["origin"], record["pass_at"]) == ({"seed": 3}, {"end": 0.5})
  assert record["behaviour"].keys() == set(MEANS) - {"median", "start_fitted_factor"}
  lines = (tmp_path / "new" / "predictions.jsonl").read_text().splitlines()
  first = json.loads(lines[0])
  assert len(lines) == 6 * len(MEANS)
  assert first["column"] == "start_greedy"
  expected = {"task_id", "question_type", "question", "truth", "answer", "score", "reward", "text"}
  assert expected < first.keys()


def test_the_console_ends_with_the_headline(sets_and_table):
  sets, table = sets_and_table
  console = Console(width=118, record=True, file=io.StringIO())
  show(table, "Rooms of vsi-bench.", console)
  text = console.export_text(clear=False)
  assert text.startswith("Rooms of vsi-bench.")
  assert f"{table.overall['end_sampled'].mean:.3f}" in text
  assert "[a note]" in text
  last = " ".join(text[text.rindex("On 90 held-out questions") :].split())
  assert last == headline(table)
  show_behaviour({"end_sampled": behaviour(sets[4].predictions)}, console)
  assert "drawing share" in console.export_text()
