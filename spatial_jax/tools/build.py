"""Builds a data set: converts the files of a foreign format into rows of docs/data.md.

python -m spatial_jax.tools.build --format=NAME --input=PATH --out=DIR [--media=FOLDER] [--limit=N]
  [--split=train|held_out]

docs/formats.md has the formats.
"""

import contextlib
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
from spatial_jax.workdir import to_path

FORMAT = flags.DEFINE_string("format", None, "format of --input; docs/formats.md has the list")
INPUT = flags.DEFINE_string("input", None, "file of rows, or folder of such files", required=True)
OUT = flags.DEFINE_string("out", None, "folder to write rows.jsonl and media into", required=True)
MEDIA = flags.DEFINE_string(
  "media", None, "folder that paths of the source are relative to (default: folder of each file)"
)
LIMIT = flags.DEFINE_integer("limit", None, "rows to write at most", lower_bound=1)
SPLIT = flags.DEFINE_enum("split", None, ["train", "held_out"], "split of all rows")


def main(arguments: Sequence[str]) -> None:
  """Converts, and prints how many rows of each question type there are."""
  no_arguments(arguments)
  if FORMAT.value is None:
    names = ", ".join(one.name for one in FORMATS)
    raise UserError(f"--format is missing: one of {names}")
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
  launch(main, "stopped; no rows were written")
