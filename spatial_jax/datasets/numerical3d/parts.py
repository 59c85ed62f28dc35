"""Builds the parts of Numerical3D with worker processes; a killed build goes on where it stopped.

    DIR/numerical3d.parts/settings.json       source and seed of the parts
                          train-00000.zip     rooms 0 to 49, ...
                          held_out-00000.zip

A part is complete if it exists. The data set is the first tasks of the parts in their order, so it
does not depend on the number of workers, nor on the order in which they finish.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from spatial_jax.config import ConfigError
from spatial_jax.datasets.numerical3d.part import (
  SPLITS,
  BuildSettings,
  Split,
  count_tasks,
  read_part,
  rooms_of,
)
from spatial_jax.errors import DataError

SETTINGS = "settings.json"
# One thread per worker: the arrays are small.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Progress(NamedTuple):
  """State of a build."""

  tasks: int  # of finished parts that are used
  wanted: int
  parts: int  # finished ones


def parts_folder(out: pathlib.Path) -> pathlib.Path:
  """The folder of the parts of a data set that is written to `out`."""
  return out / "numerical3d.parts"


def part_path(folder: pathlib.Path, split: Split, index: int) -> pathlib.Path:
  """The file of one part."""
  return folder / f"{split}-{index:05d}.zip"


def open_parts(folder: pathlib.Path, settings: BuildSettings) -> None:
  """Creates the folder, or checks that its parts are those of these settings.

  Another number of tasks may be asked for: parts are added or left out.

  Raises:
    ConfigError: if they are not.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / SETTINGS
  if path.exists():
    saved, given = read_settings(folder), dataclasses.asdict(settings)
    differing = [
      f"{name} is {value} there and {given[name]} here"
      for name, value in dataclasses.asdict(saved).items()
      if name != "tasks" and value != given[name]
    ]
    if differing:
      raise ConfigError(
        f"{folder} has parts of another build ({', '.join(differing)}); delete it or choose"
        " another --out"
      )
  partial = path.with_name(f"{SETTINGS}.partial")
  partial.write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n")
  partial.replace(path)


def read_settings(folder: pathlib.Path) -> BuildSettings:
  """The settings of the parts in a folder."""
  return BuildSettings(**json.loads((folder / SETTINGS).read_text()))


def build_parts(
  folder: pathlib.Path,
  settings: BuildSettings,
  workers: int,
  on_progress: Callable[[Progress], None],
) -> dict[Split, int]:
  """Writes the missing parts until each split has enough tasks or no more rooms.

  Args:
    folder: of `open_parts`.
    settings: what to build.
    workers: number of processes, >= 1.
    on_progress: called after each part, from one thread at a time.

  Returns:
    Split -> number of tasks.

  Raises:
    DataError: if a worker fails or a split has no task.
  """
  plan = _Plan(folder, settings, on_progress)
  if not plan.is_complete():
    command = [sys.executable, "-m", "spatial_jax.datasets.numerical3d.worker", str(folder)]
    command.append(json.dumps(dataclasses.asdict(settings)))
    with ThreadPoolExecutor(workers) as pool, plan:
      for future in [pool.submit(_serve, plan, command) for _ in range(workers)]:
        future.result()
  tasks: dict[Split, int] = {split: plan.tasks(split) for split in SPLITS}
  if not all(tasks.values()):
    raise DataError(f"{settings.source} gives no task; add more rooms")
  return tasks


def read_tasks(
  folder: pathlib.Path, settings: BuildSettings, split: Split
) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
  """The tasks of a split, in order: rows, and the contents of their images."""
  left = settings.tasks_of(split)
  for index in range(_part_count(settings, split)):
    if left == 0:
      break
    for row, images in read_part(part_path(folder, split, index)):
      if left > 0:
        yield row, images
        left -= 1


def _part_count(settings: BuildSettings, split: Split) -> int:
  return math.ceil(rooms_of(settings, split) / settings.rooms_per_part)


class _Plan:
  """The parts that are finished and those that are still to be made; shared by the threads."""

  def __init__(
    self,
    folder: pathlib.Path,
    settings: BuildSettings,
    on_progress: Callable[[Progress], None],
  ):
    self._folder, self._settings, self._on_progress = folder, settings, on_progress
    self._lock = threading.Lock()
    self._stopped = False
    self._count: dict[Split, dict[int, int]] = {split: {} for split in SPLITS}
    self._next: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
      for path in folder.glob(f"{split}-*.zip"):
        self._count[split][int(path.stem.rpartition("-")[2])] = count_tasks(path)
    for path in folder.glob("*.partial"):  # of workers that were killed
      with contextlib.suppress(FileNotFoundError):
        path.unlink()

  def __enter__(self) -> "_Plan":
    return self

  def __exit__(self, *_: object) -> None:
    """Workers end after their current part."""
    self._stopped = True

  def tasks(self, split: Split) -> int:
    """Tasks of the finished parts before the first missing one, at most the wanted number."""
    total, wanted, index = 0, self._settings.tasks_of(split), 0
    while total < wanted and index in self._count[split]:
      total += self._count[split][index]
      index += 1
    return min(total, wanted)

  def is_complete(self) -> bool:
    """Whether no part is missing."""
    return all(self._missing(split) is None for split in SPLITS)

  def take(self) -> tuple[Split, int] | None:
    """The next part to make, None if there is none."""
    with self._lock:
      for split in SPLITS:
        index = None if self._stopped else self._missing(split)
        if index is not None:
          self._next[split] = index + 1
          return split, index
    return None

  def finish(self, split: Split, index: int, tasks: int) -> None:
    """Records a finished part."""
    with self._lock:
      self._count[split][index] = tasks
      done = sum(self.tasks(name) for name in SPLITS)
      parts = sum(len(counts) for counts in self._count.values())
      self._on_progress(Progress(done, self._settings.tasks, parts))

  def _missing(self, split: Split) -> int | None:
    """The first part that is neither finished nor being made, if more tasks are wanted."""
    index = self._next[split]
    while index in self._count[split]:
      index += 1
    enough = self.tasks(split) == self._settings.tasks_of(split)
    return None if enough or index >= _part_count(self._settings, split) else index


def _serve(plan: _Plan, command: list[str]) -> None:
  """Runs one worker until no part is left."""
  environment = {**os.environ, **_ENVIRONMENT}
  with subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
  ) as worker:
    assert worker.stdin
    assert worker.stdout
    with plan:  # an error in one thread stops all
      while (part := plan.take()) is not None:
        split, index = part
        with contextlib.suppress(BrokenPipeError):  # it has ended, and there is no reply
          print(split, index, file=worker.stdin, flush=True)
        reply = worker.stdout.readline().strip()
        if not reply.isdecimal():
          problem = reply.removeprefix("error: ") or "it ended; see its messages above"
          raise DataError(f"a worker could not make part {index} of {split}: {problem}")
        plan.finish(split, index, int(reply))
