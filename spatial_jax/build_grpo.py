"""Builds the GRPO stage: rollout engine, update programs, and the reference of its KL term."""

import functools
import pathlib

from spatial_jax import compiled
from spatial_jax.data.source import Source, prompt_stream, refill_prompts
from spatial_jax.rollout import memory
from spatial_jax.rollout.encode import PromptEncoder
from spatial_jax.stages.context import RunContext
from spatial_jax.stages.grpo import GrpoStage, update_config
from spatial_jax.stages.health import BlindCheck
from spatial_jax.stages.reference import MovingAverage, StartCopy, StartWithAdapters
from spatial_jax.stages.replaced import ReplacedTasks
from spatial_jax.stages.sampling import Sampler
from spatial_jax.stages.updates import Reference, Updater, image_batches, minibatches
from spatial_jax.train_config import TrainConfig, TrainingParts, resident_bytes, whole_plan


def make_grpo(
  cfg: TrainConfig,
  context: RunContext,
  parts: TrainingParts,
  source: Source,
  workdir: pathlib.Path,
) -> GrpoStage:
  """The stage without its KL reference.

  Raises:
    ConfigError: if rollouts or update do not fit the devices; nothing was allocated.
  """
  resident = resident_bytes(cfg, parts.policy, parts.optimizer)
  engine = context.engine(cfg.rollout, resident, "config.rollout.slots")
  whole = whole_plan(cfg, parts)
  print(whole)
  memory.check(whole, "config.rollout.slots")
  learn, encode = cfg.learn, PromptEncoder(context.conversation, engine.cfg)
  programs = compiled.LearnPrograms(
    parts.policy, parts.optimizer, learn.loss, learn.micro, learn.reward.attention
  )
  parts_of_images = image_batches(learn.minibatches, learn.reward, learn.loss.kl)
  sampler = Sampler(
    engine=engine,
    decode_params=context.decode_params,
    keep_features=not context.policy.vision_trainable,
    reward=learn.reward,
    shapes=parts.shapes,
    batches=lambda step: minibatches(cfg.seed, step, cfg.rollout.prompts, parts_of_images),
    seed=cfg.seed,
    max_refills=learn.max_refills,
    refill=functools.partial(refill_prompts, source, encode, cfg.seed),
    replaced=ReplacedTasks(),
    place=programs.place,
    attention=programs.attention,
  )
  blind = BlindCheck(
    learn.health, parts.shapes, programs.local_row_shards, programs.place, programs.policy_logprobs
  )
  return GrpoStage(
    sampler=sampler,
    updater=Updater(programs, update_config(learn), parts.shapes, cfg.seed, None),
    prompt_stream=lambda first: prompt_stream(
      source, encode, cfg.seed, first, cfg.rollout.prompts, cfg.pipeline
    ),
    cfg=learn,
    steps=cfg.loop.steps,
    workdir=workdir,
    blind=blind if learn.health.blind_every else None,
  )


def reference_of(
  cfg: TrainConfig, context: RunContext, start: StartCopy | None
) -> Reference | None:
  """The reference of the KL term; `start` is a copy of the start, if one is needed."""
  kl = cfg.learn.loss.kl
  if not kl.weight:
    return None
  if kl.reference == "average":
    return MovingAverage(context.policy.frozen)
  return StartWithAdapters() if start is None else start
