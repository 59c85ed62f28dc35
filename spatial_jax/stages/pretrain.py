"""How the embedded policy learns from nothing: to see, to speak the protocol, to draw, to measure.

    room ─► pictures ─► dense truth per visual token ────────────► head ─┐
              └► questions ─► demonstrations (drawing, answer) ─► rows ──┴─► one update

Each step looks at `scenes` rooms and asks each of them many questions: a picture is encoded once and serves
all its rows. The first `see_steps` steps train the vision tower alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spatial_jax.data.demonstrations import DemonstrationConfig, demonstrate
from spatial_jax.data.dense import DenseTargets, dense_targets
from spatial_jax.data.loader import HELD_OUT_SEED, LookConfig, pick, views_of
from spatial_jax.data.procedural import ProceduralConfig, procedural_scene
from spatial_jax.data.questions import QuestionConfig, ask
from spatial_jax.data.vision import patch_image
from spatial_jax.drawing.canvas import Style
from spatial_jax.learn.batch import BatchConfig, plan_images, to_train_batch
from spatial_jax.learn.dense import DenseBatch, dense_loss
from spatial_jax.learn.loss import Metrics, row_weights, sft_loss
from spatial_jax.learn.update import Rows, apply_gradient, gradient, split_rows
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.demonstration import play
from spatial_jax.types import Params, PatchedImage, Task, TrainBatch, TrainState, VisionBatch


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """The recipe.

  Attributes:
    see_steps: steps of the vision tower alone.
    see_scenes: rooms per step while it learns to see.
    scenes, rows: rooms and answers per step afterwards.
    micro_rows: rows per microbatch.
    dense_weight: of the dense loss beside the answers' loss.
    share: part of a cell an object must fill to be its truth.
    categories: names in the order of the head's logits.
    demonstration: how answers are demonstrated.
  """

  see_steps: int
  see_scenes: int
  scenes: int
  rows: int
  micro_rows: int
  dense_weight: float
  share: float
  categories: tuple[str, ...]
  demonstration: DemonstrationConfig


class Lesson(NamedTuple):
  """One step's data: rows are None while the tower learns to see."""

  vision: VisionBatch
  dense: DenseBatch
  batch: TrainBatch | None


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
  """Makes lessons: a pure function of the step."""

  conversation: Conversation
  cfg: PretrainConfig
  rooms: ProceduralConfig
  look: LookConfig
  questions: QuestionConfig
  shapes: BatchConfig
  style: Style
  seed: int

  def lesson(self, step: int) -> Lesson:
    """The data of one step; rooms are never seen twice."""
    seeing = step < self.cfg.see_steps
    count = self.cfg.see_scenes if seeing else self.cfg.scenes
    rng = np.random.default_rng((self.seed, step))
    first = int(rng.integers(2**40)) % (HELD_OUT_SEED // 2)
    pictures: list[tuple[PatchedImage, DenseTargets]] = []
    trajectories = []
    for number in range(first, first + count):
      scene = procedural_scene(number, self.rooms)
      views = views_of(scene, number, self.look)
      patched = [patch_image(view.image, self.conversation.preprocess) for view in views]
      cell_px = self.shapes_cell_px
      dense = [
        dense_targets(scene, v, self.cfg.categories, cell_px, self.cfg.share) for v in views
      ]
      pictures += zip(patched, dense, strict=True)
      if not seeing:
        tasks = pick(ask(scene, views, rng, self.questions), self.cfg.rows // count, rng)
        trajectories += [self._demonstrate(task, patched, rng) for task in tasks]
    if seeing:
      vision, feature_of = plan_images([[image for image, _ in pictures]], self.shapes)
      return Lesson(vision, _dense_batch(vision, feature_of, pictures), None)
    # Rooms that gave fewer questions are made up for by asking the same rows again.
    missing = self.cfg.rows - len(trajectories)
    trajectories += [trajectories[i] for i in rng.integers(len(trajectories), size=missing)]
    batch = to_train_batch(trajectories, np.zeros(self.cfg.rows, np.float32), self.shapes)
    # Same images in the same order, so the same plan as the batch's own.
    _, feature_of = plan_images([t.images for t in trajectories], self.shapes)
    known = [(image, dense) for image, dense in pictures if image.content_hash in feature_of]
    return Lesson(batch.vision, _dense_batch(batch.vision, feature_of, known), batch)

  @property
  def shapes_cell_px(self) -> int:
    """Side of a merged token in pixels."""
    preprocess = self.conversation.preprocess
    return preprocess.patch_size * preprocess.merge_size

  def _demonstrate(self, task: Task, patched: list[PatchedImage], rng: np.random.Generator):
    prompt = self.conversation.prompt(task, patched)
    script = demonstrate(task, rng, self.cfg.demonstration)
    return play(self.conversation, prompt, script, self.style)


def _dense_batch(
  vision: VisionBatch,
  feature_of: dict[str, np.ndarray],
  pictures: list[tuple[PatchedImage, DenseTargets]],
) -> DenseBatch:
  """Truth in the order of the features; features without truth (drawn pictures, padding) are not valid."""
  count = vision.patches_PX.shape[0] // 4
  batch = DenseBatch(
    category_M=np.zeros(count, np.int32),
    log_depth_M=np.zeros(count, np.float32),
    box_M4=np.zeros((count, 4), np.float32),
    extent_M2=np.zeros((count, 2), np.float32),
    object_M=np.zeros(count, bool),
    valid_M=np.zeros(count, bool),
  )
  for image, truth in pictures:
    index_M = feature_of[image.content_hash]
    for field in dataclasses.fields(truth):
      batch._asdict()[field.name][index_M] = truth.__dict__[field.name]
    batch.valid_M[index_M] = True
  return batch


def pretrain_programs(
  policy: Policy, optimizer: optax.GradientTransformation, cfg: PretrainConfig
) -> Callable[[TrainState, Lesson], tuple[TrainState, Metrics]]:
  """The two jitted updates behind one function; `state.params` is {"policy": ..., "head": ...}."""
  see = jax.jit(functools.partial(_see, policy, optimizer), donate_argnums=0)
  learn = jax.jit(functools.partial(_learn, policy, optimizer, cfg), donate_argnums=0)

  def update(state: TrainState, lesson: Lesson) -> tuple[TrainState, Metrics]:
    if lesson.batch is None:
      return see(state, lesson.vision, lesson.dense)
    return learn(state, lesson.batch, lesson.dense)

  return update


def _dense_gradient(
  policy: Policy, params: Params, vision: VisionBatch, dense: DenseBatch
) -> tuple[Metrics, Params]:
  def loss(params: Params):
    return dense_loss(params["head"], policy.encode(params["policy"], vision), dense)

  (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return {"dense_loss": value, **metrics}, grads


def _see(policy, optimizer, state: TrainState, vision: VisionBatch, dense: DenseBatch):
  metrics, grads = _dense_gradient(policy, state.params, vision, dense)
  return apply_gradient(optimizer, state, grads, metrics)


def _learn(policy, optimizer, cfg, state: TrainState, batch: TrainBatch, dense: DenseBatch):
  def loss_of_rows(logp_RT: jax.Array, rows: Rows) -> tuple[jax.Array, Metrics]:
    return sft_loss(logp_RT, rows.trained_RT, rows.weight_R), {}

  rows = split_rows(batch, row_weights(batch.trained_RT, "token"), None, cfg.micro_rows)
  loss, _, grads = gradient(policy, state.params["policy"], batch, rows, loss_of_rows)
  metrics, dense_grads = _dense_gradient(policy, state.params, batch.vision, dense)
  scaled = jax.tree.map(lambda g: cfg.dense_weight * g, dense_grads)
  total = {"policy": jax.tree.map(jnp.add, grads, scaled["policy"]), "head": scaled["head"]}
  return apply_gradient(optimizer, state, total, {"loss": loss, **metrics})
