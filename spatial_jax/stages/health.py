"""Is the run healthy? Rules on the metrics of each step, and a check that images are seen.

    not finite           an update had a gradient that is not finite
    equal rewards        (nearly) all groups of the last steps have equal rewards
    divergence           the KL divergence from reference or sampler is too large
    length               responses are cut off, or much longer than at the start
    drawing              the share of rollouts that draw has fallen to a small part
    blind                log-probabilities do not change when images are exchanged between prompts

A rule prints one line with the remedy, and can end the run with a checkpoint.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spatial_jax import metrics as metrics_lib
from spatial_jax.config import check_field, check_number, check_whole
from spatial_jax.data.vision_packing import distinct, fits
from spatial_jax.learn.train_batch import BatchConfig, to_train_batch
from spatial_jax.stages.sampling import Sampled
from spatial_jax.types import Array, Params, TrainBatch, Trajectory

_WINDOW = 5  # steps that a rule averages
_LEAST_DRAWING = 0.02  # below it the share at the start is noise
_LEAST_PAIRS = 2
_QUIET_STEPS = 20  # between two warnings of one rule
Pair = tuple[Trajectory, Trajectory]  # a rollout, and another one whose images it gets


@dataclasses.dataclass(frozen=True)
class HealthConfig:
  """The limits of the rules; see the top of `stages/health.py`."""

  blind_every: int  # steps between two checks for blindness; 0: never
  blind_rows: int  # rollouts of such a check
  # Smallest mean |change| of a log-probability, nats, when images are exchanged.
  min_blind_change: float
  max_zero_variance: float  # share of groups with equal rewards
  max_kl: float  # k3 per token, nats
  max_truncated: float  # share of rollouts that a token limit cut off
  max_length_factor: float  # of the response length at the start
  min_drawing_factor: float  # of the share that draws at the start
  stop: bool  # end the run, with a checkpoint, when a rule is broken

  def __post_init__(self):
    check_whole(self, "blind_every", at_least=0)
    check_whole(self, "blind_rows", at_least=2)
    check_number(self, "min_blind_change", "max_kl", "min_drawing_factor", at_least=0)
    check_number(self, "max_zero_variance", "max_truncated", at_least=0, at_most=1)
    check_number(self, "max_length_factor", above=1)
    check_field(self, "stop", isinstance(self.stop, bool), "be True or False")


class Finding(NamedTuple):
  """A broken rule."""

  rule: str
  message: str  # one line: what is wrong, and the remedy


class Health:
  """Watches the metrics of a run; remembers how the run began, also after a resume.

  After a resume the average of the last steps starts again, so that a stopped run has a whole
  window to recover.
  """

  def __init__(self, cfg: HealthConfig, workdir: pathlib.Path):
    """Reads the first records of an existing run."""
    self._cfg = cfg
    self._recorded = metrics_lib.read(workdir)[:_WINDOW]
    self._first: list[Mapping[str, Any]] = []
    self._last: list[Mapping[str, Any]] = []
    self._said: dict[str, int] = {}

  def monitor(self, step: int, values: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The lines to print after a step, and whether the run should end; see `loop.Monitor`."""
    found = self.check(step, values)
    return [finding.message for finding in found], bool(found) and self._cfg.stop

  def check(self, step: int, values: Mapping[str, Any]) -> list[Finding]:
    """Adds the metrics of a step; returns the rules that it breaks, each once in 20 steps."""
    if not self._last:  # the first step of this process: steps from it on run again
      self._first = [record for record in self._recorded if record["step"] < step]
    self._first = [*self._first, values][:_WINDOW]
    self._last = [*self._last, values][-_WINDOW:]
    found = findings(self._cfg, self._first, self._last)
    blind = blind_finding(self._cfg, values)
    found += [] if blind is None else [blind]
    due = [f for f in found if step - self._said.get(f.rule, -_QUIET_STEPS) >= _QUIET_STEPS]
    self._said |= {finding.rule: step for finding in due}
    return due


