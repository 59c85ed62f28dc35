"""Task -> what a good policy would say: the truth of the scene written as a drawing conversation.

turn 1   think "I mark the chair and the table."      boxes around them   (sometimes left out)
turn 2   think "chair -0.4 2.0; table 1.1 3.2: table 1.5 1.2."   answer
"""

import dataclasses
import math

import numpy as np

from spatial_jax.types import ObjectBox, Operation, Task

_MOST_PLACES = 5  # an object and the four options around it
_MOST_STEPS = 3  # of so many places the steps between them are said too


@dataclasses.dataclass(frozen=True)
class DemonstrationConfig:
  """How often and how much a demonstration draws.

  Attributes:
    draw_share: share of demonstrations with a drawing turn, in [0, 1], where boxes are known.
    max_boxes: a question about more boxes than this is answered without drawing.
  """

  draw_share: float
  max_boxes: int


@dataclasses.dataclass(frozen=True)
class ScriptTurn:
  """One demonstrated turn: either operations (pixels of the image) or an answer."""

  think: str
  operations: tuple[Operation, ...]
  answer: str | None


def demonstrate(
  task: Task, rng: np.random.Generator, cfg: DemonstrationConfig
) -> tuple[ScriptTurn, ...]:
  """A correct conversation for the task, drawn from `rng`: at most one drawing turn, the answer."""
  answer = ScriptTurn(_thought(task), (), task.answer)
  drawable = 0 < len(task.boxes) <= cfg.max_boxes
  if not drawable or rng.random() >= cfg.draw_share:
    return (answer,)
  operations = tuple(
    Operation("box", box.image + 1, box.box_4, label)
    for box, label in zip(task.boxes, _labels(task.boxes), strict=True)
  )
  named = list(dict.fromkeys(box.label for box in task.boxes))
  return (ScriptTurn(f"I mark the {' and the '.join(named)}.", operations, None), answer)


def _labels(boxes: tuple[ObjectBox, ...]) -> list[str]:
  """Labels that differ within one image, so that no box replaces another: "chair", "chair 2"."""
  seen: dict[tuple[int, str], int] = {}
  labels = []
  for box in boxes:
    count = seen[box.image, box.label] = seen.get((box.image, box.label), 0) + 1
    labels.append(box.label if count == 1 else f"{box.label} {count}")
  return labels


def _thought(task: Task) -> str:
  """What leads to the answer: "chair 2.1 m." of one object, places of several, a choice in words.

  A place is how far right and how far ahead of the camera, in metres, in the picture that the
  object is nearest in. Of few places the steps from the first to the others follow, differences
  of what was said, and the choice in words:

      bed -0.4 2.0; bin 1.1 3.2; tv 0.2 1.0: bin 1.5 1.2; tv 0.6 -1.0: left.

  Empty where nothing is known.
  """
  nearest: dict[str, ObjectBox] = {}
  for box in task.boxes:
    known = nearest.get(box.label)
    if not math.isnan(box.distance_m) and (known is None or box.distance_m < known.distance_m):
      nearest[box.label] = box
  if not 0 < len(nearest) <= _MOST_PLACES:
    return ""
  if len(nearest) == 1:
    return "".join(f"{label} {box.distance_m:.1f} m." for label, box in nearest.items())
  if any(math.isnan(value) for box in nearest.values() for value in box.place_m):
    return ""
  place_2 = {label: np.round(box.place_m, 1) for label, box in nearest.items()}
  parts = ["; ".join(_said(label, at) for label, at in place_2.items())]
  if len(place_2) <= _MOST_STEPS:
    (_, start), *others = place_2.items()
    parts.append("; ".join(_said(label, at - start) for label, at in others))
  parts += [text for letter, text in map(_lettered, task.options or ()) if letter == task.answer]
  return ": ".join(parts) + "."


def _said(label: str, metres_2: np.ndarray) -> str:
  right, ahead = (round(float(value), 1) + 0.0 for value in metres_2)  # never "-0.0"
  return f"{label} {right:.1f} {ahead:.1f}"


def _lettered(option: str) -> tuple[str, str]:
  """ "A. chair" -> ("A", "chair")."""
  letter, _, text = option.partition(". ")
  return letter, text
