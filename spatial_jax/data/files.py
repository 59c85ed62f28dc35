"""Tasks from a user's files: JSONL files and TFDS folders, mixed by weight, split by scene.

    a.jsonl, b.jsonl, tfds/ ──► TaskSources ──► training parts ──grain──► endless order of tasks
                                          └──► held-out tasks

The order is a pure function of (seed, position), so that a run resumes from its step number alone.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import grain
import numpy as np

from spatial_jax.config import ConfigError, check_choice, check_field, check_number
from spatial_jax.data.jsonl import (
  BadRow,
  CheckTask,
  line_count,
  open_jsonl,
  summary_of_bad_rows,
)
from spatial_jax.data.rows import RowInfo
from spatial_jax.data.task_order import interleave
from spatial_jax.data.tfds import example_count, is_tfds_folder, open_tfds
from spatial_jax.errors import DataError
from spatial_jax.types import Task
from spatial_jax.workdir import to_path

_PASSES = 2**20  # over a file: more than any run has; grain cannot join endless orders
_SHOWN_BAD_ROWS = 20  # in a message
_ORDER_STREAM, _HELD_OUT_SEED = 5, 0  # of random numbers


class TaskSource(Protocol):
  """Random access to tasks: the protocol of grain and of `tfds.data_source`."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Task: ...


@dataclasses.dataclass(frozen=True)
class FilesConfig:
  """How tasks of files are mixed, split and ordered; the files are `SourceConfig.path`."""

  weights: tuple[float, ...]  # share of each file in training; (): by its number of tasks
  held_out: str  # files with held-out tasks, joined by commas; "": taken from the training files
  # Fraction of the scenes whose tasks are held out, if no row says its split and `held_out` is "".
  held_out_fraction: float
  columns: tuple[str, ...]  # of TFDS folders: "FIELD=FEATURE"
  # "shuffled": anew in every pass. "easy_first": the first pass by `extra.difficulty`, ascending.
  order: Literal["shuffled", "easy_first"]
  max_bad_fraction: float  # of the rows; if more cannot be used, the run is refused
  check_media: bool  # at the start, that media files exist and images have a readable header

  def __post_init__(self):
    check_choice(self, "order")
    check_number(self, "held_out_fraction", at_least=0, below=1)
    check_number(self, "max_bad_fraction", at_least=0, at_most=1)
    positive = all(weight > 0 for weight in self.weights)
    check_field(self, "weights", positive, "be above 0 for each file")


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """The tasks of one file."""

  source: TaskSource
  infos: Sequence[RowInfo]  # of each task
  train_N: np.ndarray  # int64 indices of the training tasks
  held_out_N: np.ndarray  # int64 indices of the held-out tasks


