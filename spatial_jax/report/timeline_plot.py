"""What the devices did during the rollouts of one step, from timeline.json."""

import functools
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path

from spatial_jax.report import svg

_Rectangle = tuple[float, float, float, float]  # left, bottom, right, top

# Bars of a slot: what its rollouts do. The strip above: the other programs of the devices.
_SLOT = {"decode": svg.ACCENT, "drawing": "#d9a441", "idle": "#eef1f4"}
_STRIP = {"encode_images": svg.INK, "prefill": svg.MUTED, "append": "#8a5a9e"}
_FILL = 0.9  # height of a full bar, in slots
_VISIBLE = 0.002  # share of the total time; shorter bars are not drawn


def timeline_figure(record: dict[str, Any]) -> Markup:
  """Slots over the seconds of the rollouts of one step; `record` is from `Timeline.record`."""
  height_in = 1.3 + min(0.12 * _slots(record), 4.0)
  draw = functools.partial(_draw, record)
  return svg.two_layouts(draw, (height_in, height_in), "programs on the devices over time")


def _slots(record: dict[str, Any]) -> int:
  return max((len(chunk["active"]) for chunk in record["chunks"]), default=1)


def _draw(record: dict[str, Any], phone: bool, axes: Axes) -> None:
  """The bar of a slot is filled by the share of its rollouts in each state."""
  bars = _slot_bars(record) | _strip_bars(record)
  handles = []
  for name, colour in (_SLOT | _STRIP).items():
    if rectangles := bars[name]:
      axes.add_patch(PathPatch(_path(rectangles), color=colour, linewidth=0))
      handles.append(Patch(color=colour, label=name.replace("_", " ")))
  axes.figure.legend(handles=handles, loc="outside upper left", ncols=3 if phone else 6)
  axes.set(xlim=(0, record["total_s"]), ylim=(0, sum(_strip(record))), xlabel="seconds", yticks=[])
  axes.set_ylabel(f"{_slots(record)} slots")
  axes.grid(visible=False)


def _slot_bars(record: dict[str, Any]) -> dict[str, list[_Rectangle]]:
  """Rectangles by what the rollouts of a slot do."""
  bars: dict[str, list[_Rectangle]] = {name: [] for name in _SLOT}
  for chunk in record["chunks"]:
    start_s, end_s = chunk["start_s"], chunk["end_s"]
    if end_s - start_s < _VISIBLE * record["total_s"]:
      continue
    for slot, (active, drawing) in enumerate(zip(chunk["active"], chunk["drawing"], strict=True)):
      counts = {"decode": active, "drawing": drawing, "idle": chunk["group"] - active - drawing}
      bottom = float(slot)
      for name, count in counts.items():
        top = bottom + _FILL * count / chunk["group"]
        if count > 0:
          bars[name].append((start_s, bottom, end_s, top))
        bottom = top
  return bars


def _strip_bars(record: dict[str, Any]) -> dict[str, list[_Rectangle]]:
  """Rectangles by the other programs, in a strip above the slots."""
  bottom, height = _strip(record)
  least_s = _VISIBLE * record["total_s"]
  return {
    name: [
      (span["start_s"], bottom, span["end_s"], bottom + height)
      for span in record["programs"]
      if span["program"] == name and span["end_s"] - span["start_s"] >= least_s
    ]
    for name in _STRIP
  }


def _strip(record: dict[str, Any]) -> tuple[float, float]:
  """Bottom and height of the strip above the slots."""
  return _slots(record) + 0.3, max(0.06 * _slots(record), 0.8)


def _path(rectangles: list[_Rectangle]) -> Path:
  """One path of all rectangles: much smaller than a patch for each."""
  corners = [
    ((x, y), (x, top), (right, top), (right, y), (x, y)) for x, y, right, top in rectangles
  ]
  codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
  return Path(np.reshape(corners, (-1, 2)), codes * len(rectangles))
