"""Kinds of furniture: their sizes, their places in a room and their colours."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from spatial_jax.synthetic import furniture_parts as parts
from spatial_jax.synthetic.furniture_parts import COLOURS, Colour, Range, Size
from spatial_jax.synthetic.scene import Part

# "top": on other furniture; "table": at a table or desk, facing it.
Place = Literal["wall", "free", "top", "table"]

_BRIGHT = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
_SOFT = (*_BRIGHT, "white", "brown", "grey")
_WOODEN = ("brown", "white", "black", "grey", "red", "blue", "green", "yellow")
_PLAIN = ("white", "grey", "black")
_ANY = tuple(COLOURS)


@dataclasses.dataclass(frozen=True)
class Kind:
  """One kind of furniture.

  Attributes:
    category: its name in questions.
    places: possible places, the most frequent first.
    width_m, depth_m, height_m: ranges of the size of its box; None repeats the width.
    carries: whether other objects may stand on it.
    colours: its possible colours, names of COLOURS.
    build: (size_3 in metres, colour) -> parts, measured from the middle of the bottom.
  """

  category: str
  places: tuple[Place, ...]
  width_m: Range
  depth_m: Range | None
  height_m: Range | None
  carries: bool
  colours: tuple[str, ...]
  build: Callable[[Size, Colour], list[Part]]


def parts_of(kind: Kind, size_3: Size, colour: str) -> tuple[Part, ...]:
  """The parts of one object in its own frame, origin at the middle of its box."""
  return tuple(
    dataclasses.replace(
      part,
      centre_3=(part.centre_3[0], part.centre_3[1], round(part.centre_3[2] - size_3[2] / 2, 9)),
    )
    for part in kind.build(size_3, COLOURS[colour])
  )


def scaled(kind: Kind, scale: float) -> Kind:
  """The same furniture, `scale` times as large in every direction."""

  def build(size_3: Size, colour: Colour) -> list[Part]:
    w, d, h = size_3
    plain = kind.build((w / scale, d / scale, h / scale), colour)
    return [
      dataclasses.replace(
        part, centre_3=_times(part.centre_3, scale), half_3=_times(part.half_3, scale)
      )
      for part in plain
    ]

  width_m, depth_m, height_m = (
    range_m and (range_m[0] * scale, range_m[1] * scale)
    for range_m in (kind.width_m, kind.depth_m, kind.height_m)
  )
  return dataclasses.replace(kind, width_m=width_m, depth_m=depth_m, height_m=height_m, build=build)


def _times(values_3: Size, scale: float) -> Size:
  x, y, z = values_3
  return round(x * scale, 9), round(y * scale, 9), round(z * scale, 9)


KINDS: tuple[Kind, ...] = (
  Kind(
    "table", ("free", "wall"), (0.9, 1.6), (0.7, 0.95), (0.68, 0.78), True, _WOODEN, parts.table
  ),
  Kind("desk", ("wall",), (1.1, 1.6), (0.6, 0.75), (0.7, 0.78), True, _WOODEN, parts.desk),
  Kind(
    "chair",
    ("table", "free", "wall"),
    (0.42, 0.5),
    (0.44, 0.52),
    (0.8, 0.98),
    False,
    _ANY,
    parts.chair,
  ),
  Kind("stool", ("free", "table"), (0.3, 0.4), None, (0.42, 0.7), False, _ANY, parts.stool),
  Kind("sofa", ("wall", "free"), (1.4, 2.2), (0.8, 0.95), (0.72, 0.9), False, _SOFT, parts.sofa),
  Kind("bed", ("wall",), (0.96, 1.7), (1.95, 2.1), (0.8, 1.05), False, _BRIGHT, parts.bed),
  Kind("cabinet", ("wall",), (0.7, 1.5), (0.38, 0.5), (0.65, 1.1), True, _WOODEN, parts.cabinet),
  Kind(
    "nightstand",
    ("wall",),
    (0.4, 0.52),
    (0.36, 0.45),
    (0.45, 0.6),
    True,
    _WOODEN,
    parts.nightstand,
  ),
  Kind("shelf", ("wall",), (0.7, 1.2), (0.28, 0.36), (1.3, 2.0), False, _WOODEN, parts.shelf),
  Kind(
    "refrigerator",
    ("wall",),
    (0.58, 0.75),
    (0.6, 0.72),
    (1.5, 1.85),
    False,
    _PLAIN,
    parts.refrigerator,
  ),
  Kind(
    "washer",
    ("wall",),
    (0.55, 0.65),
    (0.52, 0.62),
    (0.82, 0.9),
    True,
    ("white", "grey"),
    parts.washer,
  ),
  Kind("lamp", ("free", "wall"), (0.34, 0.46), None, (1.35, 1.7), False, _BRIGHT, parts.lamp),
  Kind("lamp", ("top",), (0.2, 0.3), None, (0.36, 0.52), False, _BRIGHT, parts.lamp),
  Kind("monitor", ("top",), (0.48, 0.66), (0.18, 0.22), (0.42, 0.5), False, _PLAIN, parts.screen),
  Kind("tv", ("top", "wall"), (0.86, 1.25), (0.22, 0.28), (0.58, 0.8), False, _PLAIN, parts.screen),
  Kind("plant", ("wall", "free"), (0.4, 0.6), None, (0.76, 1.3), False, _SOFT, parts.plant),
  Kind("plant", ("top",), (0.18, 0.26), None, (0.3, 0.42), False, _SOFT, parts.plant),
  Kind("bin", ("wall", "free"), (0.26, 0.38), None, (0.32, 0.6), False, _ANY, parts.bin),
  Kind("ball", ("free", "top"), (0.2, 0.42), None, None, False, _BRIGHT, parts.ball),
  Kind(
    "box",
    ("free", "wall", "top"),
    (0.26, 0.5),
    (0.22, 0.4),
    (0.2, 0.42),
    False,
    _SOFT,
    parts.carton,
  ),
  Kind("vase", ("top", "wall"), (0.16, 0.24), None, (0.28, 0.5), False, _SOFT, parts.vase),
)
