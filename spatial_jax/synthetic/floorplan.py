"""seed -> Scene: random furnished rooms; the same seed gives the same bytes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spatial_jax.config import ConfigError, check_field
from spatial_jax.synthetic.furniture import KINDS, Kind, Place, parts_of
from spatial_jax.synthetic.furniture_parts import Size
from spatial_jax.synthetic.scene import Scene, SceneObject

_MAX_ROOMS = 40  # attempts before the configuration is called impossible
_MAX_POSITIONS = 24  # attempts to place one object
_MAX_OBJECTS, _MIN_SIDE_M, _MAX_SIDE_M = 256, 1.0, 100.0  # limits of the config
_GAP_M = 0.05  # between objects
_CEILING_M = (2.4, 2.9)
_NOTCH = (0.32, 0.5)  # the corner cut out of an L-shaped room, as a share of each side
_SIDES = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))


@dataclasses.dataclass(frozen=True)
class ProceduralConfig:
  """Size and contents of procedural rooms.

  Attributes:
    objects: fewest and most objects in a room, 1 to 256.
    side_m: shortest and longest side of a room in metres, 1 to 100.
    l_shape_share: share of rooms with a corner cut out, in [0, 1].
    repeat_share: probability that an object repeats a category of the room, in [0, 1]; repeats
      make counting questions possible.
  """

  objects: tuple[int, int]
  side_m: tuple[float, float]
  l_shape_share: float
  repeat_share: float

  def __post_init__(self):
    fewest, most = self.objects
    low_m, high_m = self.side_m
    check_field(
      self,
      "objects",
      1 <= fewest <= most <= _MAX_OBJECTS,
      f"be the fewest and the most objects, both from 1 to {_MAX_OBJECTS}",
    )
    check_field(
      self,
      "side_m",
      _MIN_SIDE_M <= low_m <= high_m <= _MAX_SIDE_M,
      f"be the shortest and the longest side, both from {_MIN_SIDE_M:g} to {_MAX_SIDE_M:g}",
    )
    for name in ("l_shape_share", "repeat_share"):
      check_field(self, name, 0 <= vars(self)[name] <= 1, "be at least 0 and at most 1")


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


class _Placed(NamedTuple):
  """A piece of furniture with its box in the room and its colour."""

  kind: Kind
  box: _Box
  colour: str


def procedural_scene(seed: int, cfg: ProceduralConfig, kinds: Sequence[Kind] = KINDS) -> Scene:
  """A random room with furniture, placed from the largest piece to the smallest.

  Objects stand on the floor (with the back to a wall, free with any yaw, or at a table) or on other
  furniture. They are 5 cm or more apart. All random numbers come from Philox, keyed by the seed.
  Positions are rounded to millimetres, so that the scene is the same on every machine.

  Args:
    seed: >= 0; names the scene ("procedural/<seed>").
    cfg: sizes and numbers of objects.
    kinds: furniture to choose from, each equally often.

  Returns:
    A scene without cameras (see `camera_path.make_camera_path`).

  Raises:
    ConfigError: if `cfg.objects[0]` objects do not fit into rooms of `cfg.side_m`.
  """
  for attempt in range(_MAX_ROOMS):
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, attempt], np.uint64)))
    polygon_Z2, notch = _outline(rng, cfg)
    placed = _furnish(rng, cfg, kinds, polygon_Z2, notch)
    if len(placed) >= cfg.objects[0]:
      return Scene(
        scene_id=f"procedural/{seed}",
        source="procedural",
        polygon_Z2=polygon_Z2,
        height_m=_uniform(rng, _CEILING_M),
        room_size_m2=_area(polygon_Z2),
        objects=tuple(_object(item) for item in placed),
        cameras=(),
        benchmark=None,
      )
  raise ConfigError(
    f"{cfg.objects[0]} objects do not fit into rooms of {cfg.side_m[0]} to {cfg.side_m[1]} m: lower"
    " rooms.objects or raise rooms.side_m in the config"
  )


def _outline(rng: np.random.Generator, cfg: ProceduralConfig) -> tuple[np.ndarray, list[_Box]]:
  """Corners of the floor, counter-clockwise from (0, 0), and the cut-out corner as a box.

  ┌─────┐░░░░     ░ the notch of an L-shaped room, in any of the corners
  │     └───┐
  └─────────┘
  """
  w, d = _uniform(rng, cfg.side_m), _uniform(rng, cfg.side_m)
  if rng.random() >= cfg.l_shape_share:
    return np.array([[0.0, 0.0], [w, 0.0], [w, d], [0.0, d]]), []
  cut_w, cut_d = round(w * _uniform(rng, _NOTCH), 3), round(d * _uniform(rng, _NOTCH), 3)
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
  rng: np.random.Generator,
  cfg: ProceduralConfig,
  kinds: Sequence[Kind],
  polygon_Z2: np.ndarray,
  notch: list[_Box],
) -> list[_Placed]:
  """Places objects, large ones first; another random object replaces one that does not fit."""
  count = cfg.objects[0] + int(rng.random() * (cfg.objects[1] - cfg.objects[0] + 1))
  drawn: list[Kind] = []
  for _ in range(count):
    drawn.append(_draw_kind(rng, kinds, drawn, cfg.repeat_share))
  drawn.sort(key=lambda kind: (kind.places[0] == "top", -kind.width_m[1]))
  placed: list[_Placed] = []
  replacements = count
  while drawn:
    kind = drawn.pop(0)
    box = _find_place(rng, kind, polygon_Z2, notch, placed)
    if box is not None:
      placed.append(_Placed(kind, box, kind.colours[int(rng.random() * len(kind.colours))]))
    elif replacements > 0:
      replacements -= 1
      drawn.append(_draw_kind(rng, kinds, [], 0.0))
  return placed


def _draw_kind(
  rng: np.random.Generator, kinds: Sequence[Kind], drawn: list[Kind], repeat_share: float
) -> Kind:
  if drawn and rng.random() < repeat_share:
    return drawn[int(rng.random() * len(drawn))]
  return kinds[int(rng.random() * len(kinds))]


def _find_place(
  rng: np.random.Generator,
  kind: Kind,
  polygon_Z2: np.ndarray,
  notch: list[_Box],
  placed: list[_Placed],
) -> _Box | None:
  """A box of random size at a free place, or None."""
  size_3 = _draw_size(rng, kind)
  high_x, high_y = float(polygon_Z2[:, 0].max()), float(polygon_Z2[:, 1].max())
  others = notch + [item.box for item in placed]
  for _ in range(_MAX_POSITIONS):
    # At least half of the attempts use the first kind of place.
    place = kind.places[max(0, int((rng.random() * 2 - 1) * len(kind.places)))]
    box = _propose(rng, place, size_3, polygon_Z2, placed)
    if box is None:
      continue
    reach_x = abs(box.along_x) * box.half_w + abs(box.along_y) * box.half_d
    reach_y = abs(box.along_y) * box.half_w + abs(box.along_x) * box.half_d
    within = reach_x < box.x < high_x - reach_x and reach_y < box.y < high_y - reach_y
    if within and all(_are_apart(box, other) for other in others):
      return box
  return None


def _draw_size(rng: np.random.Generator, kind: Kind) -> Size:
  """Width, depth and height in metres."""
  w = _uniform(rng, kind.width_m)
  d = w if kind.depth_m is None else _uniform(rng, kind.depth_m)
  h = w if kind.height_m is None else _uniform(rng, kind.height_m)
  return w, d, h


def _propose(
  rng: np.random.Generator,
  place: Place,
  size_3: Size,
  polygon_Z2: np.ndarray,
  placed: list[_Placed],
) -> _Box | None:
  """One random box at this kind of place; it may overlap other boxes."""
  if place == "wall":
    return _at_wall(rng, size_3, polygon_Z2)
  if place == "top":
    carriers = [item.box for item in placed if item.kind.carries]
    return _on_top(rng, size_3, carriers)
  if place == "table":
    tables = [item for item in placed if item.kind.category in ("table", "desk")]
    return _at_table(rng, size_3, tables)
  high = polygon_Z2.max(axis=0)
  # Two of three free objects have a random yaw, the others a multiple of 90 degrees.
  turn = math.radians(
    int(rng.random() * 360) if rng.random() < 0.67 else 90 * int(rng.random() * 4)
  )
  x, y = rng.random() * float(high[0]), rng.random() * float(high[1])
  return _box(x, y, math.cos(turn), math.sin(turn), size_3, 0.0)


def _at_wall(rng: np.random.Generator, size_3: Size, polygon_Z2: np.ndarray) -> _Box | None:
  """The back to a wall, the front into the room."""
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
  """On top of a piece of furniture, with the same yaw."""
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


def _at_table(rng: np.random.Generator, size_3: Size, tables: list[_Placed]) -> _Box | None:
  """At one side of a table or at the front of a desk, facing it."""
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
  """A box on a grid of millimetres; its axes are rounded to be equal on every machine."""
  w, d, h = size_3
  along_x, along_y = round(along_x, 12), round(along_y, 12)
  return _Box(
    round(x, 3), round(y, 3), along_x, along_y, w / 2, d / 2, bottom, round(bottom + h, 3)
  )


def _are_apart(a: _Box, b: _Box) -> bool:
  """Whether two upright boxes are `_GAP_M` apart: by height or along a separating axis."""
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


def _object(item: _Placed) -> SceneObject:
  box = item.box
  size_3 = (2 * box.half_w, 2 * box.half_d, round(box.top - box.bottom, 3))
  axes_33 = [[box.along_x, box.along_y, 0.0], [-box.along_y, box.along_x, 0.0], [0.0, 0.0, 1.0]]
  return SceneObject(
    category=item.kind.category,
    colour=item.colour,
    centre_3=np.array([box.x, box.y, round((box.bottom + box.top) / 2, 6)]),
    size_3=np.array(size_3),
    axes_33=np.array(axes_33),
    parts=parts_of(item.kind, size_3, item.colour),
  )


def _area(polygon_Z2: np.ndarray) -> float:
  """Area of the polygon in square metres (shoelace formula)."""
  x, y = polygon_Z2.T
  return round(float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2, 6)


def _uniform(rng: np.random.Generator, low_high: tuple[float, float]) -> float:
  """A uniform random length, rounded to even millimetres."""
  return round(
    2 * round(500 * (low_high[0] + (low_high[1] - low_high[0]) * rng.random())) / 1000, 3
  )
