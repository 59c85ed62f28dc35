"""What sampling needs: its shapes and limits, its programs, its drawing workers, its memory.

The loop over them is `schedule.generate_rollouts`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from spatial_jax.config import ConfigError
from spatial_jax.data.tokenizer import IM_END
from spatial_jax.drawing.executor import Executor
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.device import ObservationBatch, PromptBatch, SampleState
from spatial_jax.rollout.sampling import SamplingArrays
from spatial_jax.types import Array, Params, VisionBatch

EncodeImages = Callable[[Params, Array, VisionBatch, np.ndarray], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutPrograms:
  """The jitted device side; static arguments bound (see `programs`).

  Attributes:
    empty: (room for a prompt, static) -> SampleState of all slots.
    feature_buffer: () -> feature_buffer_MYD, empty.
    encode_images: (params, pool donated, VisionBatch, int32 [M] rows of the pool) -> pool, mark.
    prefill: (params, SampleState donated, pool, PromptBatch) -> SampleState, mark.
    start_rows: (SampleState donated, begins_R, rollout_R, row_BG, Sampling) -> SampleState.
    sample: (params, SampleState donated, halt_R, row_R or None, truncate)
      -> (SampleState, token_RT, logp_RT) of the rows `row_R`, of all for None; rows of `halt_R`
      sample no more.
    append: (params, SampleState donated, pool, ObservationBatch) -> SampleState, mark.

  A mark is a scalar that no later program takes over, so that one may wait for it.
  """

  empty: Callable[[int], SampleState]
  feature_buffer: Callable[[], Array]
  encode_images: EncodeImages
  prefill: Callable[[Params, SampleState, Array, PromptBatch], tuple[SampleState, Array]]
  start_rows: Callable[[SampleState, Array, Array, Array, SamplingArrays], SampleState]
  sample: Callable[
    [Params, SampleState, Array, Array | None, bool], tuple[SampleState, Array, Array]
  ]
  append: Callable[[Params, SampleState, Array, ObservationBatch], tuple[SampleState, Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
  """All that sampling needs besides parameters and prompts; `stop_ids` are of `cfg.stop_tokens`."""

  conversation: Conversation
  programs: RolloutPrograms
  executor: Executor
  cfg: RolloutConfig
  stop_ids: tuple[int, ...]


def stop_ids(conversation: Conversation, cfg: RolloutConfig) -> tuple[int, ...]:
  """Ids of the tokens that end a turn.

  Raises:
    ConfigError: on the host, for a token that there is not, or that is never sampled.
  """
  ids = tuple(conversation.tokenizer.id(token) for token in cfg.stop_tokens)
  never = [t for t, i in zip(cfg.stop_tokens, ids, strict=True) if i in conversation.forbidden_ids]
  if never or not ids:
    raise ConfigError(
      f"config.rollout.stop_tokens: {', '.join(never) or 'none given'}; a policy never says these, "
      f"and needs one that ends its turns, such as {IM_END}"
    )
  return ids
