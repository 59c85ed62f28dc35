"""Config of rollouts: shapes, limits, and how tokens are sampled."""

import dataclasses
import itertools
from typing import Literal

from spatial_jax.checks import is_finite, is_whole
from spatial_jax.config import check_field
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.drawing.parser import Limits
from spatial_jax.drawing.termination import StopLimits

WeightForm = Literal["compute", "int8"]

SMALLEST = 1e-6  # of temperature and top_p, which are divided by and compared in float32
TEMPERATURES = f"be from {SMALLEST:g} to 1000"
_ASCENDING = "be ascending whole numbers, at least 1"


def is_temperature(value: object) -> bool:
  """Whether a policy can be sampled at this temperature; see TEMPERATURES."""
  return is_finite(value) and SMALLEST <= value <= 1000


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How a rollout samples."""

  temperature: float  # in [1e-6, 1000]; log-probabilities are recorded at it
  greedy: bool  # take the most likely token; log-probabilities are then those of temperature 1
  top_k: int  # draw from this number of most likely tokens; 0: all
  top_p: float  # probability mass of the nucleus, in [1e-6, 1]; 1: all
  min_p: float  # least probability as a fraction of the largest, in [0, 1); 0: any
  max_tokens_per_turn: int  # tokens; 0: the limit of `RolloutConfig`

  def __post_init__(self):
    check_field(self, "temperature", is_temperature(self.temperature), TEMPERATURES)
    check_field(self, "greedy", isinstance(self.greedy, bool), "be True or False")
    rule = "be a whole number, at least 0 (0: all) and below 2^31"
    check_field(self, "top_k", is_whole(self.top_k, 0, 2**31 - 1), rule)
    nucleus = is_finite(self.top_p) and SMALLEST <= self.top_p <= 1
    check_field(self, "top_p", nucleus, f"be between {SMALLEST:g} and 1 (1: all)")
    least = is_finite(self.min_p) and 0 <= self.min_p < 1
    check_field(self, "min_p", least, "be at least 0 and below 1 (0: any)")
    limit = is_whole(self.max_tokens_per_turn, 0)
    rule = "be a whole number, at least 0 (0: as config.rollout.max_tokens_per_turn)"
    check_field(self, "max_tokens_per_turn", limit, rule)

  @property
  def truncates(self) -> bool:
    """Whether some tokens may be left out of the draw."""
    return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """Shapes and limits of rollouts."""

  prompts: int  # prompts per step
  group: int  # G, rollouts per prompt
  slots: int  # groups on the devices at a time; further prompts wait until a group ends
  # Rollouts that sample at a time; further rollouts wait until one ends. 0: all rollouts of the
  # slots.
  rows: int
  # prefill, append: ascending; number of prompts, and of observations, per call. A call takes the
  # first number that holds all that wait, at most the last.
  prefill: tuple[int, ...]
  append: tuple[int, ...]
  decode_steps: int  # maximum number of tokens per row and device call, which is a chunk
  # If at most one of these fractions of the rows still samples, the rows are gathered into a batch
  # of that size and decoded there. (): never.
  gather_fractions: tuple[float, ...]
  # "logical": a drawing that is submitted after chunk n is appended before chunk n + 1 +
  # `drawing_delay`, so that the order of programs depends on tokens alone. "eager": it is appended
  # as soon as it is ready. "barrier": drawings wait until no row samples, and prompts until no slot
  # is in use.
  schedule: Literal["logical", "eager", "barrier"]
  drawing_delay: int  # chunks, at least 1
  # "compute": decode with weights in the compute dtype; "int8": with 8-bit decoder kernels, see
  # `policy.int8`.
  weights: WeightForm
  sampling: SamplingParams  # of the training rollouts
  max_tokens_per_turn: int  # limit of one sampled turn, tokens
  # When a rollout ends; `stop.max_response_tokens` is also the size of a row in the suffix cache.
  stop: StopLimits
  # A turn ends with one of these tokens ("<|im_end|>"); (): those of the policy's folder.
  stop_tokens: tuple[str, ...]
  # A turn ends with the token that completes one of these strings; (): none.
  stop_strings: tuple[str, ...]
  limits: Limits  # limits of the drawing operations of one turn
  # prompt_buckets, observation_buckets: ascending; padded lengths, tokens.
  prompt_buckets: tuple[int, ...]
  observation_buckets: tuple[int, ...]
  # Ascending, tokens; the suffix cache is split into blocks at these lengths. A block that no
  # active row has reached is not read. (): one block.
  suffix_block_edges: tuple[int, ...]
  feature_buffer_tokens: int  # visual tokens of the images in the feature buffer
  vision: VisionBuckets  # buckets of the vision tower

  def __post_init__(self):
    self._check_counts()
    self._check_buckets()
    fractions = all(is_finite(fraction) and 0 < fraction < 1 for fraction in self.gather_fractions)
    check_field(self, "gather_fractions", fractions, "be fractions of the rows, between 0 and 1")
    schedule = self.schedule in ("logical", "eager", "barrier")
    check_field(self, "schedule", schedule, "be logical, eager or barrier")
    check_field(self, "weights", self.weights in ("compute", "int8"), "be compute or int8")
    rule = "contain no empty token; () names those of the policy"
    check_field(self, "stop_tokens", all(self.stop_tokens), rule)
    check_field(self, "stop_strings", all(self.stop_strings), "not contain an empty string")

  def _check_counts(self) -> None:
    """Checks every field that is one number."""
    for name in (
      "prompts",
      "group",
      "slots",
      "decode_steps",
      "drawing_delay",
      "max_tokens_per_turn",
      "feature_buffer_tokens",
    ):
      check_field(self, name, is_whole(vars(self)[name], 1), "be a whole number, at least 1")
    most = self.slots * self.group
    rows = is_whole(self.rows, 0) and self.rows <= most
    check_field(self, "rows", rows, f"be at least 0 (0: all) and at most slots * group = {most}")

  def _check_buckets(self) -> None:
    """Checks every field that is a list of sizes."""
    edges = self.suffix_block_edges
    check_field(self, "suffix_block_edges", not edges or _is_ascending(edges), _ASCENDING)
    for name in ("prefill", "append", "prompt_buckets", "observation_buckets"):
      check_field(self, name, _is_ascending(vars(self)[name]), _ASCENDING)

  @property
  def suffix_block_sizes(self) -> tuple[int, ...]:
    """Tokens of each block of the suffix cache."""
    size = self.stop.max_response_tokens
    ends = [*(edge for edge in self.suffix_block_edges if edge < size), size]
    return tuple(end - start for start, end in itertools.pairwise([0, *ends]))

  @property
  def decode_row_counts(self) -> tuple[int, ...]:
    """Numbers of rows that a chunk may decode, ascending; the last is all rows."""
    gathered = (max(round(f * self.row_count), 1) for f in self.gather_fractions)
    return tuple(sorted({*gathered, self.row_count}))

  @property
  def row_count(self) -> int:
    """R, number of rows."""
    return self.rows or self.slots * self.group


def _is_ascending(sizes: tuple[int, ...]) -> bool:
  """Whether there are sizes, all whole numbers of at least 1, each larger than the one before."""
  counts = bool(sizes) and all(is_whole(size, 1) for size in sizes)
  return counts and all(a < b for a, b in itertools.pairwise(sizes))
