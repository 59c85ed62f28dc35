"""Checks a data file before training: bad rows, tables, baselines, and a page with examples.

python -m spatial_jax.tools.check FILE [--out=DIR] [--examples=24] [--columns=FIELD=FEATURE ...]
python -m spatial_jax.tools.check --schema

FILE is a JSONL file or the folder of a TFDS data set (docs/data.md). DIR gets check.html and, if
rows are bad, bad_rows.txt. Exit code 0: all rows are good; 1: some rows are bad; 2: the file cannot
be used at all.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from rich.console import Console

from spatial_jax.cli import one_line_exits
from spatial_jax.data.files import (
  FilesConfig,
  TaskSource,
  held_out_rows,
  open_file,
  row_count,
  says_held_out,
)
from spatial_jax.data.jsonl import BadRow
from spatial_jax.data.rows import SCHEMA_FILE
from spatial_jax.errors import DataError, UserError
from spatial_jax.report.data_examples import TaskView, choose_examples, task_view
from spatial_jax.report.data_facts import FactCollector
from spatial_jax.report.data_page import FILE, write_page
from spatial_jax.report.data_summary import bad_fields, summarise
from spatial_jax.report.data_warnings import warnings_of
from spatial_jax.tools import data_console
from spatial_jax.workdir import to_path, write_text

BAD_ROWS = "bad_rows.txt"
EXAMPLES = 24
# As in configs/common.py. The collector checks the media.
FILES = FilesConfig((), "", 0.1, (), "shuffled", max_bad_fraction=0.05, check_media=False)


def check_file(
  path: pathlib.Path, out: pathlib.Path, examples: int, cfg: FilesConfig, console: Console
) -> int:
  """Prints the result, writes the page and the bad rows, and returns the exit code.

  Args:
    path: JSONL file, or folder of a TFDS data set.
    out: folder to write, made if it is missing.
    examples: number of rows on the page.
    cfg: how a run reads the file.

  Raises:
    DataError: if no row can be used.
    UserError: I/O, if the file cannot be read or the folder cannot be written.
  """
  total = row_count(path)
  out.mkdir(parents=True, exist_ok=True)
  collected = FactCollector()
  with data_console.progress(console, "rows", total) as on_row:
    source, infos, bad = open_file(path, cfg, collected.check, on_row)
  _write_bad_rows(out / BAD_ROWS, bad)
  if bad:
    data_console.show_bad_rows(bad, bad_fields(bad), console)
  if not len(source):
    place = f"; all reasons are in {out / BAD_ROWS}" if bad else ""
    raise DataError(f"{path}: no row can be used{place}")
  held_out_N = held_out_rows(infos, 0.0 if says_held_out(infos) else cfg.held_out_fraction)
  name = f"{path.parent.name}/{path.name}" if path.is_dir() else path.name
  summary = summarise(name, collected, held_out_N, bad)
  views = _examples(source, collected, held_out_N, examples, console)
  warnings = warnings_of(collected.rows, held_out_N, summary) + _unreadable(views)
  if len(bad) > cfg.max_bad_fraction * (len(source) + len(bad)):
    most = f"more than {cfg.max_bad_fraction:.0%} of the rows are bad"
    warnings.insert(0, f"a run refuses the file: {most} (config.source.files.max_bad_fraction)")
  write_page(out / FILE, summary, warnings, views)
  data_console.show(summary, warnings, console)
  written = f"{out / FILE}" + (f" and {out / BAD_ROWS}" if bad else "")
  print(f"wrote {data_console.printable(written)}")
  return int(bool(bad))


def default_out(path: pathlib.Path) -> pathlib.Path:
  """Returns the folder beside a file that gets its results: rows.jsonl -> rows_check."""
  return path.parent / f"{path.name if path.is_dir() else path.stem}_check"


def _write_bad_rows(path: pathlib.Path, bad: Sequence[BadRow]) -> None:
  """Writes one line per bad row; a file of an earlier check is removed if there is none."""
  if not bad:
    path.unlink(missing_ok=True)
    return
  write_text(path, "".join(f"{data_console.printable(str(row))}\n" for row in bad))


def _examples(
  source: TaskSource,
  collected: FactCollector,
  held_out_N: np.ndarray,
  count: int,
  console: Console,
) -> list[TaskView]:
  chosen = choose_examples(collected.rows, count)
  with data_console.progress(console, "examples", len(chosen)) as on_row:
    views = []
    for index in chosen:
      views.append(task_view(source[index], bool(held_out_N[index])))
      on_row()
  return views


def _unreadable(views: Sequence[TaskView]) -> list[str]:
  """A warning about media that exist but cannot be decoded."""
  problems = [(view.task.task_id, view.problems[0]) for view in views if view.problems]
  if not problems:
    return []
  first = ": ".join(problems[0])
  return [f"the media of {len(problems)} of {len(views)} examples cannot be read; {first}"]


def main() -> None:
  """Reads the command line; an error of the user is one line and exit code 2."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("file", nargs="?", metavar="FILE", help="JSONL file, or TFDS folder")
  parser.add_argument("--out", help="folder to write (default: NAME_check beside FILE)")
  parser.add_argument("--examples", type=int, default=EXAMPLES, help="rows on the page")
  parser.add_argument(
    "--columns", nargs="+", action="extend", default=[], metavar="FIELD=FEATURE",
    help="field of a row and the TFDS feature that it is, if their names differ",
  )  # fmt: skip
  parser.add_argument("--schema", action="store_true", help="print the JSON schema of a row")
  arguments = parser.parse_args()
  if arguments.schema:
    print(SCHEMA_FILE.read_text(encoding="utf-8"), end="")
    return
  if arguments.file is None:
    parser.error("FILE is missing: give a JSONL file or the folder of a TFDS data set")
  jax.config.update("jax_platforms", "cpu")  # for the scores of the baselines
  with one_line_exits("stopped"):
    if arguments.examples < 0:
      raise UserError(f"--examples={arguments.examples} must be at least 0")
    path = to_path(arguments.file).absolute()
    out = to_path(arguments.out) if arguments.out else default_out(path)
    cfg = dataclasses.replace(FILES, columns=tuple(arguments.columns))
    code = check_file(path, out, arguments.examples, cfg, data_console.make_console())
  sys.exit(code)


if __name__ == "__main__":
  main()
