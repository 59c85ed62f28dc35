"""The table of an exam, on made-up answer sheets."""

import dataclasses
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from spatial_jax.evaluate import comparison as table_lib
from spatial_jax.evaluate.behaviour import behaviour
from spatial_jax.evaluate.benchmarks.summary import heading, vsi_score
from spatial_jax.evaluate.comparison import PredictionSet, result_table
from spatial_jax.evaluate.console import show, show_behaviour
from spatial_jax.evaluate.evaluator import write
from spatial_jax.evaluate.predictions import Prediction
from spatial_jax.evaluate.results import ResultColumn, read_results
from spatial_jax.types import Operation, OperationError, Turn
from tests import dummies

TYPES = {"object_counting": "number", "object_abs_distance": "number", "left_right": "choice"}
KEYS = (
  "start_sampled", "start_greedy", "start_best", "end_sampled", "end_greedy", "median",
  "grey_sampled", "grey_greedy",
)  # fmt: skip
BOX = Operation("box", 1, (1.0, 2.0, 3.0, 4.0), "chair")


def turn(operations=(), errors=(), produced=(), text="said"):
  return Turn(0, 1, text, operations, errors, not errors, produced)


def answered(number, score_, reward=None, **changes):
  kind = list(TYPES)[number % len(TYPES)]
  plain = Prediction(
    task_id=f"task-{number}",
    question_type=kind,
    answer_kind=TYPES[kind],
    question="How many?",
    truth="2",
    benchmark=None,
    answer="2",
    score_=score_,
    reward=score_ if reward is None else reward,
    parsed=True,
    end_reason="answer",
    turns=(turn(),),
    tokens=5,
    logp=-1.0,
    pictures=1,
  )
  return dataclasses.replace(plain, **changes)


def prediction_set(key, scores, **changes):
  marked = [answered(i, float(s), **changes) for i, s in enumerate(scores)]
  return PredictionSet(ResultColumn(key, key.replace("_", " ")), marked)


def all_sheets(means, count=90):
  """Scores around the mean of each way of answering, correlated by question."""
  generator = np.random.default_rng(0)
  ease = generator.normal(0, 0.05, count)
  return [
    prediction_set(key, np.clip(mean + ease + generator.normal(0, 0.02, count), 0, 1))
    for key, mean in zip(KEYS, means, strict=True)
  ]


@pytest.fixture(scope="module")
def good():
  """(sheets, table) of a run that kept its promises."""
  prediction_sets = all_sheets(GOOD)
  return prediction_sets, result_table(prediction_sets, 10.0, True, ("[mine]",))


def by_label(table):
  return {paired.label: paired for paired in table.paired}


GOOD = (0.45, 0.50, 0.48, 0.55, 0.53, 0.44, 0.36, 0.37)


def test_means_lie_where_they_belong(good):
  prediction_sets, table = good
  assert [column.key for column in table.columns] == list(KEYS)
  assert [(row.question_type, row.n) for row in table.rows] == [(name, 30) for name in TYPES]
  scores = np.array([a.score_ for a in prediction_sets[3].answers])
  assert table.overall["end_sampled"].mean == pytest.approx(scores.mean())
  assert table.rows[1].cells["end_sampled"].mean == pytest.approx(scores[1::3].mean())
  numbers, choices, reward = table.summary
  assert (numbers.n, choices.n, reward.n) == (60, 30, 90)
  kept = np.delete(scores, np.s_[2::3])
  assert numbers.cells["end_sampled"].mean == pytest.approx(kept.mean())
  assert choices.cells["end_sampled"].mean == pytest.approx(scores[2::3].mean())
  assert reward.question_type == "reward (sharpness 10)"


def test_differences_are_paired_and_judged(good):
  _, table = good
  found = by_label(table)
  assert len(found) == len(table_lib.COMPARISONS)
  gain = found["sampled score, end - start"]
  assert gain.mean == pytest.approx(0.10, abs=0.01)
  assert gain.high - gain.low < 0.015  # questions differ by 0.05, pairs by 0.03
  assert gain.required == "at least 0.05, interval above 0"
  assert all(paired.met for paired in table.paired if paired.required)
  assert found["sampled reward, end - start"].met is None


@pytest.mark.parametrize(
  ("means", "broken"),
  [
    ((0.51, 0.50, 0.48, 0.55, 0.53, 0.44, 0.36, 0.37), "sampled score, end - start"),
    ((0.45, 0.55, 0.48, 0.55, 0.53, 0.44, 0.36, 0.37), "greedy score, end - start"),
    ((0.45, 0.50, 0.48, 0.55, 0.58, 0.55, 0.36, 0.37), "sampled score - median answer"),
    ((0.45, 0.50, 0.48, 0.55, 0.53, 0.44, 0.36, 0.53), "greedy score - the same on grey"),
  ],
)
def test_each_requirement_can_fail_alone(means, broken):
  table = result_table(all_sheets(means), 10.0, True, ())
  assert [paired.label for paired in table.paired if paired.met is False] == [broken]


def test_nothing_is_required_where_nothing_was_promised():
  table = result_table(all_sheets(GOOD), 10.0, False, ())
  assert {(paired.required, paired.met) for paired in table.paired} == {(None, None)}


def test_a_policy_alone_is_compared_with_median_and_grey():
  table = result_table(all_sheets(GOOD)[3:], 10.0, False, ())
  assert len(table.paired) == 4
  assert not any("start" in paired.label for paired in table.paired)
  assert table.notes == ()


