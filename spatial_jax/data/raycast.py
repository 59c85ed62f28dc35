"""Numba kernels of the ray-caster: which surface each pixel sees, how far it is, and how the light falls.

One picture is four passes over arrays of the screen:

    cover ──► enclose ──► shadow ──► shade
    objects   room        light      colour (edges are sampled 2x2)

A surface is one int32 per pixel: the number of a primitive, or FLOOR, CEILING, WALL - wall number. Only
+ - * / and square roots are used, without fast-math, so that a picture has the same bytes on every
machine. All kernels release the GIL.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

BOX, SPHERE, CYLINDER = 0, 1, 2
NOTHING, FLOOR, CEILING, WALL = -4, -1, -2, -5  # a wall is WALL - its number
SHADOW_CELLS = 32  # the floor seen from the light is cut into SHADOW_CELLS^2 lists of casters
LIGHT_GRID = 4  # points of the area light per side; one per pixel of each LIGHT_GRID^2 block
_NEAR_M = 0.02


class Primitives(NamedTuple):
  """Convex shapes; each is the unit box, ball or upright cylinder under x -> centre + frame @ x.

  Attributes:
    shape_Z: int32, BOX, SPHERE or CYLINDER.
    centre_Z3: float64, metres.
    frame_Z33: float64, columns are the half axes in metres.
    inverse_Z33: float64, the inverse of `frame_Z33`.
    colour_Z3: float64, linear light in [0, 1].
    object_Z: int32, the object it belongs to, ascending.
  """

  shape_Z: np.ndarray
  centre_Z3: np.ndarray
  frame_Z33: np.ndarray
  inverse_Z33: np.ndarray
  colour_Z3: np.ndarray
  object_Z: np.ndarray


class Pinhole(NamedTuple):
  """A camera for the kernels: pixel (x, y) looks along `forward + x * right + y * down` (already scaled).

  `forward_3` points through the centre of pixel (0, 0) and has length 1 along the viewing axis, so that
  the ray parameter is the depth.
  """

  position_3: np.ndarray
  right_3: np.ndarray
  down_3: np.ndarray
  forward_3: np.ndarray
  width_px: int
  height_px: int


class Room(NamedTuple):
  """Floor z = 0, ceiling z = height, and one vertical wall per edge of the outline.

  Attributes:
    start_Z2: float64, where each wall begins.
    along_Z2: float64, unit vector along it; the inside is to its left.
    length_Z: float64, metres.
    height_m: the ceiling.
  """

  start_Z2: np.ndarray
  along_Z2: np.ndarray
  length_Z: np.ndarray
  height_m: float


class Light(NamedTuple):
  """A square lamp above everything: `position_3` in metres, `half_m` half its side."""

  position_3: np.ndarray
  half_m: float


@njit(cache=True, nogil=True, error_model="numpy")
def _multiply(matrix_33, x, y, z):
  """matrix_33 @ (x, y, z)."""
  return (
    matrix_33[0, 0] * x + matrix_33[0, 1] * y + matrix_33[0, 2] * z,
    matrix_33[1, 0] * x + matrix_33[1, 1] * y + matrix_33[1, 2] * z,
    matrix_33[2, 0] * x + matrix_33[2, 1] * y + matrix_33[2, 2] * z,
  )


@njit(cache=True, nogil=True, error_model="numpy")
def _hit_box(ox, oy, oz, dx, dy, dz):
  near_x, far_x = (-1.0 - ox) / dx, (1.0 - ox) / dx
  near_y, far_y = (-1.0 - oy) / dy, (1.0 - oy) / dy
  near_z, far_z = (-1.0 - oz) / dz, (1.0 - oz) / dz
  near = max(min(near_x, far_x), min(near_y, far_y), min(near_z, far_z))
  far = min(max(near_x, far_x), max(near_y, far_y), max(near_z, far_z))
  return near if 0.0 < near <= far else math.inf


@njit(cache=True, nogil=True, error_model="numpy")
def _hit_sphere(ox, oy, oz, dx, dy, dz):
  a = dx * dx + dy * dy + dz * dz
  b = ox * dx + oy * dy + oz * dz
  root = b * b - a * (ox * ox + oy * oy + oz * oz - 1.0)
  if root < 0.0:
    return math.inf
  near = (-b - math.sqrt(root)) / a
  return near if near > 0.0 else math.inf


@njit(cache=True, nogil=True, error_model="numpy")
def _hit_cylinder(ox, oy, oz, dx, dy, dz):
  a = dx * dx + dy * dy
  b = ox * dx + oy * dy
  root = b * b - a * (ox * ox + oy * oy - 1.0)
  if root < 0.0:
    return math.inf
  root = math.sqrt(root)
  near_z, far_z = (-1.0 - oz) / dz, (1.0 - oz) / dz
  near = max((-b - root) / a, min(near_z, far_z))
  far = min((-b + root) / a, max(near_z, far_z))
  return near if 0.0 < near <= far else math.inf


@njit(cache=True, nogil=True, error_model="numpy")
def hit(shape, ox, oy, oz, dx, dy, dz):
  """Where the ray o + t d enters the unit shape from outside: t > 0, inf when it does not."""
  if shape == BOX:
    return _hit_box(ox, oy, oz, dx, dy, dz)
  if shape == SPHERE:
    return _hit_sphere(ox, oy, oz, dx, dy, dz)
  return _hit_cylinder(ox, oy, oz, dx, dy, dz)


@njit(cache=True, nogil=True, error_model="numpy")
def _screen_rectangle(frame_33, centre_3, camera):
  """Pixels that the shape's box can touch: x0, y0, x1, y1 (exclusive) and its least depth."""
  # Screen axes from the scaled ray basis: right and down are orthogonal, as long as one pixel is wide.
  pixel2 = camera.right_3[0] ** 2 + camera.right_3[1] ** 2 + camera.right_3[2] ** 2
  axis = np.cross(camera.right_3, camera.down_3) / pixel2
  shift_x = np.dot(camera.forward_3, camera.right_3) / pixel2
  shift_y = np.dot(camera.forward_3, camera.down_3) / pixel2
  left, top, right, bottom, near, behind = math.inf, math.inf, -math.inf, -math.inf, math.inf, 0
  for corner in range(8):
    x, y, z = (corner & 1) * 2 - 1, (corner & 2) - 1, (corner & 4) // 2 - 1
    px, py, pz = _multiply(frame_33, x, y, z)
    px += centre_3[0] - camera.position_3[0]
    py += centre_3[1] - camera.position_3[1]
    pz += centre_3[2] - camera.position_3[2]
    depth = px * axis[0] + py * axis[1] + pz * axis[2]
    near = min(near, depth)
    if depth < _NEAR_M:
      behind += 1
      continue
    over = pixel2 * depth
    sx = (px * camera.right_3[0] + py * camera.right_3[1] + pz * camera.right_3[2]) / over - shift_x
    sy = (px * camera.down_3[0] + py * camera.down_3[1] + pz * camera.down_3[2]) / over - shift_y
    left, right, top, bottom = min(left, sx), max(right, sx), min(top, sy), max(bottom, sy)
  if behind == 8:
    return 0, 0, 0, 0, near
  if behind > 0:
    return 0, 0, camera.width_px, camera.height_px, max(near, 0.0)
  x0, x1 = max(left, 0.0), min(right + 1.0, float(camera.width_px))
  y0, y1 = max(top, 0.0), min(bottom + 1.0, float(camera.height_px))
  if x0 >= x1 or y0 >= y1:
    return 0, 0, 0, 0, near
  return int(x0), int(y0), int(x1), int(y1), near


