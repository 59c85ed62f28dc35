"""Task -> a response that draws and reasons, written from the truth: cold-start data.

    rooms     boxes around the objects, one of them wrong; the box again; the answer
    mazes     each turn draws the next part of the path on the image of the turn before
    physics   the principle, the equation and the numbers, then the answer

The same task always has the same response.
"""

import dataclasses
import itertools
import zlib

import numpy as np

from spatial_jax.config import check_number, check_whole
from spatial_jax.synthetic.oracle import DemonstrationConfig, demonstrate
from spatial_jax.types import ImageRef, Operation, ScriptTurn, Task

_SOLVER_STREAM = 13  # of random numbers
_SHIFT = (0.35, 0.8)  # of a wrong box, in its own width or height
_MOVES = 4  # moves of a box, of which the best is taken
_MOST_SHARED = 0.5  # part of the right box that a wrong one may cover
_SEGMENTS_PER_TURN = 2  # of a path

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class SolverConfig:
  """How the solver draws."""

  draw_fraction: float  # of the responses, in [0, 1]
  correct_fraction: float  # of those that draw boxes, how many correct a mistake, in [0, 1]
  max_boxes: int  # a response with more boxes does not draw

  def __post_init__(self):
    check_number(self, "draw_fraction", "correct_fraction", at_least=0, at_most=1)
    check_whole(self, "max_boxes", at_least=0)


@dataclasses.dataclass(frozen=True)
class Solver:
  """Writes the response of a synthetic task; a small record that worker processes receive."""

  cfg: SolverConfig

  def __call__(self, task: Task) -> tuple[ScriptTurn, ...]:
    """Returns the turns of a response: drawings, then the true answer."""
    rng = np.random.default_rng((zlib.crc32(task.task_id.encode()), _SOLVER_STREAM))
    if task.source == "physics":
      return (ScriptTurn(str(task.extra["solution"]), (), _physics_answer(task)),)
    if task.source == "mazes":
      return _trace(task, rng.random() < self.cfg.draw_fraction)
    plain = DemonstrationConfig(self.cfg.draw_fraction, self.cfg.max_boxes)
    script = demonstrate(task, rng, plain)
    corrects = len(script) > 1 and rng.random() < self.cfg.correct_fraction
    return _with_mistake(script, task, rng) if corrects else script


def _physics_answer(task: Task) -> str:
  return task.answer if task.answer_kind == "choice" else f"{task.answer} {task.unit}"


def _with_mistake(
  script: tuple[ScriptTurn, ...], task: Task, rng: np.random.Generator
) -> tuple[ScriptTurn, ...]:
  """The script with one box drawn beside its object first, and again at its place."""
  first, *rest = script
  number = int(rng.integers(len(first.operations)))
  right = first.operations[number]
  image = task.media[right.image - 1]
  assert isinstance(image, ImageRef)  # synthetic tasks have pixels
  assert isinstance(image.data, np.ndarray)
  height, width = image.data.shape[:2]
  wrong = dataclasses.replace(right, points_4=_moved(right.points_4, width, height, rng))
  operations = tuple(wrong if i == number else o for i, o in enumerate(first.operations))
  return (
    dataclasses.replace(first, operations=operations),
    ScriptTurn(f"I mark the {right.label}.", (right,), None),
    *rest,
  )


def _moved(box: Box, width: int, height: int, rng: np.random.Generator) -> Box:
  """A box of the same size beside its place, inside the image, that overlaps it little."""
  x1, y1, x2, y2 = box
  found = []
  for _ in range(_MOVES):
    dx, dy = (float(rng.choice([-1, 1]) * rng.uniform(*_SHIFT)) for _ in range(2))
    left = float(np.clip(x1 + dx * (x2 - x1), 0, max(width - 1 - (x2 - x1), 0)))
    top = float(np.clip(y1 + dy * (y2 - y1), 0, max(height - 1 - (y2 - y1), 0)))
    found.append((left, top, left + x2 - x1, top + y2 - y1))
  best = min(found, key=lambda moved: _shared(moved, box))
  if _shared(best, box) > _MOST_SHARED:  # the box fills most of the image
    return (x1, y1, (x1 + x2) / 2, (y1 + y2) / 2)
  return best


def _shared(one: Box, other: Box) -> float:
  """The part of a box that another of the same size covers, in [0, 1]."""
  wide = min(one[2], other[2]) - max(one[0], other[0])
  high = min(one[3], other[3]) - max(one[1], other[1])
  area = max((one[2] - one[0]) * (one[3] - one[1]), 1e-6)
  return max(wide, 0.0) * max(high, 0.0) / area


def _trace(task: Task, draws: bool) -> tuple[ScriptTurn, ...]:
  """Draws the path part by part, each on the image of the turn before, then answers."""
  points = task.extra["path"]
  segments = [
    Operation("line", 1, (float(x1), float(y1), float(x2), float(y2)), str(i + 1))
    for i, ((x1, y1), (x2, y2)) in enumerate(itertools.pairwise(points))
  ]
  answer = ScriptTurn("The path ends here.", (), task.answer)
  if not draws or not segments:
    return (answer,)
  turns = []
  for start in range(0, len(segments), _SEGMENTS_PER_TURN):
    image = 1 + start // _SEGMENTS_PER_TURN
    part = segments[start : start + _SEGMENTS_PER_TURN]
    operations = tuple(dataclasses.replace(o, image=image) for o in part)
    turns.append(ScriptTurn("I follow the path.", operations, None))
  return (*turns, answer)
