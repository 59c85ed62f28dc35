"""Scene + Camera -> View: picture, exact depth and instance ids of one look into a room."""

import colorsys
import math
import zlib

import numpy as np

from spatial_jax.data import raycast, shading
from spatial_jax.data.scenes import Camera, Part, Scene, SceneObject, View

_SHAPES = {"box": raycast.BOX, "sphere": raycast.SPHERE, "cylinder": raycast.CYLINDER}
_LAMP_ABOVE_CEILING_M = 1.3  # above everything, so that no object can swallow it
_LAMP_HALF_M = 0.35
_WHITE = (246, 244, 239)
# (wall, floor, (plank length, width), staggered, contrast, joint)
_FLOORS = (
  ((203, 165, 120), (1.3, 0.16), True, 0.30, 0.55),  # oak planks
  ((150, 108, 76), (1.1, 0.14), True, 0.34, 0.5),  # walnut planks
  ((222, 207, 180), (1.5, 0.2), True, 0.22, 0.6),  # birch planks
  ((205, 205, 200), (0.5, 0.5), False, 0.10, 0.6),  # stone tiles
  ((196, 160, 138), (0.4, 0.4), False, 0.16, 0.7),  # terracotta tiles
)
_WALLS = (
  (238, 232, 220),
  (222, 231, 236),
  (226, 235, 222),
  (240, 226, 216),
  (232, 228, 238),
  (244, 236, 206),
)


def render(scene: Scene, camera: Camera, shadows: bool = True) -> View:
  """Looks into the scene.

  Objects without parts are drawn as a plain box, coloured by their category. Floor, walls and lamp follow
  from the room and from `scene_id`, so that one scene looks the same from every side. The GIL is released.

  Args:
    scene: the room and its objects.
    camera: where to look from.
    shadows: false leaves the shadow rays out (faster, flatter).

  Returns:
    View: the same bytes for the same arguments.

  Raises:
    ValueError: on the host, when a part has an unknown shape or a size of zero.
  """
  primitives, room, pinhole = pack_objects(scene.objects), pack_room(scene), pack_camera(camera)
  light, style = _lamp(scene), _style(scene.scene_id)
  depth, surface, basis_Z43 = raycast.cover(primitives, pinhole)
  raycast.enclose(room, pinhole, depth, surface)
  if shadows:
    lit = shading.shadow(primitives, room, pinhole, light, depth, surface)
  else:
    lit = np.ones(depth.shape, np.float32)
  image = shading.shade(primitives, room, pinhole, light, style, basis_Z43, depth, surface, lit)
  owner = np.append(
    primitives.object_Z, -1
  )  # the room's surfaces are negative: clipped to the last
  instance = owner[np.where(surface >= 0, surface, -1)]
  instance[surface == raycast.NOTHING] = -2
  return View(camera, image, depth.astype(np.float32), instance)


def pack_objects(objects: tuple[SceneObject, ...]) -> raycast.Primitives:
  """The parts of all objects as arrays for the kernels, in the order of the objects."""
  shape, offset, half, colour, owner = [], [], [], [], []
  for index, thing in enumerate(objects):
    for part in thing.parts or (_plain_box(thing),):
      if part.shape not in _SHAPES or min(part.half_3) <= 0.0:
        raise ValueError(
          f"a part of object {index} ({thing.category}) is {part.shape!r} {part.half_3}; expected one"
          f" of {', '.join(_SHAPES)} with half extents above 0"
        )
      shape.append(_SHAPES[part.shape])
      offset.append(part.centre_3)
      half.append(part.half_3)
      colour.append(part.colour_3)
      owner.append(index)
  owner_Z = np.array(owner, np.int32)
  axes_Z33 = np.array([o.axes_33 for o in objects], np.float64).reshape(-1, 3, 3)[owner_Z]
  centre_Z3 = np.array([o.centre_3 for o in objects], np.float64).reshape(-1, 3)[owner_Z]
  half_Z3 = np.array(half, np.float64).reshape(-1, 3)
  offset_Z3 = np.array(offset, np.float64).reshape(-1, 3)
  return raycast.Primitives(
    shape_Z=np.array(shape, np.int32),
    centre_Z3=centre_Z3 + (offset_Z3[:, :, None] * axes_Z33).sum(axis=1),
    frame_Z33=np.ascontiguousarray(axes_Z33.transpose(0, 2, 1) * half_Z3[:, None, :]),
    inverse_Z33=axes_Z33 / half_Z3[:, :, None],
    colour_Z3=_linear(np.array(colour, np.float64).reshape(-1, 3)),
    object_Z=owner_Z,
  )