@dataclasses.dataclass(frozen=True, eq=False)
class FileSource:
  """Training and held-out tasks of all files."""

  parts: tuple[Part, ...]
  weights: tuple[float, ...]  # of the parts in training; 0: held-out tasks alone
  order: Literal["shuffled", "easy_first"]
  benchmark: str | None  # names of the benchmarks that training tasks belong to, joined by ", "
  bad_rows: int  # rows that were left out
  contents: str  # rows and checksum of each file; they must be equal when a run resumes

  @property
  def train_count(self) -> int:
    """The number of training tasks."""
    return sum(len(part.train_N) for part in self.parts)

  @property
  def held_out_count(self) -> int:
    """The number of held-out tasks."""
    return sum(len(part.held_out_N) for part in self.parts)

  def dataset(self, seed: int, refill: int = 0) -> grain.MapDataset[Task]:
    """Returns the endless order of the training tasks, by random access.

    Args:
      refill: further orders of the same seed: for a step that needs more tasks (dynamic sampling).

    Raises:
      DataError: if there is no training task.
    """
    if not self.train_count:
      raise DataError("config.source.path has no training task; see the split of its rows")
    shares = [(p, w) for p, w in zip(self.parts, self.weights, strict=True) if w]
    datasets = [
      self._order(part, _seed(seed, number, refill)) for number, (part, _) in enumerate(shares)
    ]
    return grain.MapDataset.mix(datasets, [weight for _, weight in shares])

  def _order(self, part: Part, seed: int) -> grain.MapDataset[Task]:
    rows = grain.MapDataset.source(_Rows(part.source, part.train_N))
    shuffled = rows.seed(seed).shuffle().repeat(_PASSES)
    if self.order == "shuffled":
      return shuffled
    difficulty_N = np.array([part.infos[i].difficulty for i in part.train_N])
    ordered = part.train_N[np.argsort(difficulty_N, kind="stable")]
    first = grain.MapDataset.source(_Rows(part.source, ordered))
    return grain.MapDataset.concatenate([first, shuffled])

  def batch(self, seed: int, step: int, count: int, refill: int = 0) -> list[Task]:
    """The `count` training tasks of one step; see `dataset`."""
    tasks = self.dataset(seed, refill)
    found = [tasks[step * count + i] for i in range(count)]
    return [task for task in found if task is not None]  # grain's type allows None

  def held_out(self, count: int) -> list[Task]:
    """The first `count` held-out tasks of a fixed random order, question types in turn."""
    places = [(part, int(i)) for part in self.parts for i in part.held_out_N]
    order = np.random.default_rng(_HELD_OUT_SEED).permutation(len(places))
    places = [places[k] for k in order]
    types = [part.infos[i].question_type for part, i in places]
    return [places[k][0].source[places[k][1]] for k in interleave(types)[:count]]

  def examples(self, seed: int, count: int) -> Iterator[Task]:
    """Yields `count` random training tasks for the baselines of the evaluation.

    A source without training tasks, such as a benchmark, yields held-out tasks.
    """
    places = [(part, int(i)) for part in self.parts for i in part.train_N]
    places = places or [(part, int(i)) for part in self.parts for i in part.held_out_N]
    order = np.random.default_rng((seed, _ORDER_STREAM)).permutation(len(places))
    for k in order[:count]:
      part, i = places[k]
      yield part.source[i]


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
  """Some tasks of a source, for grain."""

  source: TaskSource
  index_N: np.ndarray

  def __len__(self) -> int:
    return len(self.index_N)

  def __getitem__(self, index: Any) -> Task:
    return self.source[int(self.index_N[index])]


def open_files(
  paths: Sequence[pathlib.Path],
  cfg: FilesConfig,
  check: CheckTask,
  on_row: Callable[[], None] = lambda: None,
) -> FileSource:
  """Opens and checks all files; bad rows are counted, printed and left out.

  Args:
    paths: JSONL files and TFDS folders. A row may set its split to train or held_out.
    check: raises DataError for a task that cannot be scored.
    on_row: called for every row, for a progress bar.

  Raises:
    ConfigError: if the weights do not match the files.
    DataError: if a file cannot be read, too many rows cannot be used, or a file with a weight has
      no training task.
  """
  if cfg.weights and len(cfg.weights) != len(paths):
    raise ConfigError(
      f"config.source.files.weights has {len(cfg.weights)} values for {len(paths)} files in "
      "config.source.path; give one for each file"
    )
  held_out = split_paths(cfg.held_out)
  opened = [open_file(path, cfg, check, on_row) for path in (*paths, *held_out)]
  bad = [row for _, _, rows in opened for row in rows]
  _check_ids([*paths, *held_out], [infos for _, infos, _ in opened])
  _report(bad, sum(len(source) for source, _, _ in opened), cfg)
  stated = held_out or any(says_held_out(infos) for _, infos, _ in opened)
  fraction = 0.0 if stated else cfg.held_out_fraction
  parts = [_part(source, infos, fraction) for source, infos, _ in opened[: len(paths)]]
  weights = cfg.weights or tuple(float(len(part.train_N)) for part in parts)
  empty = [path for path, part in zip(paths, parts, strict=True) if not len(part.train_N)]
  if empty and cfg.weights:
    raise DataError(f"{empty[0]} has a weight and no training task; see the split of its rows")
  for source, infos, _ in opened[len(paths) :]:
    everything = np.arange(len(source), dtype=np.int64)
    parts.append(Part(source, infos, everything[:0], everything))
  weights = (*weights, *[0.0] * len(held_out))
  benchmarks = {part.infos[i].benchmark for part in parts for i in part.train_N}
  benchmark = ", ".join(sorted(filter(None, benchmarks))) or None
  names = [path.name for path in (*paths, *held_out)]
  contents = "; ".join(
    f"{name}: {_contents(part.infos)}" for name, part in zip(names, parts, strict=True)
  )
  return FileSource(tuple(parts), weights, cfg.order, benchmark, len(bad), contents)


