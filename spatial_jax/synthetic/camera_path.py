"""A camera path through a room: over free floor, turned to objects that no earlier frame shows."""

import math

import numpy as np

from spatial_jax.errors import DataError
from spatial_jax.synthetic.scene import Camera, Scene

_CELL_M = 0.2  # side of a cell of the grid of camera positions
_CLEARANCES_M = (0.5, 0.25, 0.1)  # from objects and walls; a crowded room falls back to the next
_MIN_REGION_CELLS = 25  # one square metre; with a smaller region the next clearance is tried
_BODY_HEIGHTS_M = (0.3, 0.9)  # must be free like the camera's height: a rug is no obstacle
_CAMERA_HEIGHT_M = (1.3, 1.7)
_DOWN_DEG = (12.0, 20.0)
_HEADINGS_DEG = np.arange(0.0, 360.0, 15.0)
_MAX_TURN_DEG = 75.0  # between two frames
_CLEAR_RANGE_M = (0.9, 6.0)  # an object outside this range does not count as shown
_CORE = 0.4  # half of the field of view without its border, as a share of the field of view
_MAX_FREE_VIEW_M = 4.0  # a longer view does not score higher
_STARTS = 16  # start positions that are compared
_GOALS = 6  # end positions that are compared


def make_camera_path(
  scene: Scene,
  rng: np.random.Generator,
  frames: int,
  width_px: int,
  height_px: int,
  field_of_view_deg: float,
) -> tuple[Camera, ...]:
  """Cameras along a path over free floor; a single camera shows many objects.

  The path starts at a position that shows many objects and ends at a far position. Each camera is
  turned to the heading with the most objects that no earlier camera shows.

  Args:
    scene: room and objects; `scene.cameras` is not read.
    rng: random numbers for the whole path.
    frames: number of cameras, >= 1.
    width_px, height_px: size of the images.
    field_of_view_deg: horizontal.

  Returns:
    `frames` cameras in order of time, none inside an object, 1.3 to 1.7 m above the floor.

  Raises:
    DataError: if every position at the height of the camera is inside an object.
  """
  low_m, high_m = _CAMERA_HEIGHT_M
  camera_m = round(low_m + (high_m - low_m) * rng.random(), 3)
  down_deg = _DOWN_DEG[0] + (_DOWN_DEG[1] - _DOWN_DEG[0]) * rng.random()
  core_deg = _CORE * field_of_view_deg
  new_Z = np.ones(len(scene.objects), bool)
  heading_deg, cameras = None, []
  for place_2 in _path_positions(scene, rng, frames, camera_m, core_deg):
    score, shown = _score_headings(scene, place_2, new_Z, core_deg)
    if heading_deg is not None:
      turn_deg = np.abs(_wrap_degrees(_HEADINGS_DEG - heading_deg))
      score = np.where(turn_deg <= _MAX_TURN_DEG, score, -np.inf)
    choice = int(np.argmax(score))
    heading_deg = float(_HEADINGS_DEG[choice])
    new_Z &= ~shown[choice]
    position_3 = np.array([place_2[0], place_2[1], camera_m])
    cameras.append(
      make_camera(position_3, heading_deg, down_deg, field_of_view_deg, width_px, height_px)
    )
  return tuple(cameras)