def pack_camera(camera: Camera, scale: float = 1.0) -> raycast.Pinhole:
  """The camera for the kernels; `scale` > 1 adds that much canvas around the picture, same pixels."""
  width_px, height_px = round(camera.width_px * scale), round(camera.height_px * scale)
  pixel = 1.0 / focal_px(camera)
  right_3, down_3, forward_3 = np.asarray(camera.rotation_33, np.float64)
  corner_3 = (
    forward_3 - right_3 * (pixel * (width_px - 1) / 2) - down_3 * (pixel * (height_px - 1) / 2)
  )
  position_3 = np.asarray(camera.position_3, np.float64)
  return raycast.Pinhole(position_3, right_3 * pixel, down_3 * pixel, corner_3, width_px, height_px)


def focal_px(camera: Camera) -> float:
  """Focal length in pixels; the field of view is the horizontal one."""
  return camera.width_px / 2 / math.tan(math.radians(camera.field_of_view_deg) / 2)


def pack_room(scene: Scene) -> raycast.Room:
  """Walls between neighbouring corners of the outline (of its bounding box where there is none)."""
  start_Z2 = np.ascontiguousarray(scene.polygon_Z2, np.float64)
  along_Z2 = np.roll(start_Z2, -1, axis=0) - start_Z2
  length_Z = np.sqrt((along_Z2**2).sum(axis=1))
  return raycast.Room(start_Z2, along_Z2 / length_Z[:, None], length_Z, float(scene.height_m))


def _plain_box(thing: SceneObject) -> Part:
  """One box in a soft colour that belongs to the category."""
  code = zlib.crc32(thing.category.encode())
  rgb = colorsys.hls_to_rgb(code % 360 / 360, 0.5 + code // 360 % 5 * 0.05, 0.45)
  red, green, blue = (round(255 * value) for value in rgb)
  half_3 = tuple(max(float(size) / 2, 1e-3) for size in thing.size_3)
  return Part("box", (0.0, 0.0, 0.0), half_3, (red, green, blue))


def _lamp(scene: Scene) -> raycast.Light:
  """Above the middle of the room and above its highest object, a little off to one side."""
  low_2, high_2 = scene.polygon_Z2.min(axis=0), scene.polygon_Z2.max(axis=0)
  x, y = low_2 + (high_2 - low_2) * np.array([0.42, 0.58])
  tops = [
    float(o.centre_3[2] + (np.abs(o.axes_33[:, 2]) * o.size_3).sum() / 2) for o in scene.objects
  ]
  z = max([float(scene.height_m), *tops]) + _LAMP_ABOVE_CEILING_M
  return raycast.Light(np.array([x, y, z]), _LAMP_HALF_M)


def _style(scene_id: str) -> shading.Style:
  """Floor and walls, chosen by the name of the scene."""
  code = zlib.crc32(scene_id.encode())
  floor, tile_m, staggered, contrast, joint = _FLOORS[code % len(_FLOORS)]
  wall = _WALLS[code // len(_FLOORS) % len(_WALLS)]
  return shading.Style(
    floor_3=_linear(floor),
    wall_3=_linear(wall),
    ceiling_3=_linear((250, 249, 246)),
    skirting_3=_linear(_WHITE),
    tile_m=np.array(tile_m),
    staggered=staggered,
    contrast=contrast,
    joint=joint,
  )


def _linear(colour: np.ndarray | tuple[int, int, int]) -> np.ndarray:
  """8-bit display colour -> linear light, the inverse of the picture's square root."""
  return (np.asarray(colour, np.float64) / 255) ** 2
