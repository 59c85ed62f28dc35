"""Files of a foreign format -> rows.jsonl of docs/data.md and a folder of embedded images.

--input ──readers──► Format.convert ──► checked row ──► DIR/rows.jsonl
                           └─ bytes of images ────────► DIR/media/<sha256>.jpg
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TextIO

from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.fields import Fields
from spatial_jax.data.formats.media import image_suffix
from spatial_jax.data.formats.readers import find_files, read_columns, read_rows
from spatial_jax.data.formats.table import fitting_formats
from spatial_jax.data.jsonl import BadRow, checked_info
from spatial_jax.data.media import image_size
from spatial_jax.data.rows import RowProblem, task_of_row
from spatial_jax.errors import DataError
from spatial_jax.reward.parse import check_truth
from spatial_jax.types import ImageRef
from spatial_jax.workdir import one_line_errors

ROWS, MEDIA = "rows.jsonl", "media"
SHOWN_BAD_ROWS = 20
_SEARCHED_ROWS = 50  # whose media files are looked for, to find a wrong --media early
_ORDER = (
  "id", "question", "options", "answer", "kind", "unit", "images", "videos", "type", "scene",
  "split", "benchmark", "extra", "turns",
)  # fmt: skip

Split = Literal["train", "held_out"]


@dataclasses.dataclass
class Conversion:
  """What was converted."""

  rows: int  # written
  counts: collections.Counter[tuple[str, str]]  # rows of each (question type, kind)
  bad: list[BadRow]  # the first that could not be converted
  bad_fields: collections.Counter[str]  # and how many, by field
  notes: list[str]  # sentences for the user


@dataclasses.dataclass(frozen=True)
class _Places:
  """Where media are looked for and written."""

  out: pathlib.Path
  media: pathlib.Path | None  # --media


def convert_files(
  fmt: Format,
  path: pathlib.Path,
  out: pathlib.Path,
  media: pathlib.Path | None,
  limit: int | None,
  split: Split | None,
  on_progress: Callable[[float], None] = lambda fraction: None,
) -> Conversion:
  """Converts the files under `path`; `out` then has `rows.jsonl` and perhaps `media`.

  Args:
    media: folder that paths of the source are relative to; None for the folder of each file.
    limit: rows to write at most.
    split: of all rows; None leaves it to the format and to the scenes.
    on_progress: called with the fraction of the input that was read.

  Raises:
    DataError: if the files are of another format, no row can be converted, `out` has rows already,
      or `split` would train on a benchmark.
  """
  if fmt.held_out and split == "train":
    raise DataError(f"--split=train: {fmt.name} is a benchmark, whose rows are always held out")
  if media is not None and not media.is_dir():
    raise DataError(f"--media={media} is not a folder")
  if out.suffix == ".jsonl":
    raise DataError(f"--out={out} is the folder to write; the rows go to {ROWS} in it")
  if (out / ROWS).exists():
    raise DataError(f"{out / ROWS} exists; choose another --out, or delete it")
  files, notes = _fitting_files(fmt, find_files(path))
  found = Conversion(0, collections.Counter(), [], collections.Counter(), notes)
  partial = out / f"{ROWS}.partial"
  with one_line_errors(out):
    out.mkdir(parents=True, exist_ok=True)
    try:
      with partial.open("w", encoding="utf-8") as target:
        _convert_all(fmt, files, _Places(out, media), (limit, split), target, found, on_progress)
      if not found.rows:
        raise DataError(f"no row of {path} could be converted\n{summary_of(found)}".rstrip())
      partial.replace(out / ROWS)
    finally:
      partial.unlink(missing_ok=True)
  return found


def summary_of(found: Conversion) -> str:
  """Lines for the user on the rows that could not be converted; "" if there are none."""
  total = found.bad_fields.total()
  if not total:
    return ""
  fields = ", ".join(f"{field} {count}" for field, count in found.bad_fields.most_common())
  lines = [f"{total} of {total + found.rows} rows could not be converted ({fields})"]
  lines += [f"  {row}" for row in found.bad]
  more = total - len(found.bad)
  return "\n".join(lines + ([f"  and {more} more"] if more else []))


def _fitting_files(
  fmt: Format, files: Sequence[pathlib.Path]
) -> tuple[list[pathlib.Path], list[str]]:
  """The files with the columns of the format, and notes on the others."""
  fitting, problems, notes = [], [], []
  for file in files:
    columns = read_columns(file)
    others = [one for one in fitting_formats(columns) if one is not fmt]
    if columns and not fmt.fits(columns):
      names = " or ".join(one.name for one in others)
      advice = f"; they fit --format={names}" if others else ""
      problems.append(
        f"{file.name} has the columns {', '.join(columns)}; {fmt.name} needs {fmt.needed()}{advice}"
      )
      continue
    fitting.append(file)
    special = [one for one in others if one.fits(columns) > fmt.fits(columns) and not one.general]
    if fmt.general and special:
      notes.append(f"{file.name} has the columns of --format={special[0].name}, which reads more")
  if not fitting:
    more = f" ({len(problems) - 1} more files do not fit)" if len(problems) > 1 else ""
    raise DataError(problems[0] + more)
  return fitting, [f"left out: {problem}" for problem in problems] + notes


def _convert_all(
  fmt: Format,
  files: Sequence[pathlib.Path],
  places: _Places,
  choices: tuple[int | None, Split | None],
  target: TextIO,
  found: Conversion,
  on_progress: Callable[[float], None],
) -> None:
  limit, split = choices
  seen: dict[str, str] = {}  # id -> row that has it
  missing: list[str] = []
  for file, number, value, fraction in _all_rows(files):
    where = f"{file.name}:{number}"
    try:
      row = _converted(fmt, value, file, places, split)
      row = {"id": f"{places.out.absolute().name}/{found.rows + 1}"} | row
      if row["id"] in seen:
        raise RowProblem("id", f"is {row['id']!r} as in {seen[row['id']]}")
    except RowProblem as problem:
      found.bad_fields[problem.field.partition("[")[0]] += 1
      if len(found.bad) < SHOWN_BAD_ROWS:
        found.bad.append(BadRow(where, problem.field, problem.reason))
      continue
    finally:
      on_progress(fraction)
    seen[row["id"]] = where
    target.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    found.counts[row.get("type", row["kind"]), row["kind"]] += 1
    if found.rows < _SEARCHED_ROWS:
      missing += _missing_files(row, places.out)
    found.rows += 1
    if found.rows == limit:
      break
  if missing:
    found.notes.append(
      f"{len(missing)} media files of the first {min(found.rows, _SEARCHED_ROWS)} rows do not"
      f" exist, the first is {missing[0]}; is --media the folder that paths are relative to?"
    )


def _all_rows(
  files: Sequence[pathlib.Path],
) -> Iterator[tuple[pathlib.Path, int, Any, float]]:
  """(file, number of the row, row, fraction of all files that was read)."""
  sizes = [file.stat().st_size for file in files]
  total, before = max(1, sum(sizes)), 0
  for file, size in zip(files, sizes, strict=True):
    for number, value, end in read_rows(file):
      yield file, number, value, (before + end * size) / total
    before += size


def _converted(
  fmt: Format, value: Any, file: pathlib.Path, places: _Places, split: Split | None
) -> dict[str, Any]:
  """One row that our reader accepts; raises RowProblem."""
  if isinstance(value, RowProblem):
    raise value
  row = fmt.convert(Fields(value, file.name))
  row["split"] = row.get("split") or ("held_out" if fmt.held_out else split)
  base = places.media or file.parent
  row["images"] = [
    _image(image, base, places, f"images[{i}]") for i, image in enumerate(row.get("images", ()))
  ]
  row["videos"] = [_video(video, base, places) for video in row.get("videos", ())]
  row["turns"] = [_turn(turn, base, places) for turn in row.get("turns", ())]
  row = {name: row[name] for name in _ORDER if name in row and row[name] not in (None, [], {})}
  task = task_of_row(row, "row", fmt.name, places.out)
  checked_info(row, task, check_truth, with_media=False)
  return row


def _image(image: Any, base: pathlib.Path, places: _Places, field: str) -> Any:
  """A path, or a path and marks in pixels."""
  if not isinstance(image, Mapping):
    return _stored(image, places) if isinstance(image, bytes) else _path(image, base, places)
  path = _image(image["path"], base, places, field)
  try:
    height, width = image_size(ImageRef(str(places.out / path)))
  except DataError as error:
    raise RowProblem(field, f"{error}; its marks need its size; set --media") from error
  marks = [
    mark | {"points": [round(x * (width, height)[i % 2] / 1000, 2) for i, x in enumerate(points)]}
    for mark in image["thousandths"]
    if (points := mark["points"])
  ]
  return {"path": path, "marks": marks}


def _video(video: Any, base: pathlib.Path, places: _Places) -> Any:
  if isinstance(video, Mapping):
    return {"frames": [_path(frame, base, places) for frame in video["frames"]]}
  return _path(video, base, places)


def _turn(turn: Mapping[str, Any], base: pathlib.Path, places: _Places) -> dict[str, Any]:
  images = [_image(image, base, places, "turns.images") for image in turn.get("images", ())]
  return dict(turn) | ({"images": images} if images else {})


def _path(path: str, base: pathlib.Path, places: _Places) -> str:
  """Absolute, or relative to `out` for a file in it that was found without --media."""
  full = pathlib.Path(os.path.abspath(base / path))
  out = pathlib.Path(os.path.abspath(places.out))
  if places.media is None and full.is_relative_to(out):
    return full.relative_to(out).as_posix()
  return str(full)


def _stored(content: bytes, places: _Places) -> str:
  """Writes an image under the hash of its contents, once, and returns its path in `out`."""
  name = f"{hashlib.sha256(content).hexdigest()[:16]}{image_suffix(content)}"
  target = places.out / MEDIA / name
  if not target.exists():
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f"{name}.partial")
    partial.write_bytes(content)
    partial.replace(target)
  return f"{MEDIA}/{name}"


def _missing_files(row: Mapping[str, Any], out: pathlib.Path) -> list[str]:
  items = [*row.get("images", ()), *row.get("videos", ())]
  paths = [
    (item.get("path") or item["frames"][0]) if isinstance(item, Mapping) else item for item in items
  ]
  return [path for path in paths if not (out / path).exists()]
