"""results.json: the result table of an evaluation and its fingerprint, written and read."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from spatial_jax.errors import DataError

FILE = "results.json"
PREDICTIONS = "predictions.jsonl"  # one line per column and question

# Keys of the columns.
START_GREEDY, END_GREEDY = "start_greedy", "end_greedy"
START_SAMPLED, END_SAMPLED = "start_sampled", "end_sampled"
START_BEST_TEMPERATURE, END_BEST_OF_N = "start_best_temperature", "end_best_of_n"
START_FITTED, MEDIAN = "start_fitted_factor", "median"
START_OTHER_IMAGE, END_OTHER_IMAGE = "start_other_image", "end_other_image"


@dataclasses.dataclass(frozen=True)
class Cell:
  """A mean with its 95 % bootstrap interval."""

  mean: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class ResultColumn:
  """A policy or baseline that answered all questions: `key` in the rows, `label` for people."""

  key: str
  label: str


@dataclasses.dataclass(frozen=True)
class ResultRow:
  """One question type: `n` questions and, by column key, their mean score in [0, 1]."""

  question_type: str
  n: int
  cells: dict[str, Cell]


@dataclasses.dataclass(frozen=True)
class Paired:
  """The mean of `after - before` over questions, paired by question, with its 95 % interval.

  Attributes:
    label: names the difference.
    after, before: column keys.
    measure: "score" or "reward".
    mean, low, high: of the difference.
  """

  label: str
  after: str
  before: str
  measure: str
  mean: float
  low: float
  high: float

  @property
  def verb(self) -> str:
    """ "rose", "fell", or "did not change" if the interval covers 0."""
    if self.low > 0:
      return "rose"
    return "fell" if self.high < 0 else "did not change"


@dataclasses.dataclass(frozen=True)
class ResultTable:
  """The result of an evaluation.

  Attributes:
    columns: policies and baselines, the most important first.
    rows: one per question type; every question is in one row.
    overall: mean score over all questions, by column key.
    parsed: share of answers that could be read, by column key, in [0, 1].
    summary: other means (numbers, choices, reward), each in its own unit.
    paired: differences between columns; the first one is the headline.
    notes: sentences below the table.
  """

  columns: tuple[ResultColumn, ...]
  rows: tuple[ResultRow, ...]
  overall: dict[str, Cell]
  parsed: dict[str, float]
  summary: tuple[ResultRow, ...]
  paired: tuple[Paired, ...]
  notes: tuple[str, ...]


def headline(table: ResultTable) -> str | None:
  """The first difference as one sentence, None without one.

  "greedy score, end - start: rose from 0.521 to 0.637, +0.116 (95 % interval +0.076 to +0.156)."
  """
  if not table.paired:
    return None
  first = table.paired[0]
  before, after = (table.overall[key].mean for key in (first.before, first.after))
  return (
    f"{first.label}: {first.verb} from {before:.3f} to {after:.3f}, {first.mean:+.3f} "
    f"(95 % interval {first.low:+.3f} to {first.high:+.3f})."
  )


def write_results(
  table: ResultTable, workdir: str | os.PathLike[str], more: Mapping[str, Any]
) -> pathlib.Path:
  """Writes the table to `workdir/results.json`, in one rename.

  Args:
    table: the result.
    workdir: created if missing.
    more: further JSON values that are written first, such as the config of the evaluation.

  Returns:
    The file.

  Raises:
    ValueError: if a number is NaN or infinite.
  """
  path = pathlib.Path(workdir) / FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  record = dict(more) | dataclasses.asdict(table)
  partial.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
  return partial.replace(path)


def is_up_to_date(workdir: str | os.PathLike[str], origin: Mapping[str, Any]) -> bool:
  """Whether `workdir/results.json` exists and its fingerprint has all values of `origin`."""
  try:
    record = json.loads((pathlib.Path(workdir) / FILE).read_text(encoding="utf-8"))["origin"]
    return record | json.loads(json.dumps(origin)) == record
  except (OSError, ValueError, KeyError, TypeError):
    return False  # an unreadable file is written anew


def read_results(workdir: str | os.PathLike[str]) -> ResultTable | None:
  """The table of `workdir/results.json`, None if the file does not exist.

  Raises:
    DataError: I/O: if the file is not such a table.
  """
  path = pathlib.Path(workdir) / FILE
  if not path.exists():
    return None
  try:
    return _table(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise DataError(
      f"{path} is not a result table ({error}); delete it and evaluate again"
    ) from error


def _table(record: dict[str, Any]) -> ResultTable:
  return ResultTable(
    columns=tuple(ResultColumn(**column) for column in record["columns"]),
    rows=_rows(record["rows"]),
    overall=_cells(record["overall"]),
    parsed=dict(record["parsed"]),
    summary=_rows(record["summary"]),
    paired=tuple(Paired(**paired) for paired in record["paired"]),
    notes=tuple(record["notes"]),
  )


def _rows(records: list[dict[str, Any]]) -> tuple[ResultRow, ...]:
  return tuple(ResultRow(row["question_type"], row["n"], _cells(row["cells"])) for row in records)


def _cells(record: dict[str, Any]) -> dict[str, Cell]:
  return {key: Cell(**cell) for key, cell in record.items()}