def test_the_note_says_how_much_is_sharpening(good):
  sharpening, mine = good[1].notes
  assert mine == "[mine]"
  gain, cooler, share, beyond = map(float, re.findall(r"[+-]?\d+\.?\d*(?=[ %.])", sharpening)[:4])
  assert gain == pytest.approx(0.10, abs=0.02)
  assert share == pytest.approx(100 * cooler / gain, abs=2)
  assert beyond == pytest.approx(gain - cooler, abs=0.002)
  worse = all_sheets((0.45, 0.50, 0.48, 0.40, 0.53, 0.44, 0.36, 0.37))
  assert "% of it" not in result_table(worse, 10.0, True, ()).notes[0]


def test_a_fault_takes_its_question_out_of_every_sheet():
  prediction_sets = [
    prediction_set("end_sampled", [1, 0, 0.5, 1]),
    prediction_set("median", [0, 0, 0, 0]),
  ]
  broken = dataclasses.replace(prediction_sets[0].answers[1], end_reason="fault")
  prediction_sets[0] = PredictionSet(
    prediction_sets[0].column,
    [prediction_sets[0].answers[0], broken, *prediction_sets[0].answers[2:]],
  )
  table = result_table(prediction_sets, 10.0, False, ())
  assert sum(row.n for row in table.rows) == 3
  assert table.overall["end_sampled"].mean == pytest.approx(2.5 / 3)
  assert table.paired[0].mean == pytest.approx(2.5 / 3)
  assert "1 questions are left out" in table.notes[-1]


# --- behaviour and benchmark -------------------------------------------------------------------


def test_behaviour_counts_what_was_done():
  drawing = turn((BOX, BOX), (), ("a1",))
  wrong = turn((BOX,), (OperationError("no_such_image", "9"),), ())
  found = behaviour(
    [
      answered(0, 1.0, turns=(drawing, turn()), tokens=11, pictures=2),
      answered(1, 0.0, turns=(wrong,), parsed=False, end_reason="no_action"),
      answered(2, 0.0, turns=(turn(),), end_reason="answer"),
      answered(3, 0.0, turns=(drawing,), end_reason="fault"),
    ]
  )
  assert found == {
    "drawing_share": pytest.approx(1 / 3),
    "operations": 1.0,
    "executable_share": 0.5,
    "turns": pytest.approx(4 / 3),
    "tokens": 7.0,
    "pictures": pytest.approx(4 / 3),
    "parsed_share": pytest.approx(2 / 3),
    "faults": 1.0,
    "end/answer": pytest.approx(2 / 3),
    "end/no_action": pytest.approx(1 / 3),
  }


def test_heading_says_who_trained_on_the_benchmark():
  plain = dummies.number_task(np.random.default_rng(0))
  room = dataclasses.replace(plain, benchmark="vsi-bench")
  assert heading([plain], "vsi-bench") is None
  assert "TRAINED" in (heading([plain, room], "vsi-bench") or "")
  assert "not trained" in (heading([room], None) or "")


def test_vsi_score_is_the_benchmarks_own_average():
  asked = {"benchmark": "vsi-bench"}
  right = answered(0, 0.0, **asked)  # object_counting
  near = answered(1, 0.0, answer="2.2", **asked)  # object_abs_distance, off by a tenth
  wordy = answered(0, 0.0, answer="about 2", **asked)
  foreign = answered(2, 0.0, **asked)  # not a type of the benchmark
  assert vsi_score([right, near, foreign]) == pytest.approx(100 * (1.0 + 0.8) / 2, abs=5.01)
  assert (vsi_score([right, wordy, near]) or 0) < (vsi_score([right, near]) or 0)
  assert vsi_score([answered(0, 1.0)]) is None


# --- output ------------------------------------------------------------------------------------


def test_files_hold_the_table_and_every_answer(tmp_path):
  prediction_sets = all_sheets(GOOD, count=6)
  table = result_table(prediction_sets, 10.0, True, ("a note",))
  write(tmp_path / "new", prediction_sets, table, {"seed": 3})
  assert read_results(tmp_path / "new") == table
  record = json.loads((tmp_path / "new" / "results.json").read_text())
  assert record["origin"] == {"seed": 3}
  assert record["behaviour"].keys() == set(KEYS) - {"median"}
  lines = (tmp_path / "new" / "predictions.jsonl").read_text().splitlines()
  first = json.loads(lines[0])
  assert len(lines) == 6 * len(KEYS)
  assert first["column"] == "start_sampled"
  wanted = {"task_id", "question_type", "question", "truth", "answer", "hard", "reward", "text"}
  assert wanted < first.keys()


def test_the_console_shows_means_intervals_and_verdicts(good):
  console = Console(width=118, record=True, file=io.StringIO())
  prediction_sets, table = good
  show(table, "Rooms of vsi-bench.", console)
  show_behaviour({"end_sampled": behaviour(prediction_sets[3].answers)}, console)
  text = console.export_text()
  assert text.startswith("Rooms of vsi-bench.")
  assert f"{table.overall['end_sampled'].mean:.3f}" in text
  assert f"{table.overall['end_sampled'].low:.3f}" in text
  assert "interval above 0 met" in text
  assert "[mine]" in text
  assert max(map(len, text.splitlines())) <= 118
