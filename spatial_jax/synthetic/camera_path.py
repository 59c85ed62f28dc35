"""A walk through a room: eyes over free floor, turning to what was not seen yet."""

import math

import numpy as np

from spatial_jax.errors import DataError
from spatial_jax.synthetic.scene import Camera, Scene

_CELL_M = 0.2  # grid of places to stand
_CLEARANCES_M = (0.5, 0.25, 0.1)  # from objects and walls; a crowded room falls back to the next
_ROOMY_CELLS = 25  # a square metre to walk about in is worth keeping the clearance for
_BODY_M = (0.3, 0.9)  # heights that must be free besides the eyes: a rug is no obstacle
_EYE_M = (1.3, 1.7)
_DOWN_DEG = (12.0, 20.0)
_HEADINGS_DEG = np.arange(0.0, 360.0, 15.0)
_TURN_DEG = 75.0  # the most a walker turns between two frames
_SIGHT_M = (0.9, 6.0)  # objects nearer or farther do not count as well seen
_CORE = 0.4  # half the field of view, without its rim
_OPEN_M = 4.0  # a view that is longer is no better
_PLACES = 16  # starting places that are compared
_GOALS = 6  # places to go to that are compared


def walk(
  scene: Scene,
  rng: np.random.Generator,
  frames: int,
  width_px: int,
  height_px: int,
  field_of_view_deg: float,
) -> tuple[Camera, ...]:
  """Cameras along a path over free floor; with one frame, a picture that shows many objects.

  The walk begins where most objects are in sight, goes to a far place that can be reached, and
  turns at every frame to the heading with the most objects that were not seen yet.

  Args:
    scene: room and objects; `scene.cameras` is not read.
    rng: the only source of chance.
    frames: how many cameras, >= 1.
    width_px, height_px: of the pictures.
    field_of_view_deg: horizontal.

  Returns:
    `frames` cameras in order of time, none inside an object, 1.3 to 1.7 m above the floor.

  Raises:
    DataError: on the host, when every place at the height of the eye is inside an object.
  """
  eye_m = round(_EYE_M[0] + (_EYE_M[1] - _EYE_M[0]) * rng.random(), 3)
  down_deg = _DOWN_DEG[0] + (_DOWN_DEG[1] - _DOWN_DEG[0]) * rng.random()
  core_deg = _CORE * field_of_view_deg
  unseen_Z = np.ones(len(scene.objects), bool)
  heading_deg, cameras = None, []
  for place_2 in _places(scene, rng, frames, eye_m, core_deg):
    score, seen = _headings(scene, place_2, unseen_Z, core_deg)
    if heading_deg is not None:
      score = np.where(np.abs(_wrap(_HEADINGS_DEG - heading_deg)) <= _TURN_DEG, score, -np.inf)
    choice = int(np.argmax(score))
    heading_deg = float(_HEADINGS_DEG[choice])
    unseen_Z &= ~seen[choice]
    position_3 = np.array([place_2[0], place_2[1], eye_m])
    cameras.append(look(position_3, heading_deg, down_deg, field_of_view_deg, width_px, height_px))
  return tuple(cameras)


def look(
  position_3: np.ndarray,
  heading_deg: float,
  down_deg: float,
  field_of_view_deg: float,
  width_px: int,
  height_px: int,
) -> Camera:
  """An upright camera: heading counter-clockwise from the x axis, tilted down by `down_deg`."""
  turn, tilt = math.radians(heading_deg), math.radians(down_deg)
  ahead_3 = np.array([math.cos(turn), math.sin(turn), 0.0])
  right_3 = np.array([ahead_3[1], -ahead_3[0], 0.0])
  up_3 = np.array([0.0, 0.0, 1.0])
  forward_3 = ahead_3 * math.cos(tilt) - up_3 * math.sin(tilt)
  down_3 = -ahead_3 * math.sin(tilt) - up_3 * math.cos(tilt)
  rotation_33 = np.round(np.stack([right_3, down_3, forward_3]), 12)  # the same on every machine
  return Camera(np.round(position_3, 6), rotation_33, field_of_view_deg, width_px, height_px)


