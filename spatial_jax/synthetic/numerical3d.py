"""Room -> numeric questions of the data set Numerical3D; their answers are spread over a range.

    room ──► views ──► candidates, all with a checked answer ──► choose ──► at most 10 questions

`choose` keeps a candidate with a probability that depends on its answer, so that equally many
answers are between 1 and 2 as between 2 and 4: a constant is a poor answer. Everything is a pure
function of the room number.

Source: question rules as in `question_templates`; object_height and camera_displacement are ours.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from spatial_jax.synthetic import question_templates as templates
from spatial_jax.synthetic.geometry import point_distance_m
from spatial_jax.synthetic.numerical3d_balance import keep_probability
from spatial_jax.synthetic.question_templates import Draft, Visibility
from spatial_jax.synthetic.questions import QuestionConfig, find_categories, object_boxes
from spatial_jax.synthetic.render.renderer import focal_px
from spatial_jax.synthetic.scene import Scene, View
from spatial_jax.synthetic.visibility import visible_boxes
from spatial_jax.types import ObjectBox

Numerical3DType: TypeAlias = Literal[
  "object_counting",
  "object_abs_distance",
  "object_size_estimation",
  "object_height",
  "room_size_estimation",
  "camera_distance",
  "camera_displacement",
]
TYPES: tuple[Numerical3DType, ...] = get_args(Numerical3DType)
UNITS: dict[str, str] = {
  "object_counting": "count",
  "object_abs_distance": "m",
  "object_size_estimation": "cm",
  "object_height": "cm",
  "room_size_estimation": "m^2",
  "camera_distance": "m",
  "camera_displacement": "m",
}
MAX_TASKS_PER_ROOM = 10
# Per room: 10 in sum. One frame allows no question about the room or a displacement.
MAX_PER_TYPE: dict[str, int] = {
  "object_counting": 2,
  "object_abs_distance": 2,
  "object_size_estimation": 2,
  "object_height": 1,
  "room_size_estimation": 1,
  "camera_distance": 1,
  "camera_displacement": 1,
}

HEIGHT = (
  "What is the height of the {c}, from its lowest to its highest point, measured in centimeters?"
)
CAMERA_DISTANCE = (
  "What is the distance from the position of the camera in image {i} to the closest point of the "
  "{c} (in meters)?"
)
DISPLACEMENT = (
  "What is the straight-line distance between the position of the camera in image {i} and its "
  "position in image {j} (in meters)?"
)

_QUESTION_STREAM, _CHOICE_STREAM = 6, 7  # of random numbers; numerical3d_rooms has 4 and 5
_MAX_CANDIDATES = 64  # of one type
_COUNTED_PIXELS, _COUNTED_FRACTION = 80, 0.3  # of a counted object; others: see _RULES
_SIZED_FRACTION = 0.8  # share of an object that a view shows, if the question is about its size
_SHARED_OBJECTS = 2  # clearly visible in both views of a camera displacement
_WALL_SHARE = 0.002  # of all pixels show each wall, if the question is about the room
_ON_WALL_M = 0.03
_PIXEL_STEP = 4  # every fourth row and column is enough to find walls
_RULES = QuestionConfig(
  types=("object_counting",),  # not read by `scene_visibility`
  max_per_type=_MAX_CANDIDATES,
  min_visible_pixels=150,  # of 224 x 224
  min_visible_fraction=0.5,
  instance_scope="room",
  seconds_per_view=1.0,
  task_id_prefix="",
)


class Question(NamedTuple):
  """A question about all views of a room, with its true answer."""

  question_type: str  # of TYPES
  question: str
  answer: str
  boxes: tuple[ObjectBox, ...]  # of the objects of the question, in all views


def make_numeric_questions(scene: Scene, views: list[View], number: int) -> list[Question]:
  """At most 10 questions about the views of a room; `number` seeds their choice."""
  clear, countable = visibilities(scene, views)
  chosen = choose(candidates(clear, countable, number), number)
  return [
    Question(name, draft.question, draft.answer, object_boxes(countable, draft.objects))
    for name, draft in chosen
  ]


def candidates(
  clear: Visibility, countable: Visibility, number: int
) -> dict[Numerical3DType, list[Draft]]:
  """All questions that the views answer, per type in random order; `number` seeds the order.

  Questions about the size of an object need a view of nearly all of it, those about the room a view
  of each wall, and those about two cameras two objects in common.

  Args:
    clear, countable: of `visibilities`.
    number: of the room.
  """
  streams = np.random.default_rng((number, _QUESTION_STREAM)).spawn(len(TYPES))
  return {
    name: list(
      itertools.islice(
        _drafts(name, countable if name == "object_counting" else clear, stream), _MAX_CANDIDATES
      )
    )
    for name, stream in zip(TYPES, streams, strict=True)
  }


def choose(
  found: dict[Numerical3DType, list[Draft]],
  number: int,
  keep: Callable[[str, float], float] = keep_probability,
) -> list[tuple[str, Draft]]:
  """The candidates that are kept, at most `MAX_PER_TYPE` of each type.

  Args:
    found: candidates per type.
    number: seeds the choice.
    keep: (type, answer) -> probability in [0, 1].
  """
  streams = np.random.default_rng((number, _CHOICE_STREAM)).spawn(len(TYPES))
  chosen: list[tuple[str, Draft]] = []
  for name, stream in zip(TYPES, streams, strict=True):
    kept = (d for d in found[name] if stream.random() < keep(name, float(d.answer)))
    chosen += [(name, draft) for draft in itertools.islice(kept, MAX_PER_TYPE[name])]
  return chosen


def visibilities(scene: Scene, views: list[View]) -> tuple[Visibility, Visibility]:
  """Objects that are clear enough to be measured, and those that are clear enough to be counted.

  One image is asked about what it shows, several about the room. A category is left out if one of
  its instances is less visible than that; see `questions.scene_visibility`.
  """
  scope = "views" if len(views) == 1 else "room"
  rules = dataclasses.replace(_RULES, instance_scope=scope)
  countable = dataclasses.replace(
    rules, min_visible_pixels=_COUNTED_PIXELS, min_visible_fraction=_COUNTED_FRACTION
  )
  shown = [visible_boxes(scene, view, 1) for view in views]
  clear, counted = (find_categories(scene, views, shown, rule) for rule in (rules, countable))
  return clear, counted


def _drafts(
  name: Numerical3DType, visibility: Visibility, rng: np.random.Generator
) -> Iterator[Draft]:
  one_view = len(visibility.views) == 1
  match name:
    case "object_counting":
      wording = templates.COUNT_IN_IMAGE if one_view else templates.COUNT_IN_ROOM
      yield from templates.counting(visibility, rng, wording)
    case "object_abs_distance":
      yield from templates.abs_distance(visibility, rng)
    case "object_size_estimation":
      yield from (d for d in templates.size(visibility, rng) if _is_whole(visibility, d))
    case "object_height":
      yield from (d for d in _heights(visibility, rng) if _is_whole(visibility, d))
    case "room_size_estimation":
      if not one_view and shows_all_walls(visibility.scene, visibility.views):
        yield from templates.room_size(visibility)
    case "camera_distance":
      yield from _camera_distances(visibility, rng)
    case "camera_displacement":
      yield from _displacements(visibility, rng)


def _is_whole(visibility: Visibility, draft: Draft) -> bool:
  """Whether one view shows nearly all of each object of the question."""
  whole = {
    obj.index for view in visibility.visible for obj in view if obj.fraction >= _SIZED_FRACTION
  }
  return whole.issuperset(draft.objects)


def _heights(visibility: Visibility, rng: np.random.Generator) -> Iterator[Draft]:
  """Height of the only instance of a category."""
  unique = list(visibility.unique.items())
  for k in rng.permutation(len(unique)):
    category, i = unique[k]
    centimetres = round(100 * float(np.ptp(visibility.scene.objects[i].corners_83()[:, 2])))
    yield Draft(HEIGHT.format(c=category), str(centimetres), (), (i,))


def _camera_distances(visibility: Visibility, rng: np.random.Generator) -> Iterator[Draft]:
  """Distance from a camera to the only instance of a category, which its view clearly shows."""
  several = len(visibility.views) > 1
  wording = CAMERA_DISTANCE if several else templates.CAMERA_DISTANCE
  pairs = [
    (view, category, i)
    for view, shown in enumerate(visibility.visible)
    for category, i in visibility.unique.items()
    if any(obj.index == i for obj in shown)
  ]
  for k in rng.permutation(len(pairs)):
    view, category, i = pairs[k]
    position_13 = visibility.views[view].camera.position_3[None]
    metres = float(point_distance_m(position_13, visibility.scene.objects[i])[0])
    if metres >= templates.MIN_DISTANCE_M:
      yield Draft(wording.format(i=view + 1, c=category), f"{metres:.1f}", (), (i,))


def _displacements(visibility: Visibility, rng: np.random.Generator) -> Iterator[Draft]:
  """Distance between two cameras, if both clearly show two or more objects."""
  pairs = list(itertools.combinations(range(len(visibility.views)), 2))
  for k in rng.permutation(len(pairs)):
    i, j = pairs[k]
    first, second = ({obj.index for obj in visibility.visible[view]} for view in (i, j))
    shared = sorted(first & second)
    if len(shared) >= _SHARED_OBJECTS:
      apart_3 = visibility.views[j].camera.position_3 - visibility.views[i].camera.position_3
      metres = float(np.sqrt((apart_3**2).sum()))
      question = DISPLACEMENT.format(i=i + 1, j=j + 1)
      yield Draft(question, f"{metres:.1f}", (), tuple(shared))


def shows_all_walls(scene: Scene, views: Sequence[View]) -> bool:
  """Whether the views together show a part of each wall."""
  points_N2 = np.concatenate([_room_points(view) for view in views])
  pixels = sum(view.instance.size for view in views) / _PIXEL_STEP**2
  for start_2, stop_2 in zip(scene.polygon_Z2, np.roll(scene.polygon_Z2, -1, axis=0), strict=True):
    along_2 = stop_2 - start_2
    length_m = float(np.sqrt((along_2**2).sum()))
    along_2 = along_2 / length_m
    place_N = (points_N2 - start_2) @ along_2
    off_N = (points_N2 - start_2) @ np.array([-along_2[1], along_2[0]])
    on_wall = (np.abs(off_N) < _ON_WALL_M) & (place_N >= 0) & (place_N <= length_m)
    if on_wall.sum() < _WALL_SHARE * pixels:
      return False
  return True


def _room_points(view: View) -> np.ndarray:
  """Places on the floor plan of pixels that show walls, floor or ceiling, float64 [N, 2]."""
  camera, step = view.camera, _PIXEL_STEP
  shown = view.instance[::step, ::step] == -1
  rows, columns = np.nonzero(shown)
  depth_N = view.depth_m[::step, ::step][shown].astype(np.float64)
  middle_x, middle_y = (camera.width_px - 1) / 2, (camera.height_px - 1) / 2
  local_N3 = np.stack(
    [
      (columns * step - middle_x) / focal_px(camera) * depth_N,
      (rows * step - middle_y) / focal_px(camera) * depth_N,
      depth_N,
    ],
    axis=1,
  )
  return (camera.position_3 + local_N3 @ camera.rotation_33)[:, :2]