@njit(cache=True, nogil=True, error_model="numpy")
def _ray_basis(primitives, z, camera):
  """Origin and ray basis of the camera in the coordinates of primitive z: [4, 3] rows o, f, r, d."""
  basis_43 = np.empty((4, 3))
  offset_3 = camera.position_3 - primitives.centre_Z3[z]
  for row, vector_3 in enumerate((offset_3, camera.forward_3, camera.right_3, camera.down_3)):
    x, y, w = _multiply(primitives.inverse_Z33[z], vector_3[0], vector_3[1], vector_3[2])
    basis_43[row, 0], basis_43[row, 1], basis_43[row, 2] = x, y, w
  return basis_43


@njit(cache=True, nogil=True, error_model="numpy")
def _hit_pixel(shape, basis_43, x, y):
  """Depth at which the ray through (x, y), in pixels, enters the shape."""
  return hit(
    shape,
    basis_43[0, 0],
    basis_43[0, 1],
    basis_43[0, 2],
    basis_43[1, 0] + x * basis_43[2, 0] + y * basis_43[3, 0],
    basis_43[1, 1] + x * basis_43[2, 1] + y * basis_43[3, 1],
    basis_43[1, 2] + x * basis_43[2, 2] + y * basis_43[3, 2],
  )


@njit(cache=True, nogil=True, error_model="numpy")
def cover(primitives, camera):
  """The nearest primitive behind each pixel.

  Args:
    primitives: Primitives.
    camera: Pinhole.

  Returns:
    depth float64 [height, width] (inf where none), surface int32 [height, width] (NOTHING where none),
    basis float64 [Z, 4, 3]: the camera in the coordinates of each primitive.
  """
  count = primitives.shape_Z.shape[0]
  depth = np.full((camera.height_px, camera.width_px), math.inf)
  surface = np.full((camera.height_px, camera.width_px), NOTHING, np.int32)
  basis_Z43 = np.empty((count, 4, 3))
  rectangle_Z4 = np.zeros((count, 4), np.int32)
  near_Z = np.empty(count)
  for z in range(count):
    basis_Z43[z] = _ray_basis(primitives, z, camera)
    x0, y0, x1, y1, near_Z[z] = _screen_rectangle(
      primitives.frame_Z33[z], primitives.centre_Z3[z], camera
    )
    rectangle_Z4[z, 0], rectangle_Z4[z, 1], rectangle_Z4[z, 2], rectangle_Z4[z, 3] = x0, y0, x1, y1
  for z in np.argsort(near_Z):  # front to back: most hidden pixels fail the first comparison
    for y in range(rectangle_Z4[z, 1], rectangle_Z4[z, 3]):
      for x in range(rectangle_Z4[z, 0], rectangle_Z4[z, 2]):
        if depth[y, x] > near_Z[z]:
          t = _hit_pixel(primitives.shape_Z[z], basis_Z43[z], x, y)
          if t < depth[y, x]:
            depth[y, x], surface[y, x] = t, z
  return depth, surface, basis_Z43