def inside_outline(polygon_Z2: np.ndarray, points_N2: np.ndarray) -> np.ndarray:
  """Whether each point lies within the outline, bool [N] (even-odd rule)."""
  x_N1, y_N1 = points_N2[:, :1], points_N2[:, 1:]
  x, y = polygon_Z2.T
  next_x, next_y = np.roll(polygon_Z2, -1, axis=0).T
  straddles = (y > y_N1) != (next_y > y_N1)
  with np.errstate(divide="ignore", invalid="ignore"):
    crossing = x + (y_N1 - y) * (next_x - x) / (next_y - y)
  return (straddles & (x_N1 < crossing)).sum(axis=1) % 2 == 1


def _places(
  scene: Scene, rng: np.random.Generator, frames: int, eye_m: float, core_deg: float
) -> list[np.ndarray]:
  """Where the walker stands at each frame: from the best of a few places along a path, evenly."""
  low_2 = np.round(scene.polygon_Z2.min(axis=0) + _CELL_M * rng.random(2), 3)
  free = _free_floor(scene, low_2, eye_m)
  cells = np.argwhere(free)
  starts = cells[(rng.random(_PLACES) * len(cells)).astype(int)]
  unseen_Z = np.ones(len(scene.objects), bool)
  scores = [_headings(scene, low_2 + c * _CELL_M, unseen_Z, core_deg)[0].max() for c in starts]
  path = _path(free, starts[int(np.argmax(scores))], rng)
  steps = [round(i * (len(path) - 1) / max(frames - 1, 1)) for i in range(frames)]
  return [low_2 + np.array(path[step]) * _CELL_M for step in steps]


def _free_floor(scene: Scene, low_2: np.ndarray, eye_m: float) -> np.ndarray:
  """bool [columns, rows]: connected cells of the floor where a walker has room."""
  size = np.ceil((scene.polygon_Z2.max(axis=0) - low_2) / _CELL_M).astype(int)
  points_N2 = low_2 + np.stack(np.indices(size), axis=-1).reshape(-1, 2) * _CELL_M
  inside = inside_outline(scene.polygon_Z2, points_N2)
  wall_m = _wall_distance(scene.polygon_Z2, points_N2)
  eye_clear_m = _object_distance(scene, points_N2, eye_m)
  body_clear_m = [_object_distance(scene, points_N2, height_m) for height_m in _BODY_M]
  object_m = np.minimum.reduce([eye_clear_m, *body_clear_m])
  largest = np.zeros(size, bool)
  for clearance_m in _CLEARANCES_M:
    free = inside & (wall_m >= clearance_m) & (object_m >= clearance_m)
    largest = max(largest, _largest_region(free.reshape(size)), key=np.sum)
    if largest.sum() >= _ROOMY_CELLS:
      break
  if not largest.any():  # a room too full to walk in: stand where the camera has most room
    clear_m = np.where(inside, np.minimum(wall_m, eye_clear_m), 0.0)
    if clear_m.max() == 0.0:
      raise DataError(f"{scene.scene_id}: no free place for a camera")
    largest.flat[np.argmax(clear_m)] = True
  return largest


def _object_distance(scene: Scene, points_N2: np.ndarray, height_m: float) -> np.ndarray:
  """float64 [N]: metres from each point, at one height, to the nearest object; 0 inside one."""
  points_N3 = np.column_stack([points_N2, np.full(len(points_N2), height_m)])
  object_m = np.full(len(points_N2), np.inf)
  for thing in scene.objects:
    beyond = np.abs((points_N3 - thing.centre_3) @ thing.axes_33.T) - thing.size_3 / 2
    object_m = np.minimum(object_m, np.sqrt((np.maximum(beyond, 0.0) ** 2).sum(axis=1)))
  return object_m


def _largest_region(free: np.ndarray) -> np.ndarray:
  """The cells of the largest connected part of the free floor."""
  left, largest = free.copy(), np.zeros_like(free)
  while left.sum() > largest.sum():
    x, y = np.argwhere(left)[0].tolist()
    region = np.zeros_like(free)
    region[tuple(np.array(list(_reach(left, (x, y)))).T)] = True
    left &= ~region
    if region.sum() > largest.sum():
      largest = region
  return largest


def _wall_distance(polygon_Z2: np.ndarray, points_N2: np.ndarray) -> np.ndarray:
  """Distance in metres of each point to the nearest wall."""
  nearest = np.full(len(points_N2), np.inf)
  for start, stop in zip(polygon_Z2, np.roll(polygon_Z2, -1, axis=0), strict=True):
    along = stop - start
    share = np.clip((points_N2 - start) @ along / (along @ along), 0.0, 1.0)
    off = points_N2 - start - share[:, None] * along
    nearest = np.minimum(nearest, np.sqrt((off**2).sum(axis=1)))
  return nearest


