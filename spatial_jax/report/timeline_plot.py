"""What the devices did during the rollouts of one step, from timeline.json."""

import functools
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from spatial_jax.report import svg

# Bars of a slot: what its rollouts do. The strip above: the other programs of the devices.
_SLOT = {"decode": svg.ACCENT, "drawing": "#d9a441", "idle": "#eef1f4"}
_STRIP = {"encode_images": svg.INK, "prefill": svg.MUTED, "append": "#8a5a9e"}
_VISIBLE = 0.002  # share of the total time; shorter bars are not drawn


def timeline_figure(record: dict[str, Any], width_in: float) -> Markup:
  """Slots over the seconds of the rollouts of one step.

  Args:
    record: from `Timeline.record`.
    width_in: of the figure, inches.
  """
  height_in = 1.3 + min(0.12 * _slots(record), 4.0)
  draw = functools.partial(_draw, record, 6 if width_in > 5 else 3)
  return svg.axes_svg(draw, width_in, height_in, "programs on the devices over time")


def _slots(record: dict[str, Any]) -> int:
  return max((len(chunk["active"]) for chunk in record["chunks"]), default=1)


def _draw(record: dict[str, Any], columns: int, axes: Axes) -> None:
  """The bar of a slot is filled by the share of its rollouts in each state."""
  present = set()
  least_s = _VISIBLE * record["total_s"]
  for chunk in record["chunks"]:
    length_s = chunk["end_s"] - chunk["start_s"]
    active_B = np.asarray(chunk["active"]) / chunk["group"]
    drawing_B = np.asarray(chunk["drawing"]) / chunk["group"]
    bottom_B = np.arange(len(active_B), dtype=np.float64)
    shares = {"decode": active_B, "drawing": drawing_B, "idle": 1 - active_B - drawing_B}
    for name, share_B in shares.items():
      style: Any = {"bottom": bottom_B, "align": "edge", "color": _SLOT[name], "linewidth": 0}
      if length_s >= least_s and share_B.max(initial=0) > 0:
        present.add(name)
        axes.bar(chunk["start_s"], 0.9 * share_B, length_s, **style)
      bottom_B = bottom_B + 0.9 * share_B
  slots = _slots(record)
  strip = (slots + 0.3, max(0.06 * slots, 0.8))
  for program, colour in _STRIP.items():
    found = [span for span in record["programs"] if span["program"] == program]
    spans = [(span["start_s"], span["end_s"] - span["start_s"]) for span in found]
    if spans := [(start_s, length_s) for start_s, length_s in spans if length_s >= least_s]:
      present.add(program)
      axes.broken_barh(spans, strip, color=colour, linewidth=0)
  colours = {name: colour for name, colour in (_SLOT | _STRIP).items() if name in present}
  handles = [Patch(color=colour, label=name.replace("_", " ")) for name, colour in colours.items()]
  axes.figure.legend(handles=handles, loc="outside upper left", ncols=columns)
  axes.set(xlim=(0, record["total_s"]), ylim=(0, sum(strip)), xlabel="seconds", yticks=[])
  axes.set_ylabel(f"{slots} slots")
  axes.grid(visible=False)
