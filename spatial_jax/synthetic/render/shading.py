"""Numba kernels that turn surfaces and depths into an image: soft shadows, then colour.

The lamp is a square of 4x4 points. Each pixel casts one shadow ray to one of them, neighbours to
different points, and the results are averaged over the block: a soft shadow for one ray per pixel
(interleaved sampling, Keller and Heidrich 2001). Pixels at an edge of a surface are sampled 2x2.
"""

import math
from typing import NamedTuple

import numpy as np

from spatial_jax.synthetic.render.kernels import inlined, kernel
from spatial_jax.synthetic.render.raycast import (
  CEILING,
  FLOOR,
  NOTHING,
  WALL,
  Pinhole,
  Room,
  Vector,
  corner_of,
  direction,
  hit,
  hit_pixel,
  hit_room,
  multiply,
  normal,
)

_CELLS = 32  # the floor has _CELLS^2 cells, each with a list of shadow casters
_LAMP_GRID = 4
_SKIRTING_M = 0.07
_STRIPE_M = 0.3
_AMBIENT, _CEILING_AMBIENT, _KEY, _FILL = 0.46, 0.86, 0.62, 0.12
_CORNER_M, _GROUND_M = 0.35, 0.22  # reach of the ambient occlusion of corners and of the floor


class Light(NamedTuple):
  """A square lamp above everything: `position` in metres, `half_m` half its side."""

  position: Vector
  half_m: float


class Style(NamedTuple):
  """Colours and floor pattern of the room; colours are linear light in [0, 1].

  Attributes:
    floor, wall, ceiling, skirting: colours.
    tile_m: length and width of planks or tiles.
    staggered: 1 if rows of planks are shifted against each other, else 0.
    contrast: difference in brightness between planks, in [0, 1].
    joint: brightness of the joints relative to the floor.
  """

  floor: Vector
  wall: Vector
  ceiling: Vector
  skirting: Vector
  tile_m: tuple[float, float]
  staggered: float
  contrast: float
  joint: float


@inlined
def _cell(low, high, place):
  """The cell of one coordinate of the floor, clipped to the border cells."""
  return int(min(max((place - low) / (high - low), 0.0), 0.999999) * _CELLS)


@kernel
def _caster_cells(solids_Z, light, room):
  """Cells (x0, x1, y0, y1, inclusive) of the floor that each solid can darken: int64 [Z, 4]."""
  cell_Z4 = np.empty((solids_Z.shape[0], 4), np.int64)
  lx, ly, lz = light.position
  (low_x, low_y), (high_x, high_y) = room.low_2, room.high_2
  for z in range(cell_Z4.shape[0]):
    x0, x1, y0, y1, margin = math.inf, -math.inf, math.inf, -math.inf, 0.0
    for corner in range(8):
      px, py, pz = corner_of(solids_Z[z], corner)
      scale = lz / (lz - pz)
      x, y = lx + (px - lx) * scale, ly + (py - ly) * scale
      x0, x1, y0, y1 = min(x0, x), max(x1, x), min(y0, y), max(y1, y)
      margin = max(margin, light.half_m * (scale - 1.0))  # projection of half the lamp
    cell_Z4[z, 0], cell_Z4[z, 1] = (
      _cell(low_x, high_x, x0 - margin),
      _cell(low_x, high_x, x1 + margin),
    )
    cell_Z4[z, 2], cell_Z4[z, 3] = (
      _cell(low_y, high_y, y0 - margin),
      _cell(low_y, high_y, y1 + margin),
    )
  return cell_Z4


