"""Furniture: for each kind its sizes, where it may stand, its colours, and how it is built from parts.

An object's own frame: x along its width, y out of its front, z up. Builders work from the middle of the
bottom, so that z counts from the floor; the parts fill the box of the object exactly.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

from spatial_jax.data.scenes import Part

Place = Literal["wall", "free", "top", "seat"]  # "seat": at a table or desk, facing it
Colour = tuple[int, int, int]
Range = tuple[float, float]
Size = tuple[float, float, float]

COLOURS: dict[str, Colour] = {
  "red": (200, 70, 62),
  "orange": (232, 140, 58),
  "yellow": (236, 204, 84),
  "green": (96, 158, 98),
  "blue": (74, 122, 188),
  "purple": (138, 98, 168),
  "pink": (232, 156, 178),
  "brown": (146, 104, 74),
  "white": (240, 238, 232),
  "grey": (146, 149, 154),
  "black": (54, 54, 60),
}
_BRIGHT = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
_WOODEN = ("brown", "white", "black", "grey", "red", "blue", "green", "yellow")
_PLAIN = ("white", "grey", "black")
_WOOD: Colour = (170, 128, 90)
_METAL: Colour = (120, 122, 128)
_DARK: Colour = (40, 42, 50)
_CREAM: Colour = (244, 240, 230)
_LEAF: tuple[Colour, ...] = ((70, 128, 66), (92, 150, 78), (56, 112, 62))


@dataclasses.dataclass(frozen=True)
class Kind:
  """One kind of furniture.

  Attributes:
    category: what questions call it.
    places: where it may stand, the likeliest first.
    width_m, depth_m, height_m: ranges of its box; None repeats the width.
    carries: other things may stand on it.
    colours: names of COLOURS it may have.
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
      part, centre_3=(part.centre_3[0], part.centre_3[1], round(part.centre_3[2] - size_3[2] / 2, 9))
    )
    for part in kind.build(size_3, COLOURS[colour])
  )


def _part(shape: str, x: Range, y: Range, z: Range, colour: Colour) -> Part:
  """A part from its extents along the three axes."""
  return Part(
    shape,
    (round(sum(x) / 2, 9), round(sum(y) / 2, 9), round(sum(z) / 2, 9)),
    (round((x[1] - x[0]) / 2, 9), round((y[1] - y[0]) / 2, 9), round((z[1] - z[0]) / 2, 9)),
    colour,
  )


def _box(x: Range, y: Range, z: Range, colour: Colour) -> Part:
  return _part("box", x, y, z, colour)


def _round(shape: str, radius: float, z: Range, colour: Colour, x: float = 0.0, y: float = 0.0) -> Part:
  return _part(shape, (x - radius, x + radius), (y - radius, y + radius), z, colour)


def _tint(colour: Colour, factor: float) -> Colour:
  """Darker (factor < 1) or, towards white, lighter (factor > 1)."""
  if factor <= 1:
    return (round(colour[0] * factor), round(colour[1] * factor), round(colour[2] * factor))
  red, green, blue = (round(c + (255 - c) * (factor - 1)) for c in colour)
  return (red, green, blue)


def _legs(w: float, d: float, top: float, thick: float, inset: float, colour: Colour) -> list[Part]:
  """Four square legs from the floor to `top`."""
  x, y = w / 2 - inset, d / 2 - inset
  return [
    _box(
      (sx * x - thick * (sx > 0), sx * x + thick * (sx < 0)),
      (sy * y - thick * (sy > 0), sy * y + thick * (sy < 0)),
      (0.0, top),
      colour,
    )
    for sx in (-1, 1)
    for sy in (-1, 1)
  ]


def _table(size: Size, colour: Colour) -> list[Part]:
  w, d, h = size
  top = _box((-w / 2, w / 2), (-d / 2, d / 2), (h - 0.05, h), colour)
  return [top, *_legs(w, d, h - 0.05, 0.06, 0.04, _tint(colour, 0.8))]


