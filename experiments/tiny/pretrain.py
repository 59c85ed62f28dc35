"""Entry point: python -m experiments.tiny.pretrain --config=configs/tiny_pretrain.py --workdir=DIR

Pretrains the embedded policy from random parameters.

    room ─► pictures ─► dense truth per visual token ────────────► head ─┐
              └► questions ─► demonstrations (drawing, answer) ─► rows ──┴─► one update

Each step looks at some rooms and asks each of them a group of questions: a picture is encoded
and read once and serves all its rows. The first `vision_steps` steps train the vision tower alone.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import config_flags

from experiments.tiny.batches import BatchBuilder, PretrainBatch, PretrainConfig
from experiments.tiny.dense_loss import (
  dense_loss,
  finding_loss,
  init_heads,
  pointing_loss,
  subjects,
)
from spatial_jax import rng
from spatial_jax.cli import CONFIG_HELP, enable_compilation_cache, launch, no_arguments
from spatial_jax.config import ConfigError, build
from spatial_jax.data.image import PreprocessConfig, patch_image
from spatial_jax.data.pipeline import prefetch
from spatial_jax.data.prompt_text import TextConfig, observation_text, prompt_text
from spatial_jax.data.tokenizer import (
  IMAGE_PAD,
  VIDEO_PAD,
  VISION_END,
  VISION_START,
  Tokenizer,
  load_tokenizer,
  train_tokenizer,
)
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.parser import Coordinates, write_answer, write_turn
from spatial_jax.hf.export import publish
from spatial_jax.learn.gradient import Rows, gradient
from spatial_jax.learn.losses import Metrics, row_weights, sft_loss
from spatial_jax.learn.optimizer import OptimizerConfig, check_steps, make_optimizer
from spatial_jax.learn.train_batch import BatchConfig
from spatial_jax.learn.update import apply_gradient
from spatial_jax.policy.attention_mass import log_attention
from spatial_jax.policy.config import DecoderConfig, Family, QwenVLConfig, VisionConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.stages import loop
from spatial_jax.stages.loop import LoopConfig
from spatial_jax.synthetic.floorplan import ProceduralConfig, procedural_scene
from spatial_jax.synthetic.oracle import DemonstrationConfig, demonstrate
from spatial_jax.synthetic.questions import QuestionConfig, make_questions
from spatial_jax.synthetic.tasks import CameraConfig, render_views
from spatial_jax.types import Array, Params, PatchedImage, Task, TrainState
from spatial_jax.workdir import bind_workdir, to_path

CONFIG = config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
WORKDIR = flags.DEFINE_string(
  "workdir", None, "folder that the run is written to; one that exists is resumed", required=True
)

# What a resumed run may change: how long, how often it is saved, where to, and how far it pads.
MAY_DIFFER = ("loop", "optimizer.total_steps", "optimizer.decay_steps", "out", "shapes")

Names = tuple[tuple[int, ...], ...]  # tokens of each category's name


@dataclasses.dataclass(frozen=True)
class PretrainRun:
  """Everything `configs/tiny_pretrain.py` says.

  Attributes:
    seed: of initialisation and rooms.
    loop, recipe, optimizer, shapes: how long, what, how fast, in which shapes.
    rooms, camera, questions: what is shown and asked.
    text, preprocess, style: how it is put to the policy and drawn.
    family, vision, decoder: the policy's kind and shape.
    tokenizer_rooms: rooms whose conversations the BPE is learned from.
    tokenizer_words: words of other data (real rooms, photographs) that should be few tokens too.
    out: folder the policy is written to in Hugging Face form.
  """

  seed: int
  loop: LoopConfig
  recipe: PretrainConfig
  optimizer: OptimizerConfig
  shapes: BatchConfig
  rooms: ProceduralConfig
  camera: CameraConfig
  questions: QuestionConfig
  text: TextConfig
  preprocess: PreprocessConfig
  style: Style
  family: Family
  vision: VisionConfig
  decoder: DecoderConfig
  tokenizer_rooms: int
  tokenizer_words: tuple[str, ...]
  out: str

  def __post_init__(self):
    check_steps(self.optimizer, self.loop.steps)
    if self.text.response_prefix_fraction:
      raise ConfigError(
        "config.text.response_prefix_fraction must be 0: demonstrations speak for themselves"
      )


def pretrain(run: PretrainRun, workdir: pathlib.Path, config: dict[str, Any]) -> None:
  """Trains the embedded policy from nothing, resumably, and writes it in Hugging Face form."""
  tokenizer = _tokenizer(run, workdir)
  pad, video, start, end = (
    tokenizer.id(token) for token in (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END)
  )
  cfg = QwenVLConfig(run.vision, run.decoder, pad, video, start, end, 2, run.family)
  policy = make_policy(cfg, jnp.dtype("float32"), remat=False)
  builder = BatchBuilder(
    Conversation(tokenizer, run.text, run.preprocess, cfg),
    run.recipe,
    run.rooms,
    run.camera,
    run.questions,
    run.shapes,
    run.style,
    run.seed,
  )
  optimizer = make_optimizer(run.optimizer)
  params = {
    "policy": policy.init(rng.stream(run.seed, "init")),
    "heads": init_heads(run.decoder.width),
  }
  state = TrainState(params, optimizer.init(params), jnp.int32(0))
  names = tuple(tuple(tokenizer.encode(f" {name}")) for name in run.recipe.categories)
  update = pretrain_programs(policy, optimizer, run.recipe, names)

  def step_of(first: int):
    batches = prefetch(builder.batch, first, 2)
    return lambda state, _: update(state, next(batches))

  state = loop.run(workdir, run.loop, "pretrain", state, step_of, None, config)
  publish(state.params["policy"], cfg, tokenizer, run.preprocess, pathlib.Path(run.out))


def _tokenizer(run: PretrainRun, workdir: pathlib.Path) -> Tokenizer:
  """The work directory's tokenizer, learned from conversations about a few rooms the first time."""
  path = workdir / "tokenizer.json"
  if not path.exists():
    texts = [word for word in run.tokenizer_words for _ in range(8)]
    for number in range(run.tokenizer_rooms):
      scene = procedural_scene(number, run.rooms)
      views = render_views(scene, number, run.camera)
      images = [patch_image(view.image, run.preprocess) for view in views]
      rng_ = np.random.default_rng(number)
      for task in make_questions(scene, views, rng_, run.questions):
        texts.append(prompt_text(task, images, run.text))
        texts += _script_texts(task, images, rng_, run)
    partial = path.with_suffix(".partial")  # a run killed here starts over
    train_tokenizer(texts, run.decoder.vocabulary).inner.save(str(partial))
    partial.replace(path)
  return load_tokenizer(workdir)


