"""results.json: the table of an evaluation and where it comes from, written and read."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from spatial_jax.errors import DataError

FILE = "results.json"


@dataclasses.dataclass(frozen=True)
class Cell:
  """A mean with its 95 % bootstrap interval."""

  mean: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class ResultColumn:
  """One way of answering all questions: `key` names it in the rows, `label` on the page."""

  key: str
  label: str


@dataclasses.dataclass(frozen=True)
class ResultRow:
  """One question type: `n` questions and, by column key, their score in [0, 1]."""

  question_type: str
  n: int
  cells: dict[str, Cell]


@dataclasses.dataclass(frozen=True)
class Paired:
  """A difference between two columns, paired by question.

  `required` is the condition in words ("> 0"), None when the difference is only shown;
  `met` says whether it holds, None likewise.
  """

  label: str
  mean: float
  low: float
  high: float
  required: str | None
  met: bool | None


@dataclasses.dataclass(frozen=True)
class ResultTable:
  """What an evaluation found: before and after, per question type and overall.

  `summary` holds other means over all questions or many types, in its own unit each ("reward");
  `rows` share every question out once.
  """

  columns: tuple[ResultColumn, ...]
  rows: tuple[ResultRow, ...]
  overall: dict[str, Cell]
  summary: tuple[ResultRow, ...]
  paired: tuple[Paired, ...]
  notes: tuple[str, ...]


def write_results(
  table: ResultTable, workdir: str | os.PathLike[str], more: Mapping[str, Any]
) -> pathlib.Path:
  """Writes the table to `workdir/results.json`, in one rename.

  Args:
    table: what was found.
    workdir: made when missing.
    more: written before it; JSON values, such as how to get the same table again.

  Returns:
    The file.

  Raises:
    ValueError: on the host, when a number is NaN or infinite.
  """
  path = pathlib.Path(workdir) / FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  record = dict(more) | dataclasses.asdict(table)
  partial.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
  return partial.replace(path)


def is_up_to_date(workdir: str | os.PathLike[str], origin: Mapping[str, Any]) -> bool:
  """Whether `workdir/results.json` is there and says of itself all that `origin` says."""
  try:
    record = json.loads((pathlib.Path(workdir) / FILE).read_text(encoding="utf-8"))["origin"]
    return record | json.loads(json.dumps(origin)) == record
  except (OSError, ValueError, KeyError, TypeError):
    return False  # whatever it is, it is written anew


def read_results(workdir: str | os.PathLike[str]) -> ResultTable | None:
  """The table of `workdir/results.json`, None where nothing was evaluated.

  Raises:
    DataError: I/O, when the file is not such a table.
  """
  path = pathlib.Path(workdir) / FILE
  if not path.exists():
    return None
  try:
    return _table(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise DataError(f"{path} is not a table of results ({error}); evaluate again") from error


def _table(record: dict[str, Any]) -> ResultTable:
  return ResultTable(
    columns=tuple(ResultColumn(**column) for column in record["columns"]),
    rows=_rows(record["rows"]),
    overall=_cells(record["overall"]),
    summary=_rows(record["summary"]),
    paired=tuple(Paired(**paired) for paired in record["paired"]),
    notes=tuple(record["notes"]),
  )


def _rows(records: list[dict[str, Any]]) -> tuple[ResultRow, ...]:
  return tuple(ResultRow(row["question_type"], row["n"], _cells(row["cells"])) for row in records)


def _cells(record: dict[str, Any]) -> dict[str, Cell]:
  return {key: Cell(**cell) for key, cell in record.items()}
