"""Numba kernels of the ray-caster: the surface and the depth of each pixel.

One image is four passes over arrays of pixels (the last two are in `shading`):

    cover ──► enclose ──► shadow ──► shade
    objects   room        light      colour

A surface is one int32 per pixel: the number of a solid, or FLOOR, CEILING, WALL - wall number.
The kernels use only + - * / and square roots, without fast-math: an image has the same bytes on
every machine.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from spatial_jax.synthetic.render.kernels import inlined, kernel

BOX, SPHERE, CYLINDER = 0, 1, 2
NOTHING, FLOOR, CEILING, WALL = -4, -1, -2, -5  # wall number w is the surface WALL - w
_NEAR_M = 0.02

Vector = tuple[float, float, float]


# A convex shape: the unit box, sphere or upright cylinder under x -> centre + frame @ x. Numba
# passes a record as a pointer; separate arrays are reference-counted per pixel: twice as slow.
SOLID = np.dtype(
  [
    ("form", np.int32),  # BOX, SPHERE or CYLINDER
    ("owner", np.int32),  # index of its object, ascending
    ("centre", np.float64, 3),  # metres
    ("frame", np.float64, (3, 3)),  # columns are the half axes in metres
    ("inverse", np.float64, (3, 3)),  # of the frame
    ("axes", np.float64, (3, 3)),  # rows are the unit axes
    ("colour", np.float64, 3),  # linear light in [0, 1]
  ]
)


class Pinhole(NamedTuple):
  """A camera for the kernels: the ray of pixel (x, y) is forward + x * right + y * down.

  `right` and `down` have the length of one pixel at depth 1. `forward` points through the centre
  of pixel (0, 0) and has length 1 along the viewing axis, so that the ray parameter is the depth.
  """

  position: Vector
  right: Vector
  down: Vector
  forward: Vector
  width_px: int
  height_px: int


class Room(NamedTuple):
  """Floor z = 0, ceiling z = height, and one vertical wall per edge of the outline.

  Attributes:
    wall_Z5: float64, start of the wall (x, y), the unit vector along it (x, y; the inside is to its
      left), and its length, in metres.
    low_2, high_2: bounds of the outline.
    height_m: height of the ceiling.
  """

  wall_Z5: np.ndarray
  low_2: tuple[float, float]
  high_2: tuple[float, float]
  height_m: float


@inlined
def multiply(matrix_33: np.ndarray, x: float, y: float, z: float) -> Vector:
  """matrix_33 @ (x, y, z)."""
  return (
    matrix_33[0, 0] * x + matrix_33[0, 1] * y + matrix_33[0, 2] * z,
    matrix_33[1, 0] * x + matrix_33[1, 1] * y + matrix_33[1, 2] * z,
    matrix_33[2, 0] * x + matrix_33[2, 1] * y + matrix_33[2, 2] * z,
  )


@inlined
def direction(camera: Pinhole, x: float, y: float) -> Vector:
  """World direction of the ray through (x, y), in pixels; 1 along the viewing axis."""
  return (
    camera.forward[0] + x * camera.right[0] + y * camera.down[0],
    camera.forward[1] + x * camera.right[1] + y * camera.down[1],
    camera.forward[2] + x * camera.right[2] + y * camera.down[2],
  )


@inlined
def _hit_box(ox, oy, oz, dx, dy, dz):
  ix, iy, iz = 1.0 / dx, 1.0 / dy, 1.0 / dz
  ax, ay, az = abs(ix), abs(iy), abs(iz)
  mx, my, mz = -ox * ix, -oy * iy, -oz * iz  # ray parameters at the middle planes
  near = max(mx - ax, my - ay, mz - az)
  far = min(mx + ax, my + ay, mz + az)
  return near if 0.0 < near <= far else math.inf


@inlined
def _hit_sphere(ox, oy, oz, dx, dy, dz):
  a = dx * dx + dy * dy + dz * dz
  b = ox * dx + oy * dy + oz * dz
  root = b * b - a * (ox * ox + oy * oy + oz * oz - 1.0)
  if root < 0.0:
    return math.inf
  near = (-b - math.sqrt(root)) / a
  return near if near > 0.0 else math.inf


@inlined
def _hit_cylinder(ox, oy, oz, dx, dy, dz):
  a = dx * dx + dy * dy
  b = ox * dx + oy * dy
  root = b * b - a * (ox * ox + oy * oy - 1.0)
  if root < 0.0:
    return math.inf
  root = math.sqrt(root)
  iz, ia = 1.0 / dz, 1.0 / a
  middle, half = -oz * iz, abs(iz)
  near = max((-b - root) * ia, middle - half)
  far = min((-b + root) * ia, middle + half)
  return near if 0.0 < near <= far else math.inf


@inlined
def hit(shape: int, ox: float, oy: float, oz: float, dx: float, dy: float, dz: float) -> float:
  """The ray parameter t > 0 at which o + t d enters the unit shape from outside, inf if never."""
  if shape == BOX:
    return _hit_box(ox, oy, oz, dx, dy, dz)
  if shape == SPHERE:
    return _hit_sphere(ox, oy, oz, dx, dy, dz)
  return _hit_cylinder(ox, oy, oz, dx, dy, dz)


@kernel
def _screen_rectangle(solid, camera):
  """Pixels that the box of a solid can cover (x0, y0, x1, y1, exclusive), and its least depth."""
  (rx, ry, rz), (dx, dy, dz), (fx, fy, fz) = camera.right, camera.down, camera.forward
  pixel2 = rx * rx + ry * ry + rz * rz
  ax, ay, az = (
    (ry * dz - rz * dy) / pixel2,
    (rz * dx - rx * dz) / pixel2,
    (rx * dy - ry * dx) / pixel2,
  )
  shift_x = (fx * rx + fy * ry + fz * rz) / pixel2
  shift_y = (fx * dx + fy * dy + fz * dz) / pixel2
  left, top, right, bottom, near, hidden = math.inf, math.inf, -math.inf, -math.inf, math.inf, 0
  for corner in range(8):
    px, py, pz = corner_of(solid, corner)
    px, py, pz = px - camera.position[0], py - camera.position[1], pz - camera.position[2]
    depth = px * ax + py * ay + pz * az
    near = min(near, depth)
    if depth < _NEAR_M:
      hidden += 1
      continue
    sx = (px * rx + py * ry + pz * rz) / (pixel2 * depth) - shift_x
    sy = (px * dx + py * dy + pz * dz) / (pixel2 * depth) - shift_y
    left, right, top, bottom = min(left, sx), max(right, sx), min(top, sy), max(bottom, sy)
  if hidden == 8:
    return 0, 0, 0, 0, near
  if hidden > 0:
    return 0, 0, camera.width_px, camera.height_px, max(near, 0.0)
  x0, x1 = max(left, 0.0), min(right + 1.0, float(camera.width_px))
  y0, y1 = max(top, 0.0), min(bottom + 1.0, float(camera.height_px))
  if x0 >= x1 or y0 >= y1:
    return 0, 0, 0, 0, near
  return int(x0), int(y0), int(x1), int(y1), near


@inlined
def corner_of(solid: Any, corner: int) -> Vector:
  """World position of one of the 8 corners of a solid's box."""
  sx, sy, sz = (corner & 1) * 2 - 1, (corner & 2) - 1, (corner & 4) // 2 - 1
  px, py, pz = multiply(solid.frame, sx, sy, sz)
  return px + solid.centre[0], py + solid.centre[1], pz + solid.centre[2]


