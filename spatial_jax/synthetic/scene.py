"""Scenes: a room with furniture and cameras, in metres, z up."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """One primitive of an object, in the object's frame (origin at the box centre, before yaw).

  `shape` is "box", "sphere" (an ellipsoid) or "cylinder" (upright); `half_3` are half extents in
  metres; `colour_3` is the 8-bit display colour in white light.
  """

  shape: str
  centre_3: tuple[float, float, float]
  half_3: tuple[float, float, float]
  colour_3: tuple[int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class SceneObject:
  """An object: category, colour, oriented 3D box, and the primitives that draw it.

  Attributes:
    category: "chair", ...
    colour: name of the main colour ("red", ...), "" if unknown (real rooms).
    centre_3: box centre in metres.
    size_3: box extents along its own axes in metres.
    axes_33: float64, rows are the box axes in the world (orthonormal).
    parts: the primitives; if empty, the renderer draws a plain box of `size_3`.
  """

  category: str
  colour: str
  centre_3: np.ndarray
  size_3: np.ndarray
  axes_33: np.ndarray
  parts: tuple[Part, ...]

  def corners_83(self) -> np.ndarray:
    """The 8 corners in the world, float64 [8, 3]."""
    signs_83 = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64)
    return self.centre_3 + (signs_83 * self.size_3 / 2) @ self.axes_33


@dataclasses.dataclass(frozen=True, eq=False)
class Camera:
  """A pinhole camera: x right, y down, z forward in its own frame; square pixels, centred.

  `rotation_33` rows are the camera's right, down and forward axes in the world. The field of view
  is the horizontal one.
  """

  position_3: np.ndarray
  rotation_33: np.ndarray
  field_of_view_deg: float
  width_px: int
  height_px: int


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
  """One room.

  Attributes:
    scene_id: stable name ("procedural/17", "arkitscenes/41069025").
    source: "procedural" or "vsi-rooms".
    polygon_Z2: float64 floor outline in metres, counter-clockwise.
    height_m: ceiling above the floor; the floor is z = 0.
    room_size_m2: as annotated (real rooms) or the polygon's area.
    objects: all furniture.
    cameras: a path through the room, in order of time; may be empty.
    benchmark: "vsi-bench" or None.
  """

  scene_id: str
  source: str
  polygon_Z2: np.ndarray
  height_m: float
  room_size_m2: float
  objects: tuple[SceneObject, ...]
  cameras: tuple[Camera, ...]
  benchmark: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class View:
  """The rendered view of one camera, from `render.renderer`.

  Attributes:
    image: uint8 [height, width, 3].
    depth_m: float32 [height, width], distance along the viewing axis (z of the camera), inf if the
      ray hits nothing.
    instance: int32 [height, width], index into scene.objects; -1: the room, -2: nothing.
  """

  camera: Camera
  image: np.ndarray
  depth_m: np.ndarray
  instance: np.ndarray
