"""Answer sheets -> ResultTable: means with intervals, and differences paired by question."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from spatial_jax.evaluate.bootstrap import bootstrap_interval, paired_interval
from spatial_jax.evaluate.predictions import Prediction
from spatial_jax.evaluate.results import Cell, Paired, ResultColumn, ResultRow, ResultTable

START, START_GREEDY, START_BEST = "start_sampled", "start_greedy", "start_best"
END, END_GREEDY = "end_sampled", "end_greedy"
END_BEST = "end_best"
MEDIAN, GREY, GREY_GREEDY = "median", "grey_sampled", "grey_greedy"

_SEED = 0  # of the bootstrap: the same scores always give the same table

Measure = Literal["score", "reward"]


@dataclasses.dataclass(frozen=True, eq=False)
class PredictionSet:
  """One way of answering and its answers, one per task, in the order of the tasks."""

  column: ResultColumn
  answers: Sequence[Prediction]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A difference that is shown, and what the default run must reach.

  Attributes:
    label: what is subtracted from what.
    after, before: column keys.
    measure: the hard score, or the reward.
    mean_from: the mean must be at least this; -inf: no such requirement.
    low_above: the interval must lie above this; None: the difference is only shown.
  """

  label: str
  after: str
  before: str
  measure: Measure
  mean_from: float
  low_above: float | None

  def paired(self, cell: Cell, required: bool) -> Paired:
    """The line of the table."""
    if self.low_above is None or not required:
      return Paired(self.label, cell.mean, cell.low, cell.high, None, None)
    words = f"interval above {self.low_above:g}"
    if np.isfinite(self.mean_from):
      words = f"at least {self.mean_from:g}, {words}"
    met = cell.mean >= self.mean_from and cell.low > self.low_above
    return Paired(self.label, cell.mean, cell.low, cell.high, words, bool(met))


_ANY = -np.inf
COMPARISONS = (
  Comparison("sampled score, end - start", END, START, "score", 0.05, 0.0),
  Comparison("greedy score, end - start", END_GREEDY, START_GREEDY, "score", _ANY, -0.02),
  Comparison("sampled score - median answer", END, MEDIAN, "score", _ANY, 0.0),
  Comparison("greedy score - median answer", END_GREEDY, MEDIAN, "score", _ANY, 0.0),
  Comparison("sampled score - the same on grey", END, GREY, "score", _ANY, 0.0),
  Comparison("greedy score - the same on grey", END_GREEDY, GREY_GREEDY, "score", _ANY, 0.0),
  Comparison("sampled score, end - coolest start", END, START_BEST, "score", _ANY, None),
  Comparison("sampled reward, end - start", END, START, "reward", _ANY, None),
)


def result_table(
  prediction_sets: Sequence[PredictionSet], sharpness: float, required: bool, notes: Sequence[str]
) -> ResultTable:
  """The table of an exam.

  A question whose drawing failed by a fault of the machinery on any sheet is left out of all of
  them and counted in the notes.

  Args:
    sheets: at least one; all of the same tasks.
    sharpness: of the rewards, for the row's name.
    required: whether the comparisons must come out as promised, or are only shown.
    notes: put before those on sharpening and faults.

  Raises:
    ValueError: on the host, when no question is left.
  """
  valid = [
    all(row) for row in zip(*([a.valid for a in s.answers] for s in prediction_sets), strict=True)
  ]
  kept = [
    PredictionSet(s.column, list(itertools.compress(s.answers, valid))) for s in prediction_sets
  ]
  first = kept[0].answers
  types = dict.fromkeys(a.question_type for a in first)
  everything = np.ones(len(first), bool)
  is_number = np.array([a.answer_kind == "number" for a in first])
  groups = {"numbers, MRA": is_number, "choices, exact match": ~is_number}
  rows = [
    _row(name, kept, np.array([a.question_type == name for a in first]), "score") for name in types
  ]
  summary = [_row(name, kept, mask, "score") for name, mask in groups.items() if mask.any()]
  summary += [_row(f"reward (sharpness {sharpness:.3g})", kept, everything, "reward")]
  faults = valid.count(False)
  if faults:
    notes = [*notes, f"{faults} questions are left out: the drawing machinery failed."]
  return ResultTable(
    columns=tuple(prediction_set.column for prediction_set in kept),
    rows=tuple(rows),
    overall=_row("overall", kept, everything, "score").cells,
    summary=tuple(summary),
    paired=tuple(_compare(kept, required)),
    notes=(*_sharpening(kept), *notes),
  )


def values(answers: Sequence[Prediction], measure: Measure) -> np.ndarray:
  """float64 [n], one value per question."""
  return np.array([a.score_ if measure == "score" else a.reward for a in answers], np.float64)


def _row(
  name: str, prediction_sets: Sequence[PredictionSet], mask: np.ndarray, measure: Measure
) -> ResultRow:
  cells = {
    prediction_set.column.key: bootstrap_interval(
      values(prediction_set.answers, measure)[mask], _SEED
    )
    for prediction_set in prediction_sets
  }
  return ResultRow(name, int(mask.sum()), cells)


def _compare(prediction_sets: Sequence[PredictionSet], required: bool) -> list[Paired]:
  by_key = {prediction_set.column.key: prediction_set.answers for prediction_set in prediction_sets}
  return [
    comparison.paired(
      paired_interval(
        values(by_key[comparison.after], comparison.measure),
        values(by_key[comparison.before], comparison.measure),
        _SEED,
      ),
      required,
    )
    for comparison in COMPARISONS
    if comparison.after in by_key and comparison.before in by_key
  ]


def _sharpening(prediction_sets: Sequence[PredictionSet]) -> list[str]:
  """How much of the sampled gain a lower temperature at the start gives as well."""
  mean = {
    prediction_set.column.key: values(prediction_set.answers, "score").mean()
    for prediction_set in prediction_sets
  }
  if not mean.keys() >= {START, START_BEST, END}:
    return []
  gain, cooler = mean[END] - mean[START], mean[START_BEST] - mean[START]
  label = next(
    prediction_set.column.label
    for prediction_set in prediction_sets
    if prediction_set.column.key == START_BEST
  )
  share = f" ({cooler / gain:.0%} of it)" if gain > 0 else ""
  return [
    f"The sampled score rose by {gain:+.3f}. {cooler:+.3f}{share} is had without learning"
    f" ({label}): so much is sharpening, {gain - cooler:+.3f} is beyond it. The temperature was"
    " chosen on these very questions, which favours the start."
  ]
