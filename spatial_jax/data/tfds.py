"""A TensorFlow Datasets folder of tasks, read by random access without TensorFlow.

    folder (array_record) ──open_tfds──► TfdsSource ──source[i]──► example ──columns──► row ──► Task

The features have the names of a row (docs/data.md), or `columns` says which feature is which field:
("question=problem", "images=image"). Text, numbers, lists of text, images and lists of images are
read. Images of a bytes feature stay encoded until the prompt is made, which makes the start faster.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from spatial_jax.config import ConfigError, suggestion
from spatial_jax.data.jsonl import BadRow, CheckTask, checked_info
from spatial_jax.data.records import first_line
from spatial_jax.data.rows import RowInfo, RowProblem, row_schema, task_of_row
from spatial_jax.errors import DataError
from spatial_jax.types import Task

INFO_FILE = "dataset_info.json"
_LISTS = ("options", "images", "videos")  # fields of a row that are lists
# Features that are no field of a row: times in seconds of images that are the frames of one video,
# and the path of a video.
FRAME_TIMES, VIDEO = "times_s", "video"


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
  """The good examples of all splits."""

  folder: pathlib.Path
  columns: Mapping[str, str]  # field of a row -> feature
  places: Sequence[tuple[str, int]]  # split and index of each good example

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, index: int) -> Task:
    split, number = self.places[index]
    row = row_of_example(_data(self.folder, split)[number], self.columns)
    return task_of_row(row, *_names(self.folder, split, number))


def is_tfds_folder(path: pathlib.Path) -> bool:
  """Returns whether a folder is a prepared data set: NAME/VERSION or NAME/CONFIG/VERSION."""
  return (path / INFO_FILE).is_file()


def open_tfds(
  folder: pathlib.Path,
  columns: Sequence[str],
  check: CheckTask,
  with_media: bool,
  on_row: Callable[[], None] = lambda: None,
) -> tuple[TfdsSource, list[RowInfo], list[BadRow]]:
  """Reads and checks all splits.

  Args:
    columns: "FIELD=FEATURE" for fields whose feature has another name.
    check, with_media, on_row: as in `open_jsonl`.

  Returns:
    The good examples, their infos, and the bad examples. A split named train gives training tasks,
    any other held-out tasks.

  Raises:
    ConfigError: if a column or a needed field does not exist.
    DataError: if the folder cannot be read.
  """
  builder = _builder(folder)
  names = _fields(folder, list(builder.info.features), columns)
  places, infos, bad = [], [], []
  seen: set[str] = set()
  for split in builder.info.splits:
    for number in range(len(_data(folder, split))):
      try:
        row = row_of_example(_example(folder, split, number), names)
        task = task_of_row(row, *_names(folder, split, number))
        if task.task_id in seen:
          raise RowProblem("id", f"is {task.task_id!r} for a second time")
        info = checked_info(row, task, check, with_media)
        seen.add(task.task_id)
        # The only split of a folder says nothing: some of its scenes are then held out.
        stated = _split(split) if len(builder.info.splits) > 1 else ""
        infos.append(info._replace(split=info.split or stated))
        places.append((split, number))
      except RowProblem as problem:
        bad.append(BadRow(f"{folder.name}/{split}:{number}", problem.field, problem.reason))
      on_row()
  return TfdsSource(folder, names, tuple(places)), infos, bad


def example_count(folder: pathlib.Path) -> int:
  """Returns the number of examples of all splits; DataError if the folder cannot be read."""
  return sum(split.num_examples for split in _builder(folder).info.splits.values())


def row_of_example(example: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
  """Returns the row of an example, with text decoded and empty values left out.

  Images of an example with frame times are the frames of one video.
  """
  row: dict[str, Any] = {}
  for field, feature in columns.items():
    value = _plain(example[feature], is_media=field in ("images", "videos"))
    if field in _LISTS and not isinstance(value, list):
      value = [] if value in ("", b"") else [value]
    if isinstance(value, int | float) or len(value) > 0:
      row[field] = value
  if isinstance(row.get("extra"), str):
    row["extra"] = _object(row["extra"])
  times_s = _plain(example.get(FRAME_TIMES, []), is_media=False)
  if times_s and row.get("images"):
    row["videos"] = [{"frames": row.pop("images"), "times_s": times_s}]
  if video := _plain(example.get(VIDEO, ""), is_media=False):
    row["videos"] = [*row.get("videos", ()), video]
  return row


def _object(text: str) -> Any:
  try:
    return json.loads(text)
  except ValueError as error:
    raise RowProblem("extra", f"is not JSON ({first_line(error)})") from error


def _plain(value: Any, is_media: bool) -> Any:
  """NumPy values as Python values, bytes as text; media, pixels and bytes, stay."""
  if is_media and isinstance(value, np.ndarray) and value.ndim == 3:
    return value
  if isinstance(value, np.ndarray):
    value = value.tolist() if value.ndim else value.item()
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, list | tuple):
    return [_plain(item, is_media) for item in value]
  if isinstance(value, bytes) and not is_media:
    return value.decode("utf-8", "replace")
  return value


def _fields(
  folder: pathlib.Path, features: Sequence[str], columns: Sequence[str]
) -> dict[str, str]:
  """Field of a row -> feature."""
  known = row_schema()["properties"]
  fields = {name: name for name in known if name in features}
  for column in columns:
    field, _, feature = column.partition("=")
    if field not in known:
      raise ConfigError(f"column {column!r}: {field!r} is no field ({suggestion(field, known)})")
    if feature not in features:
      raise ConfigError(f"column {column!r}: {folder} has the features {', '.join(features)}")
    fields[field] = feature
  missing = [name for name in row_schema()["required"] if name not in fields]
  if missing:
    raise ConfigError(
      f"{folder} has the features {', '.join(features)}; a task needs {', '.join(missing)}: say "
      f"which feature it is with config.source.files.columns=('{missing[0]}=FEATURE',), or "
      f"--columns={missing[0]}=FEATURE of spatial_jax.tools.check"
    )
  return fields


def _names(folder: pathlib.Path, split: str, number: int) -> tuple[str, str, pathlib.Path]:
  """Default id, source and folder of an example."""
  name = folder.parent.name
  return f"{name}/{split}/{number}", name, folder


def _split(name: str) -> str:
  return "train" if name == "train" else "held_out"


def _builder(folder: pathlib.Path) -> Any:
  import tensorflow_datasets as tfds  # takes half a second

  try:
    return tfds.builder_from_directory(folder)
  except Exception as error:  # many types
    raise DataError(f"{folder} is not a TFDS data set ({first_line(error)})") from error


_OPEN: dict[tuple[pathlib.Path, str], Any] = {}  # in each process, because readers do not pickle


def _example(folder: pathlib.Path, split: str, number: int) -> Mapping[str, Any]:
  """One example, with its images decoded; RowProblem if it is damaged."""
  try:
    return _data(folder, split)[number]
  except DataError:
    raise
  except Exception as error:  # many types
    raise RowProblem("row", f"cannot be read ({first_line(error)})") from error


def _data(folder: pathlib.Path, split: str) -> Any:
  """The examples of a split."""
  if (folder, split) not in _OPEN:
    builder = _builder(folder)
    try:
      _OPEN[folder, split] = builder.as_data_source(split)
    except Exception as error:
      raise DataError(
        f"{folder} cannot be read by random access ({first_line(error)}); build it with "
        "file_format='array_record'"
      ) from error
  return _OPEN[folder, split]