def _desk(size: Size, colour: Colour) -> list[Part]:
  w, d, h = size
  side = _tint(colour, 0.88)
  top = _box((-w / 2, w / 2), (-d / 2, d / 2), (h - 0.04, h), colour)
  left = _box((-w / 2 + 0.02, -w / 2 + 0.06), (-d / 2 + 0.02, d / 2 - 0.02), (0.0, h - 0.04), side)
  drawers = (w / 2 - 0.42, w / 2 - 0.02)
  block = _box(drawers, (-d / 2 + 0.02, d / 2 - 0.04), (0.0, h - 0.04), side)
  fronts = [
    _box(
      (drawers[0] + 0.02, drawers[1] - 0.02),
      (d / 2 - 0.04, d / 2 - 0.025),
      ((h - 0.06) * step / 3 + 0.02, (h - 0.06) * (step + 1) / 3),
      _tint(colour, 1.2),
    )
    for step in range(3)
  ]
  panel = _box((-w / 2 + 0.06, drawers[0]), (-d / 2 + 0.03, -d / 2 + 0.05), (h * 0.35, h - 0.04), side)
  return [top, left, block, panel, *fronts]


def _chair(size: Size, colour: Colour) -> list[Part]:
  w, d, h = size
  seat_m = 0.48 * h
  back = _box((-w / 2 + 0.02, w / 2 - 0.02), (-d / 2, -d / 2 + 0.05), (seat_m + 0.1, h), colour)
  posts = [
    _box((x - 0.02, x + 0.02), (-d / 2 + 0.01, -d / 2 + 0.04), (seat_m, seat_m + 0.1), _WOOD)
    for x in (-w / 2 + 0.06, w / 2 - 0.06)
  ]
  seat = _box((-w / 2, w / 2), (-d / 2, d / 2), (seat_m - 0.06, seat_m), colour)
  return [seat, back, *posts, *_legs(w, d, seat_m - 0.06, 0.04, 0.02, _WOOD)]


def _stool(size: Size, colour: Colour) -> list[Part]:
  w, _, h = size
  seat = _round("cylinder", w / 2, (h - 0.07, h), colour)
  foot = _round("cylinder", w * 0.42, (0.0, 0.03), _METAL)
  return [seat, foot, _round("cylinder", 0.03, (0.03, h - 0.07), _METAL)]


def _sofa(size: Size, colour: Colour) -> list[Part]:
  w, d, h = size
  arm, back, seat = 0.16, 0.22, 0.42
  inner = (-w / 2 + arm, w / 2 - arm)
  cushions = 2 if w < 1.8 else 3
  step = (inner[1] - inner[0]) / cushions
  low = [
    _box((-w / 2 + 0.04, w / 2 - 0.04), (-d / 2 + 0.04, d / 2 - 0.04), (0.0, 0.08), _DARK),
    _box((-w / 2, w / 2), (-d / 2, d / 2), (0.08, 0.26), _tint(colour, 0.85)),
    _box(inner, (-d / 2, -d / 2 + back), (0.26, h), colour),
    _box((-w / 2, inner[0]), (-d / 2, d / 2), (0.26, 0.6), _tint(colour, 0.93)),
    _box((inner[1], w / 2), (-d / 2, d / 2), (0.26, 0.6), _tint(colour, 0.93)),
  ]
  return low + [
    _box(
      (inner[0] + step * i + 0.01, inner[0] + step * (i + 1) - 0.01),
      (-d / 2 + back, d / 2 - 0.01),
      (0.26, seat),
      _tint(colour, 1.12),
    )
    for i in range(cushions)
  ]


def _bed(size: Size, colour: Colour) -> list[Part]:
  w, d, h = size
  mattress = 0.5
  pillows = [-w / 4, w / 4] if w > 1.2 else [0.0]
  return [
    _box((-w / 2, w / 2), (-d / 2, -d / 2 + 0.07), (0.0, h), _WOOD),
    _box((-w / 2, w / 2), (-d / 2 + 0.07, d / 2), (0.1, 0.28), _WOOD),
    *_legs(w, d, 0.1, 0.08, 0.03, _tint(_WOOD, 0.7)),
    _box((-w / 2 + 0.03, w / 2 - 0.03), (-d / 2 + 0.07, d / 2 - 0.03), (0.28, mattress), _CREAM),
    _box((-w / 2 + 0.01, w / 2 - 0.01), (-d / 2 + 0.65, d / 2 - 0.01), (0.3, mattress + 0.04), colour),
    *(
      _part(
        "sphere", (x - 0.28, x + 0.28), (-d / 2 + 0.12, -d / 2 + 0.52), (0.44, 0.64), (250, 248, 244)
      )
      for x in pillows
    ),
  ]


