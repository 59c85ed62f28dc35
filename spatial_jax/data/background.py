"""Threads that compute ahead."""

import contextlib
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

Item = TypeVar("Item")


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
