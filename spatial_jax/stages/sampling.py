"""Prompts of a step -> rollouts with scores; groups without a signal may be replaced.

prompts ─► rollouts ─► attention to the images (if it is rewarded) ─► scores
   └──── further prompts ◄─── groups whose rewards are all equal (dynamic sampling)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spatial_jax.data.pipeline import PromptBatch
from spatial_jax.learn.train_batch import BatchConfig, to_train_batch
from spatial_jax.reward.compose import score
from spatial_jax.reward.config import RewardConfig
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.image_feature_cache import ImageFeatures
from spatial_jax.rollout.profiling import Timeline
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.rollout.trajectory import distinct_tokens, limit_images
from spatial_jax.stages.replaced import ReplacedTasks
from spatial_jax.stages.step_metrics import has_variance
from spatial_jax.types import Array, Params, Prompt, Prompts, Rollouts, Scores, TrainBatch


@dataclasses.dataclass(frozen=True, eq=False)
class Sampled:
  """The rollouts of one step."""

  prompts: Prompts  # [B]
  rollouts: Rollouts  # [B][G]
  scores: Scores
  image_features: ImageFeatures | None  # of all images, if the vision tower is frozen
  timeline: Timeline
  metrics: dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """Samples and scores the rollouts of a step."""

  engine: Engine
  decode_params: Callable[[Params], Params]  # train parameters -> decode parameters
  # True if the vision tower is frozen: the update uses the image features of the rollouts.
  keep_features: bool
  reward: RewardConfig
  shapes: BatchConfig  # of the update
  seed: int
  max_refills: int
  refill: Callable[
    [int, int, int], PromptBatch[Prompt]
  ]  # (step, attempt, count) -> further prompts
  replaced: ReplacedTasks
  place: Callable[[TrainBatch], TrainBatch]  # to the devices
  # (train parameters, batch) -> attention reward of each row; called if it has a weight.
  attention: Callable[[Params, TrainBatch], Array]

  def sample(self, params: Params, step: int, prompts: Prompts, sharpness: float) -> Sampled:
    """Samples the rollouts of one step.

    Args:
      params: train parameters.
      step: from 0.
      prompts: of this step; the result has the same number.
      sharpness: of the rewards.
    """
    weights = self.decode_params(params)
    features: ImageFeatures | None = {} if self.keep_features else None
    dropped, sampled, replaced, unusable = 0, len(prompts), 0, 0
    with Timeline() as timeline:

      def run(some: Prompts) -> tuple[Prompts, Rollouts]:
        job = RolloutJob(
          some,
          self.seed,
          step,
          [self.engine.cfg.sampling] * self.engine.cfg.group,
          features,
          timeline=timeline,
        )
        return some, generate_rollouts(self.engine, weights, job)

      prompts, rollouts = run(prompts)
      rollouts, dropped = limit_images(rollouts, self.shapes.visual_tokens)
      scores = self._score(params, prompts, rollouts, features, sharpness, len(prompts))
      for attempt in range(1, self.max_refills + 1):
        flat_B = np.flatnonzero(~has_variance(scores))
        if not len(flat_B):
          break
        further = self.refill(step, attempt, len(flat_B))
        unusable += self.replaced.count(further.replaced)
        more, found = run(further.prompts)
        found, too_many = limit_images(found, self.shapes.visual_tokens)
        extra = self._score(params, more, found, features, sharpness, len(prompts))
        useful = np.flatnonzero(has_variance(extra))
        taken, prompts = [], list(prompts)
        for place, source in zip(flat_B.tolist(), useful.tolist(), strict=False):
          tried = [*rollouts[:place], found[source], *rollouts[place + 1 :]]
          if distinct_tokens(tried) <= self.shapes.visual_tokens:
            rollouts, prompts[place] = tried, more[source]
            taken.append((place, source))
        scores = _replaced(scores, extra, taken)
        dropped, sampled = dropped + too_many, sampled + len(more)
        replaced += len(taken)
    metrics: dict[str, float] = {"too_many_images": dropped}
    if self.max_refills:
      metrics |= {"sampled_prompts": sampled, "replaced_groups": replaced}
      metrics["replaced_tasks"] = unusable
    return Sampled(prompts, rollouts, scores, features, timeline, metrics)

  def _score(
    self,
    params: Params,
    prompts: Prompts,
    rollouts: Rollouts,
    features: ImageFeatures | None,
    sharpness: float,
    count: int,
  ) -> Scores:
    """Scores the rollouts; `count` is the number of prompts of a step."""
    attention_BG = None
    if "attention" in self.reward.active:
      # Groups of a refill are repeated: as many as a step has divide over the devices.
      whole = [rollouts[b % len(rollouts)] for b in range(count)]
      batch, _ = to_train_batch(whole, None, self.shapes, image_features=features)
      attention_R = np.asarray(self.attention(params, self.place(batch)))
      attention_BG = attention_R.reshape(count, -1)[: len(rollouts)]
    tasks = [prompt.task for prompt in prompts]
    return score(rollouts, tasks, self.reward, sharpness, attention_BG)


def _replaced(scores: Scores, extra: Scores, taken: list[tuple[int, int]]) -> Scores:
  """The scores with some groups from `extra`: (place in scores, place in extra)."""

  def one(value_BG: Any, other_BG: Any) -> Any:
    if np.ndim(value_BG) == 0:  # a weight
      return value_BG
    value_BG = np.array(value_BG)
    for place, source in taken:
      value_BG[place] = other_BG[source]
    return value_BG

  return jax.tree.map(one, scores, extra)