def _cabinet(size: Size, colour: Colour) -> list[Part]:
  w, d, h = size
  front = (d / 2 - 0.035, d / 2 - 0.02)
  doors = 2 if w < 1.0 else 3
  step = (w - 0.04) / doors
  parts = [
    _box((-w / 2 + 0.02, w / 2 - 0.02), (-d / 2 + 0.02, d / 2 - 0.06), (0.0, 0.07), _DARK),
    _box((-w / 2, w / 2), (-d / 2, d / 2 - 0.035), (0.07, h - 0.03), _tint(colour, 0.85)),
    _box((-w / 2, w / 2), (-d / 2, d / 2), (h - 0.03, h), colour),
  ]
  for i in range(doors):
    left = -w / 2 + 0.02 + step * i
    parts.append(_box((left + 0.008, left + step - 0.008), front, (0.09, h - 0.05), colour))
    knob = left + (step - 0.05 if i % 2 == 0 else 0.05)
    parts.append(_box((knob - 0.01, knob + 0.01), (front[1], d / 2), (h * 0.5, h * 0.5 + 0.12), _METAL))
  return parts


def _nightstand(size: Size, colour: Colour) -> list[Part]:
  w, d, h = size
  fronts = [
    _box((-w / 2 + 0.03, w / 2 - 0.03), (d / 2 - 0.03, d / 2 - 0.015), z, _tint(colour, 1.15))
    for z in ((0.15, h * 0.55), (h * 0.55 + 0.02, h - 0.05))
  ]
  knobs = [
    _part("sphere", (-0.02, 0.02), (d / 2 - 0.03, d / 2), (z - 0.02, z + 0.02), _METAL)
    for z in (h * 0.35, h * 0.74)
  ]
  return [
    *_legs(w, d, 0.12, 0.04, 0.0, _tint(colour, 0.7)),
    _box((-w / 2, w / 2), (-d / 2, d / 2 - 0.03), (0.12, h - 0.025), _tint(colour, 0.9)),
    _box((-w / 2, w / 2), (-d / 2, d / 2), (h - 0.025, h), colour),
    *fronts,
    *knobs,
  ]


def _shelf(size: Size, colour: Colour) -> list[Part]:
  w, d, h = size
  boards = max(3, round(h / 0.4))
  gap = (h - 0.03) / boards
  parts = [
    _box((-w / 2, -w / 2 + 0.03), (-d / 2, d / 2), (0.0, h), colour),
    _box((w / 2 - 0.03, w / 2), (-d / 2, d / 2), (0.0, h), colour),
    _box((-w / 2 + 0.03, w / 2 - 0.03), (-d / 2, -d / 2 + 0.02), (0.0, h), _tint(colour, 0.75)),
  ]
  spines = tuple(COLOURS.values())
  for i in range(boards + 1):
    z = gap * i
    parts.append(_box((-w / 2 + 0.03, w / 2 - 0.03), (-d / 2 + 0.02, d / 2), (z, z + 0.03), colour))
    if i < boards and i % 2 == 1:  # rows of books on every second board
      left = -w / 2 + 0.05 + 0.1 * (i % 3)
      for j in range(4):
        x = (left + 0.07 * j, left + 0.07 * j + 0.06)
        top = z + 0.03 + gap * (0.6 + 0.08 * ((i + j) % 3))
        parts.append(_box(x, (-d / 2 + 0.02, d / 2 - 0.06), (z + 0.03, top), spines[(i * 3 + j * 2) % 9]))
  return parts


