"""Draws in worker processes while the rollout loop runs; a failure is a result, not an error.

    submit ──► queue ──► thread 1 ◄──pipes──► worker process 1
                    └──► thread 2 ◄──pipes──► worker process 2 ──► result: new images or a Fault

A worker that dies (crashes), hangs (it is killed after `timeout_s`) or needs too much memory gives
a `Fault` for its current drawing; a new worker takes the next one. `parser.Limits` bounds a drawing
by counts, so a fault is an accident of the machine and not an error of the policy: the rollout is
left out of its group, not scored 0. A worker ends when its stdin ends, so it always ends with its
parent.

This is no sandbox. Model output reaches a worker as numbers and labels only. A worker has the
rights of the user who started the run and could not confine malicious code.
"""

import contextlib
import dataclasses
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import NamedTuple, TypeAlias

from absl import logging

from spatial_jax.config import check_number, check_whole
from spatial_jax.drawing import wire
from spatial_jax.drawing.canvas import DrawnImage, Style, draw, plan
from spatial_jax.types import Operation

WORKER_ENVIRONMENT = {
  # The thread pools of BLAS reserve address space that counts against the limit.
  "OPENBLAS_NUM_THREADS": "1",
  # glibc: keep the pages of one image for the next; returning them costs more than drawing.
  "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
  "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
MAX_TIMEOUT_S = 3600


@dataclasses.dataclass(frozen=True)
class ExecutorConfig:
  """The processes that draw."""

  workers: int  # number of processes; 0: in this process, without limits of time and memory
  timeout_s: float  # wall-clock time for the drawing of one turn, far above its normal time
  memory_mib: int  # address space of a worker, at least 256; NumPy and Pillow take about 200

  def __post_init__(self):
    check_whole(self, "workers", at_least=0, at_most=1024)
    check_number(self, "timeout_s", above=0, at_most=MAX_TIMEOUT_S)
    check_whole(self, "memory_mib", at_least=256, at_most=1 << 20)


@dataclasses.dataclass(frozen=True)
class Fault:
  """A drawing failed because of the machine, not because of its operations."""

  detail: str


Drawing: TypeAlias = "Future[tuple[DrawnImage, ...] | Fault]"


class _Task(NamedTuple):
  images: tuple[DrawnImage, ...]
  operations: tuple[Operation, ...]
  drawing: Drawing


class Executor:
  """Context manager that draws turns; `submit` returns a future at once."""

  def __init__(self, config: ExecutorConfig, style: Style):
    self.config, self.style = config, style
    self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
    self._threads: list[threading.Thread] = []

  def __enter__(self) -> "Executor":
    self._threads = [
      threading.Thread(target=self._serve, daemon=True) for _ in range(self.config.workers)
    ]
    for thread in self._threads:
      thread.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    """Ends the workers; drawings that are still queued become faults."""
    with contextlib.suppress(queue.Empty):
      while task := self._tasks.get_nowait():
        task.drawing.set_result(Fault("the executor was closed"))
    for _ in self._threads:
      self._tasks.put(None)
    for thread in self._threads:
      thread.join()

  def submit(self, images: Sequence[DrawnImage], operations: Sequence[Operation]) -> Drawing:
    """Submits the drawing of one turn; arguments as in `canvas.draw`."""
    task = _Task(tuple(images), tuple(operations), Future())
    if self.config.workers:
      self._tasks.put(task)
    else:
      try:
        task.drawing.set_result(draw(task.images, task.operations, self.style))
      except Exception as error:
        task.drawing.set_result(_fault(error))
    return task.drawing

  def _serve(self) -> None:
    """Runs one thread and its worker; an error ends the worker and is a fault of one drawing."""
    worker: subprocess.Popen[bytes] | None = None
    while task := self._tasks.get():
      try:
        if worker is None or worker.poll() is not None:
          _stop(worker)
          worker = _start(self.config)
        images = _paint(worker, task, self.style, self.config.timeout_s)
        task.drawing.set_result(images)
      except Exception as error:
        _stop(worker)
        task.drawing.set_result(_fault(error))
    _stop(worker)


def _paint(
  worker: subprocess.Popen[bytes], task: _Task, style: Style, timeout_s: float
) -> tuple[DrawnImage, ...]:
  """One exchange with a worker. Raises ChildProcessError if it died, hung or returned a fault."""
  assert worker.stdin is not None
  assert worker.stdout is not None
  planned = plan(task.images, task.operations)
  expired = threading.Event()
  timer = threading.Timer(timeout_s, lambda: (expired.set(), worker.kill()))
  timer.start()
  try:
    wire.send(worker.stdin, *wire.request(planned, style))
    header, payload = wire.receive(worker.stdout)
  except (OSError, EOFError) as error:
    if expired.is_set():
      raise ChildProcessError(f"the worker hung for {timeout_s:g} s and was killed") from error
    raise ChildProcessError(f"the worker died (exit status {worker.wait()})") from error
  finally:
    timer.cancel()
    timer.join()
  if "fault" in header:
    raise ChildProcessError(f"the worker failed: {header['fault']}")
  pixels = wire.arrays(payload, header["shapes"])
  return tuple(DrawnImage(p, old.operations) for p, old in zip(pixels, planned, strict=True))


def _start(config: ExecutorConfig) -> subprocess.Popen[bytes]:
  limits = [str(config.memory_mib), str(config.timeout_s)]
  return subprocess.Popen(
    [sys.executable, "-m", "spatial_jax.drawing.worker", *limits],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env={**os.environ, **WORKER_ENVIRONMENT},
    process_group=0,  # Ctrl-C goes to the parent only, which then closes stdin
  )


def _stop(worker: subprocess.Popen[bytes] | None) -> None:
  """Ends a worker in any state; it stores no data that could be lost."""
  if worker is None:
    return
  worker.kill()
  worker.wait()
  for stream in (worker.stdin, worker.stdout):
    with contextlib.suppress(OSError):  # unwritten data is lost with the worker
      if stream is not None:
        stream.close()


def _fault(error: Exception) -> Fault:
  detail = f"{type(error).__name__}: {error}"
  logging.log_first_n(logging.ERROR, "a drawing failed; its rollout is left out: %s", 5, detail)
  return Fault(detail)
