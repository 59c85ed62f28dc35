"""results.json: the result table of an evaluation and its fingerprint, written and read."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from spatial_jax.errors import DataError
from spatial_jax.workdir import write_text

FILE = "results.json"
PREDICTIONS = "predictions.jsonl"  # one line per column and question

START_GREEDY, END_GREEDY = "start_greedy", "end_greedy"
START_SAMPLED, END_SAMPLED = "start_sampled", "end_sampled"
START_BEST_TEMPERATURE, END_BEST_OF_N = "start_best_temperature", "end_best_of_n"
START_FITTED, MEDIAN = "start_fitted_factor", "median"
START_OTHER_IMAGE, END_OTHER_IMAGE = "start_other_image", "end_other_image"

# Key of a column -> its label, the most important column first.
LABELS = {
  START_GREEDY: "start, greedy",
  START_SAMPLED: "start, sampled",
  START_BEST_TEMPERATURE: "start, sampled at {}",
  END_GREEDY: "end, greedy",
  END_SAMPLED: "end, sampled",
  END_BEST_OF_N: "end, most likely of {}",
  MEDIAN: "median answer",
  START_FITTED: "start greedy x fitted factor",
  START_OTHER_IMAGE: "start greedy, other images",
  END_OTHER_IMAGE: "end, greedy, other images",
}
# What is compared first: greedy answers, else sampled ones.
END_AND_START = (END_GREEDY, START_GREEDY), (END_SAMPLED, START_SAMPLED)

Measure = Literal["score", "reward"]

# The differences that are reported: label, key of `after`, key of `before`, measure.
COMPARISONS: tuple[tuple[str, str, str, Measure], ...] = (
  ("greedy score, end - start", END_GREEDY, START_GREEDY, "score"),
  ("greedy score, end - start x fitted factor", END_GREEDY, START_FITTED, "score"),
  ("greedy score, end - median answer", END_GREEDY, MEDIAN, "score"),
  ("greedy score, end - end on other images", END_GREEDY, END_OTHER_IMAGE, "score"),
  ("greedy score, start - start on other images", START_GREEDY, START_OTHER_IMAGE, "score"),
  ("sampled score, end - start", END_SAMPLED, START_SAMPLED, "score"),
  (
    "sampled score, end - start at its best temperature",
    END_SAMPLED,
    START_BEST_TEMPERATURE,
    "score",
  ),
  ("sampled reward, end - start", END_SAMPLED, START_SAMPLED, "reward"),
)


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
  """The mean of `after - before` over questions, paired by question, with its 95 % interval."""

  label: str
  after: str  # column key, like `before`
  before: str
  measure: Measure
  mean: float
  low: float
  high: float

  @property
  def verb(self) -> str:
    """ "rose", "fell", or "shows no clear change" if the interval covers 0."""
    if self.low > 0:
      return "rose"
    return "fell" if self.high < 0 else "shows no clear change"


@dataclasses.dataclass(frozen=True)
class ResultTable:
  """The result of an evaluation; dictionaries have column keys."""

  columns: tuple[ResultColumn, ...]  # the most important first
  rows: tuple[ResultRow, ...]  # one per question type; every question is in one row
  overall: dict[str, Cell]  # mean score over all questions
  parsed: dict[str, float]  # share of answers that could be read, in [0, 1]
  summary: tuple[ResultRow, ...]  # other means (numbers, choices, reward), each in its own unit
  paired: tuple[Paired, ...]
  notes: tuple[str, ...]  # sentences below the table


def score_change(table: ResultTable) -> Paired | None:
  """The difference of the headline: the score at the end and at the start, greedy if there is."""
  scores = {(p.after, p.before): p for p in table.paired if p.measure == "score"}
  return next((scores[pair] for pair in END_AND_START if pair in scores), None)


def headline(table: ResultTable) -> str | None:
  """The result in one sentence, None without a policy in the table.

  "On 1,024 held-out questions the greedy score rose from 0.521 to 0.637: +0.116, 95 % interval
  +0.076 to +0.156."
  """
  where = f"On {sum(row.n for row in table.rows):,} held-out questions the"
  if change := score_change(table):
    interval = f"95 % interval {change.low:+.3f} to {change.high:+.3f}"
    return f"{where} {describe(change, table)}: {change.mean:+.3f}, {interval}."
  if cell := table.overall.get(END_GREEDY):
    interval = f"95 % interval {cell.low:.3f} to {cell.high:.3f}"
    return f"{where} greedy score is {cell.mean:.3f}, {interval}."
  return None


def describe(change: Paired, table: ResultTable) -> str:
  """ "greedy score rose from 0.521 to 0.637"."""
  way = "greedy" if change.after == END_GREEDY else "sampled"
  before, after = (f"{table.overall[key].mean:.3f}" for key in (change.before, change.after))
  if change.verb == "shows no clear change":
    return f"{way} score shows no clear change ({before} at the start, {after} at the end)"
  return f"{way} score {change.verb} from {before} to {after}"


def write_results(
  table: ResultTable, workdir: str | os.PathLike[str], more: Mapping[str, Any]
) -> None:
  """Writes `more`, further JSON values, and the table to `workdir/results.json`, in one rename.

  Raises:
    ValueError: if a number is NaN or infinite.
    UserError: I/O.
  """
  record = dict(more) | dataclasses.asdict(table)
  text = json.dumps(record, indent=2, allow_nan=False)
  write_text(pathlib.Path(workdir) / FILE, f"{text}\n")


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
    record = json.loads(path.read_text(encoding="utf-8"))
    return ResultTable(
      columns=tuple(ResultColumn(**column) for column in record["columns"]),
      rows=_rows(record["rows"]),
      overall=_cells(record["overall"]),
      parsed=dict(record["parsed"]),
      summary=_rows(record["summary"]),
      paired=tuple(Paired(**paired) for paired in record["paired"]),
      notes=tuple(record["notes"]),
    )
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise DataError(
      f"{path} is not a result table ({error}); delete it and evaluate again"
    ) from error


def _rows(records: list[dict[str, Any]]) -> tuple[ResultRow, ...]:
  return tuple(ResultRow(row["question_type"], row["n"], _cells(row["cells"])) for row in records)


def _cells(record: dict[str, Any]) -> dict[str, Cell]:
  return {key: Cell(**cell) for key, cell in record.items()}
