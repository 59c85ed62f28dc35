"""Photographs with measured 3D boxes -> Tasks: real pictures, real metres.

    annotations.json: [{image, width, height, projection, objects: [{label, bbox_2d, corners}]}]

`corners` are metres in a frame with the camera at its origin; `projection` takes them to the
picture. An object is asked about when words tell it from all others ("the truck", "the closest
car") and it is clear: most of it inside the picture, not behind nearer objects, not tiny. It is
counted when enough of it is shown to tell that it is there.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from spatial_jax.data.records import field, numbers, read_image, read_json
from spatial_jax.errors import DataError
from spatial_jax.synthetic import geometry
from spatial_jax.synthetic.question_templates import (
  ABS_DISTANCE,
  CAMERA_DISTANCE,
  MIN_DISTANCE_M,
  SIZE,
  Draft,
)
from spatial_jax.synthetic.questions import answer_kind, assign_letters
from spatial_jax.synthetic.scene import SceneObject
from spatial_jax.types import ObjectBox, Task

COUNT = "How many {c}(s) in this image are less than {d} meters away from the camera?"
LEFT_RIGHT = "Which of these objects ({options}) is further to the left in this image?"
CLOSER = "Which of these objects ({options}) is closer to the camera?"

# (share of the projected 3D box in the picture, share of the 2D box free of nearer 2D boxes), least
_CLEAR = (0.6, 0.5)  # to be asked about
_SHOWN = (0.1, 0.3)  # to be counted
_MIN_SIDE = 0.015  # shorter side of the 2D box, in longer sides of the picture
_LIMITS_M = (10, 15, 20, 25, 30, 40, 60)  # "less than ... meters away"
_DISTANCE_MARGIN = 0.1  # relative: nearest to the next, an object to a limit, two that are compared
_CENTRE_MARGIN = 0.03  # in picture widths: leftmost to the next, two that are compared
_SAMPLES = 64  # per side of a 2D box, to see how much of it is covered


@dataclasses.dataclass(frozen=True, eq=False)
class _Thing:
  """An annotated object; `distance_m` is from the camera to its closest point."""

  solid: SceneObject
  box_4: np.ndarray
  distance_m: float
  shown: bool
  clear: bool

  @property
  def centre_px(self) -> float:
    """Horizontal middle of the 2D box."""
    return float(self.box_4[0] + self.box_4[2]) / 2


def load_photo_tasks(
  path: pathlib.Path | str, seed: int, max_side_px: int, max_per_type: int
) -> list[Task]:
  """All questions about the photographs of a folder.

  Args:
    path: folder with `annotations.json` and the pictures it names.
    seed: of the order of questions and options.
    max_side_px: larger pictures are made smaller so that the longer side has this length.
    max_per_type: most questions per photograph and type.

  Returns:
    Tasks with source "photos"; the scene is the photograph, boxes are in pixels of the picture as
    resized.

  Raises:
    DataError: on the host, one line naming file, object and field, when something cannot be used.
  """
  file = pathlib.Path(path) / "annotations.json"
  records = read_json(file)
  if not isinstance(records, list):
    raise DataError(f"{file} must be a list of photographs, got a {type(records).__name__}")
  return [
    task
    for index, record in enumerate(records)
    for task in _photo_tasks(
      file, record, np.random.default_rng((seed, index)), max_side_px, max_per_type
    )
  ]


def _photo_tasks(
  file: pathlib.Path, record: Any, rng: np.random.Generator, max_side_px: int, max_per_type: int
) -> list[Task]:
  """The questions of one entry of the annotations."""
  name = field(record, "image", str, f"{file}, a photograph")
  where = f"{file}, {name}"
  size_2 = np.array([numbers(record, side, (), where).item() for side in ("width", "height")])
  things = _things(record, size_2, where)
  image, scale = _picture(file.parent / name, size_2, max_side_px)
  scene_id = f"photos/{pathlib.Path(name).stem}"
  tasks = []
  for question_type, drafts in _drafts(things, size_2[0]).items():
    chosen = [drafts[i] for i in rng.permutation(len(drafts))[:max_per_type]]
    texts = assign_letters(chosen, rng)
    for number, (draft, (question, options, answer)) in enumerate(zip(chosen, texts, strict=True)):
      tasks.append(
        Task(
          task_id=f"{scene_id}/{question_type}/{number}",
          question_type=question_type,
          question=question,
          options=options,
          answer=answer,
          answer_kind=answer_kind(question_type),
          images=(image,),
          source="photos",
          scene_id=scene_id,
          benchmark=None,
          boxes=tuple(_box(things[i], scale) for i in draft.objects),
        )
      )
  return tasks


def _picture(path: pathlib.Path, size_2: np.ndarray, max_side_px: int) -> tuple[np.ndarray, float]:
  """The picture, uint8 [height, width, 3], at most as large as asked, and how it was scaled."""
  picture = read_image(path)
  if picture.size != tuple(size_2):
    raise DataError(
      f"{path} is {picture.width} x {picture.height} px, its annotation says {size_2[0]:.0f} x"
      f" {size_2[1]:.0f}: fetch both again"
    )
  scale = min(1.0, max_side_px / max(picture.size))
  width, height = (max(1, round(side * scale)) for side in picture.size)
  if scale < 1:
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(picture), scale


def _things(record: Any, size_2: np.ndarray, where: str) -> list[_Thing]:
  """The annotated objects of a photograph, from left to right."""
  projection = field(record, "projection", list, where)
  columns = 4 if np.shape(projection) == (3, 4) else 3
  projection = numbers(record, "projection", (3, columns), where)
  things, inside = [], []
  for index, entry in enumerate(field(record, "objects", list, where)):
    place = f"{where}, object {index}"
    corners_83 = numbers(entry, "corners", (8, 3), place)
    solid = solid_of(field(entry, "label", str, place), corners_83, place)
    distance_m = float(geometry.point_distance_m(np.zeros((1, 3)), solid)[0])
    things.append(_Thing(solid, numbers(entry, "bbox_2d", (4,), place), distance_m, False, False))
    inside.append(_inside(corners_83, projection, size_2))
  judged = [
    _judge(thing, things, share, _MIN_SIDE * size_2.max())
    for thing, share in zip(things, inside, strict=True)
  ]
  return sorted(judged, key=lambda thing: thing.centre_px)


def _judge(thing: _Thing, things: Sequence[_Thing], inside: float, small_px: float) -> _Thing:
  """Whether an object is shown, and clear."""
  large = min(thing.box_4[2:] - thing.box_4[:2]) >= small_px
  free = _free(thing, things)
  shown, clear = (large and inside >= least[0] and free >= least[1] for least in (_SHOWN, _CLEAR))
  return dataclasses.replace(thing, shown=shown, clear=clear)


def solid_of(label: str, corners_83: np.ndarray, where: str) -> SceneObject:
  """The box with these 8 corners, whatever their order.

  Raises:
    DataError: on the host, starting with `where`, when no three edges from a corner are orthogonal.
  """
  from_first_73 = corners_83[1:] - corners_83[0]
  length_7 = np.maximum(np.linalg.norm(from_first_73, axis=1), 1e-9)
  unit_73 = from_first_73 / length_7[:, None]
  cosine_77 = np.abs(unit_73 @ unit_73.T)

  def skew(triple: tuple[int, ...]) -> float:
    return max(cosine_77[i, j] for i, j in itertools.combinations(triple, 2))

  edges = list(min(itertools.combinations(range(7), 3), key=skew))
  if skew(tuple(edges)) > 0.02:
    raise DataError(f"{where}: field corners must be the 8 corners of a box")
  left_33, _, right_33 = np.linalg.svd(unit_73[edges])  # rounded to mm: not orthonormal to the bit
  return SceneObject(label, "", corners_83.mean(axis=0), length_7[edges], left_33 @ right_33, ())


def _inside(corners_83: np.ndarray, projection: np.ndarray, size_2: np.ndarray) -> float:
  """Share of the rectangle around the projected corners in the picture; 0 behind the camera."""
  points = corners_83
  if projection.shape[1] == 4:
    points = np.concatenate([corners_83, np.ones((8, 1))], axis=1)
  seen_83 = points @ projection.T
  if seen_83[:, 2].min() <= 0:
    return 0.0
  pixels_82 = seen_83[:, :2] / seen_83[:, 2:]
  low_2, high_2 = pixels_82.min(axis=0), pixels_82.max(axis=0)
  kept_2 = np.clip(high_2, 0, size_2) - np.clip(low_2, 0, size_2)
  return float(np.prod(kept_2) / max(np.prod(high_2 - low_2), 1e-9))


def _free(thing: _Thing, things: Sequence[_Thing]) -> float:
  """Share of an object's 2D box that the 2D boxes of nearer objects leave free."""
  x1, y1, x2, y2 = thing.box_4
  steps = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
  x, y = np.meshgrid(x1 + steps * (x2 - x1), y1 + steps * (y2 - y1))
  free = np.ones(x.shape, bool)
  for other in things:
    if other.distance_m < thing.distance_m:
      left, top, right, bottom = other.box_4
      free &= (x < left) | (x > right) | (y < top) | (y > bottom)
  return float(free.mean())


