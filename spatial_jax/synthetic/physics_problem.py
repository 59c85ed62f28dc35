"""A problem of physics: its numbers, its diagram and its solution.

Coordinates of shapes are fractions of the image, the origin at the top left.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np


class Shape(NamedTuple):
  """One part of a diagram."""

  kind: Literal["line", "box", "disc", "arrow", "text"]
  points: tuple[float, ...]  # x1, y1, x2, y2, ...; of a text its centre
  color: str = "black"
  text: str = ""


@dataclasses.dataclass(frozen=True)
class Problem:
  """One problem with its numbers."""

  name: str  # of the template
  category: str
  subfield: str
  principle: str
  scene: str  # what the diagram shows, without numbers
  given: tuple[tuple[str, str], ...]  # name and value with unit
  question: str
  value: float  # the answer
  unit: str
  solution: str  # the principle, the equation and the numbers, in one or two sentences
  shapes: tuple[Shape, ...]


Template = Callable[[np.random.Generator], Problem]


def text(x: float, y: float, text: str) -> Shape:
  """A label with its centre."""
  return Shape("text", (x, y), "blue", text)


def line(*points: float) -> Shape:
  """A line through points x1, y1, x2, y2, ..."""
  return Shape("line", points)


def pick(rng: np.random.Generator, *values: float) -> float:
  """One of the values."""
  return float(values[int(rng.integers(len(values)))])


def curve(x1: float, x2: float, y: float, height: float, periods: float, count: int) -> Shape:
  """A sine around the height `y`, from `x1` to `x2`."""
  points: list[float] = []
  for u in np.linspace(0, 1, count):
    points += [x1 + (x2 - x1) * float(u), y - height * math.sin(2 * math.pi * periods * float(u))]
  return Shape("line", tuple(points))
