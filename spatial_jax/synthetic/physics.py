"""Problems of physics with a diagram, in the row format of PhyX.

    template ─► numbers ─► Problem ─► diagram + text at one of three levels ─► Task

Six domains with three templates each. A "Spatial Relation" problem has its numbers in the diagram
alone. A "Multi-Formula" problem states them in the text too; only text level "full" does so.
`extra` has category, subfield, reasoning_type, principle, text level, and the solution for the
solver.

Source: the row format is that of PhyX (arXiv:2505.15929); the problems are ours.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spatial_jax.config import check_field, check_number, check_whole
from spatial_jax.synthetic.physics_fields import FIELDS
from spatial_jax.synthetic.physics_matter import MATTER
from spatial_jax.synthetic.physics_problem import Problem
from spatial_jax.types import ImageRef, Task

TextLevel = Literal["full", "de_redundant", "minimal"]
TEMPLATES = MATTER | FIELDS
CATEGORIES = tuple(TEMPLATES)
_STREAM = 12  # of random numbers
_OPTIONS = 4
_BELOW, _ABOVE = (0.4, 0.5, 0.66), (1.5, 2.0, 2.5)  # factors of wrong options


@dataclasses.dataclass(frozen=True)
class PhysicsConfig:
  """Problems of physics."""

  categories: tuple[str, ...]  # of `CATEGORIES`; (): all
  text_levels: tuple[TextLevel, ...]  # each problem draws one
  choice_fraction: float  # of the problems with four options, in [0, 1]
  # Of the problems of text level "full": those with numbers in the diagram alone, in [0, 1]. At the
  # other levels all are such.
  spatial_fraction: float
  size_px: int  # side of the image

  def __post_init__(self):
    unknown = [name for name in self.categories if name not in CATEGORIES]
    check_field(self, "categories", not unknown, f"be of {', '.join(CATEGORIES)}")
    valid = bool(self.text_levels) and set(self.text_levels) <= {"full", "de_redundant", "minimal"}
    check_field(self, "text_levels", valid, "be of full, de_redundant, minimal")
    check_number(self, "choice_fraction", "spatial_fraction", at_least=0, at_most=1)
    check_whole(self, "size_px", at_least=140, at_most=4096)


def physics_tasks(cfg: PhysicsConfig) -> Callable[[int], list[Task]]:
  """A function from a number to one problem of a random template."""
  names = cfg.categories or CATEGORIES
  templates = [template for name in CATEGORIES if name in names for template in TEMPLATES[name]]

  def tasks_of(number: int) -> list[Task]:
    rng = np.random.default_rng((number, _STREAM))
    template = templates[int(rng.integers(len(templates)))]
    return [problem_task(template(rng), number, rng, cfg)]

  return tasks_of


def problem_task(
  problem: Problem, number: int, rng: np.random.Generator, cfg: PhysicsConfig
) -> Task:
  """One problem as a task."""
  is_spatial = rng.random() < cfg.spatial_fraction
  is_choice = rng.random() < cfg.choice_fraction
  level = cfg.text_levels[int(rng.integers(len(cfg.text_levels)))]
  in_text = level == "full" and not is_spatial
  truth = number_text(problem.value)
  options, answer = _options(problem, truth, rng) if is_choice else (None, truth)
  scene = f"problem-{number}"
  return Task(
    task_id=f"{scene}/{problem.name}",
    question_type=problem.category,
    question=problem_text(problem, level, in_text),
    options=options,
    answer=answer,
    answer_kind="choice" if is_choice else "number",
    unit=None if is_choice else problem.unit,
    media=(ImageRef(draw_diagram(problem, cfg.size_px)),),
    source="physics",
    scene_id=scene,
    benchmark=None,
    boxes=(),
    extra={
      "category": problem.category,
      "subfield": problem.subfield,
      "reasoning_type": ["Multi-Formula" if in_text else "Spatial Relation"],
      "principle": problem.principle,
      "text_level": level,
      "template": problem.name,
      "key": f"{truth} {problem.unit}",
      "solution": problem.solution,
    },
  )


def problem_text(problem: Problem, level: TextLevel, in_text: bool) -> str:
  """The text of a problem: description and question; minimal: the question alone.

  With `in_text` it also has all numbers; else they are in the diagram alone.
  """
  if level == "minimal":
    return problem.question
  if not in_text:
    return f"{problem.scene} {problem.question}"
  given = ", ".join(f"{name} = {value}" for name, value in problem.given)
  return f"{problem.scene} Given: {given}. {problem.question}"


def number_text(value: float) -> str:
  """A number with three significant digits, without an exponent."""
  if value == 0:
    return "0"
  digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
  return f"{value:.{digits}f}"


def _options(problem: Problem, truth: str, rng: np.random.Generator) -> tuple[tuple[str, ...], str]:
  """Four different options, and the letter of the right one; it is equally often of each rank."""
  below = int(rng.integers(_OPTIONS))
  factors = [*rng.permutation(_BELOW)[:below], *rng.permutation(_ABOVE)[: _OPTIONS - 1 - below]]
  texts = [truth, *(number_text(problem.value * factor) for factor in factors)]
  order = rng.permutation(_OPTIONS)
  lines = tuple(f"{'ABCD'[k]}. {texts[i]} {problem.unit}" for k, i in enumerate(order))
  return lines, "ABCD"[int(np.argmax(order == 0))]


def draw_diagram(problem: Problem, size_px: int) -> np.ndarray:
  """uint8 [size_px, size_px, 3]: the shapes of a problem, and its numbers as labels."""
  image = Image.new("RGB", (size_px, size_px), "white")
  pen = ImageDraw.Draw(image)
  width = max(1, size_px // 84)
  font = ImageFont.load_default(max(9, int(0.062 * size_px)))

  def scaled(points: Sequence[float]) -> list[float]:
    return [size_px * value for value in points]

  for shape in problem.shapes:
    points = scaled(shape.points)
    match shape.kind:
      case "line":
        pen.line(points, fill=shape.color, width=width)
      case "box":
        pen.rectangle(points, outline=shape.color, width=width)
      case "disc":
        pen.ellipse(points, outline=shape.color, width=width)
      case "arrow":
        _arrow(pen, points, shape.color, width, size_px)
      case "text":
        pen.text((points[0], points[1]), shape.text, fill=shape.color, font=font, anchor="mm")
  return np.asarray(image)


def _arrow(
  pen: ImageDraw.ImageDraw, points: list[float], color: str, width: int, size_px: int
) -> None:
  """A line with a head at its end."""
  pen.line(points, fill=color, width=width)
  tail, head = np.array(points[:2]), np.array(points[2:])
  along = (head - tail) / max(float(np.linalg.norm(head - tail)), 1e-6)
  across, length = np.array([-along[1], along[0]]), 0.045 * size_px
  for sign in (1, -1):
    side = head - length * along + sign * 0.5 * length * across
    pen.line([*head.tolist(), *side.tolist()], fill=color, width=width)
