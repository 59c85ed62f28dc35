"""Plots of the result table: scores per question type, and differences paired by question.

Every plot has two layouts: names left of the rows for a wide page, above the rows for a phone.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from spatial_jax.evaluate import results
from spatial_jax.evaluate.results import Cell, Paired, ResultTable
from spatial_jax.report import svg, wording

_ARROW_FROM = 0.03  # a shorter change has no arrow


class _RowText(NamedTuple):
  """The words of one row; `two_lines`: on a phone the numbers are below the name."""

  name: str
  numbers: str
  tooltip: str
  colour: str
  weight: str
  two_lines: bool


def dot_plot(table: ResultTable) -> Markup | None:
  """Scores per question type: an arrow from start to end, a tick for the median answer.

      all questions       1,024     |   o────►●══        ◦ other images    | median answer

  Greedy answers, else sampled ones; None if the table has no policy.
  """
  pair = next((pair for pair in results.END_AND_START if pair[0] in table.overall), None)
  if pair is None:
    return None
  count = 1 + len(table.rows)
  heights_in = 0.33 * count + 0.85, 0.48 * count + 1.15
  draw = functools.partial(_draw_dots, table, *pair)
  return svg.two_layouts(draw, heights_in, "scores per question type")


def forest_plot(paired: Sequence[Paired]) -> Markup | None:
  """Differences with their 95 % intervals around the line at 0; None without differences."""
  if not paired:
    return None
  heights_in = 0.33 * len(paired) + 0.5, 0.62 * len(paired) + 0.5
  draw = functools.partial(_draw_forest, paired)
  return svg.two_layouts(draw, heights_in, "differences paired by question")


def _draw_dots(table: ResultTable, end: str, start: str, phone: bool, axes: Axes) -> None:
  rows = [("all questions", "", sum(row.n for row in table.rows), table.overall)]
  rows += [(wording.type_name(r.question_type), r.question_type, r.n, r.cells) for r in table.rows]
  for y, (name, question_type, n, cells) in enumerate(rows):
    few = n < wording.FEW
    colour, weight = svg.MUTED if few else svg.INK, "bold" if y == 0 else "normal"
    text = _RowText(name, f"n = {n:,}", question_type, colour, weight, two_lines=False)
    _write_row(axes, y, text, phone)
    _draw_row(axes, y, cells.get(start), cells.get(end), svg.PALE if few else svg.ACCENT)
    _draw_baselines(axes, y, cells, svg.PALE if few else svg.MUTED)
  axes.set(xlim=(0, 1), xlabel="score")
  _finish(axes, len(rows), phone)
  columns = 2 if phone else 5
  handles = _dot_legend(table, start in table.overall)
  axes.figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _draw_row(axes: Axes, y: int, start: Cell | None, end: Cell | None, colour: str) -> None:
  """One question type; a column without a cell leaves a gap."""
  if end:
    axes.plot(
      [end.low, end.high], [y, y], color=colour, linewidth=7, alpha=0.28, solid_capstyle="butt"
    )
  if start and end and abs(end.mean - start.mean) >= _ARROW_FROM:
    style: Any = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.4, "shrinkA": 0}
    axes.annotate("", (end.mean, y), (start.mean, y), arrowprops=style | {"shrinkB": 3.5})
  if start:
    axes.plot(start.mean, y, "o", color=colour, markersize=3.2, clip_on=False)
  if end:
    axes.plot(end.mean, y, "o", color=colour, markersize=6.5, clip_on=False)


def _draw_baselines(axes: Axes, y: int, cells: Mapping[str, Cell], colour: str) -> None:
  if median := cells.get(results.MEDIAN):
    axes.plot([median.mean] * 2, [y - 0.27, y + 0.27], color=colour, linewidth=1.6, zorder=1)
  if other := cells.get(results.END_OTHER_IMAGE):
    ring: Any = {"color": "white", "markeredgecolor": colour, "clip_on": False, "zorder": 1}
    axes.plot(other.mean, y, "o", markersize=6, **ring)


def _dot_legend(table: ResultTable, has_start: bool) -> list[Line2D]:
  mark: Any = {"linestyle": "none", "color": svg.ACCENT, "marker": "o"}
  handles = [Line2D([], [], markersize=3.2, label="start", **mark)] if has_start else []
  handles += [
    Line2D([], [], markersize=6.5, label="end" if has_start else "policy", **mark),
    Line2D([], [], color=svg.WASH, linewidth=7, label="95 % interval"),
  ]
  if results.MEDIAN in table.overall:
    tick: Any = {"marker": "|", "markersize": 10, "markeredgewidth": 1.6, "linestyle": "none"}
    handles.append(Line2D([], [], color=svg.MUTED, label="median answer", **tick))
  if results.END_OTHER_IMAGE in table.overall:
    hollow: Any = mark | {"color": "white", "markeredgecolor": svg.MUTED}
    handles.append(Line2D([], [], markersize=6, label="images of other rooms", **hollow))
  return handles


def _draw_forest(paired: Sequence[Paired], phone: bool, axes: Axes) -> None:
  for y, difference in enumerate(paired):
    colour = svg.MUTED if difference.verb == "shows no clear change" else svg.ACCENT
    label, ends = wording.typeset(difference.label), wording.interval(difference)
    numbers = f"{wording.signed(difference.mean)}  ({ends})"
    text = _RowText(label, numbers, "", svg.INK, "normal", two_lines=True)
    _write_row(axes, y, text, phone)
    axes.plot([difference.low, difference.high], [y, y], color=colour, linewidth=1.8)
    axes.plot(difference.mean, y, "o", color=colour, markersize=6.5)
  low = min(0.0, *(d.low for d in paired))
  high = max(0.0, *(d.high for d in paired))
  margin = 0.06 * (high - low) + 1e-3
  axes.axvline(0, color=svg.INK, linewidth=1)
  axes.set(xlim=(low - margin, high + margin), xlabel="difference, 95 % interval")
  _finish(axes, len(paired), phone)


def _write_row(axes: Axes, y: float, text: _RowText, phone: bool) -> None:
  """Writes the name of a row on the left and its numbers on the right, or both above the row."""
  place: Any = {"transform": axes.get_yaxis_transform(), "va": "center", "zorder": 3}
  if phone:
    place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # hides grid lines
  name: Any = {"color": text.colour, "fontweight": text.weight, "gid": svg.tooltip(text.tooltip)}
  numbers: Any = {"color": svg.MUTED, "fontsize": svg.SMALL_PT}
  if not phone:
    axes.text(-0.02, y, text.name, ha="right", **place, **name)
    axes.text(1.02, y, text.numbers, ha="left", **place, **numbers)
    return
  axes.text(0, y - (0.52 if text.two_lines else 0.42), text.name, ha="left", **place, **name)
  if text.two_lines:
    axes.text(0, y - 0.24, text.numbers, ha="left", **place, **numbers)
  else:
    axes.text(1, y - 0.42, text.numbers, ha="right", **place, **numbers)


def _finish(axes: Axes, count: int, phone: bool) -> None:
  """Rows from top to bottom, no frame on the left."""
  axes.set(ylim=(count - 0.5, -0.8 if phone else -0.5), yticks=[])
  axes.grid(visible=False, axis="y")
  axes.spines["left"].set_visible(False)
