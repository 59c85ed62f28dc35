"""Scene + Views -> Tasks: the questions of VSI-Bench, asked only about what the pictures show.

What the instance ids add to the rules of the benchmark (`data.rules`): every object of a question
is clearly in sight, and nothing half in sight could make the answer another one.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np

from spatial_jax.errors import DataError
from spatial_jax.synthetic import geometry
from spatial_jax.synthetic import question_templates as templates
from spatial_jax.synthetic.scene import Scene, View
from spatial_jax.synthetic.visibility import visible_boxes
from spatial_jax.types import AnswerKind, ObjectBox, Task

NumberType: TypeAlias = Literal[
  "object_counting",
  "object_abs_distance",
  "object_size_estimation",
  "room_size_estimation",
  "camera_distance",
]
ChoiceType: TypeAlias = Literal[
  "object_rel_distance",
  "object_rel_direction_easy",
  "object_rel_direction_medium",
  "object_rel_direction_hard",
  "obj_appearance_order",
]
PhotoChoiceType: TypeAlias = Literal["left_right", "closer_to_camera"]  # asked by `data.photos`
QuestionType: TypeAlias = Literal[NumberType, ChoiceType]

SEVERAL_VIEWS = ("room_size_estimation", "obj_appearance_order")
ONE_VIEW = ("camera_distance",)


@dataclasses.dataclass(frozen=True)
class QuestionConfig:
  """What to ask.

  Attributes:
    types: question types; one that needs more (or fewer) views than there are gives none.
    max_per_type: questions per call and type, > 0.
    min_pixels: an object is in sight where so many pixels show it, > 0.
    min_fraction: ... and so large a share of it is neither hidden nor cut by the frame, in [0, 1].
    scope: "room" counts every instance of the room, as VSI-Bench does, and asks about a category
      only if all of them are in sight; "views" counts the instances the views show, and asks about
      a category only if none of those is merely half in sight.
    seconds_per_view: time between two views, for the order of appearance.
    prefix: put before every task id; tells apart several calls about one scene.
  """

  types: tuple[QuestionType, ...]
  max_per_type: int
  min_pixels: int
  min_fraction: float
  scope: Literal["room", "views"]
  seconds_per_view: float
  prefix: str


def answer_kind(question_type: str) -> AnswerKind:
  """Whether a question is answered by a number or by the letter of a choice.

  Raises:
    DataError: for a question type that does not exist.
  """
  if question_type in get_args(NumberType):
    return "number"
  choices = get_args(ChoiceType) + get_args(PhotoChoiceType)
  if question_type in choices:
    return "choice"
  known = ", ".join(get_args(NumberType) + choices)
  raise DataError(f"question type {question_type!r} is unknown: use one of {known}")


def fits(question_type: QuestionType, views: int) -> bool:
  """Whether a question of this type can be about so many views."""
  return question_type not in (SEVERAL_VIEWS if views == 1 else ONE_VIEW)


def ask(
  scene: Scene, views: Sequence[View], rng: np.random.Generator, cfg: QuestionConfig
) -> list[Task]:
  """Questions about what the views show; the pictures of each are all the views, in order.

  Args:
    scene: the truth.
    views: one picture, or the frames of a walk in order of time; at least one.
    rng: every type draws from a child stream of its own, so that one type more shifts no other.
    cfg: what to ask.

  Returns:
    Tasks in the order of `cfg.types`; right answers are spread evenly over the letters.
  """
  sight = look(scene, views, cfg)
  streams = dict(zip(get_args(QuestionType), rng.spawn(len(get_args(QuestionType))), strict=True))
  images = tuple(view.image for view in views)
  tasks = []
  for question_type in cfg.types:
    if not fits(question_type, len(views)):
      continue
    stream = streams[question_type]
    drafts = list(itertools.islice(_drafts(question_type, sight, stream, cfg), cfg.max_per_type))
    for number, (draft, lettered) in enumerate(zip(drafts, letter(drafts, stream), strict=True)):
      question, options, answer = lettered
      tasks.append(
        Task(
          task_id=f"{cfg.prefix}{scene.scene_id}/{question_type}/{number}",
          question_type=question_type,
          question=question,
          options=options,
          answer=answer,
          answer_kind=answer_kind(question_type),
          images=images,
          source=scene.source,
          scene_id=scene.scene_id,
          benchmark=scene.benchmark,
          boxes=_boxes(sight, draft.objects),
        )
      )
  return tasks


def look(scene: Scene, views: Sequence[View], cfg: QuestionConfig) -> templates.Sight:
  """Which categories the views let one ask about, and when each first comes into sight."""
  shown = [visible_boxes(scene, view, 1) for view in views]
  visible = [
    [s for s in seen if s.pixels >= cfg.min_pixels and s.fraction >= cfg.min_fraction]
    for seen in shown
  ]
  any_shown = {s.index for seen in shown for s in seen}
  any_visible = {s.index for seen in visible for s in seen}
  sight = templates.Sight(scene, views, visible, {}, {}, {})
  for category in dict.fromkeys(obj.category for obj in scene.objects):
    group = {i for i, obj in enumerate(scene.objects) if obj.category == category}
    asked = group if cfg.scope == "room" else group & any_shown
    if asked and asked <= any_visible:
      sight.instances[category] = tuple(sorted(asked))
    most_pixels = [max((s.pixels for s in seen if s.index in group), default=0) for seen in shown]
    first = next((view for view, pixels in enumerate(most_pixels) if pixels), None)
    if first is not None and most_pixels[first] >= cfg.min_pixels:
      sight.first_view[category] = first
  return sight


def letter(
  drafts: Iterable[templates.Draft], rng: np.random.Generator
) -> Iterator[tuple[str, tuple[str, ...] | None, str]]:
  """Gives options letters, right answers spread over A, B, ...: (question, options, answer)."""
  places: list[int] = []
  for question, answer, wrong, _ in drafts:
    if not wrong:
      yield question, None, answer
      continue
    if not places:
      places = [int(i) for i in rng.permutation(len(wrong) + 1)]
    place = places.pop()
    names = [wrong[i] for i in rng.permutation(len(wrong))]
    names.insert(place, answer)
    options = tuple(f"{chr(65 + i)}. {name}" for i, name in enumerate(names))
    yield question.replace("{options}", ", ".join(names)), options, chr(65 + place)


def _drafts(
  question_type: QuestionType, sight: templates.Sight, rng: np.random.Generator, cfg: QuestionConfig
) -> Iterator[templates.Draft]:
  """The questions of one type that can be asked, in random order."""
  match question_type:
    case "object_counting":
      return templates.counting(sight, rng, _count_wording(len(sight.views), cfg.scope))
    case "object_abs_distance":
      return templates.abs_distance(sight, rng)
    case "object_size_estimation":
      return templates.size(sight, rng)
    case "room_size_estimation":
      return templates.room_size(sight)
    case "camera_distance":
      return templates.camera_distance(sight, rng)
    case "object_rel_distance":
      return templates.rel_distance(sight, rng)
    case "object_rel_direction_easy":
      return templates.direction(sight, rng, "easy")
    case "object_rel_direction_medium":
      return templates.direction(sight, rng, "medium")
    case "object_rel_direction_hard":
      return templates.direction(sight, rng, "hard")
    case "obj_appearance_order":
      return templates.order(sight, rng, cfg.seconds_per_view)


def _count_wording(views: int, scope: str) -> str:
  if scope == "room":
    return templates.COUNT_IN_ROOM
  return templates.COUNT_IN_IMAGE if views == 1 else templates.COUNT_IN_IMAGES


def _boxes(sight: templates.Sight, objects: Sequence[int]) -> tuple[ObjectBox, ...]:
  """Where each view shows the objects of a question, view after view."""
  boxes = []
  for image, (view, seen) in enumerate(zip(sight.views, sight.visible, strict=True)):
    by_index = {s.index: s for s in seen}
    for index in objects:
      if index in by_index:
        obj = sight.scene.objects[index]
        distance = float(geometry.point_distance_m(view.camera.position_3[None], obj)[0])
        place = geometry.floor_place_m(obj.centre_3, view.camera)
        boxes.append(ObjectBox(obj.category, image, by_index[index].box_4, distance, place))
  return tuple(boxes)
