"""Prompts of a step -> rollouts with scores; groups without a signal may be replaced.

prompts ─► rollouts ─► attention to the images (if it is rewarded) ─► scores
   └──── further prompts ◄─── groups whose rewards are all equal (dynamic sampling)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from spatial_jax.data.pipeline import PromptBatch
from spatial_jax.data.vision_packing import fits
from spatial_jax.learn.train_batch import BatchConfig, to_train_batch
from spatial_jax.reward.compose import score
from spatial_jax.reward.config import RewardConfig
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.image_feature_cache import ImageFeatures
from spatial_jax.rollout.profiling import Timeline
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.rollout.trajectory import images_of, limit_images
from spatial_jax.stages.replaced import ReplacedTasks
from spatial_jax.stages.step_metrics import has_variance
from spatial_jax.types import (
  Array,
  Params,
  PatchedImage,
  Prompt,
  Prompts,
  Rollouts,
  Scores,
  TrainBatch,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Sampled:
  """The rollouts of one step."""

  prompts: Prompts  # [B]
  rollouts: Rollouts  # [B][G]
  scores: Scores
  image_features: ImageFeatures | None  # of all images, if the vision tower is frozen
  timeline: Timeline
  metrics: dict[str, float]


class Groups(NamedTuple):
  """Some prompts with their rollouts and scores."""

  prompts: Prompts  # [B]
  rollouts: Rollouts  # [B][G]
  scores: Scores


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """Samples and scores the rollouts of a step."""

  engine: Engine
  decode_params: Callable[[Params], Params]  # train parameters -> decode parameters
  # True if the vision tower is frozen: the update uses the image features of the rollouts.
  keep_features: bool
  reward: RewardConfig
  shapes: BatchConfig  # of the update
  # Step -> the prompts of each batch of the update, whose images have to fit `shapes`.
  batches: Callable[[int], Sequence[Sequence[int]]]
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
    metrics: dict[str, float] = {}
    with Timeline() as timeline:

      def run(some: Prompts) -> Rollouts:
        sampling = [self.engine.cfg.sampling] * self.engine.cfg.group
        job = RolloutJob(some, self.seed, step, sampling, features, timeline=timeline)
        return generate_rollouts(self.engine, weights, job)

      def scored(some: Prompts, rollouts: Rollouts) -> Groups:
        scores = self._score(params, some, rollouts, features, sharpness, len(prompts))
        return Groups(some, rollouts, scores)

      rollouts, metrics["too_many_images"] = self._limited(run(prompts), self.batches(step))
      groups = scored(prompts, rollouts)
      if self.max_refills:
        groups = self._refilled(step, groups, run, scored, metrics)
    return Sampled(*groups, features, timeline, metrics)

  def _refilled(
    self,
    step: int,
    groups: Groups,
    run: Callable[[Prompts], Rollouts],
    scored: Callable[[Prompts, Rollouts], Groups],
    metrics: dict[str, float],
  ) -> Groups:
    """Replaces groups without a signal by those of further prompts, and counts it in `metrics`."""
    metrics |= {"sampled_prompts": len(groups.prompts), "replaced_groups": 0, "replaced_tasks": 0}
    batches = self.batches(step)
    for attempt in range(1, self.max_refills + 1):
      flat_B = np.flatnonzero(~has_variance(groups.scores))
      if not len(flat_B):
        break
      more = self.refill(step, attempt, len(flat_B))
      found, dropped = run(more.prompts), 0
      if len(batches) == 1:  # else they are never in one batch
        found, dropped = self._limited(found, [range(len(found))])
      extra, prompts, rollouts = scored(more.prompts, found), list(groups.prompts), groups.rollouts
      taken = []
      useful = np.flatnonzero(has_variance(extra.scores))
      for place, source in zip(flat_B.tolist(), useful.tolist(), strict=False):
        tried = [*rollouts[:place], extra.rollouts[source], *rollouts[place + 1 :]]
        if all(self._fit(images_of([tried[b] for b in batch])) for batch in batches):
          rollouts, prompts[place] = tried, more.prompts[source]
          taken.append((place, source))
      groups = Groups(prompts, rollouts, _replaced(groups.scores, extra.scores, taken))
      metrics["too_many_images"] += dropped
      metrics["sampled_prompts"] += len(more.prompts)
      metrics["replaced_groups"] += len(taken)
      metrics["replaced_tasks"] += self.replaced.count(more.replaced)
    return groups

  def _limited(self, rollouts: Rollouts, batches: Sequence[Sequence[int]]) -> tuple[Rollouts, int]:
    """The rollouts with faults in the place of some, so that the images of each batch fit."""
    kept, dropped = list(rollouts), 0
    for batch in batches:
      limited, count = limit_images([kept[b] for b in batch], self._fit)
      for b, group in zip(batch, limited, strict=True):
        kept[b] = group
      dropped += count
    return kept, dropped

  def _fit(self, images: Sequence[PatchedImage]) -> bool:
    """Whether one batch of the update holds the images."""
    return fits(images, self.shapes.window_blocks, self.shapes.vision, self.keep_features)

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
