"""When to stop a rollout: a pure function of what was said so far.

Source: ViLaSR, arXiv:2506.09965, early termination. The paper ends a rollout that neither
draws nor answers, that gathers too many images, or that repeats an operation; its released code has
the last one commented out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from spatial_jax.drawing.canvas import targets
from spatial_jax.drawing.parser import Parsed

EndReason = Literal[
  "answer", "token_limit", "no_action", "repeated_operation", "too_many_images", "turn_limit"
]


@dataclasses.dataclass(frozen=True)
class StopLimits:
  """How long one rollout may go on.

  Attributes:
    max_turns: turns of the policy.
    max_images: images in all, those of the prompt included (ViLaSR: 42).
    max_image_tokens: visual tokens of all of them; a drawing that would be more is not shown.
    max_response_tokens: tokens behind the prompt, observations included.
  """

  max_turns: int
  max_images: int
  max_image_tokens: int
  max_response_tokens: int


def end_reason(
  turns: Sequence[Parsed], images: int, tokens: int, truncated: bool, limits: StopLimits
) -> EndReason | None:
  """Why the rollout ends with its last turn, or None when its drawing is to be made and shown.

  The first that holds, from top to bottom:

      answer              the turn holds answer tags
      token_limit         the turn was cut off, or the budget is spent
      no_action           nothing in it can be drawn
      repeated_operation  an operation equals one of an earlier turn
      too_many_images     its drawings would be more images than allowed
      turn_limit          it was the last permitted turn

  Args:
    turns: all turns so far, at least one.
    images: number of images before the last turn is drawn.
    max_response_tokens: tokens behind the prompt so far.
    truncated: the last turn ended at its own token limit, not by its end token.
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
  if earlier.intersection(last.operations):
    return "repeated_operation"
  if images + len(targets(last.operations)) > limits.max_images:
    return "too_many_images"
  if len(turns) >= limits.max_turns:
    return "turn_limit"
  return None
