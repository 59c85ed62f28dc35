"""Decides when a rollout ends: a pure function of its turns so far.

Source: ViLaSR, arXiv:2506.09965, early termination. The paper ends a rollout that neither draws nor
answers, that has too many images, or that repeats an operation; in its released code the last rule
is commented out.
"""

import dataclasses
import typing
from collections.abc import Collection, Sequence
from typing import Literal

from spatial_jax.config import check_number, check_whole
from spatial_jax.drawing.canvas import targets
from spatial_jax.drawing.parser import Parsed
from spatial_jax.types import Operation

EndReason = Literal[
  "answer", "token_limit", "no_action", "repeated_operation", "too_many_images", "turn_limit"
]

END_REASONS: tuple[EndReason, ...] = typing.get_args(EndReason)


@dataclasses.dataclass(frozen=True)
class StopLimits:
  """Limits of one rollout."""

  max_turns: int  # of the policy, at least 1
  max_images: int  # prompt images included, at least 0 (ViLaSR: 42)
  max_image_tokens: int  # of all these images, at least 0; a drawing beyond it is not appended
  max_response_tokens: int  # after the prompt, observations included, at least 1
  # An operation repeats one of an earlier turn if tool and image are the same and every coordinate
  # differs by at most this number of pixels; 0: only if it is identical, label included.
  near_duplicate_px: float

  def __post_init__(self):
    check_whole(self, "max_turns", "max_response_tokens", at_least=1)
    check_whole(self, "max_images", "max_image_tokens", at_least=0)
    check_number(self, "near_duplicate_px", at_least=0)


def end_reason(
  turns: Sequence[Parsed], images: int, tokens: int, truncated: bool, limits: StopLimits
) -> EndReason | None:
  """Returns why the rollout ends after its last turn, or None if it draws and continues.

  The first rule that applies, from top to bottom:

      answer              the turn has an answer after its reasoning
      token_limit         the turn was cut off, or the rollout has no tokens left
      no_action           the turn has no operation that can be drawn
      repeated_operation  an operation equals one of an earlier turn, or is near it
      too_many_images     the drawings would exceed the number of images
      turn_limit          it was the last permitted turn

  Args:
    turns: all turns so far, at least one.
    images: number of images before the last turn is drawn.
    tokens: number of tokens after the prompt so far.
    truncated: the last turn ended at its token limit, not with its end token.
    limits: counts.
  """
  last = turns[-1]
  earlier = {operation for turn in turns[:-1] for operation in turn.operations}
  if last.has_answer:
    return "answer"
  if truncated or tokens >= limits.max_response_tokens:
    return "token_limit"
  if not last.operations:
    return "no_action"
  if earlier.intersection(last.operations) or _is_near(
    earlier, last.operations, limits.near_duplicate_px
  ):
    return "repeated_operation"
  if images + len(targets(last.operations)) > limits.max_images:
    return "too_many_images"
  if len(turns) >= limits.max_turns:
    return "turn_limit"
  return None


def _is_near(
  earlier: Collection[Operation], operations: Sequence[Operation], distance_px: float
) -> bool:
  """Whether an operation is a near duplicate of an earlier one."""
  if not distance_px:
    return False
  return any(
    one.tool == other.tool
    and one.image == other.image
    and all(abs(a - b) <= distance_px for a, b in zip(one.points_4, other.points_4, strict=True))
    for one in operations
    for other in earlier
  )
