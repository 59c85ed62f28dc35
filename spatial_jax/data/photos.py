"""Photographs with measured 3D boxes -> Tasks.

    annotations.json: [{image, width, height, projection, objects: [{label, bbox_2d, corners}]}]

`corners` are metres in a frame with the camera at its origin; `projection` maps them to pixels. A
question names an object that words tell from all others ("the truck", "the closest car") and that
is clear: most of it is inside the image, not hidden by nearer objects, and not tiny. Objects are
counted if a smaller part of them is shown.
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
from spatial_jax.types import ImageRef, ObjectBox, Task

COUNT = "How many {c}(s) in this image are less than {d} meters away from the camera?"
LEFT_RIGHT = "Which of these objects ({options}) is further to the left in this image?"
CLOSER = "Which of these objects ({options}) is closer to the camera?"

# Minimum of (share of the projected 3D box that is inside the image, share of the 2D box that no 2D
# box of a nearer object covers).
_CLEAR = (0.6, 0.5)  # for questions that name the object
_SHOWN = (0.1, 0.3)  # for counting
_MIN_SIDE = 0.015  # shorter side of the 2D box, in longer sides of the image
_LIMITS_M = (10, 15, 20, 25, 30, 40, 60)  # "less than ... meters away"
_DISTANCE_MARGIN = 0.1  # least relative difference between two compared distances
_CENTRE_MARGIN = 0.03  # least difference between two compared positions, in image widths
_SAMPLES = 64  # per side of a 2D box, for the share that is not covered
_EXPECTED = (
  "expected a folder with annotations.json ([{image, width, height, projection, objects: [{label,"
  " bbox_2d, corners}]}]) and the images it names; set config.source.path to this folder"
)


@dataclasses.dataclass(frozen=True, eq=False)
class _PhotoObject:
  """An annotated object; `distance_m` is from the camera to its closest point."""

  solid: SceneObject
  box_4: np.ndarray  # pixels
  distance_m: float
  shown: bool  # may be counted
  clear: bool  # may be named

  @property
  def centre_px(self) -> float:
    """Horizontal middle of the 2D box."""
    return float(self.box_4[0] + self.box_4[2]) / 2


def load_photo_tasks(
  path: pathlib.Path | str, seed: int, max_side_px: int, max_per_type: int
) -> list[Task]:
  """All questions about the photographs of a folder; each photograph is a scene.

  Args:
    path: folder with `annotations.json` and the images it names.
    seed: for the order of questions and options.
    max_side_px: the longer side of larger images is reduced to this length, and boxes with it.
    max_per_type: most questions per photograph and type.

  Raises:
    DataError: if a file is missing or cannot be used; names file, object and field.
  """
  path = pathlib.Path(path)
  file = path / "annotations.json"
  if not path.is_dir():
    problem = "is not a folder" if path.exists() else "does not exist"
    raise DataError(f"{path} {problem}; {_EXPECTED}")
  if not file.exists():
    raise DataError(f"{file} does not exist; {_EXPECTED}")
  records = read_json(file)
  if not isinstance(records, list):
    raise DataError(f"{file} must be a list of photographs, got a {type(records).__name__}")
  tasks = [
    task
    for index, record in enumerate(records)
    for task in _photo_tasks(
      file, record, np.random.default_rng((seed, index)), max_side_px, max_per_type
    )
  ]
  if len({task.task_id for task in tasks}) < len(tasks):
    raise DataError(f"{file}: two images have the same name without extension; rename one")
  if not tasks:
    raise DataError(f"{file} gives no question: no photograph has a clearly visible object")
  return tasks


def _photo_tasks(
  file: pathlib.Path, record: Any, rng: np.random.Generator, max_side_px: int, max_per_type: int
) -> list[Task]:
  """The questions of one entry of the annotations."""
  name = field(record, "image", str, f"{file}, a photograph")
  where = f"{file}, {name}"
  size_2 = np.array([numbers(record, side, (), where).item() for side in ("width", "height")])
  objects = _photo_objects(record, size_2, where)
  image, scale = _load_image(file.parent / name, size_2, max_side_px)
  scene_id = f"photos/{pathlib.Path(name).stem}"
  tasks = []
  for question_type, drafts in _drafts(objects, size_2[0]).items():
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
          unit=None,
          media=(ImageRef(image),),
          source="photos",
          scene_id=scene_id,
          benchmark=None,
          boxes=tuple(_box(objects[i], scale) for i in draft.objects),
        )
      )
  return tasks


def _load_image(
  path: pathlib.Path, size_2: np.ndarray, max_side_px: int
) -> tuple[np.ndarray, float]:
  """The resized image, uint8 [height, width, 3], and its scale."""
  image = read_image(path)
  if image.size != tuple(size_2):
    raise DataError(
      f"{path} is {image.width} x {image.height} px but its annotation says {size_2[0]:.0f} x"
      f" {size_2[1]:.0f}; use the annotations of this image"
    )
  scale = min(1.0, max_side_px / max(image.size))
  width, height = (max(1, round(side * scale)) for side in image.size)
  if scale < 1:
    image = image.resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(image), scale


def _photo_objects(record: Any, size_2: np.ndarray, where: str) -> list[_PhotoObject]:
  """The annotated objects of a photograph, from left to right."""
  projection = field(record, "projection", list, where)
  columns = 4 if all(isinstance(row, list) and len(row) == 4 for row in projection) else 3
  projection = numbers(record, "projection", (3, columns), where)
  found: list[tuple[SceneObject, np.ndarray, float, float]] = []
  for index, entry in enumerate(field(record, "objects", list, where)):
    place = f"{where}, object {index}"
    corners_83 = numbers(entry, "corners", (8, 3), place)
    solid = box_from_corners(field(entry, "label", str, place), corners_83, place)
    distance_m = float(geometry.point_distance_m(np.zeros((1, 3)), solid)[0])
    box_4 = numbers(entry, "bbox_2d", (4,), place)
    found.append((solid, box_4, distance_m, _inside(corners_83, projection, size_2)))
  objects = []
  for solid, box_4, distance_m, inside in found:
    large = min(box_4[2:] - box_4[:2]) >= _MIN_SIDE * size_2.max()
    free = _free(box_4, [other[1] for other in found if other[2] < distance_m])
    shown, clear = (large and inside >= least[0] and free >= least[1] for least in (_SHOWN, _CLEAR))
    objects.append(_PhotoObject(solid, box_4, distance_m, shown, clear))
  return sorted(objects, key=lambda obj: obj.centre_px)


def box_from_corners(label: str, corners_83: np.ndarray, where: str) -> SceneObject:
  """The box with these 8 corners, in any order.

  Raises:
    DataError: if no three edges from a corner are orthogonal; the message starts with `where`.
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
  """Share of the rectangle around the projected corners in the image; 0 if not in front of it."""
  points = corners_83
  if projection.shape[1] == 4:
    points = np.concatenate([corners_83, np.ones((8, 1))], axis=1)
  projected_83 = points @ projection.T
  if projected_83[:, 2].min() <= 0:
    return 0.0
  pixels_82 = projected_83[:, :2] / projected_83[:, 2:]
  low_2, high_2 = pixels_82.min(axis=0), pixels_82.max(axis=0)
  kept_2 = np.clip(high_2, 0, size_2) - np.clip(low_2, 0, size_2)
  return float(np.prod(kept_2) / max(np.prod(high_2 - low_2), 1e-9))


