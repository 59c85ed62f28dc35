"""One small reinforcement-learning step with drawing, on any mesh."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiny.tokenizer import train_tokenizer
from spatial_jax import compiled, sharding
from spatial_jax.compiled import LearnPrograms
from spatial_jax.data.chat_template import CHATML
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from spatial_jax.drawing.parser import Coordinates, Limits, Parsed
from spatial_jax.drawing.termination import StopLimits, end_reason
from spatial_jax.grammar import Grammar
from spatial_jax.learn.advantage import advantage
from spatial_jax.learn.gradient import NO_OTHERS
from spatial_jax.learn.optimizer import OptimizerConfig, make_optimizer
from spatial_jax.learn.train_batch import (
  BatchConfig,
  Microbatches,
  downsample_rollouts,
  to_train_batch,
)
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.reward.compose import score
from spatial_jax.rollout import request, scheduler
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.engine import Engine
from spatial_jax.stages.context import make_engine
from spatial_jax.types import ImageRef, Operation, Params, Rollouts, Task, TrainState
from tests import dummies
from tests.learn_fixtures import loss_config
from tests.policy_fixtures import (
  PREPROCESS,
  VIDEO_CONFIG,
  hashed_params,
  pixels,
  small_config,
  with_ids,
)
from tests.rollout_fixtures import FORM, SAMPLED, STYLE

VOCABULARY = 288
TOKENIZER = train_tokenizer(["How far is the chair from the table, in meters?"] * 4, VOCABULARY)
ROLLOUT = RolloutConfig(
  prompts=4,
  group=2,
  slots=4,
  rows=0,
  prefill=(4,),
  append=(4,),
  decode_steps=4,
  gather_fractions=(0.5,),
  schedule="logical",
  drawing_delay=1,
  weights="compute",
  sampling=SAMPLED,
  max_tokens_per_turn=6,
  stop=StopLimits(
    max_turns=2, max_images=4, max_image_tokens=256, max_response_tokens=64, near_duplicate_px=0.0
  ),
  stop_tokens=("<|im_end|>",),
  stop_strings=(),
  limits=Limits(4, 2000, 8, 8, 40, 6),
  prompt_buckets=(64,),
  observation_buckets=(48,),
  suffix_block_edges=(5,),
  feature_buffer_tokens=256,
  vision=VisionBuckets((16, 48), (4, 12), (64,)),
)
# A small learning rate and a large epsilon, or Adam turns rounding errors into full steps.
FLOAT32 = ("float32", "float32")  # moments and gradients
OPTIMIZER = OptimizerConfig(
  *("adamw", 3e-3, (), "constant", 0, 100, 0, 0.9, 0.95, 1e-5, *FLOAT32, 0.01, 1.0, True, (), 0.0)
)
KEEP_FRACTION, BLOCKS = 0.5, 4
SHAPES = BatchConfig((128,), 128, VisionBuckets((48,), (12,), (64,)), 2, VOCABULARY)
LOSS = loss_config(normalise="token")
MICRO = Microbatches(1, (32, 128))


def step_config() -> QwenVLConfig:
  """The small policy with the tokenizer's ids; two KV heads, so that `tensor` may be 2."""
  cfg = small_config(tied=True)
  decoder = dataclasses.replace(cfg.decoder, vocabulary=VOCABULARY)
  return with_ids(cfg.vision, decoder, TOKENIZER)


@dataclasses.dataclass(frozen=True, eq=False)
class StepSetup:
  """Everything one step needs, on one mesh."""

  engine: Engine
  learn: LearnPrograms
  decode_params: Callable[[Params], Params]
  state: TrainState
  policy: Policy
  mesh: jax.sharding.Mesh


class Outcome(NamedTuple):
  """The results of a step."""

  rollouts: Rollouts
  state: TrainState
  metrics: dict
  weights: Params


