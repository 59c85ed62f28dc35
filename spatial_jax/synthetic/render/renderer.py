"""Scene + Camera -> View: image, exact depth and instance ids."""

import colorsys
import math
import zlib

import numpy as np

from spatial_jax.synthetic.render import raycast, shading
from spatial_jax.synthetic.scene import Camera, Part, Scene, SceneObject, View

_SHAPES = {"box": raycast.BOX, "sphere": raycast.SPHERE, "cylinder": raycast.CYLINDER}
_LAMP_ABOVE_CEILING_M = 1.3  # so that no object contains the lamp
_LAMP_HALF_M = 0.35
# (colour, (plank length, width), staggered, contrast, joint)
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
  """Renders the scene from a camera.

  Objects without parts are drawn as a plain box, coloured by category. Floor, walls and lamp depend
  on the room and on `scene_id` alone: all views of a scene agree. The GIL is released.

  Args:
    scene: the room and its objects.
    camera: the camera.
    shadows: False casts no shadow rays (faster, flatter).

  Returns:
    View: the same bytes for the same arguments.

  Raises:
    ValueError: if a part has an unknown shape or a size of zero.
  """
  solids_Z, room, pinhole = pack_objects(scene.objects), pack_room(scene), pack_camera(camera)
  light, style = _lamp(scene), _style(scene.scene_id)
  depth, surface, basis_Z12 = raycast.cover(solids_Z, pinhole)
  raycast.enclose(room, pinhole, depth, surface)
  if shadows:
    lit = shading.shadow(solids_Z, room, pinhole, light, depth, surface)
  else:
    lit = np.ones(depth.shape, np.float32)
  image = shading.shade(solids_Z, room, pinhole, light, style, basis_Z12, depth, surface, lit)
  return View(camera, image, depth.astype(np.float32), _instances(solids_Z, surface))


def trace(scene: Scene, camera: Camera) -> View:
  """`render` without colours: the same depth and instance ids, and an empty image."""
  solids_Z, pinhole = pack_objects(scene.objects), pack_camera(camera)
  depth, surface, _ = raycast.cover(solids_Z, pinhole)
  raycast.enclose(pack_room(scene), pinhole, depth, surface)
  image = np.empty((0, 0, 3), np.uint8)
  return View(camera, image, depth.astype(np.float32), _instances(solids_Z, surface))


def _instances(solids_Z: np.ndarray, surface: np.ndarray) -> np.ndarray:
  """The object of each pixel: see `View.instance`."""
  # The last entry is for the surfaces of the room, whose numbers are negative.
  owner = np.append(solids_Z["owner"], np.int32(-1))
  instance = owner[np.where(surface >= 0, surface, -1)]
  instance[surface == raycast.NOTHING] = -2
  return instance


def pack_objects(objects: tuple[SceneObject, ...]) -> np.ndarray:
  """The parts of all objects for the kernels, in the order of the objects: raycast.SOLID [Z]."""
  parts = [(i, part) for i, obj in enumerate(objects) for part in obj.parts or _plain_box(obj)]
  for i, part in parts:
    if part.shape not in _SHAPES or min(part.half_3) <= 0.0:
      raise ValueError(
        f"a part of object {i} ({objects[i].category}) is {part.shape!r} {part.half_3}; expected"
        f" one of {', '.join(_SHAPES)} with half extents above 0"
      )
  solids_Z = np.empty(len(parts), raycast.SOLID)
  if not parts:
    return solids_Z
  solids_Z["form"] = [_SHAPES[part.shape] for _, part in parts]
  solids_Z["owner"] = owner_Z = [i for i, _ in parts]
  half_Z3 = np.array([part.half_3 for _, part in parts])
  offset_Z3 = np.array([part.centre_3 for _, part in parts])
  axes_Z33 = np.array([obj.axes_33 for obj in objects], np.float64)[owner_Z]
  centre_Z3 = np.array([obj.centre_3 for obj in objects], np.float64)[owner_Z]
  solids_Z["centre"] = centre_Z3 + (offset_Z3[:, :, None] * axes_Z33).sum(axis=1)
  solids_Z["frame"] = axes_Z33.transpose(0, 2, 1) * half_Z3[:, None, :]
  solids_Z["inverse"] = axes_Z33 / half_Z3[:, :, None]
  solids_Z["axes"] = axes_Z33
  solids_Z["colour"] = _linear(np.array([part.colour_3 for _, part in parts]))
  return solids_Z