def _free(box_4: np.ndarray, nearer: Sequence[np.ndarray]) -> float:
  """Share of a 2D box that no 2D box of a nearer object covers."""
  x1, y1, x2, y2 = box_4
  steps = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
  x, y = np.meshgrid(x1 + steps * (x2 - x1), y1 + steps * (y2 - y1))
  free = np.ones(x.shape, bool)
  for left, top, right, bottom in nearer:
    free &= (x < left) | (x > right) | (y < top) | (y > bottom)
  return float(free.mean())


def _box(obj: _PhotoObject, scale: float) -> ObjectBox:
  x1, y1, x2, y2 = (float(side) * scale for side in obj.box_4)
  return ObjectBox(obj.solid.category, 0, (x1, y1, x2, y2), obj.distance_m)


def _names(objects: Sequence[_PhotoObject], width_px: float) -> dict[int, str]:
  """Clear objects with a unique name, and this name.

  Hidden and tiny objects count too: "the closest car" is closer than all other cars.
  """
  names: dict[int, str] = {}
  for label in dict.fromkeys(obj.solid.category for obj in objects):
    group = [i for i, obj in enumerate(objects) if obj.solid.category == label]  # left to right
    if len(group) == 1:
      names[group[0]] = label
      continue
    gaps_px = [objects[j].centre_px - objects[i].centre_px for i, j in itertools.pairwise(group)]
    apart = [gap_px >= _CENTRE_MARGIN * width_px for gap_px in gaps_px]
    if len(group) > 2 and all(apart[:2]) and objects[group[0]].shown:
      names[group[1]] = f"second {label} from the left"
    if len(group) > 3 and all(apart[-2:]) and objects[group[-1]].shown:
      names[group[-2]] = f"second {label} from the right"
    if apart[0]:
      names[group[0]] = f"leftmost {label}"
    if apart[-1]:
      names[group[-1]] = f"rightmost {label}"
    near, next_near = sorted(group, key=lambda i: objects[i].distance_m)[:2]
    if _differ(objects[near].distance_m, objects[next_near].distance_m):
      names[near] = f"closest {label}"
  return {i: name for i, name in sorted(names.items()) if objects[i].clear}