def make_camera(
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


def inside_polygon(polygon_Z2: np.ndarray, points_N2: np.ndarray) -> np.ndarray:
  """Whether each point is inside the polygon, bool [N] (even-odd rule)."""
  x_N1, y_N1 = points_N2[:, :1], points_N2[:, 1:]
  x, y = polygon_Z2.T
  next_x, next_y = np.roll(polygon_Z2, -1, axis=0).T
  straddles = (y > y_N1) != (next_y > y_N1)
  with np.errstate(divide="ignore", invalid="ignore"):
    crossing = x + (y_N1 - y) * (next_x - x) / (next_y - y)
  return (straddles & (x_N1 < crossing)).sum(axis=1) % 2 == 1


def _path_positions(
  scene: Scene, rng: np.random.Generator, frames: int, camera_m: float, core_deg: float
) -> list[np.ndarray]:
  """The positions of the cameras, at equal steps along the path from the best start."""
  low_2 = np.round(scene.polygon_Z2.min(axis=0) + _CELL_M * rng.random(2), 3)
  free = _free_floor(scene, low_2, camera_m)
  cells = np.argwhere(free)
  starts = cells[(rng.random(_STARTS) * len(cells)).astype(int)]
  new_Z = np.ones(len(scene.objects), bool)
  scores = [_score_headings(scene, low_2 + c * _CELL_M, new_Z, core_deg)[0].max() for c in starts]
  path = _shortest_path(free, starts[int(np.argmax(scores))], rng)
  steps = [round(i * (len(path) - 1) / max(frames - 1, 1)) for i in range(frames)]
  return [low_2 + np.array(path[step]) * _CELL_M for step in steps]


def _free_floor(scene: Scene, low_2: np.ndarray, camera_m: float) -> np.ndarray:
  """bool [columns, rows]: the largest connected region of floor cells with enough clearance."""
  size = np.ceil((scene.polygon_Z2.max(axis=0) - low_2) / _CELL_M).astype(int)
  points_N2 = low_2 + np.stack(np.indices(size), axis=-1).reshape(-1, 2) * _CELL_M
  inside = inside_polygon(scene.polygon_Z2, points_N2)
  wall_m = _wall_distance(scene.polygon_Z2, points_N2)
  camera_clear_m = _object_distance(scene, points_N2, camera_m)
  body_clear_m = [_object_distance(scene, points_N2, height_m) for height_m in _BODY_HEIGHTS_M]
  object_m = np.minimum.reduce([camera_clear_m, *body_clear_m])
  largest = np.zeros(size, bool)
  for clearance_m in _CLEARANCES_M:
    free = inside & (wall_m >= clearance_m) & (object_m >= clearance_m)
    largest = max(largest, _largest_region(free.reshape(size)), key=np.sum)
    if largest.sum() >= _MIN_REGION_CELLS:
      break
  if not largest.any():  # no free floor: take the one position with the most clearance
    clear_m = np.where(inside, np.minimum(wall_m, camera_clear_m), 0.0)
    if clear_m.max() == 0.0:
      raise DataError(f"{scene.scene_id}: no free place for a camera")
    largest.flat[np.argmax(clear_m)] = True
  return largest


def _object_distance(scene: Scene, points_N2: np.ndarray, height_m: float) -> np.ndarray:
  """float64 [N]: metres from each point at this height to the nearest object; 0 inside one."""
  points_N3 = np.column_stack([points_N2, np.full(len(points_N2), height_m)])
  object_m = np.full(len(points_N2), np.inf)
  for obj in scene.objects:
    beyond = np.abs((points_N3 - obj.centre_3) @ obj.axes_33.T) - obj.size_3 / 2
    object_m = np.minimum(object_m, np.sqrt((np.maximum(beyond, 0.0) ** 2).sum(axis=1)))
  return object_m


def _largest_region(free: np.ndarray) -> np.ndarray:
  """The cells of the largest connected region of free floor."""
  left, largest = free.copy(), np.zeros_like(free)
  while left.sum() > largest.sum():
    x, y = np.argwhere(left)[0].tolist()
    region = np.zeros_like(free)
    region[tuple(np.array(list(_reachable_cells(left, (x, y)))).T)] = True
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


def _score_headings(
  scene: Scene, place_2: np.ndarray, new_Z: np.ndarray, core_deg: float
) -> tuple[np.ndarray, np.ndarray]:
  """A score of each heading at a position, and the objects it shows, bool [headings, Z].

  Clearly shown objects add to the score (new ones more), and so does a free view. Objects right
  before the camera lower it.
  """
  to_Z2 = np.array([obj.centre_3[:2] for obj in scene.objects]).reshape(-1, 2) - place_2
  distance = np.sqrt((to_Z2**2).sum(axis=1))
  clear = (distance > _CLEAR_RANGE_M[0]) & (distance < _CLEAR_RANGE_M[1])
  clear &= _has_line_of_sight(scene.polygon_Z2, place_2, to_Z2)
  bearing_deg = np.degrees(np.arctan2(to_Z2[:, 1], to_Z2[:, 0]))
  off_deg = np.abs(_wrap_degrees(bearing_deg - _HEADINGS_DEG[:, None]))  # [headings, Z]
  shown = (off_deg < core_deg) & clear
  close = (off_deg < 1.3 * core_deg) & (distance < _CLEAR_RANGE_M[0])
  score = shown @ np.where(new_Z, 1.0, 0.3) - close.sum(axis=1)
  return np.round(score + 0.5 * _free_view_m(scene.polygon_Z2, place_2, core_deg), 6), shown


def _free_view_m(polygon_Z2: np.ndarray, place_2: np.ndarray, core_deg: float) -> np.ndarray:
  """Metres to the walls for each heading: the least of the left, middle and right ray."""
  turn = np.radians(_HEADINGS_DEG[:, None, None] + np.array([[-core_deg], [0.0], [core_deg]]))
  dx, dy = np.cos(turn), np.sin(turn)  # [headings, 3, walls]
  from_x, from_y = (polygon_Z2 - place_2).T
  along_x, along_y = (np.roll(polygon_Z2, -1, axis=0) - polygon_Z2).T
  with np.errstate(divide="ignore", invalid="ignore"):
    scale = 1 / (dx * along_y - dy * along_x)
    t = (from_x * along_y - from_y * along_x) * scale
    place = (from_x * dy - from_y * dx) * scale
  hits = (t > 0) & (place >= 0) & (place <= 1)
  return np.where(hits, t, np.inf).min(axis=(1, 2)).clip(max=_MAX_FREE_VIEW_M)


def _has_line_of_sight(
  polygon_Z2: np.ndarray, place_2: np.ndarray, to_Z2: np.ndarray
) -> np.ndarray:
  """Whether the straight line from a position to each point crosses no wall, bool [Z]."""
  to_x, to_y = to_Z2[:, :1], to_Z2[:, 1:]  # against all walls at once: [Z, walls]
  from_x, from_y = (polygon_Z2 - place_2).T
  next_x, next_y = np.roll(from_x, -1), np.roll(from_y, -1)
  along_x, along_y = next_x - from_x, next_y - from_y
  same_side = (to_x * from_y - to_y * from_x) * (to_x * next_y - to_y * next_x) > 0
  here = along_y * from_x - along_x * from_y
  there = along_x * (to_y - from_y) - along_y * (to_x - from_x)
  return (same_side | (here * there > 0)).all(axis=1)


def _shortest_path(
  free: np.ndarray, start: np.ndarray, rng: np.random.Generator
) -> list[tuple[int, int]]:
  """Cells of a shortest path from `start` to the farthest of a few random goals."""
  parent = _reachable_cells(free, (int(start[0]), int(start[1])))
  order = list(parent)
  path = [order[int(rng.random(_GOALS).max() * len(order))]]
  while path[-1] != order[0]:
    path.append(parent[path[-1]])
  return path[::-1]


def _reachable_cells(
  free: np.ndarray, start: tuple[int, int]
) -> dict[tuple[int, int], tuple[int, int]]:
  """The cells that can be reached, in order of distance, each with its parent on the path."""
  parent, order = {start: start}, [start]
  for x, y in order:
    for cell in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
      on_grid = 0 <= cell[0] < free.shape[0] and 0 <= cell[1] < free.shape[1]
      if on_grid and free[cell] and cell not in parent:
        parent[cell] = (x, y)
        order.append(cell)
  return parent


def _wrap_degrees(angle_deg: np.ndarray) -> np.ndarray:
  """The same angle in [-180, 180)."""
  return (angle_deg + 180.0) % 360.0 - 180.0
