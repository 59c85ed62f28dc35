"""One self-contained HTML file about a data file: tables, histograms, examples.

Every text of the data is escaped; the page loads nothing from outside and runs no script.
"""

import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from spatial_jax.report import svg
from spatial_jax.report.data_examples import TaskView
from spatial_jax.report.data_summary import DataSummary, range_of
from spatial_jax.report.report import page_template, style_sheet
from spatial_jax.workdir import write_text

FILE = "check.html"

_PANEL_IN = (3.4, 1.9)  # width and height of a histogram
_MOST_PANELS, _MOST_LINES, _MOST_BAD = 24, 200, 100  # on the page
_BINS = 24
_LOG_RATIO = 200.0  # of the largest to the smallest number: from it on the axis is logarithmic


def write_page(
  path: pathlib.Path, summary: DataSummary, warnings: Sequence[str], examples: Sequence[TaskView]
) -> None:
  """Writes the page.

  Raises:
    UserError: I/O, if the file cannot be written.
  """
  page = page_template("data.html.jinja").render(
    summary=summary,
    warnings=warnings,
    examples=examples,
    panels=[(line, histogram(line.value_N)) for line in summary.numbers[:_MOST_PANELS]],
    most_lines=_MOST_LINES,
    bad=summary.bad[:_MOST_BAD],
    number=number_text,
    css=style_sheet("report.css") + style_sheet("data.css"),
  )
  # A lone surrogate in a text has no UTF-8 form; the page shows a question mark.
  write_text(path, page.encode("utf-8", "replace").decode("utf-8"))


def number_text(value: float) -> str:
  """A number with up to four digits: "2.35", "1,200", "3e+20"."""
  return f"{value:,.10g}" if value == round(value) and abs(value) < 1e9 else f"{value:.4g}"


def histogram(value_N: np.ndarray) -> Markup | None:
  """The histogram of numbers as inline SVG; None if all are equal."""
  edges, is_log = bin_edges(value_N)
  if edges is None:
    return None
  draw = functools.partial(_draw, value_N, edges, is_log)
  return svg.axes_svg(draw, *_PANEL_IN, "histogram of the numbers")


def bin_edges(value_N: np.ndarray) -> tuple[np.ndarray | None, bool]:
  """Edges of the bins, None if all numbers are equal, and whether they are logarithmic.

  Few whole numbers have a bin each.
  """
  low, _, high = range_of(value_N)
  if np.array_equal(value_N, value_N.round()) and 0 < high - low <= _BINS:
    return np.arange(low, high + 2) - 0.5, False
  is_log = low > 0 and high > _LOG_RATIO * low
  space = np.geomspace if is_log else np.linspace
  edges = space(low, high, _BINS + 1)
  return (edges if (np.diff(edges) > 0).all() else None), is_log


def _draw(value_N: np.ndarray, edges: np.ndarray, is_log: bool, axes: Axes) -> None:
  axes.hist(value_N, bins=edges.tolist(), color=svg.WASH, edgecolor="white", linewidth=0.6)
  axes.axvline(float(np.median(value_N)), color=svg.ACCENT, linewidth=1.6)
  axes.grid(visible=False, axis="x")
  if is_log:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=5))
    axes.xaxis.set_minor_formatter(NullFormatter())
  else:
    whole = bool(np.array_equal(value_N, value_N.round()))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
  axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
  axes.set_ylabel("rows")
