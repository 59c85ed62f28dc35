"""The table of an exam for the terminal."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from spatial_jax.evaluate.results import Cell, Paired, ResultTable

_WIDTH = 118  # where the output is a file, and so has no width of its own
_CELL = 8  # "sampled" on one line


def make_console() -> Console:
  """Standard output; a file is as wide as the table."""
  console = Console()
  return console if console.is_terminal else Console(width=_WIDTH)


def show(table: ResultTable, heading: str | None, console: Console) -> None:
  """Prints what stands above the table, the table, its differences and its notes."""
  if heading:
    console.print(heading, style="bold")
  console.print(_scores(table))
  if table.paired:
    console.print(_differences(table.paired))
  for note in table.notes:
    console.print(note, markup=False)


def show_behaviour(found: Mapping[str, Mapping[str, float]], console: Console) -> None:
  """Prints a few of the behaviour statistics, one line per way of answering."""
  names = ("parsed_share", "drawing_share", "operations", "executable_share", "turns", "tokens")
  grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  grid.add_column("behaviour")
  for name in names:
    grid.add_column(name.replace("_", " "), justify="right")
  for key, statistics in found.items():
    grid.add_row(key.replace("_", " "), *(f"{statistics[name]:.2f}" for name in names))
  console.print(grid)


def _scores(table: ResultTable) -> Table:
  grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  grid.add_column("score", no_wrap=True)
  grid.add_column("n", justify="right", no_wrap=True)
  for column in table.columns:
    grid.add_column(column.label, justify="right", max_width=_CELL)
  keys = [column.key for column in table.columns]
  for row in table.rows:
    name = row.question_type.replace("_", " ")
    grid.add_row(name, str(row.n), *_means([row.cells[key] for key in keys]))
  grid.add_section()
  overall = [table.overall[key] for key in keys]
  grid.add_row("overall", str(sum(row.n for row in table.rows)), *_means(overall), style="bold")
  grid.add_row("95 % interval, from", "", *(f"{cell.low:.3f}" for cell in overall))
  grid.add_row("to", "", *(f"{cell.high:.3f}" for cell in overall))
  for row in table.summary:
    grid.add_row(row.question_type, str(row.n), *_means([row.cells[key] for key in keys]))
  return grid


def _means(cells: Sequence[Cell]) -> list[str]:
  return [f"{cell.mean:.3f}" for cell in cells]


def _differences(paired: Sequence[Paired]) -> Table:
  grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  grid.add_column("paired difference")
  for name in ("mean", "95 % interval"):
    grid.add_column(name, justify="right")
  grid.add_column("required")
  for line in paired:
    interval = f"{line.low:+.3f} to {line.high:+.3f}"
    verdict = ""
    if line.met is not None:
      verdict = " [green]met[/]" if line.met else " [red]not met[/]"
    grid.add_row(line.label, f"{line.mean:+.3f}", interval, f"{line.required or ''}{verdict}")
  return grid
