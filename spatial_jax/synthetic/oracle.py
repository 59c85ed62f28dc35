"""Task -> a correct drawing conversation, written from the truth of the scene.

turn 1   think "I mark the chair and the table."      boxes around them   (in some demonstrations)
turn 2   think "chair -0.4 2.0; table 1.1 3.2: table 1.5 1.2."   answer
"""

import dataclasses
import math

import numpy as np

from spatial_jax.config import check_field
from spatial_jax.types import ObjectBox, Operation, ScriptTurn, Task

_MAX_PLACES = 5  # an object and the four options around it
_MAX_PLACES_WITH_STEPS = 3  # the steps between the places are written for this number or fewer


@dataclasses.dataclass(frozen=True)
class DemonstrationConfig:
  """Drawings in demonstrations.

  Attributes:
    draw_fraction: fraction of the demonstrations with a drawing turn, in [0, 1].
    max_boxes: a demonstration with more boxes than this has no drawing turn, >= 0.
  """

  draw_fraction: float
  max_boxes: int

  def __post_init__(self):
    check_field(self, "draw_fraction", 0 <= self.draw_fraction <= 1, "be at least 0 and at most 1")
    check_field(self, "max_boxes", self.max_boxes >= 0, "be at least 0")


def demonstrate(
  task: Task, rng: np.random.Generator, cfg: DemonstrationConfig
) -> tuple[ScriptTurn, ...]:
  """A correct conversation for the task: at most one drawing turn, then the answer."""
  answer = ScriptTurn(_reasoning(task), (), task.answer)
  drawable = 0 < len(task.boxes) <= cfg.max_boxes
  if not drawable or rng.random() >= cfg.draw_fraction:
    return (answer,)
  operations = tuple(
    Operation("box", box.image + 1, box.box_4, label)
    for box, label in zip(task.boxes, _unique_labels(task.boxes), strict=True)
  )
  names = list(dict.fromkeys(box.label for box in task.boxes))
  return (ScriptTurn(f"I mark the {' and the '.join(names)}.", operations, None), answer)


def _unique_labels(boxes: tuple[ObjectBox, ...]) -> list[str]:
  """Labels that differ within one image, so that no box replaces another: "chair", "chair 2"."""
  counts: dict[tuple[int, str], int] = {}
  labels = []
  for box in boxes:
    count = counts[box.image, box.label] = counts.get((box.image, box.label), 0) + 1
    labels.append(box.label if count == 1 else f"{box.label} {count}")
  return labels


def _reasoning(task: Task) -> str:
  """The reasoning before the answer, written with the measured distances and places.

  One object: its distance, "chair 2.1 m." Several objects: the place of each, in metres to the
  right of and ahead of the camera, in the image with the smallest distance to the object. Up to
  three places are followed by the steps from the first to the others (differences of the written
  numbers). A choice is followed by the text of the right option:

      bed -0.4 2.0; bin 1.1 3.2; tv 0.2 1.0: bin 1.5 1.2; tv 0.6 -1.0: left.

  Empty if distances or places are unknown, or if there are more than five places.
  """
  nearest: dict[str, ObjectBox] = {}
  for box in task.boxes:
    best = nearest.get(box.label)
    if not math.isnan(box.distance_m) and (best is None or box.distance_m < best.distance_m):
      nearest[box.label] = box
  if not 0 < len(nearest) <= _MAX_PLACES:
    return ""
  if len(nearest) == 1:
    return "".join(f"{label} {box.distance_m:.1f} m." for label, box in nearest.items())
  if any(math.isnan(value) for box in nearest.values() for value in box.place_m):
    return ""
  place_2 = {label: np.round(box.place_m, 1) for label, box in nearest.items()}
  parts = ["; ".join(_place_text(label, at) for label, at in place_2.items())]
  if len(place_2) <= _MAX_PLACES_WITH_STEPS:
    (_, start), *others = place_2.items()
    parts.append("; ".join(_place_text(label, at - start) for label, at in others))
  options = map(_split_option, task.options or ())
  parts += [text for letter, text in options if letter == task.answer]
  return ": ".join(parts) + "."


def _place_text(label: str, metres_2: np.ndarray) -> str:
  right, ahead = (round(float(value), 1) + 0.0 for value in metres_2)  # never "-0.0"
  return f"{label} {right:.1f} {ahead:.1f}"


def _split_option(option: str) -> tuple[str, str]:
  """ "A. chair" -> ("A", "chair")."""
  letter, _, text = option.partition(". ")
  return letter, text