def findings(
  cfg: HealthConfig, first: Sequence[Mapping[str, Any]], last: Sequence[Mapping[str, Any]]
) -> list[Finding]:
  """The rules that the last records break, compared with the first ones of the run."""

  def mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    values = [float(r[name]) for r in records if r.get(name) is not None]
    return float(np.mean(values)) if values else 0.0

  found, enough = [], len(last) >= _WINDOW
  if last[-1].get("skipped_updates"):
    found.append(
      Finding(
        "not finite",
        "the gradient was not finite and the update was skipped; its rollouts are in "
        "not_finite/ of the work directory; lower learn.optimizer.learning_rate or max_grad_norm",
      )
    )
  if enough and mean(last, "zero_variance_groups") > cfg.max_zero_variance:
    share = mean(last, "zero_variance_groups")
    found.append(
      Finding(
        "equal rewards",
        f"{share:.0%} of the groups have equal rewards and teach nothing; use a smoother reward "
        "(lower k), harder or easier tasks, a larger rollout.group, or learn.max_refills",
      )
    )
  kl = max(mean(last, "kl_ref_k3"), mean(last, "kl_old_k3"))
  if enough and kl > cfg.max_kl:
    found.append(
      Finding(
        "divergence",
        f"the KL divergence is {kl:.3g} nats per token; lower learn.optimizer.learning_rate, or "
        "raise learn.loss.kl.weight",
      )
    )
  return found + _length_findings(cfg, first, last, mean) if enough else found


def _length_findings(
  cfg: HealthConfig,
  first: Sequence[Mapping[str, Any]],
  last: Sequence[Mapping[str, Any]],
  mean: Callable[[Sequence[Mapping[str, Any]], str], float],
) -> list[Finding]:
  """Rules on the length of responses and on drawing."""
  found = []
  cut = mean(last, "end_token_limit")
  if cut > cfg.max_truncated:
    found.append(
      Finding(
        "length",
        f"{cut:.0%} of the responses are cut off; raise rollout.stop.max_response_tokens, reward "
        "length (learn.reward.weights.length), or set learn.mask_truncated",
      )
    )
  before, now = mean(first, "response_tokens"), mean(last, "response_tokens")
  if before and now > cfg.max_length_factor * before:
    found.append(
      Finding(
        "length",
        f"responses have {now:.0f} tokens, {before:.0f} at the start; use loss normalise token or "
        "constant, or reward length (learn.reward.weights.length)",
      )
    )
  drew, draws = mean(first, "drawing_share"), mean(last, "drawing_share")
  if drew > _LEAST_DRAWING and draws < cfg.min_drawing_factor * drew:
    found.append(
      Finding(
        "drawing",
        f"{draws:.0%} of the rollouts draw, {drew:.0%} at the start; reward drawing "
        "(learn.reward.weights.drawing), or add an entropy bonus (learn.loss.entropy)",
      )
    )
  return found


@dataclasses.dataclass(frozen=True, eq=False)
class BlindCheck:
  """Exchanges the images of some rollouts and compares their log-probabilities.

  A policy whose image features never reach the decoder gives exactly the same ones.
  """

  cfg: HealthConfig
  shapes: BatchConfig
  row_shards: int  # devices over which rows are sharded
  place: Callable[[TrainBatch], TrainBatch]
  logprobs: Callable[[Params, TrainBatch], Array]  # of the policy with its adapters

  def due(self, step: int) -> bool:
    """Whether a step is checked."""
    return self.cfg.blind_every > 0 and step % self.cfg.blind_every == 0

  def measure(self, params: Params, sampled: Sampled) -> dict[str, float]:
    """`blind_change`: the mean absolute change of a log-probability, nats; {} if not possible.

    It is not possible without two prompts whose first images have the same size.
    """
    rollouts, most = [group[0] for group in sampled.rollouts], self.cfg.blind_rows
    pairs = exchangeable(rollouts, most, self.row_shards)
    while pairs and not self._fit(sampled, pairs):
      pairs = exchangeable(rollouts, len(pairs) - 1, self.row_shards)
    if not pairs:
      return {}
    groups = [[trajectory] for trajectory, _ in pairs]
    batch, feature_of = to_train_batch(
      groups, None, self.shapes, image_features=_features(sampled, pairs)
    )
    other = _exchanged(batch, pairs, feature_of)
    own_RT, other_RT = (
      np.asarray(self.logprobs(params, self.place(one))) for one in (batch, other)
    )
    trained_RT = batch.rows.trained_RT
    if not trained_RT.any():
      return {}
    return {"blind_change": float(np.abs(own_RT - other_RT)[trained_RT].mean())}

  def _fit(self, sampled: Sampled, pairs: Sequence[Pair]) -> bool:
    """Whether one batch of the update, which may be a minibatch, holds the images."""
    images = list(distinct([trajectory.images for trajectory, _ in pairs]).values())
    encoded = sampled.image_features is not None
    return fits(images, self.shapes.window_blocks, self.shapes.vision, encoded)


