"""Tables about a data file: types, answers, baselines, media, scenes.

RowFacts, splits, bad rows ──summarise──► DataSummary
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spatial_jax.data.jsonl import BadRow
from spatial_jax.evaluate.baselines import constant_answers, predict_constant
from spatial_jax.evaluate.predictions import EvaluationSet
from spatial_jax.report.data_facts import FactCollector, MediaCounts, RowFacts
from spatial_jax.reward.config import accuracy_reward
from spatial_jax.reward.snra import Schedule

_MOST_SCORED = 1000  # rows of a type that score its constant answer, which takes 1 ms each
# The score of an answer is its mean relative accuracy or its exact match under all other settings.
_REWARD = accuracy_reward("mra", "exact", Schedule("constant", 20.0, 20.0, 0.5, 10.0))


class Range(NamedTuple):
  """Smallest, middle and largest of some numbers."""

  low: float
  median: float
  high: float


class TypeLine(NamedTuple):
  """The rows of one question type and kind of answer."""

  name: str
  kind: str
  train: int
  held_out: int
  words: Range  # of the questions
  constant: str  # the best answer without media: the median, or the most frequent one
  score: float  # of that constant, in [0, 1]

  @property
  def rows(self) -> int:
    """Rows of both splits."""
    return self.train + self.held_out


class NumberLine(NamedTuple):
  """The numbers of one question type and unit."""

  name: str
  unit: str  # "" without one
  value_N: np.ndarray  # float64, in that unit

  @property
  def range(self) -> Range:
    """Of the numbers."""
    return range_of(self.value_N)


class LetterLine(NamedTuple):
  """The right letters of one question type."""

  name: str
  rows: int
  shares: dict[str, float]  # letter -> share of the rows, for all letters that options have
  expected: float  # score of a random letter


@dataclasses.dataclass(frozen=True, eq=False)
class DataSummary:
  """What the console and the page show of one file."""

  name: str  # of the file
  bad: Sequence[BadRow]
  train: int  # good rows of each split
  held_out: int
  scenes: tuple[int, int]  # of training and of held-out rows
  words: Range  # of all questions
  types: Sequence[TypeLine]  # the most frequent first
  numbers: Sequence[NumberLine]
  letters: Sequence[LetterLine]
  media: MediaCounts  # of all good rows
  files: int  # different media files of the good rows
  missing: Sequence[str]  # media files that do not exist, sorted

  @property
  def good(self) -> int:
    """Good rows."""
    return self.train + self.held_out

  @property
  def bad_fields(self) -> list[tuple[str, int]]:
    """As the function of this name."""
    return bad_fields(self.bad)


def bad_fields(bad: Sequence[BadRow]) -> list[tuple[str, int]]:
  """(field, bad rows), the most frequent first; items of a list count as the list."""
  return collections.Counter(row.field.partition("[")[0] for row in bad).most_common()


def summarise(
  name: str,
  collected: FactCollector,
  held_out_N: np.ndarray,
  bad: Sequence[BadRow],
) -> DataSummary:
  """Returns the summary of a file with at least one good row.

  Args:
    name: of the file.
    collected: the good rows.
    held_out_N: bool, which of them are held out.
    bad: the other rows.
  """
  rows = collected.rows
  types = type_lines(rows, held_out_N)
  of_numbers = [row for row in rows if row.task.answer_kind == "number"]
  numbers = [
    NumberLine(type_name, unit, np.array([of_numbers[i].value for i in indices], np.float64))
    for (type_name, unit), indices in _groups(
      [(row.task.question_type, row.unit or "") for row in of_numbers]
    )
  ]
  choices = [row for row in rows if row.task.answer_kind == "choice"]
  letters = [
    letter_line(type_name, [choices[i] for i in indices])
    for (type_name,), indices in _groups([(row.task.question_type,) for row in choices])
  ]
  scenes = [
    len({row.task.scene_id for row, out in zip(rows, held_out_N, strict=True) if out == wanted})
    for wanted in (False, True)
  ]
  return DataSummary(
    name=name,
    bad=bad,
    train=int((~held_out_N).sum()),
    held_out=int(held_out_N.sum()),
    scenes=(scenes[0], scenes[1]),
    words=range_of([row.words for row in rows]),
    types=types,
    numbers=numbers,
    letters=letters,
    media=MediaCounts(*np.sum([row.media for row in rows], axis=0).tolist()),
    files=len(collected.files),
    missing=sorted(collected.missing),
  )


def type_lines(rows: Sequence[RowFacts], held_out_N: np.ndarray) -> list[TypeLine]:
  """Returns the lines of all types and kinds; constants are scored on at most 1,000 rows each."""
  groups = _groups([(row.task.question_type, row.task.answer_kind) for row in rows])
  # The baselines group tasks by their type alone, so that each group gets a type of its own.
  tasks = [
    [dataclasses.replace(rows[i].task, question_type=str(number)) for i in indices]
    for number, (_, indices) in enumerate(groups)
  ]
  constants = constant_answers([task for group in tasks for task in group])
  scored = [task for group in tasks for task in group[:: -(-len(group) // _MOST_SCORED)]]
  scores = collections.defaultdict(list)
  for prediction in predict_constant(EvaluationSet(scored, (), _REWARD, 0), constants):
    scores[prediction.question_type].append(prediction.score)
  return [
    TypeLine(
      name=name,
      kind=kind,
      train=int((~held_out_N[indices]).sum()),
      held_out=int(held_out_N[indices].sum()),
      words=range_of([rows[i].words for i in indices]),
      constant=constants[str(number)],
      score=float(np.mean(scores[str(number)])),
    )
    for number, ((name, kind), indices) in enumerate(groups)
  ]


def letter_line(name: str, rows: Sequence[RowFacts]) -> LetterLine:
  """Returns the line of the choices of one type."""
  counts = collections.Counter(row.task.answer for row in rows)
  sizes = [len(row.task.options or ()) for row in rows]
  letters = [chr(ord("A") + i) for i in range(max(sizes))]
  shares = {letter: counts[letter] / len(rows) for letter in letters}
  return LetterLine(name, len(rows), shares, float(np.mean([1 / size for size in sizes])))


def range_of(values: Sequence[float] | np.ndarray) -> Range:
  """Returns smallest, middle and largest of at least one number."""
  value_N = np.asarray(values, np.float64)
  return Range(float(value_N.min()), float(np.median(value_N)), float(value_N.max()))


def _groups(
  names: Sequence[tuple[str, ...]],
) -> list[tuple[tuple[str, ...], list[int]]]:
  """(name, indices) of each name, the most frequent first, then in the order of the alphabet."""
  groups: dict[tuple[str, ...], list[int]] = {}
  for index, name in enumerate(names):
    groups.setdefault(name, []).append(index)
  return sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
