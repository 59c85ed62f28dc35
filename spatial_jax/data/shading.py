"""Numba kernels that turn surfaces and depths into a picture: soft shadows, then colour.

The lamp is a square of LIGHT_GRID^2 points. Each pixel asks for one of them, neighbours for different
ones, and the answers are averaged over the block (interleaved sampling, Keller and Heidrich 2001):
a soft shadow for one shadow ray per pixel. Pixels at the rim of a surface are sampled 2x2.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from spatial_jax.data.raycast import (
  CEILING,
  FLOOR,
  LIGHT_GRID,
  NOTHING,
  SHADOW_CELLS,
  WALL,
  _hit_pixel,
  _multiply,
  hit,
  hit_room,
  normal,
)

_SKIRTING_M = 0.07
_AMBIENT, _KEY, _FILL = 0.46, 0.62, 0.12
_FAR_AWAY = 1 << 20


class Style(NamedTuple):
  """How the room itself looks; colours are linear light in [0, 1].

  Attributes:
    floor_3, wall_3, ceiling_3, skirting_3: float64.
    tile_m: float64 [2], length and width of planks or tiles.
    staggered: each row of planks begins elsewhere.
    contrast: how much planks differ in tone, in [0, 1].
    joint: brightness of the joints relative to the floor.
  """

  floor_3: np.ndarray
  wall_3: np.ndarray
  ceiling_3: np.ndarray
  skirting_3: np.ndarray
  tile_m: np.ndarray
  staggered: bool
  contrast: float
  joint: float


@njit(cache=True, nogil=True, error_model="numpy")
def _point(camera, t, x, y):
  """World point at depth t behind pixel (x, y)."""
  return (
    camera.position_3[0] + t * (camera.forward_3[0] + x * camera.right_3[0] + y * camera.down_3[0]),
    camera.position_3[1] + t * (camera.forward_3[1] + x * camera.right_3[1] + y * camera.down_3[1]),
    camera.position_3[2] + t * (camera.forward_3[2] + x * camera.right_3[2] + y * camera.down_3[2]),
  )


@njit(cache=True, nogil=True, error_model="numpy")
def _cell(low, high, place):
  """The cell of one coordinate of the shadow grid; what lies outside belongs to the border cells."""
  return int(min(max((place - low) / (high - low), 0.0), 0.999999) * SHADOW_CELLS)


@njit(cache=True, nogil=True, error_model="numpy")
def _caster_cells(primitives, light, room):
  """Cells of the floor, seen from the lamp, that each primitive can darken: int64 [Z, 4] inclusive."""
  low_x, high_x = room.start_Z2[:, 0].min(), room.start_Z2[:, 0].max()
  low_y, high_y = room.start_Z2[:, 1].min(), room.start_Z2[:, 1].max()
  cell_Z4 = np.empty((primitives.shape_Z.shape[0], 4), np.int64)
  lx, ly, lz = light.position_3[0], light.position_3[1], light.position_3[2]
  for z in range(primitives.shape_Z.shape[0]):
    x0, x1, y0, y1, margin = math.inf, -math.inf, math.inf, -math.inf, 0.0
    for corner in range(8):
      sx, sy, sz = (corner & 1) * 2 - 1, (corner & 2) - 1, (corner & 4) // 2 - 1
      px, py, pz = _multiply(primitives.frame_Z33[z], sx, sy, sz)
      px, py = px + primitives.centre_Z3[z, 0], py + primitives.centre_Z3[z, 1]
      pz += primitives.centre_Z3[z, 2]
      scale = lz / (lz - pz)
      x, y = lx + (px - lx) * scale, ly + (py - ly) * scale
      x0, x1, y0, y1 = min(x0, x), max(x1, x), min(y0, y), max(y1, y)
      margin = max(margin, light.half_m * (scale - 1.0))  # the lamp's side, seen through the corner
    cell_Z4[z, 0] = _cell(low_x, high_x, x0 - margin)
    cell_Z4[z, 1] = _cell(low_x, high_x, x1 + margin)
    cell_Z4[z, 2] = _cell(low_y, high_y, y0 - margin)
    cell_Z4[z, 3] = _cell(low_y, high_y, y1 + margin)
  return cell_Z4


@njit(cache=True, nogil=True, error_model="numpy")
def caster_lists(primitives, light, room):
  """For each cell of the floor the primitives that can stand between it and the lamp.

  Returns:
    first int32 [cells + 1] and caster int32: cell c has caster[first[c] : first[c + 1]].
  """
  cell_Z4 = _caster_cells(primitives, light, room)
  first = np.zeros(SHADOW_CELLS * SHADOW_CELLS + 1, np.int32)
  for z in range(cell_Z4.shape[0]):
    for cx in range(cell_Z4[z, 0], cell_Z4[z, 1] + 1):
      for cy in range(cell_Z4[z, 2], cell_Z4[z, 3] + 1):
        first[cy * SHADOW_CELLS + cx + 1] += 1
  first = np.cumsum(first).astype(np.int32)
  caster, filled = np.empty(first[-1], np.int32), first[:-1].copy()
  for z in range(cell_Z4.shape[0]):
    for cx in range(cell_Z4[z, 0], cell_Z4[z, 1] + 1):
      for cy in range(cell_Z4[z, 2], cell_Z4[z, 3] + 1):
        caster[filled[cy * SHADOW_CELLS + cx]] = z
        filled[cy * SHADOW_CELLS + cx] += 1
  return first, caster


@njit(cache=True, nogil=True, error_model="numpy")
def _reaches(primitives, caster, start, stop, x, y, z, lx, ly, lz):
  """Whether the segment from (x, y, z) to the lamp point is free of caster[start:stop]."""
  for i in range(start, stop):
    inverse_33, centre_3 = primitives.inverse_Z33[caster[i]], primitives.centre_Z3[caster[i]]
    ox, oy, oz = _multiply(inverse_33, x - centre_3[0], y - centre_3[1], z - centre_3[2])
    dx, dy, dz = _multiply(inverse_33, lx - x, ly - y, lz - z)
    if hit(primitives.shape_Z[caster[i]], ox, oy, oz, dx, dy, dz) < 1.0:
      return False
  return True


@njit(cache=True, nogil=True, error_model="numpy")
def _ask_lamp(primitives, room, camera, light, depth, surface):
  """1 where the pixel's own point of the lamp is seen, 0 where hidden, -1 where it faces away."""
  first, caster = caster_lists(primitives, light, room)
  low_x, high_x = room.start_Z2[:, 0].min(), room.start_Z2[:, 0].max()
  low_y, high_y = room.start_Z2[:, 1].min(), room.start_Z2[:, 1].max()
  lx, ly, lz = light.position_3[0], light.position_3[1], light.position_3[2]
  seen = np.full(depth.shape, -1.0, np.float32)
  for y in range(depth.shape[0]):
    for x in range(depth.shape[1]):
      if surface[y, x] == NOTHING or surface[y, x] == CEILING:
        continue
      px, py, pz = _point(camera, depth[y, x], x, y)
      nx, ny, nz = normal(primitives, room, surface[y, x], px, py, pz)
      if nx * (lx - px) + ny * (ly - py) + nz * (lz - pz) <= 0.0:
        continue
      px, py, pz = px + nx * 1e-3, py + ny * 1e-3, pz + nz * 1e-3
      scale = lz / (lz - pz)
      cell = _cell(low_y, high_y, ly + (py - ly) * scale) * SHADOW_CELLS
      cell += _cell(low_x, high_x, lx + (px - lx) * scale)
      sx = lx + light.half_m * ((x % LIGHT_GRID + 0.5) * (2.0 / LIGHT_GRID) - 1.0)
      sy = ly + light.half_m * ((y % LIGHT_GRID + 0.5) * (2.0 / LIGHT_GRID) - 1.0)
      free = _reaches(primitives, caster, first[cell], first[cell + 1], px, py, pz, sx, sy, lz)
      seen[y, x] = 1.0 if free else 0.0
  return seen


