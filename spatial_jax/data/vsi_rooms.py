"""Real rooms: the scene metadata of VSI-Bench -> Scenes.

    {scene: {dataset, room_size, room_center, object_bbox: {category: [{centroid, axesLengths,
                                                                        normalizedAxes}]}}}

The metadata holds boxes, not walls: the room is drawn as a rectangle. `object_counts` is not read:
in a few rooms it disagrees with the boxes, and the boxes are what a picture of the room shows.

Source: VSI-Bench, arXiv:2412.14171, and the meta_info files of its repository.
"""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from spatial_jax.data.records import field, numbers, read_json
from spatial_jax.errors import DataError
from spatial_jax.synthetic.scene import Scene, SceneObject

_NAMES = ("arkitscenes*.json", "scannet*.json")  # the second takes scannetpp as well
_MIN_HEIGHT_M = 2.4
_ABOVE_M = 0.1  # between the highest object and the ceiling


def load_rooms(path: pathlib.Path | str) -> list[Scene]:
  """All rooms of a metadata file, or of the files of a folder, in the order of the files.

  Boxes keep their place up to one shift that puts the lowest corner on the floor, z = 0. The
  outline is the rectangle of least area around objects and room centre, widened evenly to the
  annotated size and pushed towards the room centre; where the objects alone take more than that, it
  is left as it is. There are no cameras yet.

  Args:
    path: arkitscenes.json, scannet.json, ... or a folder that holds them.

  Returns:
    Scenes with source "vsi-rooms", benchmark "vsi-bench" and ids "dataset/scene".

  Raises:
    DataError: on the host, one line naming file, scene and field, when a file cannot be used.
  """
  path = pathlib.Path(path)
  files = [path]
  if path.is_dir():
    files = sorted(file for name in _NAMES for file in path.glob(name))
    if not files:
      raise DataError(
        f"{path} holds no {' or '.join(_NAMES)}: point to VSI-Bench's meta_info files"
      )
  return [scene for file in files for scene in _load_file(file)]


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
    raise DataError(f"{where}: field object_bbox holds no box: leave the scene out")
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
  """A rectangle around the points and the centre, of the given area where they leave room for it.

      |<- margin ->| points |<- margin ->|     (w + 2m)(h + 2m) = area,  then shifted towards the
      centre

  Args:
    points_Z2: float64, metres.
    centre_2: where the middle of the room is said to be.
    area_m2: annotated floor area.

  Returns:
    float64 [4, 2], counter-clockwise.
  """
  held_Z2 = np.concatenate([points_Z2, centre_2[None]])
  turns_N = np.radians(np.arange(90.0))
  across_N2 = np.stack([np.cos(turns_N), np.sin(turns_N)], axis=1)
  along_N2 = np.stack([-np.sin(turns_N), np.cos(turns_N)], axis=1)
  extent_N = np.ptp(across_N2 @ held_Z2.T, axis=1) * np.ptp(along_N2 @ held_Z2.T, axis=1)
  best = int(np.argmin(extent_N))
  frame_22 = np.stack([across_N2[best], along_N2[best]])
  local_Z2 = held_Z2 @ frame_22.T
  low_2, high_2 = local_Z2.min(axis=0), local_Z2.max(axis=0)
  width, height = high_2 - low_2
  missing = max(area_m2 - width * height, 0.0)
  margin = (math.sqrt((width + height) ** 2 + 4 * missing) - width - height) / 4
  side_2 = high_2 - low_2 + 2 * margin
  start_2 = np.clip(frame_22 @ centre_2 - side_2 / 2, high_2 - side_2, low_2)
  corners_42 = start_2 + side_2 * np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
  return corners_42 @ frame_22
