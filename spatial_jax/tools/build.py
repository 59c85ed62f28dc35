"""Builds a data set.

Converts the files of a foreign format into rows of docs/data.md; docs/formats.md has the formats:

    python -m spatial_jax.tools.build --format=NAME --input=PATH --out=DIR [--media=FOLDER]
      [--limit=N] [--split=train|held_out]

Renders Numerical3D, numeric questions about rooms, as a TensorFlow Datasets folder:

    python -m spatial_jax.tools.build --dataset=numerical3d --source=rooms|meta:PATH --out=DIR
      [--workers=N] [--tasks=50000] [--seed=0]

A build of Numerical3D that was stopped goes on with the same command.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import cast

from absl import flags
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from spatial_jax.cli import launch, no_arguments
from spatial_jax.data.formats.table import FORMATS, find_format
from spatial_jax.errors import UserError
from spatial_jax.tools.convert import ROWS, Conversion, Split, convert_files, summary_of
from spatial_jax.tools.numerical3d import build_numerical3d, build_settings
from spatial_jax.workdir import to_path

FORMAT = flags.DEFINE_string("format", None, "format of --input; docs/formats.md has the list")
INPUT = flags.DEFINE_string("input", None, "file of rows, or folder of such files")
OUT = flags.DEFINE_string("out", None, "folder to write rows.jsonl and media into", required=True)
MEDIA = flags.DEFINE_string(
  "media", None, "folder that paths of the source are relative to (default: folder of each file)"
)
LIMIT = flags.DEFINE_integer("limit", None, "rows to write at most", lower_bound=1)
SPLIT = flags.DEFINE_enum("split", None, ["train", "held_out"], "split of all rows")
DATASET = flags.DEFINE_enum("dataset", None, ["numerical3d"], "data set to render")
SOURCE = flags.DEFINE_string("source", "rooms", "of --dataset: rooms, or meta:PATH")
WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "of --dataset: processes", 1)
TASKS = flags.DEFINE_integer("tasks", 50_000, "of --dataset: tasks of all splits", 1)
SEED = flags.DEFINE_integer("seed", 0, "of --dataset: other rooms for each", 0)


def main(arguments: Sequence[str]) -> None:
  """Converts or renders, as the flags say."""
  no_arguments(arguments)
  if DATASET.value is not None:
    render()
  else:
    convert()


def render() -> None:
  """Renders a data set; --format and --input belong to the other form of the command."""
  if FORMAT.value is not None or INPUT.value is not None:
    raise UserError("--dataset renders a data set; it has no --format and no --input")
  command = shlex.join(["python", "-m", "spatial_jax.tools.build", *sys.argv[1:]])
  settings = build_settings(SOURCE.value, SEED.value, TASKS.value)
  build_numerical3d(to_path(OUT.value), settings, WORKERS.value, command)


def convert() -> None:
  """Converts, and prints how many rows of each question type there are."""
  if FORMAT.value is None:
    names = ", ".join(one.name for one in FORMATS)
    raise UserError(f"--format is missing: one of {names}; or give --dataset=numerical3d")
  if INPUT.value is None:
    raise UserError("--input is missing: a file of rows, or a folder of such files")
  fmt = find_format(FORMAT.value)
  media = to_path(MEDIA.value) if MEDIA.value else None
  path, out = to_path(INPUT.value), to_path(OUT.value)
  split = cast(Split | None, SPLIT.value)
  console = Console()
  with _progress(console) as on_progress:
    found = convert_files(fmt, path, out, media, LIMIT.value, split, on_progress)
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
  launch(main, "stopped; no rows were written, and a build of --dataset goes on with this command")
