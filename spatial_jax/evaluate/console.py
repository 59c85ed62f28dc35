"""The progress and the result table of an evaluation on the console."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from spatial_jax.evaluate.results import Cell, ResultTable, headline

_WIDTH = 132  # of the output to a file, which has no width of its own
_CELL = 9  # "sampled" on one line


def make_console() -> Console:
  """Standard output; a file is as wide as the table."""
  console = Console()
  return console if console.is_terminal else Console(width=_WIDTH)


@contextlib.contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[], None]]:
  """Yields a function to call after each of `total` batches: a bar, or lines in a file."""
  if console.is_terminal:
    with Progress(console=console, transient=True) as bar:
      task = bar.add_task("evaluating", total=total)
      yield lambda: bar.advance(task)
    return
  lines = (f"evaluating {done}/{total}" for done in itertools.count())
  console.print(next(lines), highlight=False)
  yield lambda: console.print(next(lines), highlight=False)


def show(table: ResultTable, heading: str | None, console: Console) -> None:
  """Prints heading, table, differences, notes, and last the headline."""
  if heading:
    console.print(heading, style="bold")
  console.print(_scores(table))
  if table.paired:
    grid = _grid("difference, paired by question", "mean", "95 % interval")
    for line in table.paired:
      grid.add_row(line.label, f"{line.mean:+.3f}", f"{line.low:+.3f} to {line.high:+.3f}")
    console.print(grid)
  for note in table.notes:
    console.print(note, markup=False)
  if sentence := headline(table):
    console.print(sentence, style="bold", markup=False)


def show_behaviour(found: Mapping[str, Mapping[str, float]], console: Console) -> None:
  """Prints some behaviour statistics, one line per column of the table."""
  names = ("parsed_share", "drawing_share", "operations", "executable_share", "turns", "tokens")
  grid = _grid("behaviour", *(name.replace("_", " ") for name in names))
  for key, statistics in found.items():
    grid.add_row(key.replace("_", " "), *(f"{statistics[name]:.2f}" for name in names))
  console.print(grid)


def _scores(table: ResultTable) -> Table:
  grid = _grid("score", "n")
  for column in table.columns:
    grid.add_column(column.label, justify="right", max_width=_CELL, overflow="fold")

  def add(name: str, n: int, cells: Mapping[str, Cell], style: str = "") -> None:
    means = (f"{cells[column.key].mean:.3f}" for column in table.columns)
    grid.add_row(name, str(n), *means, style=style)

  for row in table.rows:
    add(row.question_type.replace("_", " "), row.n, row.cells)
  grid.add_section()
  add("overall", sum(row.n for row in table.rows), table.overall, "bold")
  overall = [table.overall[column.key] for column in table.columns]
  grid.add_row("95 % interval, from", "", *(f"{cell.low:.3f}" for cell in overall))
  grid.add_row("to", "", *(f"{cell.high:.3f}" for cell in overall))
  parsed = (f"{table.parsed[column.key]:.0%}" for column in table.columns)
  grid.add_row("answers parsed", "", *parsed)
  for row in table.summary:
    add(row.question_type, row.n, row.cells)
  return grid


def _grid(first: str, *numbers: str) -> Table:
  """An empty table: one column of text, then columns of numbers."""
  grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  grid.add_column(first, no_wrap=True)
  for name in numbers:
    grid.add_column(name, justify="right")
  return grid
