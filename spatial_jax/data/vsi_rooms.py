"""Real rooms: the scene metadata of VSI-Bench -> Scenes.

    {scene: {dataset, room_size, room_center, object_bbox: {category: [{centroid, axesLengths,
                                                                        normalizedAxes}]}}}

The metadata has boxes but no walls, so each room is a rectangle. `object_counts` is not read: in a
few rooms it disagrees with the boxes, and images of the room show the boxes.

Source: VSI-Bench, arXiv:2412.14171, and the meta_info files of its repository.
"""

import dataclasses
import math
import pathlib
from collections import Counter
from typing import Any

import numpy as np

from spatial_jax.data.records import field, numbers, read_json
from spatial_jax.errors import DataError
from spatial_jax.synthetic.scene import Scene, SceneObject

_NAMES = ("arkitscenes*.json", "scannet*.json")  # the second matches scannetpp too
_EXPECTED = (
  "expected the meta_info files of VSI-Bench (arkitscenes*.json, scannet*.json: {scene: {dataset,"
  " room_size, room_center, object_bbox}}); set config.source.path to their folder"
)
_MIN_HEIGHT_M = 2.4
_ABOVE_M = 0.1  # between the highest object and the ceiling


def load_rooms(path: pathlib.Path | str) -> list[Scene]:
  """All rooms of a metadata file, or of the files of a folder, in the order of the files.

  One vertical shift per room puts the lowest corner of its boxes on the floor, z = 0. The outline
  is the rectangle of least area around objects and room centre. If it is smaller than the annotated
  size, it grows evenly to this size and moves towards the room centre. The scenes have no cameras,
  and ids of the form "dataset/scene".

  Raises:
    DataError: if the path has no such file or a file cannot be used; names file, scene and field.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise DataError(f"{path} does not exist; {_EXPECTED}")
  files = [path]
  if path.is_dir():
    files = sorted(file for name in _NAMES for file in path.glob(name))
    if not files:
      raise DataError(f"{path} contains no such file; {_EXPECTED}")
  scenes = [scene for file in files for scene in _load_file(file)]
  if not scenes:
    raise DataError(f"{path} contains no rooms; {_EXPECTED}")
  counts = Counter(scene.scene_id for scene in scenes)
  repeated = [scene_id for scene_id, count in counts.items() if count > 1]
  if repeated:
    raise DataError(f"{path} contains the scene {repeated[0]} twice; remove one of its files")
  return scenes


def _load_file(file: pathlib.Path) -> list[Scene]:
  records = read_json(file)
  if not isinstance(records, dict):
    raise DataError(f"{file} must map scene names to rooms, got a {type(records).__name__}")
  return [_scene(name, record, f"{file}, scene {name}") for name, record in records.items()]


def _scene(name: str, record: Any, where: str) -> Scene:
  dataset = field(record, "dataset", str, where)
  room_size = numbers(record, "room_size", (), where).item()
  room_centre_3 = numbers(record, "room_center", (3,), where)
  groups = field(record, "object_bbox", dict, where)
  if room_size <= 0:
    raise DataError(f"{where}: field room_size must be above 0, got {room_size}")
  objects = [
    _object(category, box, f"{where}, object_bbox.{category}[{i}]")
    for category in groups
    for i, box in enumerate(field(groups, category, list, f"{where}, object_bbox"))
  ]
  if not objects:
    raise DataError(f"{where}: field object_bbox has no boxes; remove the scene")
  corners_Z3 = np.concatenate([obj.corners_83() for obj in objects])
  floor_m, top_m = float(corners_Z3[:, 2].min()), float(corners_Z3[:, 2].max())
  shift_3 = np.array([0.0, 0.0, floor_m])
  return Scene(
    scene_id=f"{dataset}/{name}",
    source="vsi-rooms",
    polygon_Z2=outline(corners_Z3[:, :2], room_centre_3[:2], room_size),
    height_m=max(_MIN_HEIGHT_M, top_m - floor_m + _ABOVE_M),
    room_size_m2=room_size,
    objects=tuple(dataclasses.replace(obj, centre_3=obj.centre_3 - shift_3) for obj in objects),
    cameras=(),
    benchmark="vsi-bench",
  )


def _object(category: str, box: Any, where: str) -> SceneObject:
  axes_33 = numbers(box, "normalizedAxes", (9,), where).reshape(3, 3)
  if not np.allclose(axes_33 @ axes_33.T, np.eye(3), atol=1e-3):
    raise DataError(
      f"{where}: field normalizedAxes must be orthonormal rows, got {axes_33.tolist()}"
    )
  size_3 = numbers(box, "axesLengths", (3,), where)
  if size_3.min() < 0:
    raise DataError(f"{where}: field axesLengths must not be negative, got {size_3.tolist()}")
  return SceneObject(category, "", numbers(box, "centroid", (3,), where), size_3, axes_33, ())


def outline(points_Z2: np.ndarray, centre_2: np.ndarray, area_m2: float) -> np.ndarray:
  """A rectangle around the points and the centre; its area is `area_m2` or, if larger, minimal.

      |<- margin ->| points |<- margin ->|     (w + 2m)(h + 2m) = area
      then moved towards the centre, as far as all points stay inside

  Centre and area are annotated, in metres. Returns float64 [4, 2], counter-clockwise.
  """
  inner_Z2 = np.concatenate([points_Z2, centre_2[None]])
  turns_N = np.radians(np.arange(90.0))
  across_N2 = np.stack([np.cos(turns_N), np.sin(turns_N)], axis=1)
  along_N2 = np.stack([-np.sin(turns_N), np.cos(turns_N)], axis=1)
  extent_N = np.ptp(across_N2 @ inner_Z2.T, axis=1) * np.ptp(along_N2 @ inner_Z2.T, axis=1)
  best = int(np.argmin(extent_N))
  frame_22 = np.stack([across_N2[best], along_N2[best]])
  local_Z2 = inner_Z2 @ frame_22.T
  low_2, high_2 = local_Z2.min(axis=0), local_Z2.max(axis=0)
  width, height = high_2 - low_2
  missing = max(area_m2 - width * height, 0.0)
  margin = (math.sqrt((width + height) ** 2 + 4 * missing) - width - height) / 4
  side_2 = high_2 - low_2 + 2 * margin
  start_2 = np.clip(frame_22 @ centre_2 - side_2 / 2, high_2 - side_2, low_2)
  corners_42 = start_2 + side_2 * np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
  return corners_42 @ frame_22
