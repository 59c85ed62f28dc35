"""What every rollout needs besides parameters and prompts: one record, made once per run.

`scheduler.generate_rollouts` runs the loop; `programs.JittedPrograms` are the programs.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

from spatial_jax.config import ConfigError
from spatial_jax.data.tokenizer import END_OF_TEXT, IM_END
from spatial_jax.drawing.executor import Executor
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.device_inputs import ObservationBatch, PromptBatch, SamplingArrays
from spatial_jax.types import Array, Params, VisionBatch


class RolloutPrograms(Protocol):
  """What the devices run, in this order; each method is one program.

      empty_state ─► prefill ─► start_rows ─► decode ─► append ─► decode ...
      empty_feature_buffer ─► encode_images

  The state (`device.SampleState`) and the feature buffer are donated. Several programs also return
  a ready token: a scalar result that no later program is given, so that the host can wait for the
  program by waiting for the token.
  """

  def empty_state(self, prefix_size: int, /) -> Any:
    """Returns the state before any prompt; the prefix cache has `prefix_size` tokens per slot."""
    ...

  def empty_feature_buffer(self) -> Array:
    """Returns the feature buffer [M, Y, D] before any image, in the compute dtype."""
    ...

  def encode_images(
    self, params: Params, feature_buffer_MYD: Array, vision: VisionBatch, buffer_row_M: Array, /
  ) -> tuple[Array, Array]:
    """Runs the vision tower and writes the features into the buffer; returns it, a ready token.

    `buffer_row_M` is int32, the buffer row of each feature; rows beyond the end are dropped.
    """
    ...

  def prefill(
    self, params: Params, state: Any, feature_buffer_MYD: Array, prompts: PromptBatch, /
  ) -> tuple[Any, Array]:
    """Prefills prompts into slots of the prefix cache; returns the state, a ready token."""
    ...

  def start_rows(
    self, state: Any, starts_R: Array, rollout_R: Array, row_BG: Array, sampling: SamplingArrays, /
  ) -> Any:
    """Starts rollouts in rows, at the end of their prompts; see `device.start_rows`."""
    ...

  def decode(
    self, params: Params, state: Any, halt_R: Array, row_R: Array | None, truncate: bool, /
  ) -> tuple[Any, Array, Array]:
    """Samples up to `decode_steps` tokens in each active row.

    Args:
      params: decode parameters.
      state: donated.
      halt_R: bool, rows that stop sampling before this call.
      row_R: int32, the rows that are gathered and decoded, padded with R; None: all rows.
      truncate: top-k, top-p or min-p is applied; static.

    Returns:
      The state, tokens int32 [rows, decode_steps] (-1: not sampled), log-probabilities float32.
    """
    ...

  def append(
    self, params: Params, state: Any, feature_buffer_MYD: Array, observations: ObservationBatch, /
  ) -> tuple[Any, Array]:
    """Appends observations to rows, which sample again; returns the state, a ready token."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
  """Prompts, programs, drawing and limits of rollouts."""

  conversation: Conversation  # encodes prompts and observations
  programs: RolloutPrograms  # what runs on the devices
  executor: Executor  # draws
  cfg: RolloutConfig  # shapes and limits
  stop_ids: tuple[int, ...]  # ids of `cfg.stop_tokens`

  @functools.cached_property
  def forbidden_ids(self) -> tuple[int, ...]:
    """Ids that are never sampled."""
    return forbidden_ids(self.conversation, self.stop_ids)


def stop_ids(conversation: Conversation, cfg: RolloutConfig) -> tuple[int, ...]:
  """Returns the ids of the tokens that end a turn.

  <|endoftext|> may be one of them, because base policies end their text with it.

  Raises:
    ConfigError: if no token is given, or the tokenizer lacks one, or the policy never samples it.
  """
  find, forbidden = conversation.tokenizer.inner.token_to_id, set(conversation.forbidden_ids)
  ids = {token: find(token) for token in cfg.stop_tokens}
  forbidden.discard(ids.get(END_OF_TEXT, -1))
  wrong = [token for token, i in ids.items() if i is None or i in forbidden]
  if wrong or not ids:
    raise ConfigError(
      f"config.rollout.stop_tokens: {', '.join(wrong) or 'no token'} cannot end a turn, because "
      f"the policy never samples it; name tokens such as {IM_END}"
    )
  return tuple(token_id for token_id in ids.values() if token_id is not None)


def forbidden_ids(conversation: Conversation, stops: Sequence[int]) -> tuple[int, ...]:
  """Returns the ids that are never sampled: those of the conversation except the stop tokens."""
  return tuple(i for i in conversation.forbidden_ids if i not in stops)