@kernel
def _caster_lists(solids_Z, light, room):
  """For each cell of the floor the solids that can be between the cell and the lamp.

  Returns:
    first int32 [cells + 1] and caster int32: cell c has caster[first[c] : first[c + 1]].
  """
  cell_Z4 = _caster_cells(solids_Z, light, room)
  first = np.zeros(_CELLS * _CELLS + 1, np.int32)
  for z in range(cell_Z4.shape[0]):
    for cx in range(cell_Z4[z, 0], cell_Z4[z, 1] + 1):
      for cy in range(cell_Z4[z, 2], cell_Z4[z, 3] + 1):
        first[cy * _CELLS + cx + 1] += 1
  for cell in range(_CELLS * _CELLS):
    first[cell + 1] += first[cell]
  caster, filled = np.empty(first[-1], np.int32), first[:-1].copy()
  for z in range(cell_Z4.shape[0]):
    for cx in range(cell_Z4[z, 0], cell_Z4[z, 1] + 1):
      for cy in range(cell_Z4[z, 2], cell_Z4[z, 3] + 1):
        caster[filled[cy * _CELLS + cx]] = z
        filled[cy * _CELLS + cx] += 1
  return first, caster


@inlined
def _is_free(solids_Z, caster, start, stop, x, y, z, lx, ly, lz):
  """Whether no solid of caster[start:stop] is between (x, y, z) and (lx, ly, lz)."""
  free = True
  for i in range(start, stop):
    solid = solids_Z[caster[i]]
    ox, oy, oz = multiply(
      solid.inverse, x - solid.centre[0], y - solid.centre[1], z - solid.centre[2]
    )
    dx, dy, dz = multiply(solid.inverse, lx - x, ly - y, lz - z)
    if hit(solid.form, ox, oy, oz, dx, dy, dz) < 1.0:
      free = False
      break
  return free


@kernel
def _cast_shadow_rays(solids_Z, room, camera, light, depth, surface):
  """Per pixel: 1 if its point of the lamp is visible, 0 if hidden, -1 if the pixel faces away."""
  first, caster = _caster_lists(solids_Z, light, room)
  lx, ly, lz = light.position
  lit = np.full(depth.shape, -1.0, np.float32)
  for y in range(depth.shape[0]):
    for x in range(depth.shape[1]):
      if surface[y, x] == NOTHING or surface[y, x] == CEILING:
        continue
      px, py, pz = _point(camera, depth[y, x], x, y)
      nx, ny, nz = normal(solids_Z, room, surface[y, x], px, py, pz)
      if nx * (lx - px) + ny * (ly - py) + nz * (lz - pz) <= 0.0:
        continue
      px, py, pz = px + nx * 1e-3, py + ny * 1e-3, pz + nz * 1e-3
      scale = lz / (lz - pz)
      cell = _cell(room.low_2[1], room.high_2[1], ly + (py - ly) * scale) * _CELLS
      cell += _cell(room.low_2[0], room.high_2[0], lx + (px - lx) * scale)
      sx = lx + light.half_m * ((x % _LAMP_GRID + 0.5) * (2.0 / _LAMP_GRID) - 1.0)
      sy = ly + light.half_m * ((y % _LAMP_GRID + 0.5) * (2.0 / _LAMP_GRID) - 1.0)
      free = _is_free(solids_Z, caster, first[cell], first[cell + 1], px, py, pz, sx, sy, lz)
      lit[y, x] = 1.0 if free else 0.0
  return lit


@kernel
def shadow(
  solids_Z: np.ndarray,
  room: Room,
  camera: Pinhole,
  light: Light,
  depth: np.ndarray,
  surface: np.ndarray,
) -> np.ndarray:
  """Visible share of the lamp per pixel, float32 [height, width]: [0, 1], -1 if facing away."""
  lit = _cast_shadow_rays(solids_Z, room, camera, light, depth, surface)
  return _blur(_blur(lit, surface, 0, 1), surface, 1, 0)


@kernel
def _blur(lit, surface, step_y, step_x):
  """Averages along one direction within a surface; the weights sum over a whole block of the lamp.

  1 2 2 2 1    = 4 equal weights (a block) smoothed by 2
  """
  height, width = lit.shape
  blurred = lit.copy()
  for y in range(height):
    for x in range(width):
      if lit[y, x] < 0.0:
        continue
      here, total, weights = surface[y, x], 0.0, 0.0
      for k in range(-2, 3):
        v, u = y + k * step_y, x + k * step_x
        if 0 <= v < height and 0 <= u < width and surface[v, u] == here and lit[v, u] >= 0.0:
          weight = 2.0 if -2 < k < 2 else 1.0
          total += weight * lit[v, u]
          weights += weight
      blurred[y, x] = total / weights
  return blurred