def _script_texts(
  task: Task, images: list[PatchedImage], rng_: np.random.Generator, run: PretrainRun
) -> list[str]:
  sizes = tuple((image.pixels.shape[1], image.pixels.shape[0]) for image in images)
  texts = [observation_text(len(images) + 1, images[:1], True, run.text)]
  for turn in demonstrate(task, rng_, DemonstrationConfig(0.5, run.recipe.max_boxes)):
    if turn.answer is None:
      texts.append(write_turn(turn.think, turn.operations, Coordinates("pixels", sizes)))
    else:
      texts.append(write_answer(turn.think, turn.answer))
  return texts


def pretrain_programs(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  cfg: PretrainConfig,
  names: Names,
) -> Callable[[TrainState, PretrainBatch], tuple[TrainState, Metrics]]:
  """The two jitted updates behind one function; `state.params` is {"policy": ..., "heads": ...}.

  Args:
    policy, optimizer, cfg: static.
    names: tokens of each category's name.
  """
  vision_step = jax.jit(
    functools.partial(_vision_step, policy, optimizer, cfg, names), donate_argnums=0
  )
  answer_step = jax.jit(
    functools.partial(_answer_step, policy, optimizer, cfg, names), donate_argnums=0
  )

  def update(state: TrainState, data: PretrainBatch) -> tuple[TrainState, Metrics]:
    return vision_step(state, data) if data.rows is None else answer_step(state, data)

  return update


