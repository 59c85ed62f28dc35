"""Task batches as pure functions of (seed, step), so that a run resumes from its step number alone.

scene number ──► Scene ──► camera path, render ──► questions ──► Tasks    (procedural, real rooms)
photographs  ──────────────────────────────────────────────────► Tasks
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
SceneTasks = Callable[[int], list[Task]]  # scene number -> all tasks of the scene

# Procedural rooms with this number or a higher one are never trained on, by any config.
HELD_OUT_SEED = 1_000_000_000
_HELD_OUT_STREAM, _BATCH_STREAM = 2, 3  # of random numbers; synthetic/tasks.py has 0 and 1
_MAX_EMPTY_SCENES = 32  # scenes without a task in a row before the configuration is refused
_RARE_TYPE_RETRIES = 4  # of held-out tasks; see `training_batch`


def training_batch(
  tasks_of: SceneTasks,
  first_scene: int,
  seed: int,
  step: int,
  count: int,
  max_tasks_per_scene: int,
  types: Sequence[str],
  rare_type_retries: int = _RARE_TYPE_RETRIES,
) -> list[Task]:
  """The tasks of one step: the same number of each of `types`.

  The first rare_type_retries * count / max_tasks_per_scene scenes fill the share of each type.
  Tasks of any type fill the rest of the batch.

  Args:
    tasks_of: scene number -> tasks.
    first_scene: lowest scene number.
    seed, step: with the other arguments they determine the result.
    count: number of tasks.
    max_tasks_per_scene: most tasks of one scene.
    types: question types; (): no shares, scenes are taken in order.
    rare_type_retries: >= 0; more retries find more tasks of rare types and render more scenes.

  Raises:
    DataError: if scene after scene gives no task.
  """
  rng = _generator(seed, step, _BATCH_STREAM)
  number = first_scene + int(rng.integers(2**40)) % (HELD_OUT_SEED // 2)
  shuffled = [types[int(i)] for i in rng.permutation(len(types))]
  return _collect(
    tasks_of, number, count, max_tasks_per_scene, shuffled, rare_type_retries, lambda _: rng
  )


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


def interleave_types(tasks: Sequence[Task]) -> list[Task]:
  """The first task of each question type, then the second of each, ..."""
  counts: Counter[str] = Counter()
  ranked = []
  for i, task in enumerate(tasks):
    ranked.append((counts[task.question_type], i))
    counts[task.question_type] += 1
  return [tasks[i] for _, i in sorted(ranked)]


def held_out_tasks(
  tasks_of: SceneTasks, first_scene: int, count: int, max_tasks_per_scene: int, types: Sequence[str]
) -> list[Task]:
  """The first `count` held-out tasks; arguments and errors as in `training_batch`."""
  return _collect(
    tasks_of,
    first_scene,
    count,
    max_tasks_per_scene,
    types,
    _RARE_TYPE_RETRIES,
    lambda number: _generator(number, _HELD_OUT_STREAM),
  )


def _collect(
  tasks_of: SceneTasks,
  number: int,
  count: int,
  max_tasks_per_scene: int,
  types: Sequence[str],
  rare_type_retries: int,
  generator_of: Callable[[int], np.random.Generator],
) -> list[Task]:
  """`count` tasks of the scenes from `number` on, `max_tasks_per_scene` or fewer of each.

  If `types` do not divide `count`, the first types get one more.
  """
  share, more = divmod(count, max(1, len(types)))
  left = Counter({name: share + (rank < more) for rank, name in enumerate(types)})
  any_type_from = number
  if types:
    any_type_from += rare_type_retries * math.ceil(count / max_tasks_per_scene)
  chosen: list[Task] = []
  misses = 0
  while len(chosen) < count:
    tasks, rng = tasks_of(number), generator_of(number)
    misses = 0 if tasks else misses + 1
    if misses == _MAX_EMPTY_SCENES:
      raise DataError(
        f"{_MAX_EMPTY_SCENES} rooms in a row gave no question; lower"
        " config.source.questions.min_visible_pixels or min_visible_fraction, or add types"
      )
    if number < any_type_from:
      tasks = _limit_per_type(tasks, left, rng)
    tasks = sample_tasks(tasks, min(max_tasks_per_scene, count - len(chosen)), rng)
    left.subtract(task.question_type for task in tasks)
    chosen += tasks
    number += 1
  return chosen


def _limit_per_type(
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


def _generator(*numbers: int) -> np.random.Generator:
  """A generator keyed by the numbers. The last is a stream > 0: NumPy ignores zeros at the end."""
  return np.random.default_rng(numbers)