def _box(thing: _Thing, scale: float) -> ObjectBox:
  x1, y1, x2, y2 = (float(side) * scale for side in thing.box_4)
  return ObjectBox(thing.solid.category, 0, (x1, y1, x2, y2), thing.distance_m)


def _names(things: Sequence[_Thing], width_px: float) -> dict[int, str]:
  """Clear objects that words tell from all others of their label, and these words.

  Objects that are hidden or tiny count as others: "the closest car" is closer than those too.
  """
  names: dict[int, str] = {}
  for label in dict.fromkeys(thing.solid.category for thing in things):
    group = [i for i, thing in enumerate(things) if thing.solid.category == label]  # left to right
    if len(group) == 1:
      names[group[0]] = label
      continue
    gaps_px = [things[j].centre_px - things[i].centre_px for i, j in itertools.pairwise(group)]
    apart = [gap_px >= _CENTRE_MARGIN * width_px for gap_px in gaps_px]
    if len(group) > 2 and all(apart[:2]) and things[group[0]].shown:
      names[group[1]] = f"second {label} from the left"
    if len(group) > 3 and all(apart[-2:]) and things[group[-1]].shown:
      names[group[-2]] = f"second {label} from the right"
    if apart[0]:
      names[group[0]] = f"leftmost {label}"
    if apart[-1]:
      names[group[-1]] = f"rightmost {label}"
    near, next_near = sorted(group, key=lambda i: things[i].distance_m)[:2]
    if _differ(things[near].distance_m, things[next_near].distance_m):
      names[near] = f"closest {label}"
  return {i: name for i, name in sorted(names.items()) if things[i].clear}