def pack_camera(camera: Camera, scale: float = 1.0) -> raycast.Pinhole:
  """The camera for the kernels; `scale` > 1 enlarges the canvas around the same image."""
  width_px, height_px = round(camera.width_px * scale), round(camera.height_px * scale)
  pixel = 1.0 / focal_px(camera)
  right_3, down_3, forward_3 = np.asarray(camera.rotation_33, np.float64)
  right_3, down_3 = right_3 * pixel, down_3 * pixel
  corner_3 = forward_3 - right_3 * ((width_px - 1) / 2) - down_3 * ((height_px - 1) / 2)
  return raycast.Pinhole(
    position=_vector(camera.position_3),
    right=_vector(right_3),
    down=_vector(down_3),
    forward=_vector(corner_3),
    width_px=width_px,
    height_px=height_px,
  )


def focal_px(camera: Camera) -> float:
  """Focal length in pixels; the field of view is the horizontal one."""
  return camera.width_px / 2 / math.tan(math.radians(camera.field_of_view_deg) / 2)


def pack_room(scene: Scene) -> raycast.Room:
  """Walls between neighbouring corners of the outline."""
  start_Z2 = np.asarray(scene.polygon_Z2, np.float64)
  along_Z2 = np.roll(start_Z2, -1, axis=0) - start_Z2
  length_Z1 = np.sqrt((along_Z2**2).sum(axis=1, keepdims=True))
  (low_x, low_y), (high_x, high_y) = start_Z2.min(axis=0).tolist(), start_Z2.max(axis=0).tolist()
  wall_Z5 = np.concatenate([start_Z2, along_Z2 / length_Z1, length_Z1], axis=1)
  return raycast.Room(wall_Z5, (low_x, low_y), (high_x, high_y), float(scene.height_m))


def _plain_box(obj: SceneObject) -> tuple[Part]:
  """One box; the category determines its colour."""
  code = zlib.crc32(obj.category.encode())
  rgb = colorsys.hls_to_rgb(code % 360 / 360, 0.5 + code // 360 % 5 * 0.05, 0.45)
  red, green, blue = (round(255 * value) for value in rgb)
  w, d, h = (max(float(size) / 2, 1e-3) for size in obj.size_3)
  return (Part("box", (0.0, 0.0, 0.0), (w, d, h), (red, green, blue)),)


def _lamp(scene: Scene) -> shading.Light:
  """A lamp near the middle of the room, above its highest object."""
  low_2, high_2 = scene.polygon_Z2.min(axis=0), scene.polygon_Z2.max(axis=0)
  x, y = low_2 + (high_2 - low_2) * np.array([0.42, 0.58])
  tops = [
    float(o.centre_3[2] + (np.abs(o.axes_33[:, 2]) * o.size_3).sum() / 2) for o in scene.objects
  ]
  z = max([float(scene.height_m), *tops]) + _LAMP_ABOVE_CEILING_M
  return shading.Light((float(x), float(y), z), _LAMP_HALF_M)


def _style(scene_id: str) -> shading.Style:
  """Floor and walls, chosen by a checksum of the scene id."""
  code = zlib.crc32(scene_id.encode())
  floor, tile_m, staggered, contrast, joint = _FLOORS[code % len(_FLOORS)]
  wall = _WALLS[code // len(_FLOORS) % len(_WALLS)]
  return shading.Style(
    floor=_vector(_linear(floor)),
    wall=_vector(_linear(wall)),
    ceiling=_vector(_linear((250, 249, 246))),
    skirting=_vector(_linear((246, 244, 239))),
    tile_m=tile_m,
    staggered=float(staggered),
    contrast=contrast,
    joint=joint,
  )


def _vector(values_3: np.ndarray) -> raycast.Vector:
  """Three plain floats: numba passes tuples as scalars and counts references to arrays."""
  x, y, z = np.asarray(values_3, np.float64).tolist()
  return x, y, z


def _linear(colour: np.ndarray | tuple[int, int, int]) -> np.ndarray:
  """8-bit display colour -> linear light, the inverse of the display encoding of `shade`."""
  return (np.asarray(colour, np.float64) / 255) ** 2
