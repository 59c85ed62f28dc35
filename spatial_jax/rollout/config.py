"""Shapes and limits of rollouts, and how their tokens are sampled."""

import dataclasses
import itertools
from typing import Literal

from spatial_jax.config import ConfigError
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.drawing.parser import Limits
from spatial_jax.drawing.termination import StopLimits

WeightForm = Literal["compute", "int8"]


@dataclasses.dataclass(frozen=True)
class Mode:
  """How a rollout samples.

  Attributes:
    temperature: > 0; of the distribution that log-probabilities are recorded of.
    greedy: takes the most likely token, and records at temperature 1.
    top_k, top_p, min_p: what is left out of the draw, see `sampling.truncated`; 0, 1, 0: nothing.
    turn_tokens: most tokens sampled in one turn, within `RolloutConfig.turn_tokens`; 0: as many.
  """

  temperature: float
  greedy: bool
  top_k: int
  top_p: float
  min_p: float
  turn_tokens: int

  def __post_init__(self):
    truncation = self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p < 1
    if self.temperature <= 0 or not truncation or self.turn_tokens < 0:
      raise ConfigError(
        "sampling: temperature > 0, top_k >= 0 (0: all), top_p in (0, 1], min_p in [0, 1), "
        f"turn_tokens >= 0 (0: all); got {self.temperature:g}, {self.top_k}, {self.top_p:g}, "
        f"{self.min_p:g}, {self.turn_tokens}"
      )

  @property
  def truncates(self) -> bool:
    """Whether anything is left out of the draw."""
    return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """Shapes and limits of rollouts.

  Attributes:
    prompts: of a step.
    group: G, rollouts per prompt.
    slots: groups on the devices at once; the other prompts wait for one to finish.
    rows: of their rollouts, those that have a row to sample in; the others wait for one to end. 0:
      all of them.
    prefill, append: ascending; how many prompts, and observations, one call reads: the first count
      that holds those that there are, up to the last.
    chunk: most tokens of a row per device call.
    narrow: where at most such a share of the rows still sample, they are decoded by themselves; ()
      never.
    schedule: "logical": a drawing handed over after chunk n is waited for before chunk n + 1 +
      `delay`, so that what runs depends on tokens alone; "eager": taken up as soon as it is there;
      "barrier": drawings wait until no row samples, prompts until no group has a slot.
    delay: chunks, at least 1.
    weights: "compute": in the compute dtype; "int8": the decoder's kernels in 8 bits, see
      `policy.int8`.
    mode: of training rollouts.
    turn_tokens: most tokens the policy samples in one turn.
    stop: when a rollout ends; `stop.tokens` is also the size of each row's own cache.
    stop_tokens, stop_strings: a turn ends with one of these tokens ("<|im_end|>"), or with the one
      that completes such a string.
    limits: what one turn may draw.
    prompt_buckets, observation_buckets: padded lengths, tokens.
    own_cuts: ascending; where each row's own cache is cut. What lies behind a cut that no sampling
      row has reached is not read.
    features: visual tokens of images kept on the devices.
    vision: buckets of the vision tower.
  """

  prompts: int
  group: int
  slots: int
  rows: int
  prefill: tuple[int, ...]
  append: tuple[int, ...]
  chunk: int
  narrow: tuple[float, ...]
  schedule: Literal["logical", "eager", "barrier"]
  delay: int
  weights: WeightForm
  mode: Mode
  turn_tokens: int
  stop: StopLimits
  stop_tokens: tuple[str, ...]
  stop_strings: tuple[str, ...]
  limits: Limits
  prompt_buckets: tuple[int, ...]
  observation_buckets: tuple[int, ...]
  own_cuts: tuple[int, ...]
  features: int
  vision: VisionBuckets

  def __post_init__(self):
    counts = (self.prompts, self.group, self.slots, self.chunk, self.delay)
    if min(*counts, self.turn_tokens, self.stop.tokens) < 1:
      raise ConfigError(
        "config.rollout: prompts, group, slots, chunk, delay, turn_tokens and stop.tokens are at "
        "least 1"
      )
    sizes = {
      "prefill": self.prefill,
      "append": self.append,
      "prompt_buckets": self.prompt_buckets,
      "observation_buckets": self.observation_buckets,
    }
    for name, counts in (*sizes.items(), ("own_cuts", self.own_cuts)):
      if list(counts) != sorted(set(counts)) or min(counts, default=1) < 1:
        raise ConfigError(f"config.rollout.{name}: ascending, from 1 on; got {counts}")
    if missing := [name for name, counts in sizes.items() if not counts]:
      raise ConfigError(f"config.rollout: {', '.join(missing)} need a size each, such as (1, 8)")
    if not 0 <= self.rows <= self.slots * self.group:
      raise ConfigError(
        f"config.rollout.rows: at most slots * group = {self.slots * self.group}, 0 for as many; "
        f"got {self.rows}"
      )
    if not all(0 < share < 1 for share in self.narrow):
      raise ConfigError(
        f"config.rollout.narrow: shares of the rows, between 0 and 1; got {self.narrow}"
      )

  @property
  def own_sizes(self) -> tuple[int, ...]:
    """Tokens in each block of a row's own cache."""
    ends = [cut for cut in self.own_cuts if cut < self.stop.tokens] + [self.stop.tokens]
    return tuple(end - start for start, end in itertools.pairwise([0, *ends]))

  @property
  def widths(self) -> tuple[int, ...]:
    """How many rows a chunk may decode, ascending, up to all."""
    few = (max(round(share * self.row_count), 1) for share in self.narrow)
    return tuple(sorted({*few, self.row_count}))

  @property
  def row_count(self) -> int:
    """R, rollouts that sample at once."""
    return self.rows or self.slots * self.group