def _differ(a_m: float, b_m: float) -> bool:
  return abs(a_m - b_m) >= _DISTANCE_MARGIN * max(a_m, b_m)


def _drafts(objects: Sequence[_PhotoObject], width_px: float) -> dict[str, list[Draft]]:
  """All questions about one photograph, by type; drafts have indices into `objects`."""
  names = _names(objects, width_px)
  pairs = list(itertools.combinations(names, 2))
  return {
    "object_counting": list(_counting(objects)),
    "camera_distance": [
      Draft(CAMERA_DISTANCE.format(c=name), f"{objects[i].distance_m:.1f}", (), (i,))
      for i, name in names.items()
      if objects[i].distance_m >= MIN_DISTANCE_M
    ],
    "object_size_estimation": [
      Draft(SIZE.format(c=name), str(geometry.longest_dimension_cm(objects[i].solid)), (), (i,))
      for i, name in names.items()
    ],
    "object_abs_distance": [
      Draft(ABS_DISTANCE.format(a=names[i], b=names[j]), f"{distance:.1f}", (), (i, j))
      for i, j in pairs
      if (distance := geometry.box_distance_m(objects[i].solid, objects[j].solid)) >= MIN_DISTANCE_M
    ],
    "left_right": [
      Draft(LEFT_RIGHT, names[i], (names[j],), (i, j))
      for i, j in pairs
      if objects[i].solid.category != objects[j].solid.category
      and objects[j].centre_px - objects[i].centre_px >= _CENTRE_MARGIN * width_px
    ],
    "closer_to_camera": list(_closer(objects, names)),
  }


def _counting(objects: Sequence[_PhotoObject]) -> Iterator[Draft]:
  """Number of objects of a label nearer than a limit; all are shown, none is near the limit."""
  for label in dict.fromkeys(obj.solid.category for obj in objects):
    group = [i for i, obj in enumerate(objects) if obj.solid.category == label]
    counted = set()
    for limit_m in _LIMITS_M:
      near = tuple(i for i in group if objects[i].distance_m < limit_m)
      certain = all(_differ(objects[i].distance_m, limit_m) for i in group)
      if len(near) > 1 and certain and all(objects[i].shown for i in near) and near not in counted:
        counted.add(near)
        yield Draft(COUNT.format(c=label, d=limit_m), str(len(near)), (), near)


def _closer(objects: Sequence[_PhotoObject], names: dict[int, str]) -> Iterator[Draft]:
  """The closer of two objects of different labels."""
  for i, j in itertools.combinations(names, 2):
    near, far = sorted((i, j), key=lambda k: objects[k].distance_m)
    different = objects[i].solid.category != objects[j].solid.category
    if different and _differ(objects[i].distance_m, objects[j].distance_m):
      yield Draft(CLOSER, names[near], (names[far],), (i, j))
