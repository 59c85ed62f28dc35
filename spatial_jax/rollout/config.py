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
class SamplingParams:
  """How a rollout samples.

  Attributes:
    temperature: > 0; of the distribution that log-probabilities are recorded of.
    greedy: takes the most likely token, and records at temperature 1.
    top_k, top_p, min_p: what is left out of the draw, see `sampling.truncated`; 0, 1, 0: nothing.
    max_tokens_per_turn: most tokens of one turn; 0: as many as `RolloutConfig` allows.
  """

  temperature: float
  greedy: bool
  top_k: int
  top_p: float
  min_p: float
  max_tokens_per_turn: int

  def __post_init__(self):
    truncation = self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p < 1
    if self.temperature <= 0 or not truncation or self.max_tokens_per_turn < 0:
      raise ConfigError(
        "sampling: temperature > 0, top_k >= 0 (0: all), top_p in (0, 1], min_p in [0, 1), "
        f"max_tokens_per_turn >= 0 (0: all); got {self.temperature:g}, {self.top_k}, "
        f"{self.top_p:g}, {self.min_p:g}, {self.max_tokens_per_turn}"
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
    decode_steps: most tokens of a row per device call.
    gather_fractions: when at most this fraction of the rows still samples, these rows are gathered
      into a smaller batch and decoded there; (): never.
    schedule: "logical": a drawing handed over after chunk n is waited for before chunk n + 1 +
      `drawing_delay`, so that the order of programs depends on tokens alone; "eager": taken up as
      soon as it is there; "barrier": drawings wait until no row samples, and prompts until no slot
      is used.
    drawing_delay: chunks, at least 1.
    weights: "compute": in the compute dtype; "int8": the decoder's kernels in 8 bits, see
      `policy.int8`.
    sampling: of training rollouts.
    max_tokens_per_turn: most tokens the policy samples in one turn.
    stop: when a rollout ends; `stop.max_response_tokens` is also the size of each row's own cache.
    stop_tokens, stop_strings: a turn ends with one of these tokens ("<|im_end|>"), or with the one
      that completes such a string.
    limits: what one turn may draw.
    prompt_buckets, observation_buckets: padded lengths, tokens.
    suffix_block_edges: ascending, tokens; the suffix cache is split into blocks at these lengths. A
      block that no sampling row has reached is not read.
    feature_buffer_tokens: visual tokens of images kept on the devices.
    vision: buckets of the vision tower.
  """

  prompts: int
  group: int
  slots: int
  rows: int
  prefill: tuple[int, ...]
  append: tuple[int, ...]
  decode_steps: int
  gather_fractions: tuple[float, ...]
  schedule: Literal["logical", "eager", "barrier"]
  drawing_delay: int
  weights: WeightForm
  sampling: SamplingParams
  max_tokens_per_turn: int
  stop: StopLimits
  stop_tokens: tuple[str, ...]
  stop_strings: tuple[str, ...]
  limits: Limits
  prompt_buckets: tuple[int, ...]
  observation_buckets: tuple[int, ...]
  suffix_block_edges: tuple[int, ...]
  feature_buffer_tokens: int
  vision: VisionBuckets

  def __post_init__(self):
    counts = (self.prompts, self.group, self.slots, self.decode_steps, self.drawing_delay)
    if min(*counts, self.max_tokens_per_turn, self.stop.max_response_tokens) < 1:
      raise ConfigError(
        "config.rollout: prompts, group, slots, decode_steps, drawing_delay, max_tokens_per_turn "
        "and stop.max_response_tokens are at least 1"
      )
    sizes = {
      "prefill": self.prefill,
      "append": self.append,
      "prompt_buckets": self.prompt_buckets,
      "observation_buckets": self.observation_buckets,
    }
    for name, counts in (*sizes.items(), ("suffix_block_edges", self.suffix_block_edges)):
      if list(counts) != sorted(set(counts)) or min(counts, default=1) < 1:
        raise ConfigError(f"config.rollout.{name}: ascending, from 1 on; got {counts}")
    if missing := [name for name, counts in sizes.items() if not counts]:
      raise ConfigError(f"config.rollout: {', '.join(missing)} need a size each, such as (1, 8)")
    if not 0 <= self.rows <= self.slots * self.group:
      raise ConfigError(
        f"config.rollout.rows: at most slots * group = {self.slots * self.group}, 0 for as many; "
        f"got {self.rows}"
      )
    if not all(0 < share < 1 for share in self.gather_fractions):
      raise ConfigError(
        "config.rollout.gather_fractions: fractions of the rows, between 0 and 1; "
        f"got {self.gather_fractions}"
      )

  @property
  def suffix_block_sizes(self) -> tuple[int, ...]:
    """Tokens in each block of a row's own cache."""
    ends = [cut for cut in self.suffix_block_edges if cut < self.stop.max_response_tokens] + [
      self.stop.max_response_tokens
    ]
    return tuple(end - start for start, end in itertools.pairwise([0, *ends]))

  @property
  def decode_row_counts(self) -> tuple[int, ...]:
    """How many rows a chunk may decode, ascending, up to all."""
    few = (max(round(share * self.row_count), 1) for share in self.gather_fractions)
    return tuple(sorted({*few, self.row_count}))

  @property
  def row_count(self) -> int:
    """R, rollouts that sample at once."""
    return self.rows or self.slots * self.group