def _lamp(size: Size, colour: Colour) -> list[Part]:
  w, _, h = size
  shade = 0.5 * min(w, h)
  return [
    _round("cylinder", w * 0.38, (0.0, 0.03), _METAL),
    _round("cylinder", min(0.02, w * 0.06), (0.03, h - shade), _METAL),
    _round("cylinder", w / 2, (h - shade, h), _tint(colour, 1.15)),
  ]


def _screen(size: Size, colour: Colour) -> list[Part]:
  """Monitor or television on its foot."""
  w, d, h = size
  foot = 0.16 * h
  return [
    _box((-w * 0.22, w * 0.22), (-d / 2, d / 2), (0.0, 0.02), colour),
    _box((-0.03, 0.03), (-0.025, 0.005), (0.02, foot), colour),
    _box((-w / 2, w / 2), (-0.025, 0.02), (foot, h), colour),
    _box((-w / 2 + 0.025, w / 2 - 0.025), (0.02, 0.026), (foot + 0.03, h - 0.025), (44, 58, 84)),
  ]


def _plant(size: Size, colour: Colour) -> list[Part]:
  w, _, h = size
  r, pot = w / 2, 0.32 * h
  crown = h - pot
  return [
    _round("cylinder", r * 0.62, (0.0, pot), colour),
    _round("cylinder", r * 0.54, (pot, pot + 0.01), (92, 70, 54)),
    _round("cylinder", 0.02, (pot, pot + crown * 0.5), _tint(_WOOD, 0.7)),
    _part("sphere", (-r, r * 0.3), (-r * 0.6, r * 0.7), (pot + crown * 0.1, h - crown * 0.15), _LEAF[0]),
    _part("sphere", (-r * 0.3, r), (-r, r * 0.5), (pot + crown * 0.12, h - crown * 0.25), _LEAF[1]),
    _part("sphere", (-r * 0.6, r * 0.7), (-r * 0.5, r), (pot + crown * 0.2, h), _LEAF[2]),
  ]


def _bin(size: Size, colour: Colour) -> list[Part]:
  w, _, h = size
  return [
    _round("cylinder", w * 0.46, (0.0, h - 0.05), colour),
    _round("cylinder", w / 2, (h - 0.05, h - 0.004), _tint(colour, 0.8)),
    _round("cylinder", w * 0.42, (h - 0.004, h), _DARK),
  ]


def _ball(size: Size, colour: Colour) -> list[Part]:
  return [_round("sphere", size[0] / 2, (0.0, size[2]), colour)]


def _carton(size: Size, colour: Colour) -> list[Part]:
  w, d, h = size
  tape = min(0.05, w * 0.12)
  return [
    _box((-w / 2, w / 2), (-d / 2, d / 2), (0.0, h - 0.004), colour),
    _box((-tape, tape), (-d / 2, d / 2), (h - 0.004, h), _tint(colour, 1.45)),
  ]


def _vase(size: Size, colour: Colour) -> list[Part]:
  w, _, h = size
  return [
    _round("cylinder", w * 0.3, (0.0, 0.02), colour),
    _round("sphere", w / 2, (0.005, h * 0.7), colour),
    _round("cylinder", w * 0.18, (h * 0.6, h - 0.015), colour),
    _round("cylinder", w * 0.28, (h - 0.015, h), _tint(colour, 1.2)),
  ]


def _refrigerator(size: Size, colour: Colour) -> list[Part]:
  w, d, h = size
  split, front = 0.62 * h, (d / 2 - 0.1, d / 2 - 0.04)
  doors = ((0.05, split - 0.008), (split + 0.008, h))
  handles = ((split - 0.45, split - 0.06), (split + 0.06, split + 0.34))
  return [
    _box((-w / 2, w / 2), (-d / 2, d / 2 - 0.1), (0.0, h), _tint(colour, 0.85)),
    *(_box((-w / 2, w / 2), front, z, colour) for z in doors),
    *(_box((-w / 2 + 0.05, -w / 2 + 0.08), (d / 2 - 0.04, d / 2), z, _METAL) for z in handles),
  ]


