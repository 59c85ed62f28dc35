"""Scene + Views -> Tasks: the questions of VSI-Bench about clearly visible objects.

The rules of the benchmark are in `question_templates`. This module adds two rules, checked with the
instance ids of the views: every object of a question is clearly visible, and no partly visible
object could change the answer.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np

from spatial_jax.config import check_field
from spatial_jax.errors import DataError
from spatial_jax.synthetic import geometry
from spatial_jax.synthetic import question_templates as templates
from spatial_jax.synthetic.scene import Scene, View
from spatial_jax.synthetic.visibility import VisibleObject, visible_boxes
from spatial_jax.types import AnswerKind, ImageRef, ObjectBox, Task

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
PhotoChoiceType: TypeAlias = Literal["left_right", "closer_to_camera"]  # made by `data.photos`
QuestionType: TypeAlias = Literal[NumberType, ChoiceType]

NEED_SEVERAL_VIEWS = ("room_size_estimation", "obj_appearance_order")
NEED_ONE_VIEW = ("camera_distance",)


@dataclasses.dataclass(frozen=True)
class QuestionConfig:
  """Which questions are made about a scene.

  Attributes:
    types: question types, at least one; a type that needs several views (or one) gives no
      questions about one view (or several).
    max_per_type: most questions of one type about one scene, >= 1.
    min_visible_pixels: a clearly visible object has this number of pixels or more in a view, >= 1.
    min_visible_fraction: ... and this share of the object is not hidden and not cut by the image
      border, in [0, 1].
    instance_scope: "room" counts all instances of a category in the room, as VSI-Bench does, and
      makes questions about it if all of them are clearly visible. "views" counts the instances in
      the views, and makes questions about a category if none of these is only partly visible.
    seconds_per_view: time between two views, for the order of appearance, > 0.
    task_id_prefix: start of every task id.
  """

  types: tuple[QuestionType, ...]
  max_per_type: int
  min_visible_pixels: int
  min_visible_fraction: float
  instance_scope: Literal["room", "views"]
  seconds_per_view: float
  task_id_prefix: str

  def __post_init__(self):
    known = get_args(QuestionType)
    valid = bool(self.types) and set(self.types) <= set(known)
    check_field(self, "types", valid, f"name at least one type of {', '.join(known)}")
    valid = len(set(self.types)) == len(self.types)
    check_field(self, "types", valid, "name each type once")
    for name in ("max_per_type", "min_visible_pixels"):
      check_field(self, name, vars(self)[name] >= 1, "be at least 1")
    valid = 0 <= self.min_visible_fraction <= 1
    check_field(self, "min_visible_fraction", valid, "be at least 0 and at most 1")
    valid = self.instance_scope in ("room", "views")
    check_field(self, "instance_scope", valid, "be room or views")
    valid = 0 < self.seconds_per_view < math.inf
    check_field(self, "seconds_per_view", valid, "be above 0 and finite")


def answer_kind(question_type: str) -> AnswerKind:
  """The kind of answer of a question type: a number or the letter of a choice.

  Raises:
    DataError: if the question type does not exist.
  """
  if question_type in get_args(NumberType):
    return "number"
  choices = get_args(ChoiceType) + get_args(PhotoChoiceType)
  if question_type in choices:
    return "choice"
  known = ", ".join(get_args(NumberType) + choices)
  raise DataError(f"question type {question_type!r} is unknown: use one of {known}")


def supports_views(question_type: QuestionType, views: int) -> bool:
  """Whether a question of this type can be about this number of views."""
  return question_type not in (NEED_SEVERAL_VIEWS if views == 1 else NEED_ONE_VIEW)


def make_questions(
  scene: Scene, views: Sequence[View], rng: np.random.Generator, cfg: QuestionConfig
) -> list[Task]:
  """Questions about the visible objects of a scene; each task has all views, in order.

  Args:
    scene: the truth.
    views: one view, or the views of a camera path in order of time; at least one.
    rng: parent of one random stream per question type: a type does not change the questions of
      another.
    cfg: which questions.

  Returns:
    Tasks in the order of `cfg.types`; the right answers are spread evenly over the letters.
  """
  visibility = scene_visibility(scene, views, cfg)
  streams = dict(zip(get_args(QuestionType), rng.spawn(len(get_args(QuestionType))), strict=True))
  media = tuple(ImageRef(view.image) for view in views)
  tasks = []
  for question_type in cfg.types:
    if not supports_views(question_type, len(views)):
      continue
    stream = streams[question_type]
    all_drafts = _drafts(question_type, visibility, stream, cfg)
    drafts = list(itertools.islice(all_drafts, cfg.max_per_type))
    texts = assign_letters(drafts, stream)
    for number, (draft, (question, options, answer)) in enumerate(zip(drafts, texts, strict=True)):
      tasks.append(
        Task(
          task_id=f"{cfg.task_id_prefix}{scene.scene_id}/{question_type}/{number}",
          question_type=question_type,
          question=question,
          options=options,
          answer=answer,
          answer_kind=answer_kind(question_type),
          unit=None,
          media=media,
          source=scene.source,
          scene_id=scene.scene_id,
          benchmark=scene.benchmark,
          boxes=object_boxes(visibility, draft.objects),
        )
      )
  return tasks


def scene_visibility(
  scene: Scene, views: Sequence[View], cfg: QuestionConfig
) -> templates.Visibility:
  """The categories for questions about these views, and the first view of each category."""
  return find_categories(scene, views, [visible_boxes(scene, view, 1) for view in views], cfg)


def find_categories(
  scene: Scene, views: Sequence[View], shown: list[list[VisibleObject]], cfg: QuestionConfig
) -> templates.Visibility:
  """`scene_visibility` with the objects that each view shows, of one pixel or more."""
  clear = [
    [
      obj
      for obj in objects
      if obj.pixels >= cfg.min_visible_pixels and obj.fraction >= cfg.min_visible_fraction
    ]
    for objects in shown
  ]
  any_shown = {obj.index for objects in shown for obj in objects}
  any_clear = {obj.index for objects in clear for obj in objects}
  visibility = templates.Visibility(scene, views, clear, {}, {}, {})
  for category in dict.fromkeys(obj.category for obj in scene.objects):
    group = {i for i, obj in enumerate(scene.objects) if obj.category == category}
    counted = group if cfg.instance_scope == "room" else group & any_shown
    if counted and counted <= any_clear:
      visibility.instances[category] = tuple(sorted(counted))
    most_pixels = [
      max((obj.pixels for obj in objects if obj.index in group), default=0) for objects in shown
    ]
    first = next((view for view, pixels in enumerate(most_pixels) if pixels), None)
    if first is not None and most_pixels[first] >= cfg.min_visible_pixels:
      visibility.first_view[category] = first
  return visibility


def assign_letters(
  drafts: Iterable[templates.Draft], rng: np.random.Generator
) -> Iterator[tuple[str, tuple[str, ...] | None, str]]:
  """Gives letters to options and spreads the right answers evenly over A, B, ...

  Returns:
    For each draft (question, options, answer): options are "A. chair", ... and the answer is a
    letter; for a number, options are None.
  """
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
  question_type: QuestionType,
  visibility: templates.Visibility,
  rng: np.random.Generator,
  cfg: QuestionConfig,
) -> Iterator[templates.Draft]:
  """All questions of one type, in random order."""
  match question_type:
    case "object_counting":
      return templates.counting(
        visibility, rng, _count_wording(len(visibility.views), cfg.instance_scope)
      )
    case "object_abs_distance":
      return templates.abs_distance(visibility, rng)
    case "object_size_estimation":
      return templates.size(visibility, rng)
    case "room_size_estimation":
      return templates.room_size(visibility)
    case "camera_distance":
      return templates.camera_distance(visibility, rng)
    case "object_rel_distance":
      return templates.rel_distance(visibility, rng)
    case "object_rel_direction_easy":
      return templates.direction(visibility, rng, "easy")
    case "object_rel_direction_medium":
      return templates.direction(visibility, rng, "medium")
    case "object_rel_direction_hard":
      return templates.direction(visibility, rng, "hard")
    case "obj_appearance_order":
      return templates.order(visibility, rng, cfg.seconds_per_view)


def _count_wording(views: int, instance_scope: str) -> str:
  if instance_scope == "room":
    return templates.COUNT_IN_ROOM
  return templates.COUNT_IN_IMAGE if views == 1 else templates.COUNT_IN_IMAGES


def object_boxes(visibility: templates.Visibility, objects: Sequence[int]) -> tuple[ObjectBox, ...]:
  """The boxes of clearly visible ones of the objects, view after view."""
  boxes = []
  for image, (view, clear) in enumerate(zip(visibility.views, visibility.visible, strict=True)):
    by_index = {shown.index: shown for shown in clear}
    for index in objects:
      if index in by_index:
        obj = visibility.scene.objects[index]
        distance = float(geometry.point_distance_m(view.camera.position_3[None], obj)[0])
        place = geometry.floor_place_m(obj.centre_3, view.camera)
        boxes.append(ObjectBox(obj.category, image, by_index[index].box_4, distance, place))
  return tuple(boxes)