def _differ(a_m: float, b_m: float) -> bool:
  return abs(a_m - b_m) >= _DISTANCE_MARGIN * max(a_m, b_m)


def _drafts(things: Sequence[_Thing], width_px: float) -> dict[str, list[Draft]]:
  """Every question about one photograph, by type; objects of a draft are indices into `things`."""
  names = _names(things, width_px)
  pairs = list(itertools.combinations(names, 2))
  return {
    "object_counting": list(_counting(things)),
    "camera_distance": [
      Draft(CAMERA_DISTANCE.format(c=name), f"{things[i].distance_m:.1f}", (), (i,))
      for i, name in names.items()
      if things[i].distance_m >= MIN_DISTANCE_M
    ],
    "object_size_estimation": [
      Draft(SIZE.format(c=name), str(geometry.longest_dimension_cm(things[i].solid)), (), (i,))
      for i, name in names.items()
    ],
    "object_abs_distance": [
      Draft(ABS_DISTANCE.format(a=names[i], b=names[j]), f"{distance:.1f}", (), (i, j))
      for i, j in pairs
      if (distance := geometry.box_distance_m(things[i].solid, things[j].solid)) >= MIN_DISTANCE_M
    ],
    "left_right": [
      Draft(LEFT_RIGHT, names[i], (names[j],), (i, j))
      for i, j in pairs
      if things[i].solid.category != things[j].solid.category
      and things[j].centre_px - things[i].centre_px >= _CENTRE_MARGIN * width_px
    ],
    "closer_to_camera": list(_closer(things, names)),
  }


def _counting(things: Sequence[_Thing]) -> Iterator[Draft]:
  """How many of a label are nearer than a limit: all of these shown, none near the limit."""
  for label in dict.fromkeys(thing.solid.category for thing in things):
    group = [i for i, thing in enumerate(things) if thing.solid.category == label]
    counted = set()
    for limit_m in _LIMITS_M:
      near = tuple(i for i in group if things[i].distance_m < limit_m)
      certain = all(_differ(things[i].distance_m, limit_m) for i in group)
      if len(near) > 1 and certain and all(things[i].shown for i in near) and near not in counted:
        counted.add(near)
        yield Draft(COUNT.format(c=label, d=limit_m), str(len(near)), (), near)


def _closer(things: Sequence[_Thing], names: dict[int, str]) -> Iterator[Draft]:
  """Which of two is closer to the camera, for objects of two labels."""
  for i, j in itertools.combinations(names, 2):
    near, far = sorted((i, j), key=lambda k: things[k].distance_m)
    different = things[i].solid.category != things[j].solid.category
    if different and _differ(things[i].distance_m, things[j].distance_m):
      yield Draft(CLOSER, names[near], (names[far],), (i, j))
