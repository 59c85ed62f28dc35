"""Rooms of the data set Numerical3D: wide ranges of room size, furniture size and repetition.

The default rooms have chairs of one size and rarely more than two of them, so that a constant is a
good answer to most questions. Here a room is 3 to 156 square metres large, furniture is 0.6 to 1.7
times its usual size, and up to half of a room repeats one category.
"""

import dataclasses

import numpy as np

from spatial_jax.config import ConfigError
from spatial_jax.errors import DataError
from spatial_jax.synthetic.camera_path import make_camera_path
from spatial_jax.synthetic.floorplan import ProceduralConfig, procedural_scene
from spatial_jax.synthetic.furniture import KINDS, Kind, scaled
from spatial_jax.synthetic.render.renderer import trace
from spatial_jax.synthetic.scene import Scene, View

IMAGE_PX, FIELD_OF_VIEW_DEG = 224, 75.0  # the wide lens of a phone, as in the default rooms
MAX_ROOMS, MAX_SEEDS = 1_000_000, 1000  # rooms of one seed; MAX_SEEDS of them are below 1e9
FRAME_COUNTS = (1, 1, 2, 3, 4, 5, 6, 7, 8)  # one is drawn for each room

_ROOM_STREAM, _CAMERA_STREAM = 4, 5  # of random numbers; see synthetic/tasks.py
_SCALES = (0.6, 0.72, 0.86, 1.0, 1.2, 1.45, 1.7)
_MIN_LONGEST_M, _MAX_LONGEST_M = 0.2, 3.4
_MAX_HEIGHT_M = 2.3  # below the ceiling
_MAX_CARRIER_M, _MAX_CARRIED_M = 1.3, 1.0  # in sum below the ceiling
_SIDE_M = (2.4, 10.0)  # of a square room, before its sides change by a fifth
_ASPECT = 1.25
_OBJECTS_PER_M2 = (0.4, 2.0)
_MIN_OBJECTS, _MAX_OBJECTS = 4, 48
_REPEAT_SHARE = (0.3, 0.97)
_L_SHAPE_SHARE = 0.25
_FEW_KINDS_SHARE, _FEW_KINDS = 0.6, (2, 6)
_LOW_M = 1.1  # hides little of what stands farther away


def numerical3d_scene(number: int) -> Scene | None:
  """The room with this number, named "numerical3d/<number>"; a pure function of the number.

  Returns:
    None if the furniture that was drawn does not fit into the room.
  """
  rng = np.random.default_rng((number, _ROOM_STREAM))
  try:
    scene = procedural_scene(number, _room_config(rng), _room_catalogue(rng))
  except ConfigError:
    return None
  return dataclasses.replace(scene, scene_id=f"numerical3d/{number}")


def numerical3d_views(scene: Scene, number: int) -> list[View] | None:
  """Depth and instance ids along one camera path, 1 to 8 frames; `number` seeds the path.

  Returns:
    Views without images, None if the room has no free place for a camera.
  """
  rng = np.random.default_rng((number, _CAMERA_STREAM))
  frames = int(rng.choice(FRAME_COUNTS))
  try:
    cameras = make_camera_path(scene, rng, frames, IMAGE_PX, IMAGE_PX, FIELD_OF_VIEW_DEG)
  except DataError:
    return None
  return [trace(scene, camera) for camera in cameras]


def _room_config(rng: np.random.Generator) -> ProceduralConfig:
  """Equally many rooms per ratio of sizes: side, density and repetition are drawn per room."""
  side_m = _log_uniform(rng, _SIDE_M)
  most = round(side_m**2 * _log_uniform(rng, _OBJECTS_PER_M2))
  most = min(max(most, _MIN_OBJECTS), _MAX_OBJECTS)
  low, high = _REPEAT_SHARE
  return ProceduralConfig(
    objects=(max(_MIN_OBJECTS, round(most * 0.4)), most),
    side_m=(max(side_m / _ASPECT, 2.0), side_m * _ASPECT),
    l_shape_share=_L_SHAPE_SHARE,
    repeat_share=low + (high - low) * rng.random(),
  )


def _room_catalogue(rng: np.random.Generator) -> tuple[Kind, ...]:
  """The kinds of furniture of a room: all, or a few low ones, which then repeat."""
  if rng.random() >= _FEW_KINDS_SHARE:
    return CATALOGUE
  low, high = _FEW_KINDS
  chosen = rng.permutation(len(_LOW))[: int(rng.integers(low, high + 1))]
  return tuple(_LOW[int(i)] for i in chosen)


def _log_uniform(rng: np.random.Generator, low_high: tuple[float, float]) -> float:
  low, high = low_high
  return low * (high / low) ** rng.random()


def _catalogue() -> tuple[Kind, ...]:
  """The furniture in all sizes that fit into a room and can be seen in an image."""
  return tuple(
    scaled(kind, scale) for kind in KINDS for scale in _SCALES if _is_usable(kind, scale)
  )


def _is_usable(kind: Kind, scale: float) -> bool:
  sides_m = [range_m or kind.width_m for range_m in (kind.width_m, kind.depth_m, kind.height_m)]
  longest_m = max(high for _, high in sides_m) * scale
  max_height_m = _MAX_CARRIER_M if kind.carries else _MAX_HEIGHT_M
  max_height_m = _MAX_CARRIED_M if "top" in kind.places else max_height_m
  high_enough = sides_m[2][1] * scale <= max_height_m
  return high_enough and _MIN_LONGEST_M <= longest_m <= _MAX_LONGEST_M


CATALOGUE = _catalogue()
_LOW = tuple(
  kind
  for kind in CATALOGUE
  if "free" in kind.places and (kind.height_m or kind.width_m)[1] <= _LOW_M
)
