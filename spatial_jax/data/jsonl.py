"""A JSONL file of tasks: checked once line by line, then read by random access.

rows.jsonl ──open_jsonl──► JsonlSource (offsets of the good lines) ──source[i]──► Task
                    └────► BadRows (line, field, reason)
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from spatial_jax.data.records import check_file
from spatial_jax.data.rows import (
  RowInfo,
  RowProblem,
  check_media,
  parse_line,
  row_info,
  task_of_row,
)
from spatial_jax.errors import DataError
from spatial_jax.types import Task

# Raises DataError for a task that no reward can score; RowProblem for another field.
CheckTask = Callable[[Task], object]
_BLOCK = 2**20  # bytes that are read at once


class BadRow(NamedTuple):
  """A row that is left out."""

  where: str  # "rows.jsonl:7"
  field: str
  reason: str

  def __str__(self) -> str:
    return f"{self.where}: {self.field}: {self.reason}"


@dataclasses.dataclass(frozen=True, eq=False)
class JsonlSource:
  """The good rows of a file, in its order; `source[i]` reads one line."""

  path: pathlib.Path
  offset_N: np.ndarray  # int64, first byte of each good row
  line_N: np.ndarray  # int64, its number from 1

  def __len__(self) -> int:
    return len(self.offset_N)

  def __getitem__(self, index: int) -> Task:
    with self.path.open("rb") as file:
      file.seek(int(self.offset_N[index]))
      row = parse_line(file.readline())
    return task_of_row(row, *_names(self.path, int(self.line_N[index])))


def open_jsonl(
  path: pathlib.Path, check: CheckTask, with_media: bool, on_row: Callable[[], None] = lambda: None
) -> tuple[JsonlSource, list[RowInfo], list[BadRow]]:
  """Reads and checks a whole file.

  Args:
    check: raises DataError if the answer of a task cannot be scored.
    with_media: media files must exist, and images have a readable header.
    on_row: called after each row, for a progress bar.

  Returns:
    The good rows, their infos, and the bad rows.

  Raises:
    DataError: if the file does not exist or is empty.
  """
  check_file(path)
  offsets, lines, infos, bad = [], [], [], []
  seen: dict[str, int] = {}
  for number, offset, line in _lines(path):
    try:
      row = parse_line(line)
      task = task_of_row(row, *_names(path, number))
      if task.task_id in seen:
        raise RowProblem("id", f"is {task.task_id!r} as in line {seen[task.task_id]}")
      infos.append(checked_info(row, task, check, with_media))
      seen[task.task_id] = number
      offsets.append(offset)
      lines.append(number)
    except RowProblem as problem:
      bad.append(BadRow(f"{path.name}:{number}", problem.field, problem.reason))
    on_row()
  source = JsonlSource(path, np.array(offsets, np.int64), np.array(lines, np.int64))
  return source, infos, bad


def line_count(path: pathlib.Path) -> int:
  """Returns the number of lines; DataError if the file does not exist or is empty."""
  check_file(path)
  with path.open("rb") as file:
    blocks = iter(lambda: file.read(_BLOCK), b"")
    count, last = 0, b""
    for block in blocks:
      count, last = count + block.count(b"\n"), block
  return count + (not last.endswith(b"\n"))


def checked_info(row: dict, task: Task, check: CheckTask, with_media: bool) -> RowInfo:
  """Checks what `task_of_row` does not, and returns the info of the row; raises RowProblem."""
  info = row_info(row, task)
  if not task.media:
    raise RowProblem("images", "is missing; a task needs an image or a video")
  try:
    check(task)
  except DataError as error:
    reason = str(error).removeprefix(f"task {task.task_id}: ")
    raise RowProblem("answer", reason) from error
  if with_media:
    check_media(task)
  return info


def summary_of_bad_rows(bad: Sequence[BadRow], total: int, shown: int) -> str:
  """Returns lines for the user: how many of `total` rows are bad, the first ones, and reasons."""
  fields = collections.Counter(row.field.partition("[")[0] for row in bad)
  counts = ", ".join(f"{field} {count}" for field, count in fields.most_common())
  lines = [f"{len(bad)} of {total} rows cannot be used ({counts})", *map(str, bad[:shown])]
  more = [f"and {len(bad) - shown} more"] if len(bad) > shown else []
  return "\n  ".join(lines + more)


def _names(path: pathlib.Path, line: int) -> tuple[str, str, pathlib.Path]:
  """Default id, source and folder of a row."""
  return f"{path.stem}/{line}", path.name, path.parent


def _lines(path: pathlib.Path) -> Iterator[tuple[int, int, bytes]]:
  """(number from 1, offset, line) of each line that is not blank."""
  offset = 0
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        yield number, offset, line
      offset += len(line)
