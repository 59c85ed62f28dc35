"""Builds a data set.

Converts the files of a foreign format into rows of docs/data.md; docs/formats.md has the formats:

    python -m spatial_jax.tools.build --format=NAME --input=PATH --out=DIR [--media=FOLDER]
      [--limit=N] [--split=train|held_out]

Renders Numerical3D, numeric questions about rooms, as a TensorFlow Datasets folder:

    python -m spatial_jax.tools.build --dataset=numerical3d --source=rooms|meta:PATH --out=DIR
      [--workers=N] [--tasks=50000] [--seed=0]

A build of Numerical3D that was stopped goes on with the same command.
"""

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import cast

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from spatial_jax.cli import one_line_exits
from spatial_jax.data.formats.table import FORMATS, find_format
from spatial_jax.errors import UserError
from spatial_jax.tools.convert import ROWS, Conversion, Split, convert_files, summary_of
from spatial_jax.tools.numerical3d import build_numerical3d, build_settings
from spatial_jax.workdir import to_path


def main(arguments: Sequence[str]) -> None:
  """Converts or renders, as the command line says."""
  given = _parser().parse_args(arguments)
  if given.dataset is not None:
    render(given)
  else:
    convert(given)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m spatial_jax.tools.build",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--out", required=True, help="folder to write")
  parser.add_argument("--format", help="format of --input; docs/formats.md has the list")
  parser.add_argument("--input", help="file of rows, or folder of such files")
  parser.add_argument(
    "--media", help="folder that paths of the source are relative to (default: that of each file)"
  )
  parser.add_argument("--limit", type=_count, help="rows to write at most")
  parser.add_argument("--split", choices=("train", "held_out"), help="split of all rows")
  parser.add_argument("--dataset", choices=("numerical3d",), help="data set to render")
  parser.add_argument("--source", default="rooms", help="of --dataset: rooms, or meta:PATH")
  parser.add_argument(
    "--workers", type=_count, default=os.cpu_count() or 1, help="of --dataset: processes"
  )
  parser.add_argument(
    "--tasks", type=_count, default=50_000, help="of --dataset: tasks of all splits (50000)"
  )
  parser.add_argument("--seed", type=int, default=0, help="of --dataset: other rooms for each (0)")
  return parser


def _count(text: str) -> int:
  """A whole number of at least 1."""
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{text} is not at least 1")
  return value


def render(given: argparse.Namespace) -> None:
  """Renders a data set; --format and --input belong to the other form of the command."""
  if given.format is not None or given.input is not None:
    raise UserError("--dataset renders a data set; it has no --format and no --input")
  command = shlex.join(["python", "-m", "spatial_jax.tools.build", *sys.argv[1:]])
  settings = build_settings(given.source, given.seed, given.tasks)
  build_numerical3d(to_path(given.out), settings, given.workers, command)


def convert(given: argparse.Namespace) -> None:
  """Converts, and prints how many rows of each question type there are."""
  if given.format is None:
    names = ", ".join(one.name for one in FORMATS)
    raise UserError(f"--format is missing: one of {names}; or give --dataset=numerical3d")
  if given.input is None:
    raise UserError("--input is missing: a file of rows, or a folder of such files")
  fmt = find_format(given.format)
  media = to_path(given.media) if given.media else None
  path, out = to_path(given.input), to_path(given.out)
  split = cast(Split | None, given.split)
  console = Console()
  with _progress(console) as on_progress:
    found = convert_files(fmt, path, out, media, given.limit, split, on_progress)
  _show(found, console)
  console.print(f"wrote {found.rows} rows to {out / ROWS}", markup=False, highlight=False)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[float], None]]:
  """Yields a function that takes the fraction that is done: a bar, or nothing in a file."""
  if not console.is_terminal:
    yield lambda fraction: None
    return
  with Progress(console=console, transient=True) as bar:
    task = bar.add_task("converting", total=1.0)
    yield lambda fraction: bar.update(task, completed=fraction)


def _show(found: Conversion, console: Console) -> None:
  grid = Table(box=box.SIMPLE)
  for name in ("question type", "answer", "rows"):
    grid.add_column(name, justify="right" if name == "rows" else "left")
  for (question_type, kind), count in sorted(found.counts.items()):
    grid.add_row(escape(question_type), kind, str(count))
  console.print(grid)
  for line in (*found.notes, summary_of(found)):
    if line:
      console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
  with one_line_exits("stopped; a build of --dataset goes on with the same command"):
    main(sys.argv[1:])