def _washer(size: Size, colour: Colour) -> list[Part]:
  w, d, h = size
  face, r = d / 2 - 0.03, 0.3 * w
  window = (0.46 * h - r, 0.46 * h + r)
  inner = (window[0] + 0.05, window[1] - 0.05)
  return [
    _box((-w / 2, w / 2), (-d / 2, face), (0.0, h), colour),
    _box((-w / 2 + 0.03, w / 2 - 0.03), (face, face + 0.008), (h - 0.13, h - 0.03), _METAL),
    _part("sphere", (-r, r), (face - 0.02, face + 0.02), window, _METAL),
    _part("sphere", (0.05 - r, r - 0.05), (face - 0.03, d / 2), inner, (58, 72, 96)),
  ]


# fmt: off
KINDS: tuple[Kind, ...] = (
  Kind("table", ("free", "wall"), (0.9, 1.6), (0.7, 0.95), (0.68, 0.78), True, _WOODEN, _table),
  Kind("desk", ("wall",), (1.1, 1.6), (0.6, 0.75), (0.7, 0.78), True, _WOODEN, _desk),
  Kind("chair", ("seat", "free", "wall"), (0.42, 0.5), (0.44, 0.52), (0.8, 0.98), False, tuple(COLOURS), _chair),
  Kind("stool", ("free", "seat"), (0.3, 0.4), None, (0.42, 0.7), False, tuple(COLOURS), _stool),
  Kind("sofa", ("wall", "free"), (1.4, 2.2), (0.8, 0.95), (0.72, 0.9), False, (*_BRIGHT, "grey", "brown", "white"), _sofa),
  Kind("bed", ("wall",), (0.95, 1.7), (1.95, 2.1), (0.8, 1.05), False, (*_BRIGHT, "grey"), _bed),
  Kind("cabinet", ("wall",), (0.7, 1.5), (0.38, 0.5), (0.65, 1.1), True, _WOODEN, _cabinet),
  Kind("nightstand", ("wall",), (0.4, 0.52), (0.36, 0.45), (0.45, 0.6), True, _WOODEN, _nightstand),
  Kind("shelf", ("wall",), (0.7, 1.2), (0.28, 0.36), (1.3, 2.0), False, ("brown", "white", "black", "grey", "blue", "green"), _shelf),
  Kind("refrigerator", ("wall",), (0.58, 0.75), (0.6, 0.72), (1.5, 1.85), False, (*_PLAIN, "red", "blue"), _refrigerator),
  Kind("washer", ("wall",), (0.55, 0.65), (0.52, 0.62), (0.82, 0.9), True, ("white", "grey"), _washer),
  Kind("lamp", ("free", "wall"), (0.34, 0.46), None, (1.35, 1.7), False, (*_BRIGHT, "white"), _lamp),
  Kind("lamp", ("top",), (0.2, 0.3), None, (0.36, 0.52), False, (*_BRIGHT, "white"), _lamp),
  Kind("monitor", ("top",), (0.48, 0.66), (0.18, 0.22), (0.42, 0.5), False, _PLAIN, _screen),
  Kind("tv", ("top", "wall"), (0.85, 1.25), (0.22, 0.28), (0.58, 0.8), False, ("black", "grey"), _screen),
  Kind("plant", ("wall", "free"), (0.4, 0.6), None, (0.75, 1.3), False, (*_BRIGHT, "white", "brown", "grey"), _plant),
  Kind("plant", ("top",), (0.18, 0.26), None, (0.3, 0.42), False, (*_BRIGHT, "white", "brown"), _plant),
  Kind("bin", ("wall", "free"), (0.26, 0.38), None, (0.32, 0.6), False, tuple(COLOURS), _bin),
  Kind("ball", ("free", "top"), (0.2, 0.42), None, None, False, (*_BRIGHT, "white"), _ball),
  Kind("box", ("free", "wall", "top"), (0.25, 0.5), (0.22, 0.4), (0.2, 0.42), False, (*_BRIGHT, "brown", "white"), _carton),
  Kind("vase", ("top", "wall"), (0.15, 0.24), None, (0.28, 0.5), False, (*_BRIGHT, "white", "black"), _vase),
)
# fmt: on
