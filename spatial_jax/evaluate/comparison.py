"""Prediction sets -> ResultTable: means with intervals, and differences paired by question."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from spatial_jax.evaluate.bootstrap import bootstrap_interval, paired_interval
from spatial_jax.evaluate.predictions import Prediction
from spatial_jax.evaluate.results import (
  END_GREEDY,
  END_OTHER_IMAGE,
  END_SAMPLED,
  MEDIAN,
  START_BEST_TEMPERATURE,
  START_FITTED,
  START_GREEDY,
  START_OTHER_IMAGE,
  START_SAMPLED,
  Cell,
  Paired,
  ResultColumn,
  ResultRow,
  ResultTable,
)

_SEED = 0  # of the bootstrap: the same scores always give the same table

Measure = Literal["score", "reward"]


@dataclasses.dataclass(frozen=True, eq=False)
class PredictionSet:
  """One column of the table: one prediction per task, in the order of the tasks."""

  column: ResultColumn
  predictions: Sequence[Prediction]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A difference `after - before` that is reported.

  Attributes:
    label: names the two columns.
    after, before: column keys.
    measure: the score or the reward.
  """

  label: str
  after: str
  before: str
  measure: Measure


# The first one is the headline.
COMPARISONS = (
  Comparison("greedy score, end - start", END_GREEDY, START_GREEDY, "score"),
  Comparison("greedy score, end - start x fitted factor", END_GREEDY, START_FITTED, "score"),
  Comparison("greedy score, end - median answer", END_GREEDY, MEDIAN, "score"),
  Comparison("greedy score, end - end on other images", END_GREEDY, END_OTHER_IMAGE, "score"),
  Comparison(
    "greedy score, start - start on other images", START_GREEDY, START_OTHER_IMAGE, "score"
  ),
  Comparison("sampled score, end - start", END_SAMPLED, START_SAMPLED, "score"),
  Comparison(
    "sampled score, end - start at its best temperature",
    END_SAMPLED,
    START_BEST_TEMPERATURE,
    "score",
  ),
  Comparison("sampled reward, end - start", END_SAMPLED, START_SAMPLED, "reward"),
)


def result_table(
  prediction_sets: Sequence[PredictionSet], sharpness: float, notes: Sequence[str]
) -> ResultTable:
  """The table of an evaluation.

  A question with a fault of the machinery in any column is left out of all columns and counted in
  the notes.

  Args:
    prediction_sets: at least one; all of the same tasks.
    sharpness: of the rewards, for the name of the row.
    notes: sentences below the table.

  Raises:
    ValueError: if no question is left.
  """
  valid = [
    all(row)
    for row in zip(*([p.valid for p in s.predictions] for s in prediction_sets), strict=True)
  ]
  kept = [
    PredictionSet(s.column, list(itertools.compress(s.predictions, valid))) for s in prediction_sets
  ]
  first = kept[0].predictions
  types = dict.fromkeys(p.question_type for p in first)
  everything = np.ones(len(first), bool)
  is_number = np.array([p.answer_kind == "number" for p in first])
  kinds = {"numbers, MRA": is_number, "choices, exact match": ~is_number}
  rows = [
    _row(name, kept, np.array([p.question_type == name for p in first]), "score") for name in types
  ]
  summary = [_row(name, kept, mask, "score") for name, mask in kinds.items() if mask.any()]
  summary += [_row(f"reward (sharpness {sharpness:.3g})", kept, everything, "reward")]
  faults = valid.count(False)
  if faults:
    notes = [*notes, f"{faults} questions are left out: drawing failed with an internal fault."]
  return ResultTable(
    columns=tuple(s.column for s in kept),
    rows=tuple(rows),
    overall=_row("overall", kept, everything, "score").cells,
    parsed={s.column.key: float(np.mean([p.parsed for p in s.predictions])) for s in kept},
    summary=tuple(summary),
    paired=tuple(_compare(kept)),
    notes=tuple(notes),
  )


def values(predictions: Sequence[Prediction], measure: Measure) -> np.ndarray:
  """float64 [n], one value per question."""
  return np.array([p.score if measure == "score" else p.reward for p in predictions], np.float64)


def _row(
  name: str, prediction_sets: Sequence[PredictionSet], mask: np.ndarray, measure: Measure
) -> ResultRow:
  cells = {
    s.column.key: bootstrap_interval(values(s.predictions, measure)[mask], _SEED)
    for s in prediction_sets
  }
  return ResultRow(name, int(mask.sum()), cells)


def _compare(prediction_sets: Sequence[PredictionSet]) -> list[Paired]:
  by_key = {s.column.key: s.predictions for s in prediction_sets}
  return [
    _paired(comparison, by_key[comparison.after], by_key[comparison.before])
    for comparison in COMPARISONS
    if comparison.after in by_key and comparison.before in by_key
  ]


def _paired(
  comparison: Comparison, after: Sequence[Prediction], before: Sequence[Prediction]
) -> Paired:
  measure = comparison.measure
  cell: Cell = paired_interval(values(after, measure), values(before, measure), _SEED)
  return Paired(
    comparison.label, comparison.after, comparison.before, measure, cell.mean, cell.low, cell.high
  )
