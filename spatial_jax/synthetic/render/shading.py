"""Numba kernels that turn surfaces and depths into a picture: soft shadows, then colour.

The lamp is a square of 4x4 points. Each pixel asks for one of them, neighbours for different ones,
and the answers are averaged over the block: a soft shadow for one shadow ray per pixel (interleaved
sampling, Keller and Heidrich 2001). Pixels at the rim of a surface are sampled 2x2.
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

_CELLS = 32  # the floor seen from the lamp is cut into _CELLS^2 lists of casters
_LAMP_GRID = 4
_SKIRTING_M = 0.07
_STRIPE_M = 0.3
_AMBIENT, _CEILING_AMBIENT, _KEY, _FILL = 0.46, 0.86, 0.62, 0.12
_CORNER_M, _GROUND_M = 0.35, 0.22  # how far the dusk of corners and of the floor reaches


class Light(NamedTuple):
  """A square lamp above everything: `position` in metres, `half_m` half its side."""

  position: Vector
  half_m: float


class Style(NamedTuple):
  """How the room itself looks; colours are linear light in [0, 1].

  Attributes:
    floor, wall, ceiling, skirting: colours.
    tile_m: length and width of planks or tiles.
    staggered: 1 when each row of planks begins elsewhere, else 0.
    contrast: how much planks differ in tone, in [0, 1].
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
  """The cell of one coordinate of the floor; what lies outside belongs to the border cells."""
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
      margin = max(margin, light.half_m * (scale - 1.0))  # the lamp, seen through the corner
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
  """For each cell of the floor the solids that can stand between it and the lamp.

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
  """Whether nothing of caster[start:stop] stands between (x, y, z) and (lx, ly, lz)."""
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
def _ask_lamp(solids_Z, room, camera, light, depth, surface):
  """1 where the pixel's own point of the lamp is seen, 0 where hidden, -1 where it faces away."""
  first, caster = _caster_lists(solids_Z, light, room)
  lx, ly, lz = light.position
  seen = np.full(depth.shape, -1.0, np.float32)
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
      seen[y, x] = 1.0 if free else 0.0
  return seen


@kernel
def shadow(
  solids_Z: np.ndarray,
  room: Room,
  camera: Pinhole,
  light: Light,
  depth: np.ndarray,
  surface: np.ndarray,
) -> np.ndarray:
  """Share of the lamp that each pixel sees, float32 [height, width]: [0, 1], -1 facing away."""
  seen = _ask_lamp(solids_Z, room, camera, light, depth, surface)
  return _spread(_spread(seen, surface, 0, 1), surface, 1, 0)


@kernel
def _spread(seen, surface, step_y, step_x):
  """Averages along one direction within a surface; the weights sum over a whole block of the lamp.

  1 2 2 2 1    = 4 equal ones (a block) smoothed by 2
  """
  height, width = seen.shape
  spread = seen.copy()
  for y in range(height):
    for x in range(width):
      if seen[y, x] < 0.0:
        continue
      here, total, weights = surface[y, x], 0.0, 0.0
      for k in range(-2, 3):
        v, u = y + k * step_y, x + k * step_x
        if 0 <= v < height and 0 <= u < width and surface[v, u] == here and seen[v, u] >= 0.0:
          weight = 2.0 if -2 < k < 2 else 1.0
          total += weight * seen[v, u]
          weights += weight
      spread[y, x] = total / weights
  return spread


@inlined
def _point(camera, t, x, y):
  """World point at depth t behind pixel (x, y)."""
  dx, dy, dz = direction(camera, x, y)
  return camera.position[0] + t * dx, camera.position[1] + t * dy, camera.position[2] + t * dz


@inlined
def _hash(a, b):
  """A number in [0, 1) from two integers, the same everywhere."""
  h = ((a * 0x9E3779B1) ^ (b * 0x85EBCA77)) & 0xFFFFFFFF
  h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
  return ((h ^ (h >> 12)) & 0xFFFF) / 65536.0


