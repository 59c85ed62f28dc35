"""Statistics of a data set: how far answers without an image get, per question type.

A constant is the best that a policy can answer without looking at image and question. `per_text` is
for a policy that reads the question ("bed") and not the image: it answers the median of all other
tasks with the same question.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spatial_jax.reward.accuracy import MRA_EPSILON, MRA_TOLERANCES

_CONSTANTS = 400  # that are tried, besides the answers themselves


class TaskSummary(NamedTuple):
  """One task without its images."""

  split: str
  number: int  # in its split, from 0
  question_type: str
  unit: str
  question: str
  answer: str
  kind: str
  scene: str
  images: int
  image_bytes: int


class Constant(NamedTuple):
  """An answer that is given to every question of a type, and its score (MRA)."""

  value: float
  score: float


@dataclasses.dataclass(frozen=True)
class TypeStatistics:
  """The answers of one question type."""

  name: str
  unit: str
  counts: Mapping[str, int]  # per split
  truth_Z: np.ndarray  # float64, all true answers
  median: Constant
  best: Constant
  per_text: float  # score of the median of the other tasks with the same question


def summarise(split: str, number: int, row: Mapping[str, Any]) -> TaskSummary:
  """The summary of a row of `tfds_features.decode_row`."""
  return TaskSummary(
    split=split,
    number=number,
    question_type=row["type"] or row["kind"] or "",
    unit=row["unit"] or "",
    question=row["question"] or "",
    answer=row["answer"],
    kind=row["kind"] or "",
    scene=row["scene"] or "",
    images=len(row["images"]),
    image_bytes=sum(map(len, row["images"])),
  )


def type_statistics(tasks: Iterable[TaskSummary]) -> list[TypeStatistics]:
  """Statistics of each question type with numbers as answers, sorted by name."""
  groups: dict[str, list[TaskSummary]] = defaultdict(list)
  for task in tasks:
    if task.kind == "number":
      groups[task.question_type].append(task)
  return [_statistics(name, groups[name]) for name in sorted(groups)]


def best_constant(truth_Z: np.ndarray) -> Constant:
  """The constant with the highest mean MRA.

  Args:
    truth_Z: float64 > 0, true answers.
  """
  values_N, counts_N = np.unique(truth_Z, return_counts=True)
  tried_N = np.geomspace(values_N[0], values_N[-1], _CONSTANTS)
  tried_N = np.unique(np.concatenate([tried_N, values_N[:: max(1, len(values_N) // _CONSTANTS)]]))
  score_N = mean_relative_accuracy(tried_N[:, None], values_N) @ (counts_N / counts_N.sum())
  best = int(np.argmax(score_N))
  return Constant(float(tried_N[best]), float(score_N[best]))


def mean_relative_accuracy(answers: np.ndarray, truths: np.ndarray) -> np.ndarray:
  """`reward.accuracy.mean_relative_accuracy` in NumPy: here each shape occurs once.

  Args:
    answers, truths: of shapes that broadcast; computed in float32.
  """
  answers, truths = answers.astype(np.float32), truths.astype(np.float32)
  error = np.abs(answers - truths) / (np.abs(truths) + np.float32(MRA_EPSILON))
  return (error[..., None] <= MRA_TOLERANCES).mean(axis=-1)


def _statistics(name: str, tasks: Sequence[TaskSummary]) -> TypeStatistics:
  truth_Z = np.array([float(task.answer) for task in tasks])
  median = float(np.median(truth_Z))
  by_text: dict[str, list[int]] = defaultdict(list)
  for i, task in enumerate(tasks):
    by_text[task.question].append(i)
  told_Z = np.full_like(truth_Z, median)
  for indices in by_text.values():
    if len(indices) > 1:
      told_Z[indices] = _medians_of_others(truth_Z[indices])
  return TypeStatistics(
    name=name,
    unit=tasks[0].unit,
    counts=Counter(task.split for task in tasks),
    truth_Z=truth_Z,
    median=Constant(median, _score(np.full_like(truth_Z, median), truth_Z)),
    best=best_constant(truth_Z),
    per_text=_score(told_Z, truth_Z),
  )


def _medians_of_others(values_N: np.ndarray) -> np.ndarray:
  """For each of two or more values, the median of the others."""
  order = np.argsort(values_N)
  ordered_N, count = values_N[order], len(values_N) - 1
  low, high = (count - 1) // 2, count // 2  # places of the middle values without one
  place_N = np.empty(len(values_N), np.int64)
  place_N[order] = np.arange(len(values_N))
  return (ordered_N[low + (place_N <= low)] + ordered_N[high + (place_N <= high)]) / 2


def _score(answer_Z: np.ndarray, truth_Z: np.ndarray) -> float:
  return float(mean_relative_accuracy(answer_Z, truth_Z).mean())