@njit(cache=True, nogil=True, error_model="numpy")
def shadow(primitives, room, camera, light, depth, surface):
  """Share of the lamp that each pixel sees, float32 [height, width] in [0, 1]."""
  seen = _ask_lamp(primitives, room, camera, light, depth, surface)
  lit = np.zeros(depth.shape, np.float32)
  half = LIGHT_GRID // 2
  for y in range(depth.shape[0]):
    for x in range(depth.shape[1]):
      if seen[y, x] < 0.0:
        continue
      total, count = 0.0, 0
      for v in range(max(y - half, 0), min(y + half, depth.shape[0])):
        for u in range(max(x - half, 0), min(x + half, depth.shape[1])):
          if surface[v, u] == surface[y, x] and seen[v, u] >= 0.0:
            total += seen[v, u]
            count += 1
      lit[y, x] = total / count
  return lit


@njit(cache=True, nogil=True, error_model="numpy")
def _hash(a, b):
  """A float in [0, 1) from two small integers, the same everywhere."""
  h = np.uint32(a + _FAR_AWAY) * np.uint32(0x9E3779B1) ^ np.uint32(b + _FAR_AWAY) * np.uint32(
    0x85EBCA77
  )
  h = (h ^ (h >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
  h = np.uint32(h ^ (h >> np.uint32(12)))
  return (h & np.uint32(0xFFFF)) / 65536.0


@njit(cache=True, nogil=True, error_model="numpy")
def _floor_tone(style, x, y, footprint_m):
  """Relative brightness of planks or tiles and their joints; detail below a pixel fades out."""
  row = math.floor(y / style.tile_m[1])
  shift = _hash(row, 7) if style.staggered else 0.0
  column = math.floor(x / style.tile_m[0] + shift)
  in_row = y - row * style.tile_m[1]
  in_column = x - (column - shift) * style.tile_m[0]
  edge = min(in_row, style.tile_m[1] - in_row, in_column, style.tile_m[0] - in_column)
  joint = min(
    max((0.005 + 0.5 * footprint_m - edge) / footprint_m, 0.0), min(1.0, 0.01 / footprint_m)
  )
  fade = min(1.0, style.tile_m[1] / footprint_m * 0.5)
  tone = 1.0 + style.contrast * fade * (_hash(row, column) - 0.5)
  return tone * (1.0 - joint * (1.0 - style.joint))


@njit(cache=True, nogil=True, error_model="numpy")
def _corner_shade(room, x, y, z, reach_m):
  """Ambient light left near walls and ceiling-floor corners: 1 in the open, lower in a corner."""
  nearest = math.inf
  for wall in range(room.length_Z.shape[0]):
    dx, dy = x - room.start_Z2[wall, 0], y - room.start_Z2[wall, 1]
    place = dx * room.along_Z2[wall, 0] + dy * room.along_Z2[wall, 1]
    off = room.along_Z2[wall, 0] * dy - room.along_Z2[wall, 1] * dx
    if -0.1 < place < room.length_Z[wall] + 0.1 and 1e-4 < off < nearest:
      nearest = off
  nearest = nearest / reach_m
  return 1.0 - 0.3 / (1.0 + nearest * nearest)


@njit(cache=True, nogil=True, error_model="numpy")
def _ground_shade(height_m):
  """Ambient light left close above the floor."""
  height = height_m / 0.22
  return 1.0 - 0.3 / (1.0 + height * height)


@njit(cache=True, nogil=True, error_model="numpy")
def _albedo(primitives, room, style, surface, x, y, z, footprint_m):
  """Colour of a surface point and the ambient light that reaches it: r, g, b, ambient."""
  if surface == FLOOR:
    tone = _floor_tone(style, x, y, footprint_m)
    colour_3, ambient = style.floor_3, _corner_shade(room, x, y, z, 0.35)
  elif surface == CEILING:
    tone, colour_3, ambient = 1.0, style.ceiling_3, _corner_shade(room, x, y, z, 0.4)
  elif surface < 0:
    wall = WALL - surface
    place = (x - room.start_Z2[wall, 0]) * room.along_Z2[wall, 0]
    place += (y - room.start_Z2[wall, 1]) * room.along_Z2[wall, 1]
    tone = 1.0 if math.floor(place / 0.3) % 2 == 0 else 0.965
    colour_3 = style.wall_3
    ambient = (
      _corner_shade(room, x, y, z, 0.35) * _ground_shade(z) * _ground_shade(room.height_m - z)
    )
    if z < _SKIRTING_M:
      tone, colour_3 = 1.0, style.skirting_3
  else:
    tone, colour_3, ambient = 1.0, primitives.colour_Z3[surface], _ground_shade(max(z, 0.0))
  return colour_3[0] * tone, colour_3[1] * tone, colour_3[2] * tone, ambient


@njit(cache=True, nogil=True, error_model="numpy")
def _colour(primitives, room, camera, light, style, surface, depth, lit, x, y):
  """Linear light that comes from a surface through (x, y): Lambert, lamp, sky and a faint fill."""
  if surface == NOTHING:
    return 0.0, 0.0, 0.0
  px, py, pz = _point(camera, depth, x, y)
  nx, ny, nz = normal(primitives, room, surface, px, py, pz)
  vx, vy, vz = camera.position_3[0] - px, camera.position_3[1] - py, camera.position_3[2] - pz
  distance = math.sqrt(vx * vx + vy * vy + vz * vz)
  slant = max((nx * vx + ny * vy + nz * vz) / distance, 0.08)
  footprint_m = depth * math.sqrt(
    camera.right_3[0] ** 2 + camera.right_3[1] ** 2 + camera.right_3[2] ** 2
  )
  r, g, b, ambient = _albedo(
    primitives, room, style, surface, px, py, pz, footprint_m / math.sqrt(slant)
  )
  lx, ly, lz = light.position_3[0] - px, light.position_3[1] - py, light.position_3[2] - pz
  facing = (nx * lx + ny * ly + nz * lz) / math.sqrt(lx * lx + ly * ly + lz * lz)
  sky = _AMBIENT * ambient * (0.82 + 0.18 * nz) * (0.8 + 0.2 * lit)
  if surface == CEILING:
    sky = (_AMBIENT + 0.4) * ambient
  power = sky + _KEY * max(facing, 0.0) * lit + _FILL * slant
  return r * power, g * power * 0.99, b * power * 0.97


@njit(cache=True, nogil=True, error_model="numpy")
def _is_rim(surface, y, x):
  """Whether a direct neighbour shows another surface."""
  here = surface[y, x]
  return (
    (x > 0 and surface[y, x - 1] != here)
    or (x + 1 < surface.shape[1] and surface[y, x + 1] != here)
    or (y > 0 and surface[y - 1, x] != here)
    or (y + 1 < surface.shape[0] and surface[y + 1, x] != here)
  )


@njit(cache=True, nogil=True, error_model="numpy")
def _sample(primitives, room, camera, basis_Z43, surface, lit, x, y, sx, sy):
  """What (sx, sy) inside pixel (x, y) sees, looking only for what the 3x3 pixels around see."""
  best, seen = hit_room(
    room,
    camera.position_3,
    camera.forward_3[0] + sx * camera.right_3[0] + sy * camera.down_3[0],
    camera.forward_3[1] + sx * camera.right_3[1] + sy * camera.down_3[1],
    camera.forward_3[2] + sx * camera.right_3[2] + sy * camera.down_3[2],
  )
  share = lit[y, x]
  for v in range(max(y - 1, 0), min(y + 2, surface.shape[0])):
    for u in range(max(x - 1, 0), min(x + 2, surface.shape[1])):
      other = surface[v, u]
      if other >= 0 and other != seen:
        t = _hit_pixel(primitives.shape_Z[other], basis_Z43[other], sx, sy)
        if t < best:
          best, seen = t, other
  if seen != surface[y, x]:
    for v in range(max(y - 1, 0), min(y + 2, surface.shape[0])):
      for u in range(max(x - 1, 0), min(x + 2, surface.shape[1])):
        if surface[v, u] == seen:
          share = lit[v, u]
  return best, seen, share


@njit(cache=True, nogil=True, error_model="numpy")
def shade(primitives, room, camera, light, style, basis_Z43, depth, surface, lit):
  """The picture, uint8 [height, width, 3], display encoding = square root of linear light."""
  image = np.empty((depth.shape[0], depth.shape[1], 3), np.uint8)
  for y in range(depth.shape[0]):
    for x in range(depth.shape[1]):
      if not _is_rim(surface, y, x):
        r, g, b = _colour(
          primitives, room, camera, light, style, surface[y, x], depth[y, x], lit[y, x], x, y
        )
      else:
        r, g, b = 0.0, 0.0, 0.0
        for corner in range(4):
          sx, sy = x - 0.25 + 0.5 * (corner & 1), y - 0.25 + 0.5 * (corner >> 1)
          t, seen, share = _sample(primitives, room, camera, basis_Z43, surface, lit, x, y, sx, sy)
          cr, cg, cb = _colour(primitives, room, camera, light, style, seen, t, share, sx, sy)
          r, g, b = r + 0.25 * cr, g + 0.25 * cg, b + 0.25 * cb
      image[y, x, 0] = int(255.0 * math.sqrt(min(r, 1.0)) + 0.5)
      image[y, x, 1] = int(255.0 * math.sqrt(min(g, 1.0)) + 0.5)
      image[y, x, 2] = int(255.0 * math.sqrt(min(b, 1.0)) + 0.5)
  return image