@kernel
def _ray_bases(solids_Z, camera):
  """The camera in the coordinates of each solid: [Z, 12] position, forward, right, down."""
  basis_Z12 = np.empty((solids_Z.shape[0], 12))
  for z in range(basis_Z12.shape[0]):
    centre = solids_Z[z].centre
    offset = (
      camera.position[0] - centre[0],
      camera.position[1] - centre[1],
      camera.position[2] - centre[2],
    )
    for row, vector in enumerate((offset, camera.forward, camera.right, camera.down)):
      x, y, w = multiply(solids_Z[z].inverse, vector[0], vector[1], vector[2])
      basis_Z12[z, 3 * row], basis_Z12[z, 3 * row + 1], basis_Z12[z, 3 * row + 2] = x, y, w
  return basis_Z12


@inlined
def hit_pixel(shape: int, basis_Z12: np.ndarray, z: int, x: float, y: float) -> float:
  """Depth at which the ray through (x, y), in pixels, enters solid z."""
  return hit(
    shape,
    basis_Z12[z, 0],
    basis_Z12[z, 1],
    basis_Z12[z, 2],
    basis_Z12[z, 3] + x * basis_Z12[z, 6] + y * basis_Z12[z, 9],
    basis_Z12[z, 4] + x * basis_Z12[z, 7] + y * basis_Z12[z, 10],
    basis_Z12[z, 5] + x * basis_Z12[z, 8] + y * basis_Z12[z, 11],
  )