def split_paths(paths: str) -> tuple[pathlib.Path, ...]:
  """The paths of a config value, which are joined by commas."""
  return tuple(to_path(path.strip()) for path in paths.split(",") if path.strip())


def is_scene_held_out(scene: str, fraction: float) -> bool:
  """Whether a scene is held out; depends on its name alone, not on the other scenes."""
  return zlib.crc32(scene.encode()) < fraction * 2**32


def open_file(
  path: pathlib.Path, cfg: FilesConfig, check: CheckTask, on_row: Callable[[], None]
) -> tuple[TaskSource, list[RowInfo], list[BadRow]]:
  """Opens and checks one JSONL file or TFDS folder.

  Args:
    check, on_row: as in `open_files`.

  Returns:
    The good rows, their infos, and the bad rows.

  Raises:
    ConfigError: if `cfg.columns` do not match the features.
    DataError: if the file cannot be read.
  """
  if _is_tfds(path):
    return open_tfds(path, cfg.columns, check, cfg.check_media, on_row)
  return open_jsonl(path, check, cfg.check_media, on_row)


def row_count(path: pathlib.Path) -> int:
  """Returns the number of rows, for a progress bar; blank lines count.

  Raises:
    DataError: if the file cannot be read.
  """
  return example_count(path) if _is_tfds(path) else line_count(path)


def _is_tfds(path: pathlib.Path) -> bool:
  """Whether a path is a TFDS folder; DataError if it is neither that nor a JSONL file."""
  if path.is_dir():
    if not is_tfds_folder(path):
      raise DataError(
        f"{path} is a folder without dataset_info.json; give a JSONL file, or the folder of one "
        "version of a TFDS data set (NAME/1.0.0)"
      )
    return True
  if path.suffix in (".parquet", ".tsv", ".csv", ".json"):
    raise DataError(
      f"{path} is not in our format; convert it first: python -m spatial_jax.tools.build "
      f"--format=NAME --input={path} --out=DIR (docs/formats.md)"
    )
  return False


def says_held_out(infos: Sequence[RowInfo]) -> bool:
  """Whether a row says that it is held out; then no scene is held out by its name."""
  return any(info.split == "held_out" for info in infos)


def held_out_rows(infos: Sequence[RowInfo], fraction: float) -> np.ndarray:
  """Which rows are held out, bool [N]: as they say, else a fraction of the scenes."""
  held_out = [
    info.split == "held_out" or (info.split == "" and is_scene_held_out(info.scene, fraction))
    for info in infos
  ]
  return np.array(held_out, bool)


def _part(source: TaskSource, infos: Sequence[RowInfo], fraction: float) -> Part:
  held_out_N = held_out_rows(infos, fraction)
  return Part(source, infos, np.flatnonzero(~held_out_N), np.flatnonzero(held_out_N))


def _report(bad: Sequence[BadRow], good: int, cfg: FilesConfig) -> None:
  """Prints the bad rows; raises DataError if there are too many."""
  total = good + len(bad)
  if not bad:
    return
  text = summary_of_bad_rows(bad, total, _SHOWN_BAD_ROWS)
  if not good or len(bad) > cfg.max_bad_fraction * total:
    raise DataError(
      f"{text}\nmore than config.source.files.max_bad_fraction = {cfg.max_bad_fraction:g}: fix the "
      "rows (python -m spatial_jax.tools.check FILE lists all) or raise it"
    )
  print(f"warning: {text}")


def _check_ids(paths: Sequence[pathlib.Path], infos: Sequence[Sequence[RowInfo]]) -> None:
  """Refuses an id that two files have: ids seed the sampling and identify predictions.

  Raises:
    DataError: naming both files.
  """
  file_of: dict[str, pathlib.Path] = {}
  for path, rows in zip(paths, infos, strict=True):
    for row in rows:
      if row.task_id in file_of:
        raise DataError(
          f"{file_of[row.task_id]} and {path} both have the id {row.task_id}; give rows other ids, "
          "or rows without an id files of other names"
        )
    file_of |= dict.fromkeys((row.task_id for row in rows), path)


def _contents(infos: Sequence[RowInfo]) -> str:
  """The number of good rows, and a checksum of what the splits and the order depend on."""
  return f"{len(infos)} rows, checksum {zlib.crc32(repr(list(infos)).encode()):08x}"


def _seed(*numbers: int) -> int:
  words = np.random.SeedSequence((*numbers, _ORDER_STREAM)).generate_state(1)
  return int(words[0]) >> 1