@inlined
def _point(camera, t, x, y):
  """World point at depth t on the ray of pixel (x, y)."""
  dx, dy, dz = direction(camera, x, y)
  return camera.position[0] + t * dx, camera.position[1] + t * dy, camera.position[2] + t * dz


@inlined
def _hash(a, b):
  """A number in [0, 1) from two integers, the same on every machine."""
  h = ((a * 0x9E3779B1) ^ (b * 0x85EBCA77)) & 0xFFFFFFFF
  h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
  return ((h ^ (h >> 12)) & 0xFFFF) / 65536.0


@inlined
def _floor_tone(style, x, y, footprint_m):
  """Relative brightness of planks or tiles and joints; details below a pixel fade out."""
  length, width = style.tile_m
  row = math.floor(y / width)
  shift = _hash(row, 7) * style.staggered
  column = math.floor(x / length + shift)
  in_row, in_column = y - row * width, x - (column - shift) * length
  edge = min(in_row, width - in_row, in_column, length - in_column)
  sharp = 1.0 / footprint_m
  joint = min(max((0.005 - edge) * sharp + 0.5, 0.0), min(1.0, 0.01 * sharp))
  tone = 1.0 + style.contrast * min(1.0, 0.5 * width * sharp) * (_hash(row, column) - 0.5)
  return tone * (1.0 - joint * (1.0 - style.joint))


@inlined
def _corner_shade(room, x, y):
  """Share of the ambient light beside walls: 1 far from walls, lower in a corner."""
  nearest2 = math.inf
  for wall in range(room.wall_Z5.shape[0]):
    dx, dy = x - room.wall_Z5[wall, 0], y - room.wall_Z5[wall, 1]
    along_x, along_y = room.wall_Z5[wall, 2], room.wall_Z5[wall, 3]
    place, off = dx * along_x + dy * along_y, along_x * dy - along_y * dx
    if off > 1e-4:  # in front of the wall, not on it
      beyond = max(-place, place - room.wall_Z5[wall, 4], 0.0)
      nearest2 = min(nearest2, off * off + beyond * beyond)
  return _occlusion(nearest2, _CORNER_M)


@inlined
def _occlusion(distance2, reach_m):
  """Share of the ambient light at a (squared) distance from a large surface."""
  return 1.0 - 0.3 * reach_m * reach_m / (reach_m * reach_m + distance2)


@inlined
def _albedo(solids_Z, room, style, surface, x, y, z, footprint_m):
  """Colour of a surface point and its share of the ambient light: r, g, b, ambient."""
  tone = 1.0
  if surface >= 0:
    colour = solids_Z[surface].colour
    r, g, b = colour[0], colour[1], colour[2]
    ambient = _occlusion(max(z, 0.0) ** 2, _GROUND_M)
  else:
    ambient = _corner_shade(room, x, y)
    if surface == FLOOR:
      r, g, b = style.floor
      tone = _floor_tone(style, x, y, footprint_m)
    elif surface == CEILING:
      r, g, b = style.ceiling
    elif z < _SKIRTING_M:
      r, g, b = style.skirting
    else:
      wall = WALL - surface
      place = (x - room.wall_Z5[wall, 0]) * room.wall_Z5[wall, 2]
      place += (y - room.wall_Z5[wall, 1]) * room.wall_Z5[wall, 3]
      tone = 1.0 - 0.035 * (int(place / _STRIPE_M) & 1)
      r, g, b = style.wall
      ambient *= _occlusion(z * z, _GROUND_M) * _occlusion((room.height_m - z) ** 2, _GROUND_M)
  return r * tone, g * tone, b * tone, ambient