def blind_finding(cfg: HealthConfig, values: Mapping[str, Any]) -> Finding | None:
  """The finding of a check for blindness, None if the images are seen."""
  change = values.get("blind_change")
  if change is None or change >= cfg.min_blind_change:
    return None
  return Finding(
    "blind",
    f"exchanging images between prompts changes log-probabilities by {change:.1e} nats: the policy "
    "does not see its images; check that the data has the right media, and the port with "
    "python -m spatial_jax.tools.verify",
  )


def exchangeable(rollouts: Sequence[Trajectory], most: int, multiple: int) -> list[Pair]:
  """Pairs rollouts whose prompts have as many images of the same sizes; the images are a cycle.

  Args:
    most: pairs at most.
    multiple: their number is a multiple of it.
  """
  by_sizes: dict[tuple[Any, ...], list[Trajectory]] = {}
  for trajectory in rollouts:
    sizes = tuple(image.grid_3 for image in trajectory.images[: trajectory.prompt_images])
    if sizes and trajectory.trained_T.any():
      by_sizes.setdefault(sizes, []).append(trajectory)
  same = max(by_sizes.values(), key=len, default=[])
  distinct_images = list({_hashes(trajectory): trajectory for trajectory in same}.values())
  count = min(len(distinct_images), most) // multiple * multiple
  if count < _LEAST_PAIRS:
    return []
  chosen = distinct_images[:count]
  return list(zip(chosen, [*chosen[1:], chosen[0]], strict=True))


def _hashes(trajectory: Trajectory) -> tuple[str, ...]:
  return tuple(image.content_hash for image in trajectory.images[: trajectory.prompt_images])


def _features(sampled: Sampled, pairs: Sequence[Pair]) -> Any:
  """The features of all images of the pairs; None if the vision tower is trained."""
  if sampled.image_features is None:
    return None
  names = distinct([t.images for pair in pairs for t in pair])
  return {name: sampled.image_features[name] for name in names}


def _exchanged(
  batch: TrainBatch, pairs: Sequence[Pair], feature_of: Mapping[str, np.ndarray]
) -> TrainBatch:
  """The batch with the prompt images of the other rollout of each pair."""
  other_of: dict[int, int] = {}
  feature_BT = np.array(batch.prefix.feature_RT)
  suffix_RT = np.array(batch.rows.tokens.feature_RT)
  for b, (own, other) in enumerate(pairs):
    other_of = {
      int(mine): int(theirs)
      for one, two in zip(_hashes(own), _hashes(other), strict=True)
      for mine, theirs in zip(feature_of[one], feature_of[two], strict=True)
    }
    for row_T in (feature_BT[b], suffix_RT[b]):
      row_T[:] = [other_of.get(int(index), int(index)) for index in row_T]
  rows = batch.rows._replace(tokens=batch.rows.tokens._replace(feature_RT=suffix_RT))
  return batch._replace(prefix=batch.prefix._replace(feature_RT=feature_BT), rows=rows)
