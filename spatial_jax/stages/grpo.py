"""Reinforcement learning from verifiable rewards: GRPO and its relatives.

tasks ─► prompts ─► rollouts (with drawing) ─► scores ─► advantages ─► batches ─► updates
         └──────────── stages/sampling.py ───────────┘                └ stages/updates.py ┘
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from spatial_jax.checks import is_ascending
from spatial_jax.config import FieldError, check_choice, check_field, check_number, check_whole
from spatial_jax.data.pipeline import PromptBatch
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.learn.advantage import AdvantageConfig, advantage
from spatial_jax.learn.losses import LossConfig
from spatial_jax.learn.optimizer import OptimizerConfig
from spatial_jax.learn.train_batch import BatchConfig, Microbatches
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.reward.config import RewardConfig
from spatial_jax.reward.snra import sharpness
from spatial_jax.rollout.profiling import save_timeline
from spatial_jax.rollout.saved_groups import make_saved_groups, most_drawings_first, save_groups
from spatial_jax.stages.health import BlindCheck, HealthConfig
from spatial_jax.stages.sampling import Sampled, Sampler
from spatial_jax.stages.step_metrics import summarise
from spatial_jax.stages.updates import UpdateConfig, Updater
from spatial_jax.types import Prompt, StageStep, TrainState

NOT_FINITE = "not_finite"  # folder of the rollouts of an update that was not finite


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
  """The config of a GRPO stage."""

  # reward, advantage, loss, optimizer, health: of what follows the rollouts.
  reward: RewardConfig
  advantage: AdvantageConfig
  loss: LossConfig
  optimizer: OptimizerConfig
  health: HealthConfig
  keep_fraction: float  # fraction of the rollouts that the update uses; see `downsample_rollouts`
  # Updates per step: the prompts of a step are divided into `minibatches`, and all of them are used
  # `epochs` times. More than one update per step is off-policy; the ratio of the loss corrects it.
  minibatches: int
  epochs: int
  # Dynamic sampling: groups with equal rewards are replaced by those of further prompts, at most
  # this number of times per step; 0: never. Source: DAPO (arXiv:2503.14476).
  max_refills: int
  # Rollouts that a limit cut off do not train (overlong filtering of DAPO); their rewards still
  # count in the mean of their group.
  mask_truncated: bool
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
    check_whole(self, "minibatches", "epochs", at_least=1)
    check_whole(self, "max_refills", "save_rollouts_every", "saved_groups", at_least=0)
    valid = isinstance(self.mask_truncated, bool)
    check_field(self, "mask_truncated", valid, "be True or False")
    valid = is_ascending(self.prefix_buckets, 1)
    check_field(self, "prefix_buckets", valid, "be ascending, from 1 on")
    check_choice(self, "reference")
    averaged = self.loss.kl.weight and self.loss.kl.reference == "average"
    if averaged and not self.optimizer.ema_decay:
      raise FieldError(
        "optimizer.ema_decay is 0 and must be above 0, because the KL reference is the average"
      )

  @property
  def updates(self) -> int:
    """Optimizer updates per step."""
    return self.minibatches * self.epochs


def batch_config(learn: GrpoConfig, policy: QwenVLConfig) -> BatchConfig:
  """The static shapes of the update."""
  return BatchConfig(
    prefix_buckets=learn.prefix_buckets,
    tokens=learn.micro.lengths[-1],
    vision=learn.vision,
    window_blocks=policy.vision.window_blocks,
    vocabulary=policy.decoder.vocabulary,
  )


def update_config(learn: GrpoConfig) -> UpdateConfig:
  """What the updates of a step read."""
  return UpdateConfig(
    learn.loss, learn.keep_fraction, learn.minibatches, learn.epochs, learn.mask_truncated
  )


@dataclasses.dataclass(frozen=True, eq=False)
class GrpoStage:
  """Everything that a GRPO step needs besides the train state and the step number."""

  sampler: Sampler  # prompts -> rollouts and scores
  updater: Updater  # rollouts and advantages -> next state
  # First step -> the prompts of that step and the following ones, made in the background.
  prompt_stream: Callable[[int], Iterator[PromptBatch[Prompt]]]
  cfg: GrpoConfig
  steps: int  # of the run
  workdir: pathlib.Path  # of the saved rollouts
  blind: BlindCheck | None  # does a rollout depend on its images? None: never checked

  def sharpness(self, step: int) -> float:
    """k of the smooth rewards in a step."""
    return float(sharpness(step / self.steps, self.cfg.reward.schedule))

  def step_function(self, first: int) -> StageStep:
    """The function of one step, for a run that begins with the step `first`."""
    stream = self.prompt_stream(first)

    def run(state: TrainState, step: int) -> tuple[TrainState, Mapping[str, Any]]:
      batch = next(stream)
      replaced = self.sampler.replaced.count(batch.replaced)
      state, metrics = self.step(state, step, batch)
      return state, {**metrics, "replaced_tasks": replaced + metrics.get("replaced_tasks", 0)}

    return run

  def step(
    self, state: TrainState, step: int, batch: PromptBatch[Prompt]
  ) -> tuple[TrainState, Mapping[str, Any]]:
    """One step: prompts, rollouts, scores, advantages, batches, updates.

    Args:
      state: donated.
      step: from 0.
      batch: prompts of this step.

    Returns:
      The next state and the metrics of the step.
    """
    k, begin = self.sharpness(step), time.monotonic()
    sampled = self.sampler.sample(state.params, step, batch.prompts, k)
    sampled = self.updater.with_kl_in_reward(state, sampled)
    rollout_s = time.monotonic() - begin
    advantages_BG = np.asarray(advantage(sampled.scores, self.cfg.advantage))
    blind = {}
    if self.blind is not None and self.blind.due(step):
      blind = self.blind.measure(state.params, sampled)

    state, metrics = self.updater.update(state, step, sampled, advantages_BG)
    if metrics["skipped_updates"]:
      self._save(step, sampled, advantages_BG, self.workdir / NOT_FINITE)
    if self.cfg.save_rollouts_every and step % self.cfg.save_rollouts_every == 0:
      self._save(step, sampled, advantages_BG, self.workdir)
      save_timeline(sampled.timeline, step, self.workdir)
    tokens = sum(t.trained_T.sum() for group in sampled.rollouts for t in group)
    return state, {
      **metrics,
      **summarise(sampled.rollouts, sampled.scores, advantages_BG),
      **sampled.metrics,
      **blind,
      "sharpness": k,
      "rollout_s": rollout_s,
      "update_s": time.monotonic() - begin - rollout_s,
      **sampled.timeline.summary(),
      "tokens_per_s": tokens / rollout_s,
    }

  def _save(
    self, step: int, sampled: Sampled, advantages_BG: np.ndarray, workdir: pathlib.Path
  ) -> None:
    """Saves some rollouts of a step for the report, those with the most drawings."""
    groups = make_saved_groups(
      sampled.prompts, sampled.rollouts, sampled.scores, advantages_BG, step
    )
    save_groups(most_drawings_first(groups, max(self.cfg.saved_groups, 1)), workdir)