@kernel
def cover(solids_Z: np.ndarray, camera: Pinhole) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The nearest solid of each pixel.

  Returns:
    depth float64 [height, width] (inf if none), surface int32 [height, width] (NOTHING if none),
    basis float64 [Z, 12]: the camera in the coordinates of each solid.
  """
  depth = np.full((camera.height_px, camera.width_px), math.inf)
  surface = np.full((camera.height_px, camera.width_px), NOTHING, np.int32)
  basis_Z12 = _ray_bases(solids_Z, camera)
  rectangle_Z4 = np.zeros((basis_Z12.shape[0], 4), np.int64)
  near_Z = np.empty(basis_Z12.shape[0])
  for z in range(basis_Z12.shape[0]):
    x0, y0, x1, y1, near_Z[z] = _screen_rectangle(solids_Z[z], camera)
    rectangle_Z4[z, 0], rectangle_Z4[z, 1], rectangle_Z4[z, 2], rectangle_Z4[z, 3] = x0, y0, x1, y1
  order = np.argsort(near_Z)  # front to back: most hidden pixels fail the first comparison
  for rank in range(order.shape[0]):
    z = int(order[rank])
    solid, near = solids_Z[z], near_Z[z]
    for y in range(rectangle_Z4[z, 1], rectangle_Z4[z, 3]):
      for x in range(rectangle_Z4[z, 0], rectangle_Z4[z, 2]):
        if depth[y, x] > near:
          t = hit_pixel(solid.form, basis_Z12, z, x, y)
          if t < depth[y, x]:
            depth[y, x], surface[y, x] = t, z
  return depth, surface, basis_Z12


@kernel
def count_covered(solids_Z: np.ndarray, camera: Pinhole, objects: int) -> np.ndarray:
  """Number of pixels that each object covers without the others: int64 [objects]."""
  stamp = np.full((camera.height_px, camera.width_px), -1, np.int32)
  covered = np.zeros(objects, np.int64)
  basis_Z12 = _ray_bases(solids_Z, camera)
  for z in range(basis_Z12.shape[0]):
    x0, y0, x1, y1, _ = _screen_rectangle(solids_Z[z], camera)
    solid = solids_Z[z]
    owner = solid.owner
    for y in range(y0, y1):
      for x in range(x0, x1):
        if stamp[y, x] != owner and hit_pixel(solid.form, basis_Z12, z, x, y) < math.inf:
          stamp[y, x] = owner
          covered[owner] += 1
  return covered


@inlined
def hit_room(room: Room, position: Vector, dx: float, dy: float, dz: float) -> tuple[float, int]:
  """Depth and surface at which the ray leaves the room; walls are visible from inside only."""
  best, surface = math.inf, NOTHING
  if dz < 0.0 and position[2] > 0.0:
    best, surface = -position[2] / dz, FLOOR
  elif dz > 0.0 and position[2] < room.height_m:
    best, surface = (room.height_m - position[2]) / dz, CEILING
  for wall in range(room.wall_Z5.shape[0]):
    along_x, along_y = room.wall_Z5[wall, 2], room.wall_Z5[wall, 3]
    facing = along_x * dy - along_y * dx  # inward normal (-along_y, along_x)
    if facing < 0.0:
      from_x, from_y = position[0] - room.wall_Z5[wall, 0], position[1] - room.wall_Z5[wall, 1]
      t = (along_y * from_x - along_x * from_y) / facing
      if 0.0 < t < best:
        place = (from_x + t * dx) * along_x + (from_y + t * dy) * along_y
        if 0.0 <= place <= room.wall_Z5[wall, 4]:
          best, surface = t, WALL - wall
  return best, surface


@kernel
def enclose(room: Room, camera: Pinhole, depth: np.ndarray, surface: np.ndarray) -> None:
  """Fills in floor, ceiling and walls where they are nearer than the solids, in place."""
  for y in range(camera.height_px):
    for x in range(camera.width_px):
      dx, dy, dz = direction(camera, x, y)
      t, room_surface = hit_room(room, camera.position, dx, dy, dz)
      if t < depth[y, x]:
        depth[y, x], surface[y, x] = t, room_surface


@inlined
def normal(solids_Z: np.ndarray, room: Room, surface: int, x: float, y: float, z: float) -> Vector:
  """Unit normal of a surface at the world point (x, y, z)."""
  if surface >= 0:
    nx, ny, nz = _solid_normal(solids_Z[surface], x, y, z)
  elif surface <= WALL:
    nx, ny, nz = -room.wall_Z5[WALL - surface, 3], room.wall_Z5[WALL - surface, 2], 0.0
  else:
    nx, ny, nz = 0.0, 0.0, 1.0 if surface == FLOOR else -1.0
  return nx, ny, nz


@inlined
def _solid_normal(solid, x, y, z):
  inverse, centre = solid.inverse, solid.centre
  ux, uy, uz = multiply(inverse, x - centre[0], y - centre[1], z - centre[2])
  face, out = 2, uz  # the axis of a flat face
  if solid.form == BOX:
    if abs(ux) >= abs(uy) and abs(ux) >= abs(uz):
      face, out = 0, ux
    elif abs(uy) >= abs(uz):
      face, out = 1, uy
  if solid.form == BOX or (solid.form == CYLINDER and ux * ux + uy * uy <= uz * uz):
    sign = 1.0 if out > 0.0 else -1.0
    nx, ny, nz = sign * solid.axes[face, 0], sign * solid.axes[face, 1], sign * solid.axes[face, 2]
  else:
    uz = 0.0 if solid.form == CYLINDER else uz
    nx = inverse[0, 0] * ux + inverse[1, 0] * uy + inverse[2, 0] * uz
    ny = inverse[0, 1] * ux + inverse[1, 1] * uy + inverse[2, 1] * uz
    nz = inverse[0, 2] * ux + inverse[1, 2] * uy + inverse[2, 2] * uz
    scale = 1.0 / math.sqrt(nx * nx + ny * ny + nz * nz)
    nx, ny, nz = nx * scale, ny * scale, nz * scale
  return nx, ny, nz
