"""Files of foreign rows, read one row or one batch at a time: .jsonl, .json, .parquet, .tsv."""

import contextlib
import csv
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from spatial_jax.data.records import check_file
from spatial_jax.data.rows import RowProblem, parse_line
from spatial_jax.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".tsv")
_BATCH = 64  # rows of a parquet file in memory; a row may have many images
_CHUNK = 1 << 20  # characters of a JSON list that are read at once
_PEEKED = 20  # rows whose names are the columns of a JSON file


class ForeignRow(NamedTuple):
  """One row as it stands in its file."""

  number: int  # of its line or row, from 1
  value: Any  # parsed JSON, a table row as a dict, or the RowProblem of a damaged row
  end: float  # fraction of the file up to the end of this row


def find_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The files of rows under a path: itself, or those of a folder and its folders, sorted.

  Raises:
    DataError: if there are none.
  """
  if path.is_dir():
    found = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
    if not found:
      raise DataError(f"--input={path} has no file of rows ({', '.join(SUFFIXES)})")
    return found
  if path.suffix not in SUFFIXES:
    raise DataError(f"--input={path} must be a folder or one of {', '.join(SUFFIXES)}")
  check_file(path)
  return [path]


def read_columns(path: pathlib.Path) -> list[str]:
  """The columns of a file; [] if it has no readable row among the first ones.

  Raises:
    DataError: if the file cannot be read.
  """
  if path.suffix == ".parquet":
    with _open_parquet(path) as table:
      return list(table.schema_arrow.names)
  values = [row.value for row in itertools.islice(read_rows(path), _PEEKED)]
  names = (name for value in values if isinstance(value, dict) for name in value)
  return [str(name) for name in dict.fromkeys(names)]


def read_rows(path: pathlib.Path) -> Iterator[ForeignRow]:
  """The rows of a file in its order.

  Raises:
    DataError: if the file cannot be read.
  """
  if path.suffix == ".parquet":
    return _parquet_rows(path)
  if path.suffix == ".tsv":
    return _tsv_rows(path)
  if path.suffix == ".json" and _first_character(path) == "[":
    return _json_rows(path)
  return _jsonl_rows(path)


def _first_character(path: pathlib.Path) -> str:
  with path.open(encoding="utf-8-sig", errors="replace") as file:
    while chunk := file.read(1024):
      if text := chunk.lstrip():
        return text[0]
  return ""


def _jsonl_rows(path: pathlib.Path) -> Iterator[ForeignRow]:
  size, read = max(1, path.stat().st_size), 0
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      read += len(line)
      if not line.strip():
        continue
      try:
        value = parse_line(line)
      except RowProblem as problem:
        value = problem
      yield ForeignRow(number, value, read / size)


def _json_rows(path: pathlib.Path) -> Iterator[ForeignRow]:
  """The items of a JSON list, without reading the whole list."""
  size, read = max(1, path.stat().st_size), 0
  decoder = json.JSONDecoder()
  with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
    text, position = file.read(_CHUNK).lstrip()[1:], 0
    for number in itertools.count(1):
      value = None
      while True:
        position = _skip(text, position)
        try:
          value, end = decoder.raw_decode(text, position)
          # A number at the end of the chunk may go on; a list or object may not.
          if end < len(text) or isinstance(value, dict | list):
            break
        except (ValueError, RecursionError):
          end = -1
        more = file.read(max(_CHUNK, len(text) - position))
        if not more:
          break
        read += position
        text, position = text[position:] + more, 0
      if end < 0:
        if text[position:].strip() != "]":
          yield ForeignRow(number, RowProblem("row", "is not JSON; the file ends here"), 1.0)
        return
      position = end
      yield ForeignRow(number, value, min(1.0, (read + position) / size))


def _skip(text: str, position: int) -> int:
  """The next place that is neither white space nor a comma."""
  while position < len(text) and text[position] in ", \t\r\n":
    position += 1
  return position


def _tsv_rows(path: pathlib.Path) -> Iterator[ForeignRow]:
  csv.field_size_limit(sys.maxsize)  # images in base64 are longer than the default allows
  size = max(1, path.stat().st_size)
  with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
    reader = csv.reader((line for line in iter(file.readline, "")), delimiter="\t")
    try:
      header = next(reader, [])
      for number, cells in enumerate(reader, 2):
        if not cells:
          continue
        value: Any = dict(zip(header, cells, strict=False))
        if len(cells) > len(header):
          value = RowProblem("row", f"has {len(cells)} cells, but {len(header)} columns have names")
        yield ForeignRow(number, value, file.tell() / size)
    except csv.Error as error:
      raise DataError(f"{path} is not a table with tabs ({error})") from error


@contextlib.contextmanager
def _open_parquet(path: pathlib.Path) -> Iterator[Any]:
  try:
    import pyarrow  # an extra, and slow to load
    from pyarrow import parquet
  except ImportError as error:
    raise DataError(f"{path.name} needs the extra data: pip install 'spatial_jax[data]'") from error
  try:
    with parquet.ParquetFile(path) as table:
      yield table
  except (pyarrow.ArrowException, OSError) as error:
    reason = str(error).split("\n")[0][:100]
    raise DataError(f"{path} is not a readable parquet file ({reason})") from error


def _parquet_rows(path: pathlib.Path) -> Iterator[ForeignRow]:
  with _open_parquet(path) as table:
    total, number = max(1, table.metadata.num_rows), 0
    for batch in table.iter_batches(batch_size=_BATCH):
      for i in range(batch.num_rows):
        number += 1
        try:
          value = batch.slice(i, 1).to_pylist()[0]
        except ValueError as error:  # text that is not UTF-8, dates out of range
          value = RowProblem("row", f"cannot be read ({str(error)[:60]})")
        yield ForeignRow(number, value, number / total)
