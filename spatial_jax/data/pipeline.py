"""Choice of tasks by question type, and threads that compute ahead."""

import contextlib
import functools
import itertools
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np

from spatial_jax.types import Task

Item = TypeVar("Item")


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
  counts: Counter[str] = Counter()
  ranked = []
  for i, task in enumerate(tasks):
    ranked.append((counts[task.question_type], i))
    counts[task.question_type] += 1
  return [tasks[i] for _, i in sorted(ranked)]


def prefetch(make: Callable[[int], Item], first: int, depth: int) -> Iterator[Item]:
  """Yields make(first), make(first + 1), ...; a thread computes up to `depth` items ahead.

  An error of `make` is raised in place of its item. After the iterator is closed the thread ends
  with its current item. Neither closing nor the end of the program waits for the thread.
  """
  ready: queue.Queue[Future[Item]] = queue.Queue(depth)
  closed = threading.Event()

  def work() -> None:
    for number in itertools.count(first):
      future: Future[Item] = Future()
      _set_result(future, functools.partial(make, number))
      ready.put(future)
      if closed.is_set() or future.exception():
        return

  threading.Thread(target=work, daemon=True, name="prefetch").start()
  try:
    while True:
      yield ready.get().result()
  finally:
    closed.set()
    with contextlib.suppress(queue.Empty):
      while True:  # make room for the last item, so that the thread reads `closed` and ends
        ready.get_nowait()


def compute_async(make: Callable[[], Item]) -> Callable[[], Item]:
  """Starts `make` in a thread; the returned function waits for its result or raises its error.

  The end of the program does not wait for the thread.
  """
  future: Future[Item] = Future()
  threading.Thread(
    target=_set_result, args=(future, make), daemon=True, name="compute_async"
  ).start()
  return future.result


def _set_result(future: Future[Item], make: Callable[[], Item]) -> None:
  try:
    future.set_result(make())
  except BaseException as error:
    future.set_exception(error)
