"""The result of `tools.check` on the console."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from spatial_jax.data.jsonl import BadRow
from spatial_jax.report.data_page import number_text
from spatial_jax.report.data_summary import DataSummary

_WIDTH = 132  # of the output to a file, which has no width of its own
_MOST_BAD, _MOST_LINES, _MOST_CHARS = 20, 40, 300


def make_console() -> Console:
  """Standard output."""
  console = Console(highlight=False)
  return console if console.is_terminal else Console(width=_WIDTH, highlight=False)


@contextlib.contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Callable[[], None]]:
  """Yields a function to call after each of `total` items; a bar, or nothing in a file."""
  if not console.is_terminal:
    yield lambda: None
    return
  with Progress(console=console, transient=True) as bar:
    task = bar.add_task(what, total=total)
    yield lambda: bar.advance(task)


def printable(text: str) -> str:
  """Text of a data file on one line: control characters and lone surrogates are escaped."""
  return "".join(
    char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
  )


def show_bad_rows(bad: Sequence[BadRow], fields: Sequence[tuple[str, int]], out: Console) -> None:
  """Prints how many rows are bad by field, and the first ones."""
  counts = ", ".join(f"{field} {count:,}" for field, count in fields)
  _print(out, f"{len(bad):,} bad row{'s' if len(bad) > 1 else ''} ({counts})", "bold red")
  for row in bad[:_MOST_BAD]:
    _print(out, f"  {row}")
  if len(bad) > _MOST_BAD:
    _print(out, f"  and {len(bad) - _MOST_BAD:,} more")
  out.print()


def show(summary: DataSummary, warnings: Sequence[str], out: Console) -> None:
  """Prints the tables and the warnings."""
  rows = f"{summary.good:,} of {summary.good + len(summary.bad):,} rows can be used"
  _print(out, f"{summary.name}: {rows}", "bold")
  scenes = f"{summary.scenes[0]:,} and {summary.scenes[1]:,} scenes"
  _print(out, f"{summary.train:,} training rows, {summary.held_out:,} held-out rows ({scenes})")
  media, files = summary.media, f"{summary.files:,} files, {len(summary.missing):,} missing"
  _print(
    out,
    f"{media.images:,} images, {media.videos:,} video files, {media.frame_lists:,} lists of "
    f"{media.frames:,} frames ({files})",
  )
  low, median, high = (f"{value:g}" for value in summary.words)
  _print(out, f"questions have {low} to {high} words, in the median {median}")
  out.print(_types(summary))
  if summary.numbers:
    out.print(_numbers(summary))
  if summary.letters:
    out.print(_letters(summary))
  for text in warnings:
    _print(out, f"warning: {text}", "yellow")


def _types(summary: DataSummary) -> Table:
  grid = _grid(("question type", "kind"), ("training", "held-out", "words"), ("constant answer",))
  grid.add_column("its score", justify="right")
  for line in summary.types[:_MOST_LINES]:
    low, _, high = (f"{value:g}" for value in line.words)
    words = low if low == high else f"{low} to {high}"
    counts = (f"{line.train:,}", f"{line.held_out:,}", words)
    _add(grid, line.name, line.kind, *counts, line.constant, f"{line.score:.2f}")
  return _with_rest(grid, len(summary.types))


def _numbers(summary: DataSummary) -> Table:
  grid = _grid(("numbers", "unit"), ("rows", "smallest", "median", "largest"))
  for line in summary.numbers[:_MOST_LINES]:
    values = map(number_text, line.range)
    _add(grid, line.name, line.unit or "none", f"{len(line.value_N):,}", *values)
  return _with_rest(grid, len(summary.numbers))


def _letters(summary: DataSummary) -> Table:
  letters = max((tuple(line.shares) for line in summary.letters), key=len)
  grid = _grid(("choices",), ("rows", "chance", *letters))
  for line in summary.letters[:_MOST_LINES]:
    shares = (f"{line.shares[a]:.0%}" if a in line.shares else "" for a in letters)
    _add(grid, line.name, f"{line.rows:,}", f"{line.expected:.0%}", *shares)
  return _with_rest(grid, len(summary.letters))


def _grid(texts: Sequence[str], numbers: Sequence[str], more: Sequence[str] = ()) -> Table:
  grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  for name in texts:
    grid.add_column(name, overflow="fold", max_width=40)
  for name in numbers:
    grid.add_column(name, justify="right", no_wrap=True)
  for name in more:
    grid.add_column(name, overflow="ellipsis", no_wrap=True, max_width=30)
  return grid


def _add(grid: Table, *cells: str) -> None:
  grid.add_row(*(Text(_short(cell)) for cell in cells))


def _with_rest(grid: Table, lines: int) -> Table:
  if lines > _MOST_LINES:
    _add(grid, f"and {lines - _MOST_LINES:,} more")
  return grid


def _print(out: Console, text: str, style: str = "") -> None:
  """Prints one line of text that may come from the data: no markup, no control characters."""
  out.print(Text(_short(text)), style=style, soft_wrap=True)


def _short(text: str) -> str:
  text = printable(text)
  return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}..."
