"""Choice and order of tasks by question type."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from spatial_jax.types import Task


def sample_tasks(tasks: Sequence[Task], count: int, rng: np.random.Generator) -> list[Task]:
  """Up to `count` random tasks; each draw first draws a question type uniformly."""
  by_type: dict[str, list[Task]] = {}
  for task in tasks:
    by_type.setdefault(task.question_type, []).append(task)
  left = {name: list(rng.permutation(len(group))) for name, group in by_type.items()}
  chosen: list[Task] = []
  while left and len(chosen) < count:
    names = list(left)
    name = names[int(rng.integers(len(names)))]
    chosen.append(by_type[name][left[name].pop()])
    if not left[name]:
      del left[name]
  return chosen


def limit_per_type(
  tasks: Sequence[Task], left: Counter[str], rng: np.random.Generator
) -> list[Task]:
  """Random tasks, at most `left` of each type."""
  left = left.copy()
  kept = []
  for task in [tasks[i] for i in rng.permutation(len(tasks))]:
    if left[task.question_type] > 0:
      left[task.question_type] -= 1
      kept.append(task)
  return kept


def interleave_types(tasks: Sequence[Task]) -> list[Task]:
  """The first task of each question type, then the second of each, ..."""
  return [tasks[i] for i in interleave([task.question_type for task in tasks])]


def interleave(types: Sequence[str]) -> list[int]:
  """Indices of `types`: the first of each type, then the second of each, ..."""
  counts: Counter[str] = Counter()
  ranked = []
  for i, name in enumerate(types):
    ranked.append((counts[name], i))
    counts[name] += 1
  return [i for _, i in sorted(ranked)]