def step_setup(
  data: int, fsdp: int, tensor: int, rollout: RolloutConfig = ROLLOUT, dtype=jnp.float32
) -> StepSetup:
  """The start of a run with hashed weights, which are the same on every mesh."""
  mesh_cfg = sharding.MeshConfig(data, fsdp, tensor)
  mesh = sharding.make_mesh(mesh_cfg, jax.devices()[: data * fsdp * tensor])
  cfg = step_config()
  policy, optimizer = make_policy(cfg, dtype, mesh), make_optimizer(OPTIMIZER)
  # Smaller weights: the large logits of the parity cases lose a digit to rounding.
  params = jax.tree.map(lambda x: x * jnp.float32(0.7), hashed_params(cfg, 3))
  params = jax.device_put(params, sharding.param_shardings(params, mesh))
  conversation = Conversation(TOKENIZER, FORM, CHATML, PREPROCESS, VIDEO_CONFIG, cfg)
  executor = Executor(ExecutorConfig(0, 20.0, 1024), STYLE)
  return StepSetup(
    engine=make_engine(policy, conversation, executor, rollout, 0, "config.rollout.slots"),
    learn=compiled.LearnPrograms(policy, optimizer, LOSS, MICRO),
    policy=policy,
    decode_params=compiled.decode_params(policy, mesh, rollout.weights),
    state=compiled.init_state(policy, optimizer, params, mesh),
    mesh=mesh,
  )


def tasks(first: int) -> list[Task]:
  """One question per prompt, each about another image."""
  return [
    dataclasses.replace(
      dummies.number_task(np.random.default_rng(i), f"task-{i}"),
      question="How far is the chair?",
      media=(ImageRef(pixels(i, 24, 24)),),
    )
    for i in range(first, first + ROLLOUT.prompts)
  ]


def make_rollouts_draw(monkeypatch: pytest.MonkeyPatch) -> None:
  """Makes half of the first turns draw a box, chosen by their text: random weights never draw."""

  def parse(text: str, coordinates: Coordinates, limits: Limits, grammar: Grammar) -> Parsed:
    box = Operation("box", 1, (2.0, 3.0, 15.0, 4.0 + len(text)), "a")
    draws = len(coordinates.sizes) == 1 and zlib.crc32(text.encode()) % 2 == 0
    return Parsed((box,) if draws else (), (), None, False)

  def end_reason_of(turns, images, tokens, truncated, limits):
    return end_reason(turns, images, tokens, False, limits)

  monkeypatch.setattr(request, "parse", parse)
  monkeypatch.setattr(request, "end_reason", end_reason_of)


def step(setup: StepSetup, state: TrainState, number: int) -> Outcome:
  """tasks -> prompts -> rollouts -> scores -> advantages -> batch -> update; `state` is donated."""
  questions = tasks(100 * number)
  prompts = [setup.engine.conversation.prompt(task) for task in questions]
  weights = setup.decode_params(state.params)
  job = scheduler.RolloutJob(prompts, 0, number, [SAMPLED] * ROLLOUT.group)
  rollouts = scheduler.generate_rollouts(setup.engine, weights, job)
  scores = score(rollouts, questions, dummies.REWARD, 2.0)
  # Random weights never answer; without different rewards the update would change nothing.
  random_BG = np.random.default_rng(number).random(scores.reward_BG.shape, np.float32)
  scores = scores._replace(reward_BG=random_BG, accuracy_BG=random_BG)
  advantage_BG = np.asarray(advantage(scores, dummies.ADVANTAGE))
  # Blocks of the largest mesh, so that every mesh keeps the same rows.
  kept_BG = downsample_rollouts(advantage_BG, KEEP_FRACTION, BLOCKS)
  batch, _ = to_train_batch(rollouts, advantage_BG, SHAPES, kept_BG)
  state, metrics = setup.learn.update(state, setup.learn.place(batch), NO_OTHERS)
  return Outcome(rollouts, state, metrics, weights)
