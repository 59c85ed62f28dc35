"""The style of all figures, and matplotlib figures as inline SVG."""

import functools
import html
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, MUTED, PALE = "#1d2530", "#55606e", "#7a8594", "#c9d0d9"
ACCENT, WASH = "#1f6f8b", "#bcd7e0"

SMALL_PT = 9.0  # 12 CSS pixels at the natural size of a figure
_TOOLTIP = "tooltip:"

_STYLE: Any = {
  "svg.fonttype": "none",  # text stays text, in the font of the page
  "svg.hashsalt": "report",  # equal data give equal bytes
  "font.size": 9.75,  # 13 CSS pixels at the natural size of a figure
  "text.color": INK,
  "text.parse_math": False,  # names of question types may hold a dollar sign
  "axes.edgecolor": PALE,
  "axes.labelcolor": SOFT,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#e9edf1",
  "grid.linewidth": 0.8,
  "xtick.color": SOFT,
  "ytick.color": SOFT,
  "xtick.labelsize": SMALL_PT,
  "ytick.labelsize": SMALL_PT,
  "xtick.major.size": 0,
  "ytick.major.size": 0,
  "legend.frameon": False,
  "legend.fontsize": SMALL_PT,
}


def figure_svg(
  draw: Callable[[Figure], None], width_in: float, height_in: float, label: str
) -> Markup:
  """A figure as inline SVG; it shrinks with its column and is never enlarged.

  Args:
    draw: adds axes to an empty figure.
    width_in: natural width, inches of 96 CSS pixels.
    height_in: natural height, inches of 96 CSS pixels.
    label: describes the figure to a screen reader.
  """
  with mpl.rc_context(_STYLE):
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    draw(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
  text = buffer.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
  text = re.sub(rf'<g id="{_TOOLTIP}([^"]+)">', r"<g><title>\1</title>", text)
  text = re.sub(r'<g id="[^"]*">', "<g>", text)  # an id must not repeat on the page
  size = f'width="{96 * width_in:.0f}" role="img" aria-label="{html.escape(label)}"'
  text = re.sub(r'(<svg[^>]*?) width="[^"]*"', lambda match: f"{match[1]} {size}", text, count=1)
  return Markup(re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))


def axes_svg(draw: Callable[[Axes], None], width_in: float, height_in: float, label: str) -> Markup:
  """`figure_svg` of one plot."""
  return figure_svg(lambda figure: draw(figure.add_subplot()), width_in, height_in, label)


def two_layouts(
  draw: Callable[[bool, Axes], None], heights_in: tuple[float, float], label: str
) -> Markup:
  """A plot for a wide page and one for a phone; the style sheet shows one of them.

  Args:
    draw: called with False and the wide plot, and with True and that for a phone.
    heights_in: of both, inches.
    label: as in `figure_svg`.
  """
  wide, phone = (
    axes_svg(functools.partial(draw, is_phone), width_in, height_in, label)
    for is_phone, width_in, height_in in zip((False, True), (10.0, 3.7), heights_in, strict=True)
  )
  both = Markup('<div class="wide-only">{}</div><div class="phone-only">{}</div>')
  return both.format(wide, phone)


def tooltip(text: str) -> str:
  """The `gid` that gives an artist the tooltip `text`."""
  return f"{_TOOLTIP}{text}"
