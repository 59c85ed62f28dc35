"""Rollouts and advantages of a step -> the next train state, by one or several updates.

rollouts ─► minibatches of prompts ─► TrainBatch ─► log-probabilities of reference and trainer
                                          └──────────────► update, `epochs` times over all
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from spatial_jax.learn.losses import KlConfig, LossConfig, kl_estimate, kl_weight
from spatial_jax.learn.train_batch import BatchConfig, downsample_rollouts, to_train_batch
from spatial_jax.reward.config import RewardConfig
from spatial_jax.stages.sampling import Sampled
from spatial_jax.types import Array, OtherLogprobs, Params, TrainBatch, TrainState

# Of rollouts that a limit of their length cut off.
TRUNCATED = ("token_limit", "turn_limit")
_MINIBATCH_STREAM = 7  # of random numbers
_SUMS = ("skipped_updates",)  # metrics that are added over the updates of a step
_FIRST = ("logp_difference",)  # before the first update: later ones differ from the sampler


class UpdatePrograms(Protocol):
  """What the update runs on the devices; `compiled.LearnPrograms` are the programs."""

  local_row_shards: int  # devices over which the rows of one process are sharded

  def place(self, batch: TrainBatch, /) -> TrainBatch:
    """Moves a NumPy batch to the devices."""
    ...

  def logprobs(self, params: Params, batch: TrainBatch, /) -> Array:
    """Log-probabilities [R, T] of a batch under a policy without adapters."""
    ...

  def policy_logprobs(self, params: Params, batch: TrainBatch, /) -> Array:
    """Log-probabilities [R, T] of a batch under the policy with its adapters."""
    ...

  def update(
    self, state: TrainState, batch: TrainBatch, others: OtherLogprobs, /
  ) -> tuple[TrainState, Mapping[str, Any]]:
    """One optimizer step, see `learn.update.policy_update`; the state is donated."""
    ...


class Reference(Protocol):
  """The reference policy of the KL term; `stages.reference` has the classes."""

  def logprobs(self, programs: UpdatePrograms, state: TrainState, batch: TrainBatch, /) -> Array:
    """Log-probabilities [R, T] of a batch under the reference."""
    ...


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
  """What the updates of a step read of the config of their stage."""

  loss: LossConfig
  keep_fraction: float
  minibatches: int
  epochs: int
  mask_truncated: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Updater:
  """Trains on the rollouts of a step."""

  programs: UpdatePrograms
  cfg: UpdateConfig
  shapes: BatchConfig
  seed: int
  reference: Reference | None  # None without a KL term

  def update(
    self, state: TrainState, step: int, sampled: Sampled, advantages_BG: np.ndarray
  ) -> tuple[TrainState, dict[str, Any]]:
    """All updates of a step; the state is donated.

    Returns:
      The next state, and the metrics of the updates: means, except for counts.
    """
    cfg = self.cfg
    parts = minibatches(self.seed, step, len(sampled.rollouts), cfg.minibatches)
    batches = [self._batch(sampled, advantages_BG, part) for part in parts]
    once = len(batches) * cfg.epochs == 1
    if once:
      batches = [self.programs.place(batches[0])]
    others = [self._others(state, batch, once) for batch in batches]
    found: list[Mapping[str, Any]] = []
    for _ in range(cfg.epochs):
      for batch, other in zip(batches, others, strict=True):
        placed = batch if once else self.programs.place(batch)
        state, metrics = self.programs.update(state, placed, other)
        found.append(metrics)
    return state, _joined(jax.device_get(found))

  def with_kl_in_reward(self, state: TrainState, sampled: Sampled) -> Sampled:
    """Subtracts beta times the KL estimate of each rollout from its reward, if the loss says so.

    The estimate is the sum over the sampled tokens; the policy is as the sampler recorded it.
    """
    kl = self.cfg.loss.kl
    if self.reference is None or kl.place != "reward":
      return sampled
    batch, _ = to_train_batch(
      sampled.rollouts, None, self.shapes, image_features=sampled.image_features
    )
    ref_RT = self.reference.logprobs(self.programs, state, self.programs.place(batch))
    rows = batch.rows
    kl_RT = np.asarray(kl_estimate(rows.old_logp_RT, ref_RT, rows.trained_RT, kl.estimate))
    scores = sampled.scores
    kl_BG = kl_RT.sum(axis=1).reshape(scores.reward_BG.shape)
    beta = float(kl_weight(kl, state.step))
    scores = scores._replace(
      reward_BG=np.where(scores.valid_BG, scores.reward_BG - beta * kl_BG, 0.0).astype(np.float32),
      components=scores.components | {"kl": kl_BG},
      terms=scores.terms | {"kl": kl_BG},
      weights=scores.weights | {"kl": -beta},
    )
    return dataclasses.replace(sampled, scores=scores)

  def _batch(self, sampled: Sampled, advantages_BG: np.ndarray, part: Sequence[int]) -> TrainBatch:
    """The TrainBatch of some groups, NumPy arrays."""
    rollouts, advantages_BG = [sampled.rollouts[b] for b in part], advantages_BG[list(part)]
    weight_BG = np.ones_like(advantages_BG)
    if self.cfg.mask_truncated:
      is_whole = [[t.end_reason not in TRUNCATED for t in group] for group in rollouts]
      weight_BG = np.array(is_whole, np.float32)
    kept_BG = downsample_rollouts(
      advantages_BG * weight_BG, self.cfg.keep_fraction, self.programs.local_row_shards
    )
    batch, _ = to_train_batch(
      rollouts,
      advantages_BG,
      self.shapes,
      kept_BG,
      sampled.image_features,
      weight_BG=weight_BG,
    )
    return batch

  def _others(self, state: TrainState, batch: TrainBatch, placed: bool) -> OtherLogprobs:
    """Log-probabilities before the first update."""
    loss, ref_RT, trainer_RT = self.cfg.loss, None, None
    has_kl = self.reference is not None and loss.kl.place == "loss"
    has_importance = loss.importance.kind != "none" and not placed  # else the update has them
    if has_kl or has_importance:
      batch = batch if placed else self.programs.place(batch)
    if has_kl and self.reference is not None:
      ref_RT = self.reference.logprobs(self.programs, state, batch)
      jax.block_until_ready(ref_RT)  # the update needs the memory of a reference on the host
    if has_importance:
      trainer_RT = self.programs.policy_logprobs(state.params, batch)
    return OtherLogprobs(ref_RT, trainer_RT)


def minibatches(seed: int, step: int, prompts: int, count: int) -> list[list[int]]:
  """The prompts of each minibatch: equal parts of a random order, each ascending."""
  if count == 1:
    return [list(range(prompts))]
  order = np.random.default_rng((seed, step, _MINIBATCH_STREAM)).permutation(prompts)
  return [sorted(part.tolist()) for part in np.split(order, count)]


def image_batches(minibatches: int, reward: RewardConfig, kl: KlConfig) -> int:
  """The number of parts of a step whose images are packed apart.

  One if a program reads the whole step: the attention reward, or a KL term in the reward.
  """
  whole = "attention" in reward.active or (kl.weight and kl.place == "reward")
  return 1 if whole else minibatches


def _joined(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The metrics of several updates as those of one step."""

  def one(name: str) -> Any:
    values = [metrics[name] for metrics in found]
    if name in _SUMS:
      return sum(values)
    return values[0] if name in _FIRST else np.mean(values)

  return {name: one(name) for name in found[0]}
