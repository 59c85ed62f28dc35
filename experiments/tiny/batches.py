"""Lessons of the embedded policy: rooms, the truth in their pictures, and demonstrated answers.

room ─► pictures ─► dense truth per visual token ────────────► DenseBatch
          └► questions ─► demonstrations (drawing, answer) ──► TrainBatch
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from experiments.tiny.dense_loss import DenseBatch
from experiments.tiny.dense_targets import DenseTargets, dense_targets
from spatial_jax.config import ConfigError
from spatial_jax.data.image import patch_image
from spatial_jax.data.pipeline import HELD_OUT_SEED, sample_tasks
from spatial_jax.drawing.canvas import Style
from spatial_jax.errors import DataError
from spatial_jax.learn.gradient import Microbatches
from spatial_jax.learn.train_batch import BatchConfig, plan_images, to_train_batch
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.demonstration import demonstration_trajectory
from spatial_jax.synthetic.floorplan import ProceduralConfig, procedural_scene
from spatial_jax.synthetic.oracle import DemonstrationConfig, demonstrate
from spatial_jax.synthetic.questions import QuestionConfig, make_questions
from spatial_jax.synthetic.scene import Scene, View
from spatial_jax.synthetic.tasks import CameraConfig, render_views
from spatial_jax.types import AnswerKind, PatchedImage, Rollouts, TrainBatch, VisionBatch

_TRIES = 256  # rooms in a row without a question before the configuration is refused


@dataclasses.dataclass(frozen=True)
class BatchRecipe:
  """One kind of lesson: rows of about the same length, so that little is padding.

  Attributes:
    scenes, group: rooms, and questions asked of each.
    answer: questions that are answered like this.
    draw_share: of the answers with a drawing turn before them.
  """

  scenes: int
  group: int
  answer: AnswerKind
  draw_share: float


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """The recipe.

  Attributes:
    vision_steps: steps of the vision tower alone.
    vision_scenes: rooms per step while it learns to see.
    batches: of the steps afterwards, one after another and again from the first.
    dense_weight: of the dense loss beside the answers' loss.
    point_layer: decoder layer whose first head is shown where to look, 1 or more.
    point_tokens: so many tokens of one row per room take part in that.
    point_reach: so many tokens behind a name speak of it.
    share: part of a cell an object must fill to be its truth.
    categories: names in the order of the head's logits.
    max_boxes: most boxes of one demonstrated drawing.
    micro: how rows go through the decoder.
  """

  vision_steps: int
  vision_scenes: int
  batches: tuple[BatchRecipe, ...]
  dense_weight: float
  point_layer: int
  point_tokens: int
  point_reach: int
  share: float
  categories: tuple[str, ...]
  max_boxes: int
  micro: Microbatches

  def __post_init__(self):
    if not self.batches:
      raise ConfigError("config.recipe.batches is empty: name at least one")


class PretrainBatch(NamedTuple):
  """One step's data: rows are None while the tower learns to see."""

  vision: VisionBatch
  dense: DenseBatch
  rows: TrainBatch | None


class Room(NamedTuple):
  """A room, its views, and each of them as patches with the truth in them."""

  scene: Scene
  views: list[View]
  pictures: list[tuple[PatchedImage, DenseTargets]]


@dataclasses.dataclass(frozen=True, eq=False)
class BatchBuilder:
  """Makes batches: a pure function of the step."""

  conversation: Conversation
  cfg: PretrainConfig
  rooms: ProceduralConfig
  camera: CameraConfig
  questions: QuestionConfig
  shapes: BatchConfig
  style: Style
  seed: int

  def batch(self, step: int) -> PretrainBatch:
    """The data of one step; of so many rooms hardly one is seen twice.

    Raises:
      DataError: on the host, when room after room gives no question.
    """
    draw = np.random.default_rng((self.seed, step))
    first = int(draw.integers(2**40)) % (HELD_OUT_SEED // 2)
    if step < self.cfg.vision_steps:
      return self._see(range(first, first + self.cfg.vision_scenes))
    return self._answer(self.cfg.batches[step % len(self.cfg.batches)], first, draw)

  def _see(self, numbers: Iterable[int]) -> PretrainBatch:
    """Pictures of rooms and the truth in them."""
    pictures = [picture for number in numbers for picture in self._room(number).pictures]
    vision, feature_of = plan_images([[image for image, _ in pictures]], self.shapes)
    return PretrainBatch(vision, _dense_batch(vision, feature_of, pictures), None)

  def _answer(self, cfg: BatchRecipe, first: int, draw: np.random.Generator) -> PretrainBatch:
    """Questions about the rooms from `first` on that give some."""
    demonstration = DemonstrationConfig(cfg.draw_share, self.cfg.max_boxes)
    pictures: list[tuple[PatchedImage, DenseTargets]] = []
    groups: Rollouts = []
    misses = 0
    for number in itertools.count(first):
      room = self._room(number)
      tasks = make_questions(room.scene, room.views, draw, self.questions)
      tasks = sample_tasks(
        [task for task in tasks if task.answer_kind == cfg.answer], cfg.group, draw
      )
      misses = 0 if tasks else misses + 1
      if misses == _TRIES:
        raise DataError(
          f"{_TRIES} rooms in a row gave no question that a {cfg.answer} answers; "
          "loosen config.questions"
        )
      if not tasks:
        continue
      patched = [image for image, _ in room.pictures]
      told = [
        demonstration_trajectory(
          self.conversation,
          self.conversation.prompt(task, patched),
          demonstrate(task, draw, demonstration),
          self.style,
        )
        for task in tasks
      ]
      # A room that gave fewer questions is asked some of them again.
      again = draw.integers(len(told), size=cfg.group - len(told))
      groups.append(told + [told[i] for i in again])
      pictures += room.pictures
      if len(groups) == cfg.scenes:
        break
    advantage_BG = np.zeros((cfg.scenes, cfg.group), np.float32)
    batch, feature_of = to_train_batch(groups, advantage_BG, self.shapes)
    assert isinstance(batch.vision, VisionBatch)
    return PretrainBatch(batch.vision, _dense_batch(batch.vision, feature_of, pictures), batch)

  def _room(self, number: int) -> "Room":
    """Pictures of a walk through one room, and what every cell of them shows."""
    preprocess = self.conversation.preprocess
    cell_px = preprocess.patch_size * preprocess.merge_size
    scene = procedural_scene(number, self.rooms)
    views = render_views(scene, number, self.camera)
    pictures = [
      (
        patch_image(view.image, preprocess),
        dense_targets(scene, view, self.cfg.categories, cell_px, self.cfg.share),
      )
      for view in views
    ]
    return Room(scene, views, pictures)


def _dense_batch(
  vision: VisionBatch,
  feature_of: dict[str, np.ndarray],
  pictures: list[tuple[PatchedImage, DenseTargets]],
) -> DenseBatch:
  """Truth in the order of the features; without truth (drawn pictures, padding): not valid."""
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
  for image, truth in pictures:
    index_M = feature_of[image.content_hash]
    for field in dataclasses.fields(truth):
      batch._asdict()[field.name][index_M] = truth.__dict__[field.name]
    batch.valid_M[index_M] = True
  return batch
