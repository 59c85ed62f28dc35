"""Builders of furniture: (size, colour) -> boxes, ellipsoids and cylinders that fill this size.

The frame of an object: x along its width, y out of its front, z up. The origin is the middle of its
bottom face.
"""

from spatial_jax.synthetic.scene import Part

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
_WOOD: Colour = (170, 128, 90)
_METAL: Colour = (120, 122, 128)
_DARK: Colour = (40, 42, 50)
_CREAM: Colour = (244, 240, 230)
_LEAF: tuple[Colour, ...] = ((70, 128, 66), (92, 150, 78), (56, 112, 62))


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


def _round(
  shape: str, radius: float, z: Range, colour: Colour, x: float = 0.0, y: float = 0.0
) -> Part:
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


def table(size: Size, colour: Colour) -> list[Part]:
  """A slab on four legs."""
  w, d, h = size
  top = _box((-w / 2, w / 2), (-d / 2, d / 2), (h - 0.05, h), colour)
  return [top, *_legs(w, d, h - 0.05, 0.06, 0.04, _tint(colour, 0.8))]


def desk(size: Size, colour: Colour) -> list[Part]:
  """A slab on a side panel and a block of three drawers."""
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
  panel = _box(
    (-w / 2 + 0.06, drawers[0]), (-d / 2 + 0.03, -d / 2 + 0.05), (h * 0.35, h - 0.04), side
  )
  return [top, left, block, panel, *fronts]


def chair(size: Size, colour: Colour) -> list[Part]:
  """A square board, a back and four legs; its front is y."""
  w, d, h = size
  board_m = 0.48 * h
  back = _box((-w / 2 + 0.02, w / 2 - 0.02), (-d / 2, -d / 2 + 0.05), (board_m + 0.1, h), colour)
  posts = [
    _box((x - 0.02, x + 0.02), (-d / 2 + 0.01, -d / 2 + 0.04), (board_m, board_m + 0.1), _WOOD)
    for x in (-w / 2 + 0.06, w / 2 - 0.06)
  ]
  board = _box((-w / 2, w / 2), (-d / 2, d / 2), (board_m - 0.06, board_m), colour)
  return [board, back, *posts, *_legs(w, d, board_m - 0.06, 0.04, 0.02, _WOOD)]


def stool(size: Size, colour: Colour) -> list[Part]:
  """A round board on a pole."""
  w, _, h = size
  board = _round("cylinder", w / 2, (h - 0.07, h), colour)
  foot = _round("cylinder", w * 0.42, (0.0, 0.03), _METAL)
  return [board, foot, _round("cylinder", 0.03, (0.03, h - 0.07), _METAL)]


def sofa(size: Size, colour: Colour) -> list[Part]:
  """Base, back, two arms and cushions."""
  w, d, h = size
  arm, back, cushion_m = 0.16, 0.22, 0.42
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
      (0.26, cushion_m),
      _tint(colour, 1.12),
    )
    for i in range(cushions)
  ]


def bed(size: Size, colour: Colour) -> list[Part]:
  """Headboard, frame, mattress, blanket and pillows."""
  w, d, h = size
  mattress = 0.5
  pillows = [-w / 4, w / 4] if w > 1.2 else [0.0]
  return [
    _box((-w / 2, w / 2), (-d / 2, -d / 2 + 0.07), (0.0, h), _WOOD),
    _box((-w / 2, w / 2), (-d / 2 + 0.07, d / 2), (0.1, 0.28), _WOOD),
    *_legs(w, d, 0.1, 0.08, 0.03, _tint(_WOOD, 0.7)),
    _box((-w / 2 + 0.03, w / 2 - 0.03), (-d / 2 + 0.07, d / 2 - 0.03), (0.28, mattress), _CREAM),
    _box(
      (-w / 2 + 0.01, w / 2 - 0.01), (-d / 2 + 0.65, d / 2 - 0.01), (0.3, mattress + 0.04), colour
    ),
    *(
      _part(
        "sphere",
        (x - 0.28, x + 0.28),
        (-d / 2 + 0.12, -d / 2 + 0.52),
        (0.44, 0.64),
        (250, 248, 244),
      )
      for x in pillows
    ),
  ]


def cabinet(size: Size, colour: Colour) -> list[Part]:
  """Two or three doors under a top."""
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
    parts.append(
      _box((knob - 0.01, knob + 0.01), (front[1], d / 2), (h * 0.5, h * 0.5 + 0.12), _METAL)
    )
  return parts


def nightstand(size: Size, colour: Colour) -> list[Part]:
  """Two drawers on short legs."""
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


