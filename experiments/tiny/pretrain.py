"""Entry point: python -m experiments.tiny.pretrain --config=configs/tiny_pretrain.py --workdir=DIR

Pretrains the embedded policy from random parameters.

    room ─► images ─► dense targets per visual token ──────────► dense losses ─┐
              └► questions ─► demonstrations (drawing, answer) ─► SFT loss ────┴─► one update

Each step renders some rooms and makes a group of questions about each; the vision tower and the
prefix run once per image. The first `vision_steps` steps train the vision tower alone.
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
from ml_collections import ConfigDict, config_flags

from experiments.tiny.attention_mass import log_attention, truncate
from experiments.tiny.batches import BatchBuilder, PretrainBatch, RecipeConfig
from experiments.tiny.dense_loss import (
  dense_loss,
  finding_loss,
  init_heads,
  pointing_loss,
  subjects,
)
from experiments.tiny.tokenizer import train_tokenizer
from spatial_jax import rng, sharding
from spatial_jax.checks import MAX_SEED
from spatial_jax.cli import CONFIG_HELP, enable_compilation_cache, launch, no_arguments
from spatial_jax.config import ConfigError, build, check_field, check_whole
from spatial_jax.data.background import prefetch
from spatial_jax.data.chat_template import CHATML
from spatial_jax.data.image import PreprocessConfig, patch_image
from spatial_jax.data.prompt_form import PromptForm, form_record, read_form
from spatial_jax.data.prompt_text import observation_text, prompt_text
from spatial_jax.data.tokenizer import (
  IMAGE_PAD,
  VIDEO_PAD,
  VISION_END,
  VISION_START,
  Tokenizer,
  load_tokenizer,
)
from spatial_jax.data.video import VideoConfig
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.parser import Coordinates
from spatial_jax.hf import export, weights
from spatial_jax.learn.gradient import Microbatch, Objective, gradient
from spatial_jax.learn.losses import Metrics, nll, token_weights
from spatial_jax.learn.optimizer import OptimizerConfig, check_steps, make_optimizer
from spatial_jax.learn.train_batch import BatchConfig
from spatial_jax.learn.update import apply_gradient
from spatial_jax.policy.config import DecoderConfig, Family, QwenVLConfig, VisionConfig
from spatial_jax.policy.logprobs import TokenScores
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.demonstration import write_answer, write_turn
from spatial_jax.stages import loop
from spatial_jax.stages.loop import LoopConfig
from spatial_jax.synthetic.floorplan import ProceduralConfig, procedural_scene
from spatial_jax.synthetic.oracle import DemonstrationConfig, demonstrate
from spatial_jax.synthetic.questions import QuestionConfig, make_questions
from spatial_jax.synthetic.tasks import CameraConfig, render_views
from spatial_jax.types import Array, Params, PatchedImage, Task, TrainState
from spatial_jax.workdir import bind_workdir, to_path, write_text

# Config keys that may differ when a run is resumed.
MAY_DIFFER = (
  *("loop", "optimizer.total_steps", "optimizer.warmup_steps", "optimizer.decay_steps"),
  *("out", "shapes", "text"),
)

Names = tuple[tuple[int, ...], ...]  # tokens of the name of each category


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """The config of pretraining, as in `configs/tiny_pretrain.py`.

  Attributes:
    seed: of initialisation and rooms.
    loop, recipe, optimizer, shapes: steps, batches and losses, optimizer, static shapes.
    rooms, camera, questions: the data.
    text, preprocess, video, style: prompt form, patches, drawings.
    family, vision, decoder: family and shape of the policy.
    tokenizer_rooms: number of rooms whose conversations train the tokenizer, >= 1.
    tokenizer_words: words of other data (real rooms, photographs) for the tokenizer.
    out: folder for the trained policy in Hugging Face form.
  """

  seed: int
  loop: LoopConfig
  recipe: RecipeConfig
  optimizer: OptimizerConfig
  shapes: BatchConfig
  rooms: ProceduralConfig
  camera: CameraConfig
  questions: QuestionConfig
  text: str
  preprocess: PreprocessConfig
  video: VideoConfig
  style: Style
  family: Family
  vision: VisionConfig
  decoder: DecoderConfig
  tokenizer_rooms: int
  tokenizer_words: tuple[str, ...]
  out: str

  def __post_init__(self):
    check_steps(self.optimizer, self.loop.steps)
    check_whole(self, "seed", at_least=0, at_most=MAX_SEED)
    check_whole(self, "tokenizer_rooms", at_least=1)
    check_field(self, "out", bool(self.out), "name a folder")
    if self.recipe.pointing_layer >= self.decoder.layers:
      raise ConfigError(
        f"config.recipe.pointing_layer is {self.recipe.pointing_layer} and must be at most"
        f" {self.decoder.layers - 1}, the last of config.decoder.layers"
      )
    if self.recipe.micro.lengths[-1] < self.shapes.tokens:
      raise ConfigError(
        f"config.recipe.micro.lengths ends at {self.recipe.micro.lengths[-1]} and must be at least"
        f" config.shapes.tokens, {self.shapes.tokens}"
      )


def pretrain(cfg: PretrainConfig, workdir: pathlib.Path, config: dict[str, Any]) -> None:
  """Trains the embedded policy from random parameters and writes it in Hugging Face form."""
  form = read_form(cfg.text)
  tokenizer = _tokenizer(cfg, form, workdir)
  pad, video, start, end = (
    tokenizer.id(token) for token in (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END)
  )
  policy_cfg = QwenVLConfig(cfg.vision, cfg.decoder, pad, video, start, end, 2, cfg.family)
  policy = make_policy(policy_cfg, jnp.dtype("float32"), remat=False)
  builder = BatchBuilder(
    Conversation(tokenizer, form, CHATML, cfg.preprocess, cfg.video, policy_cfg),
    cfg.recipe,
    cfg.rooms,
    cfg.camera,
    cfg.questions,
    cfg.shapes,
    cfg.style,
    cfg.seed,
  )
  optimizer = make_optimizer(cfg.optimizer)
  params = {
    "policy": policy.init(rng.stream(cfg.seed, "init")),
    "heads": init_heads(cfg.decoder.width),
  }
  state = TrainState(params, optimizer.init(params), jnp.int32(0))
  names = tuple(tuple(tokenizer.encode(f" {name}")) for name in cfg.recipe.categories)
  update = pretrain_programs(policy, optimizer, cfg.recipe, names)

  def step_of(first: int):
    batches = prefetch(builder.batch, first, 2)
    return lambda state, _: update(state, next(batches))

  state = loop.run(workdir, cfg.loop, "pretrain", state, step_of, None, None, config)
  out, params = to_path(cfg.out), state.params["policy"]
  weights.save(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), policy_cfg, out)
  export.write_files(tokenizer, CHATML, cfg.preprocess, out, None)


def _tokenizer(cfg: PretrainConfig, form: PromptForm, workdir: pathlib.Path) -> Tokenizer:
  """The tokenizer of the work directory; the first call trains it on conversations about rooms."""
  path = workdir / "tokenizer.json"
  if not path.exists():
    texts = [word for word in cfg.tokenizer_words for _ in range(8)]
    for number in range(cfg.tokenizer_rooms):
      scene = procedural_scene(number, cfg.rooms)
      views = render_views(scene, number, cfg.camera)
      images = [patch_image(view.image, cfg.preprocess) for view in views]
      generator = np.random.default_rng(number)
      for task in make_questions(scene, views, generator, cfg.questions):
        texts.append(prompt_text(task, images, form.text, CHATML))
        texts += _script_texts(task, images, generator, cfg, form)
    write_text(path, train_tokenizer(texts, cfg.decoder.vocabulary).inner.to_str(pretty=True))
  return load_tokenizer(workdir)


def _script_texts(
  task: Task,
  images: list[PatchedImage],
  generator: np.random.Generator,
  cfg: PretrainConfig,
  form: PromptForm,
) -> list[str]:
  sizes = tuple((image.pixels.shape[1], image.pixels.shape[0]) for image in images)
  texts = [observation_text(len(images) + 1, images[:1], True, form.text, CHATML)]
  for turn in demonstrate(task, generator, DemonstrationConfig(0.5, cfg.recipe.max_boxes)):
    if turn.answer is None:
      texts.append(write_turn(turn.think, turn.operations, Coordinates("pixels", sizes)))
    else:
      texts.append(write_answer(turn.think, turn.answer))
  return texts


def pretrain_programs(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  cfg: RecipeConfig,
  names: Names,
) -> Callable[[TrainState, PretrainBatch], tuple[TrainState, Metrics]]:
  """The update of a step, jitted for vision steps and for answer steps.

  `state.params` is {"policy": ..., "heads": ...}.

  Args:
    policy, optimizer, cfg: static.
    names: tokens of the name of each category.
  """
  vision_step = jax.jit(
    functools.partial(_vision_step, policy, optimizer, cfg, names), donate_argnums=0
  )
  answer_step = jax.jit(
    functools.partial(_answer_step, policy, optimizer, cfg, names), donate_argnums=0
  )

  def update(state: TrainState, batch: PretrainBatch) -> tuple[TrainState, Metrics]:
    return vision_step(state, batch) if batch.answers is None else answer_step(state, batch)

  return update


def _dense_gradient(
  policy: Policy, names: Names, params: Params, batch: PretrainBatch, cfg: RecipeConfig
) -> tuple[Metrics, Params]:
  """Metrics and gradient of the dense losses; pointing and finding need answers."""

  def loss(params: Params):
    table_VD = params["policy"]["decoder"]["embed"]["embedding"]
    names_ZD = jnp.stack([jnp.mean(table_VD[np.array(tokens)], axis=0) for tokens in names])
    features_MYD = policy.encode(params["policy"], batch.vision)
    value, metrics = dense_loss(
      params["heads"]["cell"], features_MYD[:, 0], names_ZD, batch.dense_targets
    )
    if batch.answers is None:
      return value, metrics
    words_value, words_metrics = _words_loss(policy, names, params, features_MYD, batch, cfg)
    return value + words_value, metrics | words_metrics

  (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return {"dense_loss": value, **metrics}, grads


def _words_loss(
  policy: Policy,
  names: Names,
  params: Params,
  features_MYD: jax.Array,
  batch: PretrainBatch,
  cfg: RecipeConfig,
) -> tuple[jax.Array, Metrics]:
  """Pointing and finding loss of the first row of every room.

  The last token of a name identifies its category.
  """
  answers, dense = batch.answers, batch.dense_targets
  assert answers is not None
  prefix = answers.prefix
  lower, lower_params = truncate(policy, params["policy"], cfg.pointing_layer + 1)
  _, keys = lower.prefill(lower_params, prefix, features_MYD)

  def first(x_RT: Array) -> jax.Array:
    by_room = jnp.asarray(x_RT).reshape(prefix.token_RT.shape[0], -1, *x_RT.shape[1:])
    return by_room[:, 0, : cfg.pointing_tokens]

  tokens = jax.tree.map(first, answers.rows.tokens)
  valid_BT = tokens.valid_RT
  layer = cfg.pointing_layer
  log_BHTS = log_attention(policy, params["policy"], layer, keys, tokens, features_MYD)
  hidden_BTD = lower.hidden_with_prefix(lower_params, keys, tokens, features_MYD)
  category_V = np.zeros(policy.cfg.decoder.vocabulary, np.int32)
  category_V[[tokens[-1] for tokens in names]] = 1 + np.arange(len(names))
  name_BT = jnp.where(valid_BT, jnp.take(category_V, tokens.token_RT), 0)
  subject_BT = subjects(name_BT, cfg.pointing_reach)
  category_M = jnp.where(jnp.asarray(dense.valid_M), jnp.asarray(dense.category_M), 0)
  shown_BS = jnp.take(category_M, prefix.feature_RT, mode="clip")
  shown_BS = jnp.where(jnp.asarray(prefix.feature_RT) >= 0, shown_BS, 0)
  truth_M4 = jnp.concatenate([dense.extent_M2, dense.place_M6[:, 4:]], axis=1)
  truth_BS4 = jnp.take(truth_M4, prefix.feature_RT, axis=0, mode="clip")
  attention = (log_BHTS[:, 0], subject_BT, shown_BS)
  pointing, pointing_metrics = pointing_loss(*attention)
  finding, finding_metrics = finding_loss(
    params["heads"]["word"], hidden_BTD, *attention, truth_BS4
  )
  return pointing + finding, pointing_metrics | finding_metrics


def _vision_step(policy, optimizer, cfg, names, state: TrainState, batch: PretrainBatch):
  metrics, grads = _dense_gradient(policy, names, state.params, batch, cfg)
  return apply_gradient(optimizer, state, grads, metrics)


def _answer_step(policy, optimizer, cfg, names, state: TrainState, batch: PretrainBatch):
  def answer_loss(scores: TokenScores, microbatch: Microbatch) -> tuple[jax.Array, Metrics]:
    return nll(scores.logp_RT, microbatch.rows.trained_RT, microbatch.token_weight_R), {}

  answers = batch.answers
  assert answers is not None
  weight_R = token_weights(answers.rows.trained_RT, "token", answers.rows.weight_R)
  objective = Objective(answer_loss, is_sum_of_tokens=True)
  loss, _, grads = gradient(
    policy, state.params["policy"], answers, weight_R, None, objective, cfg.micro
  )
  metrics, dense_grads = _dense_gradient(policy, names, state.params, batch, cfg)
  scaled = jax.tree.map(lambda g: cfg.dense_weight * g, dense_grads)
  total = {"policy": jax.tree.map(jnp.add, grads, scaled["policy"]), "heads": scaled["heads"]}
  return apply_gradient(optimizer, state, total, {"loss": loss, **metrics})


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Builds the config, binds the work directory to it and pretrains.

  Raises:
    UserError: if config or work directory cannot be used.
  """
  resolved = json.loads(config.to_json_best_effort())
  cfg = build(PretrainConfig, dict(config))
  resolved["form"] = form_record(read_form(cfg.text))
  sharding.refuse_several_processes()
  to_path(cfg.out)  # refuses a remote one
  bind_workdir(workdir, resolved, MAY_DIFFER)
  pretrain(cfg, workdir, resolved)


def main(arguments: Sequence[str]) -> None:
  """Pretrains with the config and the work directory of the command line."""
  no_arguments(arguments)
  enable_compilation_cache()
  run(flags.FLAGS.config, to_path(flags.FLAGS.workdir))


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
  flags.DEFINE_string("workdir", None, "folder of the run; an existing run is resumed")
  flags.mark_flags_as_required(["config", "workdir"])
  launch(main, "stopped; the same command continues from the last checkpoint")
