"""Reinforcement learning from verifiable rewards: GRPO and AP-GRPO.

tasks ─► prompts ─► rollouts (with drawing) ─► scores ─► advantages ─► batch ─► update
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import jax
import numpy as np

from spatial_jax.checks import is_ascending
from spatial_jax.config import check_choice, check_field, check_number, check_whole
from spatial_jax.data.pipeline import PromptBatch
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.learn.advantage import AdvantageConfig, advantage
from spatial_jax.learn.losses import LossConfig
from spatial_jax.learn.optimizer import OptimizerConfig
from spatial_jax.learn.train_batch import (
  BatchConfig,
  Microbatches,
  downsample_rollouts,
  to_train_batch,
)
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.reward.compose import RewardConfig, score
from spatial_jax.reward.snra import sharpness
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.profiling import Timeline, save_timeline
from spatial_jax.rollout.saved_groups import make_saved_groups, most_drawings_first, save_groups
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.rollout.trajectory import limit_images
from spatial_jax.types import (
  Array,
  Params,
  Prompts,
  Rollouts,
  Scores,
  StageStep,
  TrainBatch,
  TrainState,
)


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
  """The config of a GRPO stage."""

  # reward, advantage, loss, optimizer: of what follows the rollouts.
  reward: RewardConfig
  advantage: AdvantageConfig
  loss: LossConfig
  optimizer: OptimizerConfig
  keep_fraction: float  # fraction of the rollouts that the update uses; see `downsample_rollouts`
  prefix_buckets: tuple[int, ...]  # padded lengths of prompts in the update, tokens
  vision: VisionBuckets  # padded sizes of the images in the update
  micro: Microbatches  # rows and padded lengths of the microbatches of the update
  # Where the KL reference is between two uses, if it is a copy of the start; see
  # `stages.reference`.
  reference: Literal["device", "host"]
  # Steps between two steps whose rollouts are saved for the report; 0: never.
  save_rollouts_every: int
  saved_groups: int  # number of groups that are saved, those with the most drawings

  def __post_init__(self):
    check_number(self, "keep_fraction", above=0, at_most=1)
    valid = is_ascending(self.prefix_buckets, 1)
    check_field(self, "prefix_buckets", valid, "be ascending, from 1 on")
    check_choice(self, "reference")
    check_whole(self, "save_rollouts_every", "saved_groups", at_least=0)


class UpdatePrograms(Protocol):
  """What the update runs on the devices; `compiled.LearnPrograms` are the programs."""

  local_row_shards: int  # devices over which the rows of one process are sharded

  def place(self, batch: TrainBatch, /) -> TrainBatch:
    """Moves a NumPy batch to the devices."""
    ...

  def logprobs(self, params: Params, batch: TrainBatch, /) -> Array:
    """Log-probabilities [R, T] of a batch under a reference policy, without adapters."""
    ...

  def update(
    self, state: TrainState, batch: TrainBatch, ref_logp_RT: Array | None, /
  ) -> tuple[TrainState, Mapping[str, Any]]:
    """One optimizer step, see `learn.update.policy_update`; the state is donated."""
    ...


class Reference(Protocol):
  """The reference policy, if it is a copy of the start; `stages.reference` has the class."""

  def on_devices(self, params: Params, /) -> Params:
    """All its parameters; the frozen ones are those of the policy, `params`."""
    ...


def batch_config(learn: GrpoConfig, policy: QwenVLConfig) -> BatchConfig:
  """The static shapes of the update."""
  return BatchConfig(
    prefix_buckets=learn.prefix_buckets,
    tokens=learn.micro.lengths[-1],
    vision=learn.vision,
    window_blocks=policy.vision.window_blocks,
    vocabulary=policy.decoder.vocabulary,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class GrpoStage:
  """Everything that a GRPO step needs besides the train state and the step number."""

  engine: Engine  # generates rollouts
  programs: UpdatePrograms  # of the update
  decode_params: Callable[[Params], Params]  # train parameters -> decode parameters
  # True if the vision tower is frozen: the update uses the image features of the rollouts.
  keep_features: bool
  # First step -> the prompts of that step and the following ones, made in the background.
  prompt_stream: Callable[[int], Iterator[PromptBatch]]
  # cfg, shapes: of the stage, and its static shapes.
  cfg: GrpoConfig
  shapes: BatchConfig
  # steps, seed: of the run.
  steps: int
  seed: int
  # The reference policy; None without a KL term, or if it is the policy without its adapters.
  reference: Reference | None
  workdir: pathlib.Path  # of the saved rollouts

  def sharpness(self, step: int) -> float:
    """k of the smooth rewards in a step."""
    return float(sharpness(step / self.steps, self.cfg.reward.schedule))

  def step_function(self, first: int) -> StageStep:
    """The function of one step, for a run that begins with the step `first`."""
    stream = self.prompt_stream(first)

    def run(state: TrainState, step: int) -> tuple[TrainState, Mapping[str, Any]]:
      batch = next(stream)
      for reason in batch.replaced:
        print(f"warning: replaced by another task: {reason}")
      state, metrics = self.step(state, step, batch.prompts)
      return state, {**metrics, "replaced_tasks": len(batch.replaced)}

    return run

  def step(
    self, state: TrainState, step: int, prompts: Prompts
  ) -> tuple[TrainState, Mapping[str, Any]]:
    """One step: prompts, rollouts, scores, advantages, batch, update.

    Args:
      state: donated.
      step: from 0.
      prompts: of this step.

    Returns:
      The next state and the metrics of the step.
    """
    cfg = self.cfg
    sampling_params = [self.engine.cfg.sampling] * self.engine.cfg.group
    k = self.sharpness(step)
    begin = time.monotonic()
    weights = self.decode_params(state.params)
    image_features = {} if self.keep_features else None
    with Timeline() as timeline:
      job = RolloutJob(prompts, self.seed, step, sampling_params, image_features, timeline=timeline)
      rollouts = generate_rollouts(self.engine, weights, job)
    rollouts, too_many_images = limit_images(rollouts, self.shapes.visual_tokens)
    del weights  # the update needs the memory
    rollout_s = time.monotonic() - begin

    scores = score(rollouts, [prompt.task for prompt in prompts], cfg.reward, k)
    advantages_BG = np.asarray(advantage(scores, cfg.advantage))
    kept_BG = downsample_rollouts(advantages_BG, cfg.keep_fraction, self.programs.local_row_shards)
    batch, _ = to_train_batch(rollouts, advantages_BG, self.shapes, kept_BG, image_features)
    batch = self.programs.place(batch)
    ref_logp_RT = self.reference_logprobs(state.params, batch) if cfg.loss.kl_weight else None
    state, metrics = self.programs.update(state, batch, ref_logp_RT)
    self._save(step, prompts, rollouts, scores, advantages_BG, timeline)

    metrics = jax.device_get(metrics)
    update_s = time.monotonic() - begin - rollout_s
    return state, {
      **metrics,
      **summarise(rollouts, scores, advantages_BG),
      "sharpness": k,
      "too_many_images": too_many_images,
      "rollout_s": rollout_s,
      "update_s": update_s,
      **timeline.summary(),
      "tokens_per_s": sum(t.trained_T.sum() for group in rollouts for t in group) / rollout_s,
    }

  def reference_logprobs(self, params: Params, batch: TrainBatch) -> Array:
    """Log-probabilities [R, T] of a batch under the reference of the policy with `params`."""
    if self.reference is None:
      return self.programs.logprobs(params, batch)  # leaves the adapters out
    logp_RT = self.programs.logprobs(self.reference.on_devices(params), batch)
    return jax.block_until_ready(logp_RT)  # the update needs the memory of a reference on the host

  def _save(
    self,
    step: int,
    prompts: Prompts,
    rollouts: Rollouts,
    scores: Scores,
    advantages_BG: np.ndarray,
    timeline: Timeline,
  ) -> None:
    """Every `save_rollouts_every` steps: saves rollouts and timeline for the report."""
    cfg = self.cfg
    if not cfg.save_rollouts_every or step % cfg.save_rollouts_every:
      return
    groups = make_saved_groups(prompts, rollouts, scores, advantages_BG, step)
    save_groups(most_drawings_first(groups, cfg.saved_groups), self.workdir)
    save_timeline(timeline, step, self.workdir)


def summarise(rollouts: Rollouts, scores: Scores, advantages_BG: np.ndarray) -> dict[str, float]:
  """Statistics of one step: means over valid rollouts, a share of groups, the number of faults."""
  valid_BG = scores.valid_BG
  turns = [[len(t.turns) for t in group] for group in rollouts]
  drawn = [[any(turn.produced for turn in t.turns) for t in group] for group in rollouts]
  lengths = [[t.trained_T.sum() for t in group] for group in rollouts]

  def mean(values_BG: Any) -> float:
    return float(np.asarray(values_BG, np.float32)[valid_BG].mean()) if valid_BG.any() else 0.0

  return {
    "reward": mean(scores.reward_BG),
    "accuracy": mean(scores.accuracy_BG),
    "score": mean(scores.score_BG),
    "format": mean(scores.format_BG),
    "parsed": mean(scores.parsed_BG),
    "drawing_share": mean(drawn),
    "turns": mean(turns),
    "response_tokens": mean(lengths),
    "zero_variance_groups": zero_variance_share(scores),
    "advantage_abs": mean(np.abs(advantages_BG)),
    "faults": float((~valid_BG).sum()),
  }


def zero_variance_share(scores: Scores) -> float:
  """Share of the groups with at least two valid rollouts whose rewards are (nearly) equal."""
  groups = zip(np.asarray(scores.reward_BG), scores.valid_BG, strict=True)
  rewards = [reward_G[usable_G] for reward_G, usable_G in groups if usable_G.sum() > 1]
  return float(np.mean([np.std(reward_G) < 0.01 for reward_G in rewards])) if rewards else 0.0