def _headings(
  scene: Scene, place_2: np.ndarray, unseen_Z: np.ndarray, core_deg: float
) -> tuple[np.ndarray, np.ndarray]:
  """How rewarding each heading is from a place, and which objects it shows, bool [headings, Z].

  Objects count where they are well in sight (those seen before less), free view counts, and what
  stands right before the eyes counts against a heading.
  """
  to_Z2 = np.array([thing.centre_3[:2] for thing in scene.objects]).reshape(-1, 2) - place_2
  distance = np.sqrt((to_Z2**2).sum(axis=1))
  sighted = (distance > _SIGHT_M[0]) & (distance < _SIGHT_M[1])
  sighted &= _unblocked(scene.polygon_Z2, place_2, to_Z2)
  bearing_deg = np.degrees(np.arctan2(to_Z2[:, 1], to_Z2[:, 0]))
  off_deg = np.abs(_wrap(bearing_deg - _HEADINGS_DEG[:, None]))  # [headings, Z]
  seen = (off_deg < core_deg) & sighted
  close = (off_deg < 1.3 * core_deg) & (distance < _SIGHT_M[0])
  score = seen @ np.where(unseen_Z, 1.0, 0.3) - close.sum(axis=1)
  return np.round(score + 0.5 * _open_m(scene.polygon_Z2, place_2, core_deg), 6), seen


def _open_m(polygon_Z2: np.ndarray, place_2: np.ndarray, core_deg: float) -> np.ndarray:
  """How far each heading is open up to the walls, left, ahead and right: the least."""
  turn = np.radians(_HEADINGS_DEG[:, None, None] + np.array([[-core_deg], [0.0], [core_deg]]))
  dx, dy = np.cos(turn), np.sin(turn)  # [headings, 3, walls]
  from_x, from_y = (polygon_Z2 - place_2).T
  along_x, along_y = (np.roll(polygon_Z2, -1, axis=0) - polygon_Z2).T
  with np.errstate(divide="ignore", invalid="ignore"):
    scale = 1 / (dx * along_y - dy * along_x)
    t = (from_x * along_y - from_y * along_x) * scale
    place = (from_x * dy - from_y * dx) * scale
  hits = (t > 0) & (place >= 0) & (place <= 1)
  return np.where(hits, t, np.inf).min(axis=(1, 2)).clip(max=_OPEN_M)


def _unblocked(polygon_Z2: np.ndarray, place_2: np.ndarray, to_Z2: np.ndarray) -> np.ndarray:
  """Whether the straight line from a place to each point crosses no wall, bool [Z]."""
  to_x, to_y = to_Z2[:, :1], to_Z2[:, 1:]  # against all walls at once: [Z, walls]
  from_x, from_y = (polygon_Z2 - place_2).T
  next_x, next_y = np.roll(from_x, -1), np.roll(from_y, -1)
  along_x, along_y = next_x - from_x, next_y - from_y
  same_side = (to_x * from_y - to_y * from_x) * (to_x * next_y - to_y * next_x) > 0
  here = along_y * from_x - along_x * from_y
  there = along_x * (to_y - from_y) - along_y * (to_x - from_x)
  return (same_side | (here * there > 0)).all(axis=1)


def _path(free: np.ndarray, start: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
  """Cells of a shortest path from `start` to the farthest of a few random places."""
  parent = _reach(free, (int(start[0]), int(start[1])))
  order = list(parent)
  path = [order[int(rng.random(_GOALS).max() * len(order))]]
  while path[-1] != order[0]:
    path.append(parent[path[-1]])
  return path[::-1]


def _reach(free: np.ndarray, start: tuple[int, int]) -> dict[tuple[int, int], tuple[int, int]]:
  """Cells that can be reached, in order of distance, each with the cell one comes from."""
  parent, order = {start: start}, [start]
  for x, y in order:
    for cell in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
      on_grid = 0 <= cell[0] < free.shape[0] and 0 <= cell[1] < free.shape[1]
      if on_grid and free[cell] and cell not in parent:
        parent[cell] = (x, y)
        order.append(cell)
  return parent


def _wrap(angle_deg: np.ndarray) -> np.ndarray:
  """The same angle in [-180, 180)."""
  return (angle_deg + 180.0) % 360.0 - 180.0
