"""Prediction sets -> ResultTable: means with intervals, and differences paired by question."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from spatial_jax.errors import DataError
from spatial_jax.evaluate.bootstrap import bootstrap_interval, paired_interval
from spatial_jax.evaluate.predictions import Prediction
from spatial_jax.evaluate.results import (
  COMPARISONS,
  Measure,
  Paired,
  ResultColumn,
  ResultRow,
  ResultTable,
)

_SEED = 0  # of the bootstrap: the same scores always give the same table


@dataclasses.dataclass(frozen=True, eq=False)
class PredictionSet:
  """One column of the table: one prediction per task, in the order of the tasks."""

  column: ResultColumn
  predictions: Sequence[Prediction]


def result_table(
  prediction_sets: Sequence[PredictionSet],
  sharpness: float,
  notes: Sequence[str],
  score_name: str,
) -> ResultTable:
  """The table of an evaluation.

  A question with a fault of the machinery in any column is left out of all columns and counted in
  the notes.

  Args:
    prediction_sets: at least one; all of the same tasks.
    sharpness: of the rewards, for the name of the row.
    notes: sentences below the table.
    score_name: of the score of numbers.

  Raises:
    DataError: if no question is left.
  """
  valid = [
    all(row)
    for row in zip(*([p.valid for p in s.predictions] for s in prediction_sets), strict=True)
  ]
  notes = [*notes, *_notes_on_faults(prediction_sets, valid)]
  kept = {s.column.key: list(itertools.compress(s.predictions, valid)) for s in prediction_sets}
  first = next(iter(kept.values()))
  everything = np.ones(len(first), bool)
  is_number = np.array([p.answer_kind == "number" for p in first])
  others = "choices and words" if any(p.answer_kind == "words" for p in first) else "choices"
  kinds = {f"numbers, {score_name}": is_number, f"{others}, exact match": ~is_number}
  types = dict.fromkeys(p.question_type for p in first)
  rows = [
    _row(name, kept, np.array([p.question_type == name for p in first]), "score") for name in types
  ]
  summary = [_row(name, kept, mask, "score") for name, mask in kinds.items() if mask.any()]
  summary += [_row(f"reward (sharpness {sharpness:.3g})", kept, everything, "reward")]
  return ResultTable(
    columns=tuple(s.column for s in prediction_sets),
    rows=tuple(rows),
    overall=_row("overall", kept, everything, "score").cells,
    parsed={key: float(np.mean([p.parsed for p in found])) for key, found in kept.items()},
    summary=tuple(summary),
    paired=tuple(
      _paired(kept, *comparison)
      for comparison in COMPARISONS
      if comparison[1] in kept and comparison[2] in kept
    ),
    notes=tuple(notes),
  )


def _notes_on_faults(prediction_sets: Sequence[PredictionSet], valid: Sequence[bool]) -> list[str]:
  """Sentences on the questions that are left out, and why.

  Args:
    prediction_sets: all columns.
    valid: for each question, whether no column has a fault.

  Raises:
    DataError: if every question is left out.
  """
  columns = [s.predictions for s in prediction_sets]
  faulty = [row for row, good in zip(zip(*columns, strict=True), valid, strict=True) if not good]
  problems = [next((p.problem for p in row if p.problem), "") for row in faulty]
  not_asked = [problem for problem in problems if problem]
  failed = len(problems) - len(not_asked)
  notes = []
  if not_asked:
    count, first = len(not_asked), not_asked[0]
    notes.append(f"{count} questions could not be asked and are left out; the first: {first}.")
  if failed:
    notes.append(f"{failed} questions are left out: drawing failed with an internal fault.")
  if not any(valid):
    raise DataError(f"no question is left to evaluate: {notes[0]}")
  return notes


def values(predictions: Sequence[Prediction], measure: Measure) -> np.ndarray:
  """float64 [n], one value per question."""
  return np.array([p.score if measure == "score" else p.reward for p in predictions], np.float64)


def _row(
  name: str, kept: Mapping[str, Sequence[Prediction]], mask: np.ndarray, measure: Measure
) -> ResultRow:
  cells = {
    key: bootstrap_interval(values(found, measure)[mask], _SEED) for key, found in kept.items()
  }
  return ResultRow(name, int(mask.sum()), cells)


def _paired(
  kept: Mapping[str, Sequence[Prediction]], label: str, after: str, before: str, measure: Measure
) -> Paired:
  cell = paired_interval(values(kept[after], measure), values(kept[before], measure), _SEED)
  return Paired(label, after, before, measure, cell.mean, cell.low, cell.high)
