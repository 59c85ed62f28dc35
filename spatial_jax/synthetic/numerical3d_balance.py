"""How often a candidate question of Numerical3D is kept, by its type and its answer.

Most rooms have two chairs, and few have nine. If every question were kept, a constant would be a
good answer to many. Rare answers are kept always and common ones rarely, so that about equally many
answers lie in each range of equal ratio.

Source: experiments/numerical3d_balance.py, which measures the table.
"""

import bisect
import math


def _ratios(low: float, high: float, bins: int) -> tuple[float, ...]:
  """Edges of `bins` ranges of equal ratio."""
  return tuple(low * (high / low) ** (i / bins) for i in range(bins + 1))


_COUNT_EDGES = (1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 10.5, 13.5)
# Answers of the edges and between them, in the unit of the type; others are never kept.
EDGES: dict[str, tuple[float, ...]] = {
  "object_counting": _COUNT_EDGES,
  "object_abs_distance": _ratios(0.35, 8.05, 10),
  "object_size_estimation": _ratios(20.0, 320.0, 10),
  "object_height": _ratios(18.0, 230.0, 10),
  "room_size_estimation": _ratios(5.0, 130.0, 10),
  "camera_distance": _ratios(0.65, 7.05, 10),
  "camera_displacement": _ratios(0.35, 6.05, 10),
}
# The probability for each range between two edges.
KEEP: dict[str, tuple[float, ...]] = {
  "object_counting": (0.26, 0.37, 0.42, 0.73, 0.82, 1.0, 1.0, 1.0, 1.0),
  "object_abs_distance": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
  "object_size_estimation": (1.0, 0.82, 0.73, 0.31, 0.26, 0.36, 0.41, 0.41, 1.0, 1.0),
  "object_height": (1.0, 1.0, 1.0, 0.85, 0.47, 0.53, 0.63, 1.0, 1.0, 1.0),
  "room_size_estimation": (1.0, 1.0, 0.92, 0.9, 0.83, 0.81, 0.83, 0.83, 0.94, 1.0),
  "camera_distance": (1.0, 1.0, 0.75, 0.5, 0.28, 0.29, 0.37, 0.42, 0.59, 1.0),
  "camera_displacement": (0.11, 0.12, 0.13, 0.14, 0.1, 0.13, 0.17, 0.2, 0.5, 0.94),
}


def keep_probability(question_type: str, answer: float) -> float:
  """The probability that a candidate is kept, in [0, 1].

  Args:
    question_type: of `numerical3d.TYPES`.
    answer: > 0, in the unit of the type.
  """
  edges, keep = EDGES[question_type], KEEP[question_type]
  index = bisect.bisect_right(edges, answer) - 1
  return keep[index] if 0 <= index < len(keep) and math.isfinite(answer) else 0.0
