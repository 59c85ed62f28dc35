"""Images to trace: grid mazes and tangled lines, with their true paths.

    maze_exit       "Which exit does the path from S reach?"       A, B or C     (choice)
    maze_moves      "Give the moves from S to the exit."           right down    (words)
    tangled_lines   "Which letter does line 2 reach?"              A, B, ...     (choice)

A maze is a forest: each exit has its own tree of cells, so that exactly one path leads from S to an
exit. `extra` has the path in pixels, for the solver.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spatial_jax.config import check_field, check_whole
from spatial_jax.types import ImageRef, Task

MazeType = Literal["maze_exit", "maze_moves", "tangled_lines"]
_STEPS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
_LETTERS = "ABC"
_LINES = ("A", "B", "C", "D")
_MARGIN = 0.14  # of the side: around the maze, for the exits
_SHIFT = 0.35  # of a crossing along the lines, in distances between them
_CURVE_POINTS = 64  # of a drawn line
_TRIES = 64  # mazes, of which the one with the best length of its path is taken
_STREAM = 11  # of random numbers
Cell = tuple[int, int]  # row, column


@dataclasses.dataclass(frozen=True)
class MazeConfig:
  """Mazes and tangled lines."""

  types: tuple[MazeType, ...]
  size_px: int  # side of the image
  cells: int  # of a maze along one side
  path_cells: tuple[int, int]  # fewest and most steps of the path, if a maze has such a path
  lines: int  # of tangled lines, 2 to 4
  crossings: int  # places where two neighbours may cross

  def __post_init__(self):
    check_field(self, "types", bool(self.types), "name at least one type")
    check_whole(self, "size_px", at_least=112, at_most=4096)
    check_whole(self, "cells", at_least=2, at_most=8)  # letters are as large as such a cell
    check_whole(self, "lines", at_least=2, at_most=len(_LINES))
    check_whole(self, "crossings", at_least=1, at_most=16)
    low, high = self.path_cells
    check_field(self, "path_cells", 1 <= low <= high, "be two whole numbers, the smaller first")


@dataclasses.dataclass(frozen=True)
class Maze:
  """One maze."""

  cells: int
  parent: dict[Cell, Cell]  # of each cell in its tree; the root is the cell at its exit
  roots: tuple[Cell, ...]  # the cells at the exits A, B, C
  sides: tuple[str, ...]  # of the exits: the move that leaves the maze
  start: Cell

  @property
  def path(self) -> tuple[Cell, ...]:
    """The cells from the start to its exit."""
    path = [self.start]
    while path[-1] in self.parent:
      path.append(self.parent[path[-1]])
    return tuple(path)

  @property
  def exit(self) -> int:
    """Index of the exit that the start reaches."""
    return self.roots.index(self.path[-1])


def maze_tasks(cfg: MazeConfig) -> Callable[[int], list[Task]]:
  """A function from a number to the tasks of one image of each type."""

  def tasks_of(number: int) -> list[Task]:
    rng = np.random.default_rng((number, _STREAM))
    return [_MAKERS[name](name, number, rng, cfg) for name in cfg.types]

  return tasks_of


def make_maze(rng: np.random.Generator, cells: int, exits: int) -> Maze:
  """Grows one tree from each exit until all cells belong to one; the start is another cell."""
  border = [(r, c) for r in range(cells) for c in range(cells) if {r, c} & {0, cells - 1}]
  roots = [border[i] for i in rng.permutation(len(border))[:exits]]
  owner = {root: i for i, root in enumerate(roots)}
  parent: dict[Cell, Cell] = {}
  frontier = list(roots)
  while len(owner) < cells * cells:
    # The newest cell as a rule, so that corridors are long; sometimes an older one.
    cell = frontier[-1 if rng.random() < 0.8 else int(rng.integers(len(frontier)))]
    free = [
      (cell[0] + dr, cell[1] + dc)
      for dr, dc in _STEPS.values()
      if 0 <= cell[0] + dr < cells
      and 0 <= cell[1] + dc < cells
      and (cell[0] + dr, cell[1] + dc) not in owner
    ]
    if not free:
      frontier.remove(cell)
      continue
    child = free[int(rng.integers(len(free)))]
    owner[child], parent[child] = owner[cell], cell
    frontier.append(child)
  children = [cell for cell in owner if cell in parent] or list(owner)
  start = children[int(rng.integers(len(children)))]
  # The last root has the largest tree; without a new order its letter would be the usual answer.
  named = tuple(roots[i] for i in rng.permutation(exits))
  return Maze(cells, parent, named, tuple(_side(root, cells) for root in named), start)


def _fitting_maze(rng: np.random.Generator, cfg: MazeConfig, exits: int) -> Maze:
  """The first maze with a path of the right length, or the nearest of `_TRIES`."""
  low, high = cfg.path_cells

  def misfit(maze: Maze) -> int:
    steps = len(maze.path) - 1
    return max(low - steps, steps - high, 0)

  best = make_maze(rng, cfg.cells, exits)
  for _ in range(_TRIES):
    if not misfit(best):
      break
    best = min(best, make_maze(rng, cfg.cells, exits), key=misfit)
  return best


def _side(cell: Cell, cells: int) -> str:
  """The move from a border cell out of the maze."""
  if cell[1] == cells - 1:
    return "right"
  if cell[1] == 0:
    return "left"
  return "down" if cell[0] == cells - 1 else "up"


def moves(path: tuple[Cell, ...]) -> tuple[str, ...]:
  """The moves along a path of cells."""
  names = {step: name for name, step in _STEPS.items()}
  return tuple(names[(b[0] - a[0], b[1] - a[1])] for a, b in itertools.pairwise(path))


def _maze_task(name: str, number: int, rng: np.random.Generator, cfg: MazeConfig) -> Task:
  exits = len(_LETTERS) if name == "maze_exit" else 1
  maze = _fitting_maze(rng, cfg, exits)
  cell_px = (1 - 2 * _MARGIN) * cfg.size_px / cfg.cells
  origin = _MARGIN * cfg.size_px

  def center(cell: Cell) -> tuple[float, float]:
    return origin + (cell[1] + 0.5) * cell_px, origin + (cell[0] + 0.5) * cell_px

  image = draw_maze(maze, cfg.size_px)
  points = [center(cell) for cell in maze.path]
  common = {"path": _corners(points)}
  if name == "maze_exit":
    return _task(
      name,
      number,
      "Which exit does the path from S reach?",
      tuple(f"{letter}. {letter}" for letter in _LETTERS),
      _LETTERS[maze.exit],
      "choice",
      image,
      common,
    )
  answer = " ".join(moves(maze.path)) or "none"
  question = "Give the moves from S to the exit: right, left, up or down, one word per cell."
  return _task(name, number, question, None, answer, "words", image, common)


def draw_maze(maze: Maze, size_px: int) -> np.ndarray:
  """uint8 [size_px, size_px, 3]: walls in black, S in red, the letters of the exits outside."""
  image = Image.new("RGB", (size_px, size_px), "white")
  pen = ImageDraw.Draw(image)
  origin, cell = _MARGIN * size_px, (1 - 2 * _MARGIN) * size_px / maze.cells
  width = max(1, size_px // 84)
  font = ImageFont.load_default(max(10, int(0.09 * size_px)))
  open_sides = {*maze.parent.items(), *((b, a) for a, b in maze.parent.items())}
  leaving = dict(zip(maze.roots, maze.sides, strict=True))
  for r in range(maze.cells):
    for c in range(maze.cells):
      x, y = origin + c * cell, origin + r * cell
      walls = {
        "up": (x, y, x + cell, y),
        "down": (x, y + cell, x + cell, y + cell),
        "left": (x, y, x, y + cell),
        "right": (x + cell, y, x + cell, y + cell),
      }
      for name, wall in walls.items():
        dr, dc = _STEPS[name]
        if ((r, c), (r + dr, c + dc)) in open_sides or leaving.get((r, c)) == name:
          continue
        pen.line(wall, fill="black", width=width)
  for letter, root, side in zip(_LETTERS, maze.roots, maze.sides, strict=False):
    dr, dc = _STEPS[side]
    x = origin + (root[1] + 0.5 + 0.85 * dc) * cell
    y = origin + (root[0] + 0.5 + 0.85 * dr) * cell
    pen.text((x, y), letter, fill="blue", font=font, anchor="mm")
  x, y = origin + (maze.start[1] + 0.5) * cell, origin + (maze.start[0] + 0.5) * cell
  pen.text((x, y), "S", fill="red", font=font, anchor="mm")
  return np.asarray(image)


def _lines_task(name: str, number: int, rng: np.random.Generator, cfg: MazeConfig) -> Task:
  count, stops = cfg.lines, cfg.crossings + 2
  orders = [np.arange(count)]
  for _ in range(stops - 1):
    order = orders[-1].copy()
    i = int(rng.integers(count))
    if i < count - 1:  # else no lines cross here
      order[[i, i + 1]] = order[[i + 1, i]]
    orders.append(order)
  size = cfg.size_px
  shift_K = rng.uniform(-_SHIFT, _SHIFT, stops)
  shift_K[[0, -1]] = 0
  x_K = np.linspace(0.14, 0.86, stops) * size + shift_K * 0.72 * size / (stops - 1)
  slot = [0.15 + 0.7 * i / max(count - 1, 1) for i in range(count)]
  paths = []
  for line in range(count):
    y_K = np.array([slot[int(np.argmax(order == line))] for order in orders]) * size
    paths.append(list(zip(x_K.tolist(), y_K.tolist(), strict=True)))
  image = draw_lines(paths, size)
  asked = int(rng.integers(count))
  end = int(np.argmax(orders[-1] == asked))
  letters = _LINES[:count]
  return _task(
    name,
    number,
    f"Which letter does line {asked + 1} reach?",
    tuple(f"{letter}. {letter}" for letter in letters),
    letters[end],
    "choice",
    image,
    {"path": [[float(x), float(y)] for x, y in paths[asked]]},
  )


def draw_lines(paths: list[list[tuple[float, float]]], size_px: int) -> np.ndarray:
  """uint8 [size_px, size_px, 3]: smooth lines from numbers on the left to letters on the right."""
  image = Image.new("RGB", (size_px, size_px), "white")
  pen = ImageDraw.Draw(image)
  font = ImageFont.load_default(max(10, int(0.08 * size_px)))
  for path in paths:
    pen.line(_smooth(path), fill="black", width=max(1, size_px // 84))
  for number, path in enumerate(sorted(paths, key=lambda p: p[0][1]), 1):
    x, y = path[0]
    pen.text((x - 0.07 * size_px, y), str(number), fill="red", font=font, anchor="mm")
  for letter, path in zip(_LINES, sorted(paths, key=lambda p: p[-1][1]), strict=False):
    x, y = path[-1]
    pen.text((x + 0.07 * size_px, y), letter, fill="blue", font=font, anchor="mm")
  return np.asarray(image)


def _smooth(path: list[tuple[float, float]]) -> list[tuple[float, float]]:
  """Points of a curve through a path, level at each point."""
  points = []
  for (x1, y1), (x2, y2) in itertools.pairwise(path):
    for u in np.linspace(0, 1, _CURVE_POINTS // len(path) + 2):
      points.append((x1 + (x2 - x1) * u, y1 + (y2 - y1) * u * u * (3 - 2 * u)))
  return points


def _corners(points: list[tuple[float, float]]) -> list[list[float]]:
  """A path of points without those in the middle of a straight part."""
  kept = points[:1]
  for before, here, after in zip(points, points[1:], points[2:], strict=False):
    one = (here[0] - before[0], here[1] - before[1])
    other = (after[0] - here[0], after[1] - here[1])
    if abs(one[0] * other[1] - one[1] * other[0]) > 1e-6:
      kept.append(here)
  if len(points) > 1:
    kept.append(points[-1])
  return [[float(x), float(y)] for x, y in kept]


def _task(
  name: str,
  number: int,
  question: str,
  options: tuple[str, ...] | None,
  answer: str,
  kind: Literal["choice", "words"],
  image: np.ndarray,
  extra: dict,
) -> Task:
  scene = f"image-{number}"
  return Task(
    task_id=f"{scene}/{name}",
    question_type=name,
    question=question,
    options=options,
    answer=answer,
    answer_kind=kind,
    unit=None,
    media=(ImageRef(image),),
    source="mazes",
    scene_id=scene,
    benchmark=None,
    boxes=(),
    extra=extra,
  )


_MAKERS = {"maze_exit": _maze_task, "maze_moves": _maze_task, "tangled_lines": _lines_task}