@inlined
def _floor_tone(style, x, y, footprint_m):
  """Relative brightness of planks or tiles and their joints; what is below a pixel fades out."""
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
  """Ambient light left beside walls: 1 in the open, lower in a corner."""
  nearest2 = math.inf
  for wall in range(room.wall_Z5.shape[0]):
    dx, dy = x - room.wall_Z5[wall, 0], y - room.wall_Z5[wall, 1]
    along_x, along_y = room.wall_Z5[wall, 2], room.wall_Z5[wall, 3]
    place, off = dx * along_x + dy * along_y, along_x * dy - along_y * dx
    if off > 1e-4:  # in front of the wall, not on it
      beyond = max(-place, place - room.wall_Z5[wall, 4], 0.0)
      nearest2 = min(nearest2, off * off + beyond * beyond)
  return _dusk(nearest2, _CORNER_M)


@inlined
def _dusk(distance2, reach_m):
  """Ambient light left at a (squared) distance from something large."""
  return 1.0 - 0.3 * reach_m * reach_m / (reach_m * reach_m + distance2)


@inlined
def _albedo(solids_Z, room, style, surface, x, y, z, footprint_m):
  """Colour of a surface point and the ambient light that reaches it: r, g, b, ambient."""
  tone = 1.0
  if surface >= 0:
    colour = solids_Z[surface].colour
    r, g, b = colour[0], colour[1], colour[2]
    ambient = _dusk(max(z, 0.0) ** 2, _GROUND_M)
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
      ambient *= _dusk(z * z, _GROUND_M) * _dusk((room.height_m - z) ** 2, _GROUND_M)
  return r * tone, g * tone, b * tone, ambient


@inlined
def _colour(solids_Z, room, camera, light, style, surface, depth, lit, x, y):
  """Linear light from a surface through (x, y): Lambert under the lamp, sky, and a faint fill."""
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
def _is_rim(surface, y, x):
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
  """What (sx, sy) inside pixel (x, y) sees, looking only for what the 3x3 pixels around see."""
  dx, dy, dz = direction(camera, sx, sy)
  best, seen = hit_room(room, camera.position, dx, dy, dz)
  for v in range(max(y - 1, 0), min(y + 2, surface.shape[0])):
    for u in range(max(x - 1, 0), min(x + 2, surface.shape[1])):
      other = surface[v, u]
      if other >= 0 and other != seen:
        t = hit_pixel(solids_Z[other].form, basis_Z12, other, sx, sy)
        if t < best:
          best, seen = t, other
  share = lit[y, x]
  if seen != surface[y, x]:
    for v in range(max(y - 1, 0), min(y + 2, surface.shape[0])):
      for u in range(max(x - 1, 0), min(x + 2, surface.shape[1])):
        if surface[v, u] == seen:
          share = lit[v, u]
  return best, seen, share


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
  """The picture, uint8 [height, width, 3], display encoding = square root of linear light."""
  image = np.zeros((depth.shape[0], depth.shape[1], 3), np.uint8)
  for y in range(depth.shape[0]):
    for x in range(depth.shape[1]):
      r, g, b = 0.0, 0.0, 0.0
      rim = _is_rim(surface, y, x)
      weight = 0.25 if rim else 1.0
      for corner in range(4 if rim else 1):
        sx, sy = float(x), float(y)
        t, seen, share = depth[y, x], surface[y, x], lit[y, x]
        if rim:
          sx, sy = x - 0.25 + 0.5 * (corner & 1), y - 0.25 + 0.25 * (corner & 2)
          t, seen, share = _sample(solids_Z, room, camera, basis_Z12, surface, lit, x, y, sx, sy)
        if seen != NOTHING:
          cr, cg, cb = _colour(solids_Z, room, camera, light, style, seen, t, share, sx, sy)
          r, g, b = r + weight * cr, g + weight * cg, b + weight * cb
      image[y, x, 0] = int(255.0 * math.sqrt(min(r, 1.0)) + 0.5)
      image[y, x, 1] = int(255.0 * math.sqrt(min(g, 1.0)) + 0.5)
      image[y, x, 2] = int(255.0 * math.sqrt(min(b, 1.0)) + 0.5)
  return image