@njit(cache=True, nogil=True, error_model="numpy")
def count_covered(primitives, camera, objects):
  """Pixels that each object would cover if it were alone: int64 [objects]."""
  stamp = np.full((camera.height_px, camera.width_px), -1, np.int32)
  covered = np.zeros(objects, np.int64)
  for z in range(primitives.shape_Z.shape[0]):
    basis_43 = _ray_basis(primitives, z, camera)
    x0, y0, x1, y1, _ = _screen_rectangle(primitives.frame_Z33[z], primitives.centre_Z3[z], camera)
    owner = primitives.object_Z[z]
    for y in range(y0, y1):
      for x in range(x0, x1):
        if stamp[y, x] != owner and _hit_pixel(primitives.shape_Z[z], basis_43, x, y) < math.inf:
          stamp[y, x] = owner
          covered[owner] += 1
  return covered


@njit(cache=True, nogil=True, error_model="numpy")
def hit_room(room, position_3, dx, dy, dz):
  """Depth and surface where the ray leaves the room; walls are seen from inside only."""
  best, surface = math.inf, NOTHING
  if dz < 0.0:
    best, surface = -position_3[2] / dz, FLOOR
  elif dz > 0.0:
    best, surface = (room.height_m - position_3[2]) / dz, CEILING
  if best <= 0.0:
    best, surface = math.inf, NOTHING
  for wall in range(room.length_Z.shape[0]):
    along_x, along_y = room.along_Z2[wall, 0], room.along_Z2[wall, 1]
    facing = along_x * dy - along_y * dx  # inward normal (-along_y, along_x)
    if facing < 0.0:
      from_x, from_y = (
        position_3[0] - room.start_Z2[wall, 0],
        position_3[1] - room.start_Z2[wall, 1],
      )
      t = (along_y * from_x - along_x * from_y) / facing
      if 0.0 < t < best:
        place = (from_x + t * dx) * along_x + (from_y + t * dy) * along_y
        if 0.0 <= place <= room.length_Z[wall]:
          best, surface = t, WALL - wall
  return best, surface


@njit(cache=True, nogil=True, error_model="numpy")
def enclose(room, camera, depth, surface):
  """Puts floor, ceiling and walls behind the objects, in place."""
  for y in range(camera.height_px):
    for x in range(camera.width_px):
      dx = camera.forward_3[0] + x * camera.right_3[0] + y * camera.down_3[0]
      dy = camera.forward_3[1] + x * camera.right_3[1] + y * camera.down_3[1]
      dz = camera.forward_3[2] + x * camera.right_3[2] + y * camera.down_3[2]
      t, seen = hit_room(room, camera.position_3, dx, dy, dz)
      if t < depth[y, x]:
        depth[y, x], surface[y, x] = t, seen


@njit(cache=True, nogil=True, error_model="numpy")
def normal(primitives, room, surface, x, y, z):
  """Unit normal of a surface at the world point (x, y, z)."""
  if surface == FLOOR:
    return 0.0, 0.0, 1.0
  if surface == CEILING:
    return 0.0, 0.0, -1.0
  if surface < 0:
    wall = WALL - surface
    return -room.along_Z2[wall, 1], room.along_Z2[wall, 0], 0.0
  inverse_33, centre_3 = primitives.inverse_Z33[surface], primitives.centre_Z3[surface]
  ux, uy, uz = _multiply(inverse_33, x - centre_3[0], y - centre_3[1], z - centre_3[2])
  shape = primitives.shape_Z[surface]
  if shape == BOX:  # the face whose coordinate is the largest
    ax, ay, az = abs(ux), abs(uy), abs(uz)
    if ax >= ay and ax >= az:
      uy, uz = 0.0, 0.0
    elif ay >= az:
      ux, uz = 0.0, 0.0
    else:
      ux, uy = 0.0, 0.0
  elif shape == CYLINDER:  # side or lid
    if ux * ux + uy * uy > uz * uz:
      uz = 0.0
    else:
      ux, uy = 0.0, 0.0
  nx = inverse_33[0, 0] * ux + inverse_33[1, 0] * uy + inverse_33[2, 0] * uz
  ny = inverse_33[0, 1] * ux + inverse_33[1, 1] * uy + inverse_33[2, 1] * uz
  nz = inverse_33[0, 2] * ux + inverse_33[1, 2] * uy + inverse_33[2, 2] * uz
  length = math.sqrt(nx * nx + ny * ny + nz * nz)
  return nx / length, ny / length, nz / length
