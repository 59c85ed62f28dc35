"""Pretraining batches of the embedded policy: images with dense targets, demonstrated answers.

room ─► images ─► dense targets per visual token ─────────────► DenseBatch
          └► questions ─► demonstrations (drawing, answer) ──► TrainBatch
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from experiments.tiny.dense_loss import DenseBatch
from experiments.tiny.dense_targets import DenseTargets, dense_targets
from spatial_jax.config import check_field
from spatial_jax.data.image import patch_image
from spatial_jax.data.source import HELD_OUT_SEED
from spatial_jax.data.task_order import sample_tasks
from spatial_jax.drawing.canvas import Style
from spatial_jax.errors import DataError
from spatial_jax.learn.train_batch import BatchConfig, Microbatches, plan_images, to_train_batch
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.demonstration import demonstration_trajectory
from spatial_jax.synthetic.floorplan import ProceduralConfig, procedural_scene
from spatial_jax.synthetic.oracle import DemonstrationConfig, demonstrate
from spatial_jax.synthetic.questions import QuestionConfig, make_questions
from spatial_jax.synthetic.scene import Scene, View
from spatial_jax.synthetic.tasks import CameraConfig, render_views
from spatial_jax.types import (
  AnswerKind,
  PatchedImage,
  Rollouts,
  Task,
  TrainBatch,
  Trajectory,
  VisionBatch,
)

_MAX_EMPTY_ROOMS = 256  # rooms without a question in a row before the configuration is refused


@dataclasses.dataclass(frozen=True)
class BatchRecipe:
  """One kind of batch; its rows have similar lengths, which keeps padding short.

  Attributes:
    rooms: number of rooms, >= 1.
    questions_per_room: >= 1.
    answer_kind: the questions have this kind of answer.
    draw_fraction: fraction of the demonstrations with a drawing turn, in [0, 1].
  """

  rooms: int
  questions_per_room: int
  answer_kind: AnswerKind
  draw_fraction: float

  def __post_init__(self):
    for name in ("rooms", "questions_per_room"):
      check_field(self, name, vars(self)[name] >= 1, "be at least 1")
    valid = self.answer_kind in ("number", "choice")
    check_field(self, "answer_kind", valid, "be number or choice")
    check_field(self, "draw_fraction", 0 <= self.draw_fraction <= 1, "be at least 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
  """The recipe of pretraining.

  Attributes:
    vision_steps: first steps, which train the vision tower alone, >= 0.
    vision_rooms: rooms per vision step, >= 1.
    batches: kinds of batches of the later steps, in turn, at least one.
    dense_weight: weight of the dense loss beside the loss of the answers, >= 0.
    pointing_layer: decoder layer whose first head learns to attend to named objects, >= 1.
    pointing_tokens: number of tokens of one row per room in the pointing loss, >= 1.
    pointing_reach: number of tokens after a name that refer to it, >= 0.
    min_cell_fraction: a cell's object fills at least this fraction of the cell, in (0, 1).
    categories: names of objects, in the order of the logits, at least one.
    max_boxes: most boxes of one demonstrated drawing, >= 0.
    micro: microbatches of the decoder.
  """

  vision_steps: int
  vision_rooms: int
  batches: tuple[BatchRecipe, ...]
  dense_weight: float
  pointing_layer: int
  pointing_tokens: int
  pointing_reach: int
  min_cell_fraction: float
  categories: tuple[str, ...]
  max_boxes: int
  micro: Microbatches

  def __post_init__(self):
    for name in ("vision_steps", "pointing_reach", "max_boxes"):
      check_field(self, name, vars(self)[name] >= 0, "be at least 0")
    for name in ("vision_rooms", "pointing_layer", "pointing_tokens"):
      check_field(self, name, vars(self)[name] >= 1, "be at least 1")
    check_field(self, "batches", bool(self.batches), "name at least one kind of batch")
    valid = 0 <= self.dense_weight < math.inf
    check_field(self, "dense_weight", valid, "be at least 0 and finite")
    valid = 0 < self.min_cell_fraction < 1
    check_field(self, "min_cell_fraction", valid, "be above 0 and below 1")
    valid = bool(self.categories) and len(set(self.categories)) == len(self.categories)
    check_field(self, "categories", valid, "name at least one category, each once")


class PretrainBatch(NamedTuple):
  """The data of one step; `answers` is None in a vision step."""

  vision: VisionBatch
  dense_targets: DenseBatch
  answers: TrainBatch | None


class Room(NamedTuple):
  """A room, its views, and each view as patches with its dense targets."""

  scene: Scene
  views: list[View]
  images: list[tuple[PatchedImage, DenseTargets]]


@dataclasses.dataclass(frozen=True, eq=False)
class BatchBuilder:
  """Makes the batch of a step; the same step gives the same batch."""

  conversation: Conversation
  cfg: RecipeConfig
  rooms: ProceduralConfig
  camera: CameraConfig
  questions: QuestionConfig
  shapes: BatchConfig
  style: Style
  seed: int

  def batch(self, step: int) -> PretrainBatch:
    """The data of one step, about rooms that no other step is likely to use.

    Raises:
      DataError: if room after room gives no question.
    """
    rng = np.random.default_rng((self.seed, step))
    first = int(rng.integers(2**40)) % (HELD_OUT_SEED // 2)
    if step < self.cfg.vision_steps:
      return self._vision_batch(range(first, first + self.cfg.vision_rooms))
    return self._answer_batch(self.cfg.batches[step % len(self.cfg.batches)], first, rng)

  def _vision_batch(self, numbers: Iterable[int]) -> PretrainBatch:
    """Images of rooms with dense targets."""
    images = [image for number in numbers for image in self._room(number).images]
    vision, feature_of = plan_images([[image for image, _ in images]], self.shapes)
    return PretrainBatch(vision, _dense_batch(vision, feature_of, images), None)

  def _answer_batch(
    self, recipe: BatchRecipe, first: int, rng: np.random.Generator
  ) -> PretrainBatch:
    """Demonstrated answers about the rooms from `first` on that give questions."""
    images: list[tuple[PatchedImage, DenseTargets]] = []
    groups: Rollouts = []
    misses = 0
    for number in itertools.count(first):
      room = self._room(number)
      tasks = make_questions(room.scene, room.views, rng, self.questions)
      tasks = [task for task in tasks if task.answer_kind == recipe.answer_kind]
      tasks = sample_tasks(tasks, recipe.questions_per_room, rng)
      misses = 0 if tasks else misses + 1
      if misses == _MAX_EMPTY_ROOMS:
        raise DataError(
          f"{_MAX_EMPTY_ROOMS} rooms in a row gave no question with a {recipe.answer_kind} as"
          " answer; lower config.questions.min_visible_pixels or min_visible_fraction, or add types"
        )
      if not tasks:
        continue
      demonstrations = [self._demonstration(task, room, recipe, rng) for task in tasks]
      # A room with fewer questions repeats some of them.
      repeats = rng.integers(
        len(demonstrations), size=recipe.questions_per_room - len(demonstrations)
      )
      groups.append(demonstrations + [demonstrations[i] for i in repeats])
      images += room.images
      if len(groups) == recipe.rooms:
        break
    batch, feature_of = to_train_batch(groups, None, self.shapes)
    assert isinstance(batch.vision, VisionBatch)
    return PretrainBatch(batch.vision, _dense_batch(batch.vision, feature_of, images), batch)

  def _demonstration(
    self, task: Task, room: Room, recipe: BatchRecipe, rng: np.random.Generator
  ) -> Trajectory:
    cfg = DemonstrationConfig(recipe.draw_fraction, self.cfg.max_boxes)
    prompt = self.conversation.prompt(task, [image for image, _ in room.images])
    script = demonstrate(task, rng, cfg)
    return demonstration_trajectory(self.conversation, prompt, script, self.style)

  def _room(self, number: int) -> Room:
    """One room with rendered views and dense targets."""
    preprocess = self.conversation.preprocess
    cell_px = preprocess.patch_size * preprocess.merge_size
    scene = procedural_scene(number, self.rooms)
    views = render_views(scene, number, self.camera)
    images = [
      (
        patch_image(view.image, preprocess),
        dense_targets(scene, view, self.cfg.categories, cell_px, self.cfg.min_cell_fraction),
      )
      for view in views
    ]
    return Room(scene, views, images)


def _dense_batch(
  vision: VisionBatch,
  feature_of: dict[str, np.ndarray],
  images: list[tuple[PatchedImage, DenseTargets]],
) -> DenseBatch:
  """Targets in the order of the features; drawings and padding have none and are not valid."""
  count = vision.patches_PX.shape[0] // 4
  batch = DenseBatch(
    category_M=np.zeros(count, np.int32),
    log_depth_M=np.zeros(count, np.float32),
    box_M4=np.zeros((count, 4), np.float32),
    extent_M2=np.zeros((count, 2), np.float32),
    place_M6=np.zeros((count, 6), np.float32),
    object_M=np.zeros(count, bool),
    valid_M=np.zeros(count, bool),
  )
  for image, targets in images:
    index_M = feature_of[image.content_hash]
    for field in dataclasses.fields(targets):
      batch._asdict()[field.name][index_M] = targets.__dict__[field.name]
    batch.valid_M[index_M] = True
  return batch
