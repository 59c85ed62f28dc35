"""Draws in worker processes, beside the loop, and never raises into it.

    submit ──► queue ──► thread 1 ◄──pipes──► worker process 1
                    └──► thread 2 ◄──pipes──► worker process 2 ──► result: pictures or a Fault

Covered: a worker that dies, hangs (killed after `timeout_s`) or asks for too much memory gives a
`Fault` for the one drawing it was at, and a fresh worker takes the next. What a drawing may hold is
limited by counts in `protocol`, so these are accidents of the machine, never a verdict on the
policy: the row is left out, not scored 0. A worker ends when its stdin does, so none outlives its
parent, however that ends.

Not covered: this is no sandbox. Model output is data only, and reaches a worker as numbers and
labels; a worker has the rights of the user who started the run and would not hold malicious code.
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

from spatial_jax.config import ConfigError
from spatial_jax.drawing import wire
from spatial_jax.drawing.canvas import Picture, Style, draw, plan
from spatial_jax.types import Operation

WORKER_ENVIRONMENT = {
  # Thread pools of BLAS would reserve address space that counts against the limit.
  "OPENBLAS_NUM_THREADS": "1",
  # glibc: keep the pages of one picture for the next; giving them back costs more than drawing.
  "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
  "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}


@dataclasses.dataclass(frozen=True)
class ExecutorConfig:
  """Who draws.

  Attributes:
    workers: processes; 0 draws in this one.
    timeout_s: wall-clock seconds for one turn's drawing, far above what it takes.
    memory_mib: address space of a worker, in MiB; NumPy and Pillow take about 200 of it.
  """

  workers: int
  timeout_s: float
  memory_mib: int

  def __post_init__(self):
    if self.workers < 0 or self.timeout_s <= 0 or self.memory_mib < 1:
      raise ConfigError(
        "config.executor: workers >= 0 (0: this process), timeout_s > 0, memory_mib >= 1; got "
        f"{self.workers}, {self.timeout_s:g}, {self.memory_mib}"
      )


@dataclasses.dataclass(frozen=True)
class Fault:
  """The machinery broke while drawing; says nothing about what was to be drawn."""

  detail: str


Drawing: TypeAlias = "Future[tuple[Picture, ...] | Fault]"


class _Task(NamedTuple):
  images: tuple[Picture, ...]
  operations: tuple[Operation, ...]
  drawing: Drawing


class Executor:
  """Context manager that draws turns: `submit` returns at once, its result is waited for."""

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
    """Ends the workers; drawings that none has begun become faults."""
    with contextlib.suppress(queue.Empty):
      while task := self._tasks.get_nowait():
        task.drawing.set_result(Fault("the executor was closed"))
    for _ in self._threads:
      self._tasks.put(None)
    for thread in self._threads:
      thread.join()

  def submit(self, images: Sequence[Picture], operations: Sequence[Operation]) -> Drawing:
    """Hands over one turn's drawing (arguments as in `canvas.draw`)."""
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
    """One thread and its worker: what goes wrong ends the worker and is a fault of one drawing."""
    worker: subprocess.Popen[bytes] | None = None
    while task := self._tasks.get():
      try:
        if worker is None or worker.poll() is not None:
          _stop(worker)
          worker = _start(self.config)
        pictures = _paint(worker, task, self.style, self.config.timeout_s)
        task.drawing.set_result(pictures)
      except Exception as error:
        _stop(worker)
        task.drawing.set_result(_fault(error))
    _stop(worker)


def _paint(
  worker: subprocess.Popen[bytes], task: _Task, style: Style, timeout_s: float
) -> tuple[Picture, ...]:
  """One exchange with a worker. Raises ChildProcessError (host) when it died, hung or refused."""
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
    raise ChildProcessError(f"the worker gave up: {header['fault']}")
  pixels = wire.arrays(payload, header["shapes"])
  return tuple(Picture(p, old.drawn) for p, old in zip(pixels, planned, strict=True))


def _start(config: ExecutorConfig) -> subprocess.Popen[bytes]:
  limits = [str(config.memory_mib), str(config.timeout_s)]
  return subprocess.Popen(
    [sys.executable, "-m", "spatial_jax.drawing.worker", *limits],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env={**os.environ, **WORKER_ENVIRONMENT},
    process_group=0,  # Ctrl-C at the terminal is for the parent, which then closes stdin
  )


def _stop(worker: subprocess.Popen[bytes] | None) -> None:
  """Ends a worker, whatever state it is in: it holds nothing that could be lost."""
  if worker is None:
    return
  worker.kill()
  worker.wait()
  for stream in (worker.stdin, worker.stdout):
    with contextlib.suppress(OSError):  # what could not be written goes with the worker
      if stream is not None:
        stream.close()


def _fault(error: Exception) -> Fault:
  detail = f"{type(error).__name__}: {error}"
  logging.log_first_n(logging.ERROR, "a drawing failed, its rollout is left out: %s", 5, detail)
  return Fault(detail)