@inlined
def _colour(solids_Z, room, camera, light, style, surface, depth, lit, x, y):
  """Linear light of a surface at (x, y): Lambert under the lamp, ambient light, a faint fill."""
  dx, dy, dz = direction(camera, x, y)
  px = camera.position[0] + depth * dx
  py = camera.position[1] + depth * dy
  pz = camera.position[2] + depth * dz
  nx, ny, nz = normal(solids_Z, room, surface, px, py, pz)
  slant = max(-(nx * dx + ny * dy + nz * dz), 0.08)
  pixel_m = depth * math.sqrt(camera.right[0] ** 2 + camera.right[1] ** 2 + camera.right[2] ** 2)
  r, g, b, ambient = _albedo(solids_Z, room, style, surface, px, py, pz, pixel_m / math.sqrt(slant))
  if surface == CEILING:
    power = _CEILING_AMBIENT * ambient
  else:
    power = _AMBIENT * ambient * (0.82 + 0.18 * nz) * (0.8 + 0.2 * max(lit, 0.0))
  lx, ly, lz = light.position[0] - px, light.position[1] - py, light.position[2] - pz
  facing = (nx * lx + ny * ly + nz * lz) / math.sqrt(lx * lx + ly * ly + lz * lz)
  power += _KEY * max(facing, 0.0) * max(lit, 0.0) + _FILL * slant
  return r * power, g * power * 0.99, b * power * 0.97


@inlined
def _is_edge(surface, y, x):
  """Whether a direct neighbour shows another surface."""
  here = surface[y, x]
  return (
    (x > 0 and surface[y, x - 1] != here)
    or (x + 1 < surface.shape[1] and surface[y, x + 1] != here)
    or (y > 0 and surface[y - 1, x] != here)
    or (y + 1 < surface.shape[0] and surface[y + 1, x] != here)
  )


@kernel
def _sample(solids_Z, room, camera, basis_Z12, surface, lit, x, y, sx, sy):
  """Depth, surface and visible lamp share at (sx, sy); tests the surfaces of 3x3 pixels only."""
  dx, dy, dz = direction(camera, sx, sy)
  best, nearest = hit_room(room, camera.position, dx, dy, dz)
  for v in range(max(y - 1, 0), min(y + 2, surface.shape[0])):
    for u in range(max(x - 1, 0), min(x + 2, surface.shape[1])):
      other = surface[v, u]
      if other >= 0 and other != nearest:
        t = hit_pixel(solids_Z[other].form, basis_Z12, other, sx, sy)
        if t < best:
          best, nearest = t, other
  share = lit[y, x]
  if nearest != surface[y, x]:
    for v in range(max(y - 1, 0), min(y + 2, surface.shape[0])):
      for u in range(max(x - 1, 0), min(x + 2, surface.shape[1])):
        if surface[v, u] == nearest:
          share = lit[v, u]
  return best, nearest, share


@kernel
def shade(
  solids_Z: np.ndarray,
  room: Room,
  camera: Pinhole,
  light: Light,
  style: Style,
  basis_Z12: np.ndarray,
  depth: np.ndarray,
  surface: np.ndarray,
  lit: np.ndarray,
) -> np.ndarray:
  """The image, uint8 [height, width, 3], display encoding = square root of linear light."""
  image = np.zeros((depth.shape[0], depth.shape[1], 3), np.uint8)
  for y in range(depth.shape[0]):
    for x in range(depth.shape[1]):
      r, g, b = 0.0, 0.0, 0.0
      edge = _is_edge(surface, y, x)
      weight = 0.25 if edge else 1.0
      for corner in range(4 if edge else 1):
        sx, sy = float(x), float(y)
        t, nearest, share = depth[y, x], surface[y, x], lit[y, x]
        if edge:
          sx, sy = x - 0.25 + 0.5 * (corner & 1), y - 0.25 + 0.25 * (corner & 2)
          t, nearest, share = _sample(solids_Z, room, camera, basis_Z12, surface, lit, x, y, sx, sy)
        if nearest != NOTHING:
          cr, cg, cb = _colour(solids_Z, room, camera, light, style, nearest, t, share, sx, sy)
          r, g, b = r + weight * cr, g + weight * cg, b + weight * cb
      image[y, x, 0] = int(255.0 * math.sqrt(min(r, 1.0)) + 0.5)
      image[y, x, 1] = int(255.0 * math.sqrt(min(g, 1.0)) + 0.5)
      image[y, x, 2] = int(255.0 * math.sqrt(min(b, 1.0)) + 0.5)
  return image
