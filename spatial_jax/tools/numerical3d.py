"""The data set Numerical3D: numeric questions about rendered rooms, as array_record files.

`spatial_jax.tools.build --dataset=numerical3d` builds it.

    rooms ──workers──► parts ──TFDS──► DIR/numerical3d/1.0.0 ──► DIR/index.html, DIR/examples.html

A build that was stopped goes on where it stopped. The bytes of the data set depend on the source,
the seed and the number of tasks alone.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from spatial_jax.config import ConfigError
from spatial_jax.datasets.numerical3d.numerical3d_dataset_builder import NAME, RELEASE, Builder
from spatial_jax.datasets.numerical3d.part import METADATA, PROCEDURAL, SPLITS, BuildSettings
from spatial_jax.datasets.numerical3d.parts import (
  Progress,
  build_parts,
  open_parts,
  parts_folder,
)
from spatial_jax.metrics import duration
from spatial_jax.report.dataset_page import INDEX, DatasetAbout, write_pages
from spatial_jax.workdir import one_line_errors, to_path, write_text

RECORD = "numerical3d.json"  # in DIR: settings, and time of the build
ROOMS_PER_PART = 50  # about 20 seconds of work
_EXAMPLES = 24  # on the second page
_TASK_BYTES = 80_000  # memory per task while the data set is written: 58,000 measured, and a margin
_REPORT_S = 10.0  # between two lines of progress
_SUMMARY = (
  "Questions about rendered 3D rooms with a number as the answer. Each has one to eight images of"
  " one room; the answers of each type are spread over a wide range, so that a constant scores low."
)


def build_settings(source: str, seed: int, tasks: int) -> BuildSettings:
  """Returns the settings of a build from the command line; a metadata path becomes absolute."""
  if source.startswith(METADATA):
    source = METADATA + str(to_path(source.removeprefix(METADATA)).resolve())
  return BuildSettings(source, seed, tasks, ROOMS_PER_PART)


def build_numerical3d(
  out: pathlib.Path, settings: BuildSettings, workers: int, command: str
) -> None:
  """Builds the data set and its pages, or goes on with a build that was stopped.

  Args:
    out: created if missing; `out/numerical3d/1.0.0` is the data set.
    settings: what to build.
    workers: number of processes, >= 1.
    command: for the page.

  Raises:
    UserError: if `out` has another data set or is in use, or the metadata cannot be used.
  """
  seconds, dataset = build_dataset(out, settings, workers), out / NAME / RELEASE
  if not (out / INDEX).exists():
    print("writing the pages", flush=True)
    builder = tfds.builder_from_directory(dataset)
    splits = {split: builder.as_data_source(split) for split in SPLITS}  # pyright: ignore
    write_pages(out, splits, _about(dataset, settings, seconds, command), _EXAMPLES)
  print(f"{dataset}: {duration(seconds)}; statistics: {out / INDEX}")


def build_dataset(out: pathlib.Path, settings: BuildSettings, workers: int) -> float:
  """`build_numerical3d` without the pages; returns the seconds it took, earlier runs included."""
  _check_memory(settings.tasks)
  with one_line_errors(out):
    out.mkdir(parents=True, exist_ok=True)
  with _locked(out):
    record = _open_record(out, settings)
    if not (out / NAME / RELEASE).exists():
      _make_parts(out, settings, workers, record)
      for stale in (out / NAME).glob("incomplete.*"):
        shutil.rmtree(stale)
      print("writing the data set", flush=True)
      tfds.disable_progress_bar()
      with _timed(out, record):
        unused = parts_folder(out) / "downloads"
        Builder(data_dir=out).download_and_prepare(download_dir=unused)
  return record["seconds"]


def _check_memory(tasks: int) -> None:
  """Refuses a data set that the memory does not hold: TFDS shuffles the examples in memory.

  Raises:
    ConfigError: naming both sizes.
  """
  needed = tasks * _TASK_BYTES
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if needed > memory:
    raise ConfigError(
      f"--tasks={tasks} needs about {needed / 1e9:.0f} GB of memory and the machine has"
      f" {memory / 1e9:.0f} GB; build several data sets with other values of --seed"
    )


def _make_parts(
  out: pathlib.Path, settings: BuildSettings, workers: int, record: dict[str, Any]
) -> None:
  """Makes the missing parts and prints the progress."""
  start = reported = time.monotonic()
  first: Progress | None = None

  def report(progress: Progress) -> None:
    nonlocal reported, first
    now = time.monotonic()
    first = first or progress
    if now - reported >= _REPORT_S:
      reported = now
      line = f"{progress.tasks:,} of {progress.wanted:,} tasks, {progress.parts:,} parts"
      done = progress.tasks - first.tasks
      if done > 0:
        left_s = (now - start) * (progress.wanted - progress.tasks) / done
        line += f", about {duration(left_s)} left"
      print(line, flush=True)

  open_parts(parts_folder(out), settings)
  with _timed(out, record):
    tasks = build_parts(parts_folder(out), settings, workers, report)
  if sum(tasks.values()) < settings.tasks:
    print(f"the rooms give {sum(tasks.values()):,} of {settings.tasks:,} tasks")


def _open_record(out: pathlib.Path, settings: BuildSettings) -> dict[str, Any]:
  """The record of the build in `out`, which must have the same settings; a new one if none.

  Raises:
    ConfigError: if `out` has a data set with other settings.
  """
  path, given = out / RECORD, dataclasses.asdict(settings)
  if path.exists():
    record = json.loads(path.read_text())
    if record["settings"] != given:
      raise ConfigError(f"--out={out} has a data set of {record['settings']}; choose another --out")
    return record
  record = {"settings": given, "seconds": 0.0}
  write_text(path, json.dumps(record, indent=2) + "\n")
  return record


@contextlib.contextmanager
def _timed(out: pathlib.Path, record: dict[str, Any]) -> Iterator[None]:
  """Adds the time of the block to the record; that of a killed process is lost."""
  start = time.monotonic()
  try:
    yield
  finally:
    record["seconds"] += time.monotonic() - start
    write_text(out / RECORD, json.dumps(record, indent=2) + "\n")


@contextlib.contextmanager
def _locked(out: pathlib.Path) -> Iterator[None]:
  """Keeps other builds out of the folder; the kernel ends the lock with the process."""
  folder = os.open(out, os.O_RDONLY)
  try:
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  except BlockingIOError as error:
    raise ConfigError(f"--out={out} is in use by another build; wait for its end") from error
  finally:
    os.close(folder)


def _about(
  dataset: pathlib.Path, settings: BuildSettings, seconds: float, command: str
) -> DatasetAbout:
  files = sum(file.stat().st_size for file in dataset.iterdir())
  source = "procedural rooms" if settings.source == PROCEDURAL else "rooms of VSI-Bench metadata"
  facts = (
    ("source", source),
    ("seed", str(settings.seed)),
    ("files", f"{files / 1e9:.2f} GB, array_record"),
    ("time", duration(seconds)),
    ("command", command),
  )
  return DatasetAbout("Numerical3D", _SUMMARY, facts)