def shelf(size: Size, colour: Colour) -> list[Part]:
  """Open boards with rows of books on every second one."""
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
        parts.append(
          _box(x, (-d / 2 + 0.02, d / 2 - 0.06), (z + 0.03, top), spines[(i * 3 + j * 2) % 9])
        )
  return parts


def lamp(size: Size, colour: Colour) -> list[Part]:
  """Foot, pole and shade."""
  w, _, h = size
  shade = 0.5 * min(w, h)
  return [
    _round("cylinder", w * 0.38, (0.0, 0.03), _METAL),
    _round("cylinder", min(0.02, w * 0.06), (0.03, h - shade), _METAL),
    _round("cylinder", w / 2, (h - shade, h), colour),
  ]


def screen(size: Size, colour: Colour) -> list[Part]:
  """Monitor or television on its foot."""
  w, d, h = size
  foot = 0.16 * h
  return [
    _box((-w * 0.22, w * 0.22), (-d / 2, d / 2), (0.0, 0.02), colour),
    _box((-0.03, 0.03), (-0.025, 0.005), (0.02, foot), colour),
    _box((-w / 2, w / 2), (-0.025, 0.02), (foot, h), colour),
    _box((-w / 2 + 0.025, w / 2 - 0.025), (0.02, 0.026), (foot + 0.03, h - 0.025), (44, 58, 84)),
  ]


def plant(size: Size, colour: Colour) -> list[Part]:
  """Three crowns over a pot."""
  w, _, h = size
  r, pot = w / 2, 0.32 * h
  crown = h - pot
  return [
    _round("cylinder", r * 0.62, (0.0, pot), colour),
    _round("cylinder", r * 0.54, (pot, pot + 0.01), (92, 70, 54)),
    _round("cylinder", 0.02, (pot, pot + crown * 0.5), _tint(_WOOD, 0.7)),
    _part(
      "sphere", (-r, r * 0.3), (-r * 0.6, r * 0.7), (pot + crown * 0.1, h - crown * 0.15), _LEAF[0]
    ),
    _part("sphere", (-r * 0.3, r), (-r, r * 0.5), (pot + crown * 0.12, h - crown * 0.25), _LEAF[1]),
    _part("sphere", (-r * 0.6, r * 0.7), (-r * 0.5, r), (pot + crown * 0.2, h), _LEAF[2]),
  ]


def bin(size: Size, colour: Colour) -> list[Part]:
  """A round bin with a rim."""
  w, _, h = size
  return [
    _round("cylinder", w * 0.46, (0.0, h - 0.05), colour),
    _round("cylinder", w / 2, (h - 0.05, h - 0.004), _tint(colour, 0.8)),
    _round("cylinder", w * 0.42, (h - 0.004, h), _DARK),
  ]


def ball(size: Size, colour: Colour) -> list[Part]:
  """A ball."""
  return [_round("sphere", size[0] / 2, (0.0, size[2]), colour)]


def carton(size: Size, colour: Colour) -> list[Part]:
  """A cardboard box with a strip of tape."""
  w, d, h = size
  tape = min(0.05, w * 0.12)
  return [
    _box((-w / 2, w / 2), (-d / 2, d / 2), (0.0, h - 0.004), colour),
    _box((-tape, tape), (-d / 2, d / 2), (h - 0.004, h), _tint(colour, 1.45)),
  ]


def vase(size: Size, colour: Colour) -> list[Part]:
  """Belly, neck and lip."""
  w, _, h = size
  return [
    _round("cylinder", w * 0.3, (0.0, 0.02), colour),
    _round("sphere", w / 2, (0.005, h * 0.7), colour),
    _round("cylinder", w * 0.18, (h * 0.6, h - 0.015), colour),
    _round("cylinder", w * 0.28, (h - 0.015, h), _tint(colour, 1.2)),
  ]


def refrigerator(size: Size, colour: Colour) -> list[Part]:
  """Two doors with handles."""
  w, d, h = size
  split, front = 0.62 * h, (d / 2 - 0.1, d / 2 - 0.04)
  doors = ((0.05, split - 0.008), (split + 0.008, h))
  handles = ((split - 0.45, split - 0.06), (split + 0.06, split + 0.34))
  return [
    _box((-w / 2, w / 2), (-d / 2, d / 2 - 0.1), (0.0, h), _tint(colour, 0.85)),
    *(_box((-w / 2, w / 2), front, z, colour) for z in doors),
    *(_box((-w / 2 + 0.05, -w / 2 + 0.08), (d / 2 - 0.04, d / 2), z, _METAL) for z in handles),
  ]


def washer(size: Size, colour: Colour) -> list[Part]:
  """A box with a round window in its front."""
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
