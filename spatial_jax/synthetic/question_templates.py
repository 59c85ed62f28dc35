"""Wordings and rules of the question types: visible objects -> questions with one right answer.

Each generator yields drafts in random order and computes them lazily. The rules are those of
VSI-Bench; camera_distance is our own type.

Source: VSI-Bench, arXiv:2412.14171; generation rules as in VLM-3R, arXiv:2505.20279.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from spatial_jax.synthetic import geometry
from spatial_jax.synthetic.scene import Scene, View
from spatial_jax.synthetic.visibility import VisibleObject

ABS_DISTANCE = (
  "Measuring from the closest point of each object, what is the direct distance between the {a} "
  "and the {b} (in meters)?"
)
SIZE = (
  "What is the length of the longest dimension (length, width, or height) of the {c}, measured in "
  "centimeters?"
)
CAMERA_DISTANCE = (
  "What is the distance from the camera to the closest point of the {c} (in meters)?"
)
COUNT_IN_ROOM = "How many {c}(s) are in this room?"
COUNT_IN_IMAGE = "How many {c}(s) are in this image?"
COUNT_IN_IMAGES = "How many {c}(s) are in these images?"
ROOM_SIZE = (
  "What is the size of this room (in square meters)? \nIf multiple rooms are shown, estimate the "
  "size of the combined space."
)
REL_DISTANCE = (
  "Measuring from the closest point of each object, which of these objects ({options}) is the "
  "closest to the {c}?"
)
REL_DISTANCE_MANY = (
  " If there are multiple instances of an object category, measure to the closest."
)
DIRECTION = "If I am standing by the {p} and facing the {o}, is the {q} to "
DIRECTION_END = {
  "easy": "the left or the right of the {o}?",
  "medium": "my left, right, or back?\nAn object is to my back if I would have to turn at least "
  "135 degrees in order to face it.",
  "hard": "my front-left, front-right, back-left, or back-right?\nThe directions refer to the "
  "quadrants of a Cartesian plane (if I am standing at the origin and facing along the positive "
  "y-axis).",
}
DIRECTION_NAMES = {
  "easy": ("left", "right"),
  "medium": ("left", "right", "back"),
  "hard": geometry.HARD_SECTORS,
}
ORDER = (
  "What will be the first-time appearance order of the following categories in the video: {list}?"
)

MIN_DISTANCE_M = 0.2  # no question about a shorter distance
MIN_GAP_M = 0.15  # between the distances of two options, and between the target and the nearest
DIRECTION_RANGE_M = (0.3, 5.0)  # distance of every pair among the three objects
MAX_CORNERS_OUTSIDE = 2  # corners of the queried box in another sector than its centre
MIN_SECONDS = 1  # two first appearances are further apart than this
_ROUNDS = 8  # attempts for every target, or for four categories


class Draft(NamedTuple):
  """A question before its options get letters.

  `wrong` holds the wrong options, empty if the answer is a number; `{options}` in the question
  stands for the options in the order of their letters; `objects` are indices into `scene.objects`.
  """

  question: str
  answer: str
  wrong: tuple[str, ...]
  objects: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Visibility:
  """The objects and categories that the views of a scene show.

  Attributes:
    visible: per view, the clearly visible objects.
    instances: the categories for questions, and their instances.
    first_view: the view that first shows a category; without the categories whose first view shows
      too few pixels.
    distances_m: cache of box distances, by pair of objects.
  """

  scene: Scene
  views: Sequence[View]
  visible: list[list[VisibleObject]]
  instances: dict[str, tuple[int, ...]]
  first_view: dict[str, int]
  distances_m: dict[tuple[int, int], float]

  @property
  def unique(self) -> dict[str, int]:
    """Categories with one instance, and that instance."""
    return {name: group[0] for name, group in self.instances.items() if len(group) == 1}

  def distance_m(self, a: int, b: int) -> float:
    """Distance between the boxes of two objects."""
    pair = (min(a, b), max(a, b))
    if pair not in self.distances_m:
      objects = self.scene.objects
      self.distances_m[pair] = geometry.box_distance_m(objects[pair[0]], objects[pair[1]])
    return self.distances_m[pair]

  def nearest_m(self, target: int, category: str) -> float:
    """Distance from one object to the closest instance of a category."""
    return min(self.distance_m(target, i) for i in self.instances[category])


def _shuffled(items: Iterable, rng: np.random.Generator) -> list:
  listed = list(items)
  return [listed[i] for i in rng.permutation(len(listed))]


def counting(visibility: Visibility, rng: np.random.Generator, wording: str) -> Iterator[Draft]:
  """Number of instances of a category that has more than one."""
  for category, group in _shuffled(visibility.instances.items(), rng):
    if len(group) > 1:
      yield Draft(wording.format(c=category), str(len(group)), (), group)


def abs_distance(visibility: Visibility, rng: np.random.Generator) -> Iterator[Draft]:
  """Distance between the only instances of two categories, 0.2 m or more."""
  for pair in _shuffled(itertools.combinations(visibility.unique.items(), 2), rng):
    (a, i), (b, j) = _shuffled(pair, rng)
    distance = visibility.distance_m(i, j)
    if distance >= MIN_DISTANCE_M:
      yield Draft(ABS_DISTANCE.format(a=a, b=b), f"{distance:.1f}", (), (i, j))


def size(visibility: Visibility, rng: np.random.Generator) -> Iterator[Draft]:
  """Longest dimension of the only instance of a category."""
  for category, i in _shuffled(visibility.unique.items(), rng):
    centimetres = geometry.longest_dimension_cm(visibility.scene.objects[i])
    yield Draft(SIZE.format(c=category), str(centimetres), (), (i,))


def room_size(visibility: Visibility) -> Iterator[Draft]:
  """Area of the room."""
  yield Draft(ROOM_SIZE, f"{visibility.scene.room_size_m2:.1f}", (), ())


def camera_distance(visibility: Visibility, rng: np.random.Generator) -> Iterator[Draft]:
  """Distance from the first camera to the only instance of a category, 0.2 m or more."""
  camera_13 = visibility.views[0].camera.position_3[None]
  for category, i in _shuffled(visibility.unique.items(), rng):
    distance = float(geometry.point_distance_m(camera_13, visibility.scene.objects[i])[0])
    if distance >= MIN_DISTANCE_M:
      yield Draft(CAMERA_DISTANCE.format(c=category), f"{distance:.1f}", (), (i,))


def rel_distance(visibility: Visibility, rng: np.random.Generator) -> Iterator[Draft]:
  """The closest of four categories to an object; any two distances differ by 0.15 m or more."""
  done = set()
  for _ in range(_ROUNDS):
    for category, target in _shuffled(visibility.unique.items(), rng):
      chosen: dict[str, float] = {}
      for other in _shuffled((c for c in visibility.instances if c != category), rng):
        distance = visibility.nearest_m(target, other)
        if all(abs(distance - d) >= MIN_GAP_M for d in (0.0, *chosen.values())):
          chosen[other] = distance
        if len(chosen) == 4:
          break
      key = (category, frozenset(chosen))
      if len(chosen) < 4 or key in done:
        continue
      done.add(key)
      answer, *wrong = sorted(chosen, key=chosen.__getitem__)
      objects = (target, *(i for name in chosen for i in visibility.instances[name]))
      many = REL_DISTANCE_MANY if len(objects) > 5 else ""
      yield Draft(REL_DISTANCE.replace("{c}", category) + many, answer, tuple(wrong), objects)


def direction(visibility: Visibility, rng: np.random.Generator, level: str) -> Iterator[Draft]:
  """Direction of a third object, standing by the first and facing the second."""
  nearest_m, farthest_m = DIRECTION_RANGE_M
  for triple in _shuffled(itertools.permutations(visibility.unique.items(), 3), rng):
    (p, standing), (o, facing), (q, queried) = triple
    pairs = itertools.combinations((standing, facing, queried), 2)
    if not all(nearest_m <= visibility.distance_m(i, j) <= farthest_m for i, j in pairs):
      continue
    answer = _sector(visibility.scene, standing, facing, queried, level)
    if answer in DIRECTION_NAMES[level]:
      question = (DIRECTION + DIRECTION_END[level]).format(p=p, o=o, q=q)
      wrong = tuple(name for name in DIRECTION_NAMES[level] if name != answer)
      yield Draft(question, answer, wrong, (standing, facing, queried))


def _sector(scene: Scene, standing: int, facing: int, queried: int, level: str) -> str:
  """The sector of the queried object, "" if its box or centre is too near another sector."""
  stand_3, face_3 = scene.objects[standing].centre_3, scene.objects[facing].centre_3
  box = scene.objects[queried]
  points_Z2 = np.concatenate([box.centre_3[None], box.corners_83()])[:, :2]
  centre, *corners = geometry.direction_deg(stand_3[:2], face_3[:2], points_Z2)
  name = geometry.sector(centre, level)
  outside = sum(geometry.sector(corner, level) != name for corner in corners)
  ambiguous = outside > MAX_CORNERS_OUTSIDE or geometry.near_boundary(centre, level)
  return "" if ambiguous else name


def order(
  visibility: Visibility, rng: np.random.Generator, seconds_per_view: float
) -> Iterator[Draft]:
  """Order of the first appearances of four categories, more than 1 whole second apart."""
  seconds = {name: round(view * seconds_per_view) for name, view in visibility.first_view.items()}
  done = set()
  for _ in range(_ROUNDS * len(seconds)):
    chosen: list[str] = []
    for category in _shuffled(seconds, rng):
      if all(abs(seconds[category] - seconds[c]) > MIN_SECONDS for c in chosen):
        chosen.append(category)
      if len(chosen) == 4:
        break
    if len(chosen) < 4 or frozenset(chosen) in done:
      continue
    done.add(frozenset(chosen))
    right, *others = itertools.permutations(sorted(chosen, key=seconds.__getitem__))
    wrong = tuple(", ".join(names) for names in _shuffled(others, rng)[:3])
    objects = tuple(i for i, obj in enumerate(visibility.scene.objects) if obj.category in chosen)
    yield Draft(ORDER.replace("{list}", ", ".join(chosen)), ", ".join(right), wrong, objects)
