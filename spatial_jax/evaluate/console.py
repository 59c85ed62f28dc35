"""The result table for the terminal."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from spatial_jax.evaluate.results import Cell, Paired, ResultTable, headline

_WIDTH = 118  # of the output to a file, which has no width of its own
_CELL = 9  # "sampled" on one line


def make_console() -> Console:
  """Standard output; a file is as wide as the table."""
  console = Console()
  return console if console.is_terminal else Console(width=_WIDTH)


def show(table: ResultTable, heading: str | None, console: Console) -> None:
  """Prints heading, table, differences, notes, and last the headline."""
  if heading:
    console.print(heading, style="bold")
  console.print(_scores(table))
  if table.paired:
    console.print(_differences(table.paired))
  for note in table.notes:
    console.print(note, markup=False)
  if sentence := headline(table):
    console.print(sentence, style="bold", markup=False)


def show_behaviour(found: Mapping[str, Mapping[str, float]], console: Console) -> None:
  """Prints some behaviour statistics, one line per column of the table."""
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
  grid.add_row("answers parsed", "", *(f"{table.parsed[key]:.0%}" for key in keys))
  for row in table.summary:
    grid.add_row(row.question_type, str(row.n), *_means([row.cells[key] for key in keys]))
  return grid


def _means(cells: Sequence[Cell]) -> list[str]:
  return [f"{cell.mean:.3f}" for cell in cells]


def _differences(paired: Sequence[Paired]) -> Table:
  grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  grid.add_column("difference, paired by question")
  for name in ("mean", "95 % interval"):
    grid.add_column(name, justify="right")
  for line in paired:
    grid.add_row(line.label, f"{line.mean:+.3f}", f"{line.low:+.3f} to {line.high:+.3f}")
  return grid
