"""seed -> Scene: furnished rooms without end, the same bytes for the same seed."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from spatial_jax.synthetic.furniture import KINDS, Kind, Place, parts_of
from spatial_jax.synthetic.furniture_parts import Size
from spatial_jax.synthetic.scene import Scene, SceneObject

_ROOMS = 40  # rooms that are tried before the configuration is called impossible
_TRIES = 24  # places that are tried for one object
_GAP_M = 0.05  # between objects
_CEILING_M = (2.4, 2.9)
_NOTCH = (0.32, 0.5)  # share of each side that the corner cut out of an L-shaped room takes
_SIDES = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))


@dataclasses.dataclass(frozen=True)
class ProceduralConfig:
  """How rooms are drawn.

  Attributes:
    objects: fewest and most objects in a room; (1, 1) is the first lesson of a curriculum.
    side_m: shortest and longest side of a room in metres.
    l_shape_share: share of rooms with a corner cut out, in [0, 1].
    repeat_share: chance that an object is of a category already drawn (what makes counting worth
      asking), in [0, 1].
  """

  objects: tuple[int, int]
  side_m: tuple[float, float]
  l_shape_share: float
  repeat_share: float


class _Box(NamedTuple):
  """An upright box: middle of its footprint, unit vector along its width, half sizes, z range."""

  x: float
  y: float
  along_x: float
  along_y: float
  half_w: float
  half_d: float
  bottom: float
  top: float


class _Standing(NamedTuple):
  """A kind of furniture, where it stands, and its colour."""

  kind: Kind
  box: _Box
  colour: str


def procedural_scene(seed: int, cfg: ProceduralConfig) -> Scene:
  """Draws a room, then its furniture from the largest piece to the smallest.

  Objects stand on the floor (back to a wall, free with any yaw, or at a table) or on furniture that
  carries, and keep 5 cm from one another. All draws come from Philox keyed by the seed; positions
  are rounded to millimetres, so that the scene is the same on every machine.

  Args:
    seed: >= 0; names the scene ("procedural/<seed>").
    cfg: sizes and numbers.

  Returns:
    A scene without cameras (see `cameras.walk`).

  Raises:
    ValueError: on the host, when `cfg.objects[0]` objects do not fit into rooms of `cfg.side_m`.
  """
  for attempt in range(_ROOMS):
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, attempt], np.uint64)))
    polygon_Z2, notch = _outline(rng, cfg)
    standing = _furnish(rng, cfg, polygon_Z2, notch)
    if len(standing) >= cfg.objects[0]:
      return Scene(
        scene_id=f"procedural/{seed}",
        source="procedural",
        polygon_Z2=polygon_Z2,
        height_m=_between(rng, _CEILING_M),
        room_size_m2=_area(polygon_Z2),
        objects=tuple(_object(thing) for thing in standing),
        cameras=(),
        benchmark=None,
      )
  raise ValueError(
    f"{cfg.objects[0]} objects do not fit into rooms of {cfg.side_m[0]} to {cfg.side_m[1]} m: lower"
    " objects or raise side_m"
  )


def _outline(rng: np.random.Generator, cfg: ProceduralConfig) -> tuple[np.ndarray, list[_Box]]:
  """Corners of the floor, counter-clockwise from (0, 0), and the corner cut out as a solid box.

  ┌─────┐░░░░     ░ the notch of an L-shaped room, in any of the corners
  │     └───┐
  └─────────┘
  """
  w, d = _between(rng, cfg.side_m), _between(rng, cfg.side_m)
  if rng.random() >= cfg.l_shape_share:
    return np.array([[0.0, 0.0], [w, 0.0], [w, d], [0.0, d]]), []
  cut_w, cut_d = round(w * _between(rng, _NOTCH), 3), round(d * _between(rng, _NOTCH), 3)
  polygon_Z2 = np.array(
    [[0.0, 0.0], [w, 0.0], [w, d - cut_d], [w - cut_w, d - cut_d], [w - cut_w, d], [0.0, d]]
  )
  x, y = w - cut_w / 2, d - cut_d / 2
  if rng.random() < 0.5:
    polygon_Z2, x = (np.array([w, 0.0]) + polygon_Z2 * [-1.0, 1.0])[::-1], w - x
  if rng.random() < 0.5:
    polygon_Z2, y = (np.array([0.0, d]) + polygon_Z2 * [1.0, -1.0])[::-1], d - y
  notch = _Box(x, y, 1.0, 0.0, cut_w / 2, cut_d / 2, 0.0, math.inf)
  return np.round(polygon_Z2, 3), [notch]


def _furnish(
  rng: np.random.Generator, cfg: ProceduralConfig, polygon_Z2: np.ndarray, notch: list[_Box]
) -> list[_Standing]:
  """Places objects, large ones first; what finds no place is replaced by another draw."""
  wanted = cfg.objects[0] + int(rng.random() * (cfg.objects[1] - cfg.objects[0] + 1))
  drawn: list[Kind] = []
  for _ in range(wanted):
    drawn.append(_draw_kind(rng, drawn, cfg.repeat_share))
  drawn.sort(key=lambda kind: (kind.places[0] == "top", -kind.width_m[1]))
  standing: list[_Standing] = []
  spare = wanted
  while drawn:
    kind = drawn.pop(0)
    box = _find_place(rng, kind, polygon_Z2, notch, standing)
    if box is not None:
      standing.append(_Standing(kind, box, kind.colours[int(rng.random() * len(kind.colours))]))
    elif spare > 0:
      spare -= 1
      drawn.append(_draw_kind(rng, [], 0.0))
  return standing


def _draw_kind(rng: np.random.Generator, drawn: list[Kind], repeat_share: float) -> Kind:
  if drawn and rng.random() < repeat_share:
    return drawn[int(rng.random() * len(drawn))]
  return KINDS[int(rng.random() * len(KINDS))]


def _find_place(
  rng: np.random.Generator,
  kind: Kind,
  polygon_Z2: np.ndarray,
  notch: list[_Box],
  standing: list[_Standing],
) -> _Box | None:
  """A box of a drawn size at a place where it touches nothing, or None."""
  size_3 = _draw_size(rng, kind)
  high_x, high_y = float(polygon_Z2[:, 0].max()), float(polygon_Z2[:, 1].max())
  others = notch + [thing.box for thing in standing]
  for _ in range(_TRIES):
    # Half of the tries go to the likeliest place.
    place = kind.places[max(0, int((rng.random() * 2 - 1) * len(kind.places)))]
    box = _propose(rng, kind, place, size_3, polygon_Z2, standing)
    if box is None:
      continue
    reach_x = abs(box.along_x) * box.half_w + abs(box.along_y) * box.half_d
    reach_y = abs(box.along_y) * box.half_w + abs(box.along_x) * box.half_d
    within = reach_x < box.x < high_x - reach_x and reach_y < box.y < high_y - reach_y
    if within and all(_apart(box, other) for other in others):
      return box
  return None


def _draw_size(rng: np.random.Generator, kind: Kind) -> Size:
  """Width, depth and height in metres."""
  w = _between(rng, kind.width_m)
  d = w if kind.depth_m is None else _between(rng, kind.depth_m)
  h = w if kind.height_m is None else _between(rng, kind.height_m)
  return w, d, h


def _propose(
  rng: np.random.Generator,
  kind: Kind,
  place: Place,
  size_3: Size,
  polygon_Z2: np.ndarray,
  standing: list[_Standing],
) -> _Box | None:
  """One random box of the wished kind of place; it may still hit something."""
  if place == "wall":
    return _at_wall(rng, size_3, polygon_Z2)
  if place == "top":
    carriers = [thing.box for thing in standing if thing.kind.carries]
    return _on_top(rng, size_3, carriers)
  if place == "seat":
    tables = [thing for thing in standing if thing.kind.category in ("table", "desk")]
    return _at_table(rng, size_3, tables)
  high = polygon_Z2.max(axis=0)
  # Two of three free objects stand askew.
  turn = math.radians(
    int(rng.random() * 360) if rng.random() < 0.67 else 90 * int(rng.random() * 4)
  )
  x, y = rng.random() * float(high[0]), rng.random() * float(high[1])
  return _box(x, y, math.cos(turn), math.sin(turn), size_3, 0.0)


def _at_wall(rng: np.random.Generator, size_3: Size, polygon_Z2: np.ndarray) -> _Box | None:
  """Back to a wall, front into the room."""
  wall = int(rng.random() * len(polygon_Z2))
  (x0, y0), (x1, y1) = polygon_Z2[wall].tolist(), polygon_Z2[(wall + 1) % len(polygon_Z2)].tolist()
  length = abs(x1 - x0) + abs(y1 - y0)  # walls run along x or y
  spare = length - size_3[0] - 2 * _GAP_M
  if spare < 0:
    return None
  ax, ay = round((x1 - x0) / length), round((y1 - y0) / length)
  place, off = _GAP_M + size_3[0] / 2 + spare * rng.random(), size_3[1] / 2 + 1.2 * _GAP_M
  return _box(x0 + ax * place - ay * off, y0 + ay * place + ax * off, ax, ay, size_3, 0.0)


def _on_top(rng: np.random.Generator, size_3: Size, carriers: list[_Box]) -> _Box | None:
  """On a piece of furniture, facing the same way."""
  if not carriers:
    return None
  below = carriers[int(rng.random() * len(carriers))]
  spare_w, spare_d = below.half_w - size_3[0] / 2 - 0.01, below.half_d - size_3[1] / 2 - 0.01
  if spare_w < 0 or spare_d < 0:
    return None
  u, v = spare_w * (2 * rng.random() - 1), spare_d * (2 * rng.random() - 1)
  x = below.x + u * below.along_x - v * below.along_y
  y = below.y + u * below.along_y + v * below.along_x
  return _box(x, y, below.along_x, below.along_y, size_3, below.top)


def _at_table(rng: np.random.Generator, size_3: Size, tables: list[_Standing]) -> _Box | None:
  """At one side of a table (the front of a desk), facing it."""
  if not tables:
    return None
  table = tables[int(rng.random() * len(tables))]
  box = table.box
  side_x, side_y = _SIDES[int(rng.random() * 4)] if table.kind.category == "table" else _SIDES[1]
  out_x = side_x * box.along_x - side_y * box.along_y
  out_y = side_x * box.along_y + side_y * box.along_x
  reach = abs(side_x) * box.half_w + abs(side_y) * box.half_d
  slide = abs(side_x) * box.half_d + abs(side_y) * box.half_w
  out = reach + size_3[1] / 2 + _GAP_M * (1.2 + rng.random())
  across = 0.6 * slide * (2 * rng.random() - 1)
  x, y = box.x + out * out_x - across * out_y, box.y + out * out_y + across * out_x
  return _box(x, y, -out_y, out_x, size_3, 0.0)  # its front (y axis) is (-out_x, -out_y)


def _box(x: float, y: float, along_x: float, along_y: float, size_3: Size, bottom: float) -> _Box:
  """A box on a grid of millimetres; rounded axes, so that no last bit depends on the machine."""
  w, d, h = size_3
  along_x, along_y = round(along_x, 12), round(along_y, 12)
  return _Box(
    round(x, 3), round(y, 3), along_x, along_y, w / 2, d / 2, bottom, round(bottom + h, 3)
  )


def _apart(a: _Box, b: _Box) -> bool:
  """Whether two upright boxes keep their distance: by height or by a separating axis."""
  if a.bottom >= b.top or b.bottom >= a.top:
    return True
  dx, dy = b.x - a.x, b.y - a.y
  cos = abs(a.along_x * b.along_x + a.along_y * b.along_y)
  sin = abs(a.along_x * b.along_y - a.along_y * b.along_x)
  return (
    abs(dx * a.along_x + dy * a.along_y) > a.half_w + b.half_w * cos + b.half_d * sin + _GAP_M
    or abs(dy * a.along_x - dx * a.along_y) > a.half_d + b.half_w * sin + b.half_d * cos + _GAP_M
    or abs(dx * b.along_x + dy * b.along_y) > b.half_w + a.half_w * cos + a.half_d * sin + _GAP_M
    or abs(dy * b.along_x - dx * b.along_y) > b.half_d + a.half_w * sin + a.half_d * cos + _GAP_M
  )


def _object(thing: _Standing) -> SceneObject:
  box = thing.box
  size_3 = (2 * box.half_w, 2 * box.half_d, round(box.top - box.bottom, 3))
  axes_33 = [[box.along_x, box.along_y, 0.0], [-box.along_y, box.along_x, 0.0], [0.0, 0.0, 1.0]]
  return SceneObject(
    category=thing.kind.category,
    colour=thing.colour,
    centre_3=np.array([box.x, box.y, round((box.bottom + box.top) / 2, 6)]),
    size_3=np.array(size_3),
    axes_33=np.array(axes_33),
    parts=parts_of(thing.kind, size_3, thing.colour),
  )


def _area(polygon_Z2: np.ndarray) -> float:
  """Area inside the outline in square metres (shoelace formula)."""
  x, y = polygon_Z2.T
  return round(float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2, 6)


def _between(rng: np.random.Generator, low_high: tuple[float, float]) -> float:
  """Uniform in the range, in whole even millimetres."""
  return round(
    2 * round(500 * (low_high[0] + (low_high[1] - low_high[0]) * rng.random())) / 1000, 3
  )
