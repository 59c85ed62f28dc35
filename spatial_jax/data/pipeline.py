"""Where tasks come from: a pure function of (seed, index), so that resuming is knowing the step.

scene number ──► Scene ──► walk, render ──► ask ──► Tasks        (procedural rooms, real rooms)
photographs  ─────────────────────────────────────► Tasks
"""

import contextlib
import functools
import itertools
import math
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np

from spatial_jax.errors import DataError
from spatial_jax.types import Task

Item = TypeVar("Item")
TasksOf = Callable[[int], list[Task]]  # scene number -> all questions about it

# Procedural rooms from here on are never trained on, by any recipe of this repository.
HELD_OUT_SEED = 1_000_000_000
_PICK, _BATCH = 2, 3  # uses of randomness; 0 and 1 are those of synthetic/tasks.py
_TRIES = 32  # scenes in a row without a question before the configuration is refused
_PATIENCE = 4  # of an exam; see `batch`


def batch(
  tasks_of: TasksOf,
  first_scene: int,
  seed: int,
  step: int,
  count: int,
  max_tasks_per_scene: int,
  types: Sequence[str],
  rare_type_retries: int = _PATIENCE,
) -> list[Task]:
  """The tasks of one step: equally many of each of `types`.

  Types that few rooms offer are searched for in rare_type_retries * count / max_tasks_per_scene
  rooms. What is still missing is filled with any types.

  Args:
    tasks_of: scene number -> tasks.
    first_scene: number the run's scenes count from.
    seed, step: with the other arguments they fix the result.
    count: tasks.
    max_tasks_per_scene: most tasks of one room.
    types: question types; () takes them as rooms offer them.
    rare_type_retries: at 1 nothing is waited for.

  Raises:
    DataError: on the host, when the rooms give no questions.
  """
  rng = _generator(seed, step, _BATCH)
  number = first_scene + int(rng.integers(2**40)) % (HELD_OUT_SEED // 2)
  mixed = [types[int(i)] for i in rng.permutation(len(types))]
  return _gather(
    tasks_of, number, count, max_tasks_per_scene, mixed, rare_type_retries, lambda _: rng
  )


def pick(tasks: Sequence[Task], count: int, rng: np.random.Generator) -> list[Task]:
  """Up to `count` of the tasks, question types drawn evenly however many questions each has."""
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


def types_in_turn(tasks: Sequence[Task]) -> list[Task]:
  """The first task of each question type, then the second of each, ..."""
  seen: Counter[str] = Counter()
  ranked = []
  for i, task in enumerate(tasks):
    ranked.append((seen[task.question_type], i))
    seen[task.question_type] += 1
  return [tasks[i] for _, i in sorted(ranked)]


def held_out(
  tasks_of: TasksOf, first_scene: int, count: int, max_tasks_per_scene: int, types: Sequence[str]
) -> list[Task]:
  """`count` tasks of held-out rooms, always the same ones; arguments and errors as in `batch`."""
  return _gather(
    tasks_of,
    first_scene,
    count,
    max_tasks_per_scene,
    types,
    _PATIENCE,
    lambda number: _generator(number, _PICK),
  )


def _gather(
  tasks_of: TasksOf,
  number: int,
  count: int,
  max_tasks_per_scene: int,
  types: Sequence[str],
  rare_type_retries: int,
  generator_of: Callable[[int], np.random.Generator],
) -> list[Task]:
  """`count` tasks, at most `max_tasks_per_scene` of a room, from room `number` on.

  Where `count` does not divide, the first of the types get one more.
  """
  share, more = divmod(count, max(1, len(types)))
  left = Counter({name: share + (rank < more) for rank, name in enumerate(types)})
  free_from = number + (rare_type_retries * math.ceil(count / max_tasks_per_scene) if types else 0)
  chosen: list[Task] = []
  misses = 0
  while len(chosen) < count:
    tasks, rng = tasks_of(number), generator_of(number)
    misses = 0 if tasks else misses + 1
    if misses == _TRIES:
      raise DataError(f"{_TRIES} rooms in a row gave no question; loosen source.questions")
    if number < free_from:
      tasks = _within(tasks, left, rng)
    tasks = pick(tasks, min(max_tasks_per_scene, count - len(chosen)), rng)
    left.subtract(task.question_type for task in tasks)
    chosen += tasks
    number += 1
  return chosen


def _within(tasks: Sequence[Task], left: Counter[str], rng: np.random.Generator) -> list[Task]:
  """Of each type at most as many as are left for it, at random."""
  left = left.copy()
  kept = []
  for task in [tasks[i] for i in rng.permutation(len(tasks))]:
    if left[task.question_type] > 0:
      left[task.question_type] -= 1
      kept.append(task)
  return kept


def prefetch(make: Callable[[int], Item], first: int, depth: int) -> Iterator[Item]:
  """make(first), make(first + 1), ...: up to `depth` lie ready, made in a thread while one is used.

  An error of `make` is raised where its item would have come. Closing the iterator ends the thread
  with the item it is at; neither that nor leaving the program waits for it.
  """
  ready: queue.Queue[Future[Item]] = queue.Queue(depth)
  closed = threading.Event()

  def work() -> None:
    for number in itertools.count(first):
      future: Future[Item] = Future()
      _fulfil(future, functools.partial(make, number))
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
      while True:  # make room: the thread puts one item more and then sees that it may go
        ready.get_nowait()


def ahead(make: Callable[[], Item]) -> Callable[[], Item]:
  """What `make` gives, made from now on in a thread; an error of it is raised where it is wanted.

  Leaving the program does not wait for it.
  """
  future: Future[Item] = Future()
  threading.Thread(target=_fulfil, args=(future, make), daemon=True, name="ahead").start()
  return future.result


def _fulfil(future: Future[Item], make: Callable[[], Item]) -> None:
  try:
    future.set_result(make())
  except BaseException as error:
    future.set_exception(error)


def _generator(*numbers: int) -> np.random.Generator:
  """Randomness named by its numbers, its use the last; NumPy ignores zeros at the end."""
  return np.random.default_rng(numbers)
