"""Distances and directions between oriented boxes, by the rules of VSI-Bench.

Lengths are in metres, z is up. VSI-Bench takes the smallest distance between two grids of points,
5 cm apart, on the surfaces of the boxes; the functions here compute this distance exactly.
"""

import math

import numpy as np

from spatial_jax.synthetic.scene import Camera, SceneObject

_EDGES_122 = np.array(
  [(i, i | bit) for bit in (1, 2, 4) for i in range(8) if not i & bit], dtype=np.int64
)  # pairs of corner indices, in the order of SceneObject.corners_83

HARD_SECTORS = ("front-left", "back-left", "back-right", "front-right")


def longest_dimension_cm(obj: SceneObject) -> int:
  """The longest of length, width and height in whole centimetres."""
  return round(float(np.max(obj.size_3)) * 100)


def point_distance_m(points_Z3: np.ndarray, obj: SceneObject) -> np.ndarray:
  """Distance from each point to the closest point of the box, float64 [Z]; 0 inside."""
  local_Z3 = (points_Z3 - obj.centre_3) @ obj.axes_33.T
  outside_Z3 = np.maximum(np.abs(local_Z3) - obj.size_3 / 2, 0.0)
  return np.sqrt(np.sum(outside_Z3**2, axis=-1))


def floor_place_m(point_3: np.ndarray, camera: Camera) -> tuple[float, float]:
  """Place of a point on the floor relative to a camera: (metres to the right, metres ahead)."""
  right_3, _, forward_3 = camera.rotation_33
  ahead_2 = forward_3[:2] / np.linalg.norm(forward_3[:2])
  offset_3 = point_3 - camera.position_3
  return float(offset_3 @ right_3), float(offset_3[:2] @ ahead_2)


def box_distance_m(a: SceneObject, b: SceneObject) -> float:
  """Distance between the closest points of two oriented boxes, 0 if they touch or overlap.

  The closest points of two separate boxes are a corner and a point of a face, or points of two
  edges:

      min( corners(a) to b,  corners(b) to a,  edges(a) to edges(b) )

  Source: VSI-Bench, arXiv:2412.14171 (its generator samples this distance on grids of points).
  """
  if _overlap(a, b):
    return 0.0
  corners = min(
    float(point_distance_m(a.corners_83(), b).min()),
    float(point_distance_m(b.corners_83(), a).min()),
  )
  return min(corners, _edge_distance_m(a.corners_83(), b.corners_83()))


def _overlap(a: SceneObject, b: SceneObject) -> bool:
  """Whether none of the 15 separating axes of two boxes has a gap."""
  cross_Z3 = np.cross(a.axes_33[:, None, :], b.axes_33[None, :, :]).reshape(9, 3)
  axes_Z3 = np.concatenate([a.axes_33, b.axes_33, cross_Z3])
  reach_Z = np.abs(axes_Z3 @ a.axes_33.T) @ a.size_3 + np.abs(axes_Z3 @ b.axes_33.T) @ b.size_3
  gap_Z = np.abs(axes_Z3 @ (b.centre_3 - a.centre_3)) - reach_Z / 2
  return bool(np.all(gap_Z <= 1e-9))


def _edge_distance_m(a_83: np.ndarray, b_83: np.ndarray) -> float:
  """Smallest distance between two edges, among pairs whose closest points are inside both edges."""
  start_a, end_a = a_83[_EDGES_122[:, 0]], a_83[_EDGES_122[:, 1]]
  start_b, end_b = b_83[_EDGES_122[:, 0]], b_83[_EDGES_122[:, 1]]
  along_a, along_b = (end_a - start_a)[:, None, :], (end_b - start_b)[None, :, :]
  between = start_b[None, :, :] - start_a[:, None, :]
  aa, bb = np.sum(along_a**2, -1), np.sum(along_b**2, -1)
  ab = np.sum(along_a * along_b, -1)
  at, bt = np.sum(along_a * between, -1), np.sum(along_b * between, -1)
  determinant = aa * bb - ab**2
  skew = determinant > 1e-12 * np.maximum(aa * bb, 1e-300)  # parallel edges: corners are enough
  safe = np.where(skew, determinant, 1.0)
  s, t = (at * bb - ab * bt) / safe, (at * ab - aa * bt) / safe
  inside = skew & (s >= 0) & (s <= 1) & (t >= 0) & (t <= 1)
  apart = between - s[..., None] * along_a + t[..., None] * along_b
  length = np.sqrt(np.sum(apart**2, -1))
  return float(np.min(length, where=inside, initial=math.inf))


def direction_deg(
  standing_2: np.ndarray, facing_2: np.ndarray, points_Z2: np.ndarray
) -> np.ndarray:
  """Counter-clockwise angle in the floor plane from the facing direction to each point, [0, 360).

                 0 facing
          90 left  +  270 right
                180 back

  Args:
    standing_2, facing_2: position of the observer and a point straight ahead, metres.
    points_Z2: the points, metres.
  """
  forward_2 = facing_2 - standing_2
  to_Z2 = points_Z2 - standing_2
  left_2 = np.array([-forward_2[1], forward_2[0]])
  angle_Z = np.degrees(np.arctan2(to_Z2 @ left_2, to_Z2 @ forward_2)) % 360.0
  return np.where(angle_Z >= 360.0, 0.0, angle_Z)  # -1e-17 % 360 is 360


def sector(angle_deg: float, level: str) -> str:
  """Name of a direction in VSI-Bench: a quadrant for "hard"; left, back, right for the others."""
  if level == "hard":
    return HARD_SECTORS[int(angle_deg // 90)]
  return "left" if angle_deg < 135 else "back" if angle_deg < 225 else "right"


def near_boundary(angle_deg: float, level: str) -> bool:
  """Whether a boundary is within 10 degrees; "hard" checks the upper end of each quadrant only."""
  if level == "hard":
    return 90 - angle_deg % 90 < 10
  return any(abs((angle_deg - edge + 180) % 360 - 180) < 10 for edge in (0, 135, 225))
