"""Reflection: a rollout that draws the same label again, and elsewhere.

turn 1   box "chair" at (10, 20, 60, 90)
turn 3   box "chair" at (12, 24, 80, 96)      reflective
"""

from collections.abc import Sequence

from spatial_jax.types import Operation, Turn


def reflections(turns: Sequence[Turn]) -> int:
  """Returns the number of operations that revise one of an earlier turn.

  An operation revises an earlier one if both have the same label, they belong to different turns,
  and they differ (in tool, image or coordinates).

  Source: ViLaSR (arXiv:2506.09965, Eq. 5).
  """
  earlier: dict[str, set[Operation]] = {}
  count = 0
  for turn in turns:
    for operation in turn.operations:
      others = earlier.get(operation.label, set())
      count += any(operation != other for other in others)
    for operation in turn.operations:
      earlier.setdefault(operation.label, set()).add(operation)
  return count


def is_reflective(turns: Sequence[Turn]) -> bool:
  """Returns whether the turns have at least one reflection."""
  return reflections(turns) > 0
