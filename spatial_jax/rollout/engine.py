"""What every rollout needs besides parameters and prompts: one record, made once per run.

`scheduler.generate_rollouts` runs the loop.
"""

import dataclasses
import functools
from collections.abc import Sequence

from spatial_jax.config import ConfigError
from spatial_jax.data.tokenizer import END_OF_TEXT, IM_END
from spatial_jax.drawing.executor import Executor
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.programs import RolloutPrograms


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
  """Prompts, programs, drawing and limits of rollouts.

  Attributes:
    conversation: encodes prompts and observations.
    programs: what runs on the devices.
    executor: draws.
    cfg: shapes and limits.
    stop_ids: ids of `cfg.stop_tokens`.
  """

  conversation: Conversation
  programs: RolloutPrograms
  executor: Executor
  cfg: RolloutConfig
  stop_ids: tuple[int, ...]

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