def _dense_gradient(
  policy: Policy, names: Names, params: Params, data: PretrainBatch, cfg: PretrainConfig
) -> tuple[Metrics, Params]:
  """Of what features show and, where there are rows, of where words look."""

  def loss(params: Params):
    table_VD = params["policy"]["decoder"]["embed"]["embedding"]
    names_ZD = jnp.stack([jnp.mean(table_VD[np.array(tokens)], axis=0) for tokens in names])
    features_MYD = policy.encode(params["policy"], data.vision)
    value, metrics = dense_loss(params["heads"]["cell"], features_MYD[:, 0], names_ZD, data.dense)
    if data.rows is None:
      return value, metrics
    more, words = _words_loss(policy, names, params, features_MYD, data, cfg)
    return value + more, metrics | words

  (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return {"dense_loss": value, **metrics}, grads


def _words_loss(
  policy: Policy,
  names: Names,
  params: Params,
  features_MYD: jax.Array,
  data: PretrainBatch,
  cfg: PretrainConfig,
) -> tuple[jax.Array, Metrics]:
  """Where words look and what they find, in the first row of every room.

  A name is known by its last token.
  """
  batch, dense = data.rows, data.dense
  assert batch is not None
  prefix = batch.prefix
  upto, upto_params = policy.truncate(params["policy"], cfg.point_layer + 1)
  _, keys = upto.prefill(
    upto_params,
    prefix.token_BT,
    prefix.position_BTA,
    prefix.valid_BT,
    features_MYD,
    prefix.feature_BT,
  )

  def first(x_RT: Array) -> jax.Array:
    by_room = jnp.asarray(x_RT).reshape(prefix.token_BT.shape[0], -1, *x_RT.shape[1:])
    return by_room[:, 0, : cfg.point_tokens]

  valid_BT = first(batch.valid_RT)
  rows = (first(batch.token_RT), first(batch.position_RTA), valid_BT)
  rows += (features_MYD, first(batch.feature_RT))
  log_BHTS = log_attention(policy, params["policy"], cfg.point_layer, keys, *rows)
  hidden_BTD = upto.hidden_with_prefix(upto_params, keys, *rows)
  category_V = np.zeros(policy.cfg.decoder.vocabulary, np.int32)
  category_V[[tokens[-1] for tokens in names]] = 1 + np.arange(len(names))
  name_BT = jnp.where(valid_BT, jnp.take(category_V, rows[0]), 0)
  subject_BT = subjects(name_BT, cfg.point_reach)
  known_M = jnp.where(jnp.asarray(dense.valid_M), jnp.asarray(dense.category_M), 0)
  shown_BS = jnp.take(known_M, prefix.feature_BT, mode="clip")
  shown_BS = jnp.where(jnp.asarray(prefix.feature_BT) >= 0, shown_BS, 0)
  truth_M4 = jnp.concatenate([dense.extent_M2, dense.place_M6[:, 4:]], axis=1)
  truth_BS4 = jnp.take(truth_M4, prefix.feature_BT, axis=0, mode="clip")
  where = (log_BHTS[:, 0], subject_BT, shown_BS)
  pointing, looks = pointing_loss(*where)
  finding, finds = finding_loss(params["heads"]["word"], hidden_BTD, *where, truth_BS4)
  return pointing + finding, looks | finds


def _vision_step(policy, optimizer, cfg, names, state: TrainState, data: PretrainBatch):
  metrics, grads = _dense_gradient(policy, names, state.params, data, cfg)
  return apply_gradient(optimizer, state, grads, metrics)


def _answer_step(policy, optimizer, cfg, names, state: TrainState, data: PretrainBatch):
  def loss_of_rows(logp_RT: jax.Array, rows: Rows) -> tuple[jax.Array, Metrics]:
    return sft_loss(logp_RT, rows.trained_RT, rows.weight_R), {}

  batch = data.rows
  assert batch is not None
  weight_R = row_weights(batch.trained_RT, "token")
  loss, _, grads = gradient(
    policy, state.params["policy"], batch, weight_R, None, loss_of_rows, cfg.micro
  )
  metrics, dense_grads = _dense_gradient(policy, names, state.params, data, cfg)
  scaled = jax.tree.map(lambda g: cfg.dense_weight * g, dense_grads)
  total = {"policy": jax.tree.map(jnp.add, grads, scaled["policy"]), "heads": scaled["heads"]}
  return apply_gradient(optimizer, state, total, {"loss": loss, **metrics})


def main(arguments: Sequence[str]) -> None:
  """Builds the config, claims the work directory and pretrains."""
  no_arguments(arguments)
  enable_compilation_cache()
  workdir, resolved = to_path(WORKDIR.value), json.loads(CONFIG.value.to_json_best_effort())
  run = build(PretrainRun, dict(CONFIG.value))
  bind_workdir(workdir, resolved, MAY_DIFFER)
  pretrain(run, workdir, resolved)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  launch(main, "stopped; the same command goes on from the last checkpoint")
