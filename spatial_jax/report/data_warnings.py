"""Warnings about a data file whose rows can be used: what makes training on it doubtful."""

import collections
import math
from collections.abc import Sequence

import numpy as np

from spatial_jax.report.data_facts import RowFacts
from spatial_jax.report.data_summary import DataSummary, LetterLine, TypeLine

_FEW = 20  # rows; the answers of fewer are not judged
_HIGH_SCORE = 0.7  # of a constant answer
_LEAST_BIAS, _SIGMAS = 0.1, 3.0  # a letter is biased if its share is above chance by both
_NAMES = 5  # in a warning
_MANY_TYPES = 100


def warnings_of(
  rows: Sequence[RowFacts], held_out_N: np.ndarray, summary: DataSummary
) -> list[str]:
  """Returns the warnings, a sentence each.

  Args:
    rows: the good rows.
    held_out_N: bool, which of them are held out.
    summary: of the same rows.
  """
  found = _split_warnings(rows, held_out_N, summary)
  found += _duplicate_warnings(rows)
  if summary.missing:
    found.append(
      f"{_count(len(summary.missing), 'media file')} of bad rows missing: {_some(summary.missing)}"
    )
  found += _type_warnings(summary)
  found += [text for line in summary.letters if (text := _letter_warning(line))]
  found += [text for line in summary.types if (text := _constant_warning(line))]
  return found


def _split_warnings(
  rows: Sequence[RowFacts], held_out_N: np.ndarray, summary: DataSummary
) -> list[str]:
  found = []
  if not summary.train:
    found.append("all rows are held out: a run needs a further file with training rows")
  if not summary.held_out:
    found.append("no row is held out: an evaluation needs more scenes, or a file of its own")
  held_out = {row.task.scene_id for row, out in zip(rows, held_out_N, strict=True) if out}
  train = {row.task.scene_id for row, out in zip(rows, held_out_N, strict=True) if not out}
  if both := sorted(held_out & train):
    found.append(f"{_count(len(both), 'scene')} in both splits: {_some(both)}")
  return found


def _duplicate_warnings(rows: Sequence[RowFacts]) -> list[str]:
  groups: dict[bytes, list[RowFacts]] = {}
  for row in rows:
    groups.setdefault(row.key, []).append(row)
  equal = [group for group in groups.values() if len(group) > 1]
  differ = [group for group in equal if len({_answer(row) for row in group}) > 1]
  found = []
  if equal:
    repeated = sum(len(group) - 1 for group in equal)
    found.append(
      f"{_count(repeated, 'row')} with the question and the media of an earlier row: "
      f"{_some([_ids(group) for group in equal])}"
    )
  if differ:
    found.append(
      f"{_count(len(differ), 'question')} with equal media but different answers: "
      f"{_some([_ids(group) for group in differ])}"
    )
  return found


def _type_warnings(summary: DataSummary) -> list[str]:
  found = []
  kinds, units = collections.defaultdict(list), collections.defaultdict(list)
  for line in summary.types:
    kinds[line.name].append(line.kind)
  for line in summary.numbers:
    units[line.name].append(line.unit or "no unit")
  for name, several in kinds.items():
    if len(several) > 1:
      found.append(f"type {name} has answers of several kinds ({', '.join(several)})")
  for name, several in units.items():
    if len(several) > 1:
      found.append(f"type {name} has numbers of several units ({_some(several)})")
  if len(kinds) > _MANY_TYPES:
    found.append(f"{len(kinds):,} question types; tables need few")
  return found


def _letter_warning(line: LetterLine) -> str:
  letter, share = max(line.shares.items(), key=lambda item: item[1])
  sigma = math.sqrt(line.expected * (1 - line.expected) / line.rows)
  if line.rows < _FEW or share - line.expected < max(_LEAST_BIAS, _SIGMAS * sigma):
    return ""
  return (
    f"type {line.name}: {share:.0%} of the answers are {letter} (chance {line.expected:.0%}); "
    f"the constant answer {letter} scores {share:.2f}"
  )


def _constant_warning(line: TypeLine) -> str:
  if line.kind == "choice" or line.rows < _FEW or line.score < _HIGH_SCORE:
    return ""
  return f"type {line.name}: the constant answer {line.constant} scores {line.score:.2f}"


def _answer(row: RowFacts) -> object:
  """The answer for comparison; of a choice its text, because options may come in another order."""
  if row.task.answer_kind != "choice":
    return row.value if row.task.answer_kind == "number" else row.task.answer.casefold()
  return next(o[3:].casefold() for o in row.task.options or () if o[0] == row.task.answer)


def _ids(group: Sequence[RowFacts]) -> str:
  return " = ".join(row.task.task_id for row in group[:3]) + (" = ..." if len(group) > 3 else "")


def _some(names: Sequence[str]) -> str:
  more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
  return ", ".join(names[:_NAMES]) + more


def _count(number: int, name: str) -> str:
  return f"{number:,} {name}{'' if number == 1 else 's'}"
