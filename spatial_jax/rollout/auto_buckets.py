"""Shapes for one question: no larger than what is asked, so that nobody waits for padding."""

import dataclasses

from spatial_jax.data.vision_packing import VisionBuckets, geometric_buckets, window_layout
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.image_feature_cache import most_drawn, most_drawn_tokens
from spatial_jax.types import Prompt

_LENGTH = 64  # lengths are rounded up to multiples of it: few traces
_SMALLEST = 16  # sizes of the tower's batch to this times 1, 1.5, 2, 3, 4, 6, ...


def fitted(
  cfg: RolloutConfig, conversation: Conversation, prompt: Prompt, samples: int, chunk: int
) -> RolloutConfig:
  """`cfg` with room for one prompt and `samples` rollouts of it, and for all they may draw.

  Args:
    cfg: limits, mode and words that end a turn.
    conversation: what reads prompt and drawings.
    prompt: the question.
    samples: rollouts, at least 1.
    chunk: tokens between two looks of whoever listens.
  """
  drawn = most_drawn(len(prompt.images), cfg.stop)
  shown = sum(image.tokens for image in prompt.images)
  tokens = len(prompt.token_ids_T)
  return dataclasses.replace(
    cfg,
    prompts=1,
    group=samples,
    slots=1,
    rows=0,
    prefill=(1,),
    append=tuple(sorted({1, min(samples, cfg.append[-1])})),
    decode_steps=chunk,
    gather_fractions=(),
    prompt_buckets=(_round(tokens),),
    observation_buckets=_observations(cfg, conversation, prompt, drawn),
    feature_buffer_tokens=max(shown + most_drawn_tokens(prompt.images, cfg.stop), 1),
    vision=_vision(conversation, prompt),
  )


def _observations(
  cfg: RolloutConfig, conversation: Conversation, prompt: Prompt, drawn: int
) -> tuple[int, ...]:
  """Lengths of 1, 2, 4, ... drawn pictures and their words; a turn draws one per operation."""
  most = min(drawn, cfg.limits.operations)
  if most < 1:
    return (_LENGTH,)
  pixels = max((image.pixels for image in prompt.images), key=lambda pixels: pixels.size)

  def length(count: int) -> int:
    first = len(prompt.images) + drawn  # the longest number
    looks = [
      conversation.observation(first, [pixels] * count, last, closed=False)
      for last in (False, True)
    ]
    return max(len(look.token_ids_T) for look in looks)

  one, more = length(1), length(2) - length(1)
  counts = {min(1 << n, most) for n in range(most.bit_length() + 1)}
  return tuple(sorted({_round(one + more * (count - 1)) for count in counts}))


def _vision(conversation: Conversation, prompt: Prompt) -> VisionBuckets:
  """Of one picture, and of all of the prompt's."""
  blocks = conversation.policy.vision.window_blocks
  grids = [image.grid_3 for image in prompt.images]
  windows = [window_layout(grid, blocks).slots for grid in grids] or [1]
  frames = [time for time, _, _ in grids] or [1]
  patches = max((height * width for _, height, width in grids), default=1)
  return VisionBuckets(
    windows=tuple(sorted({_up(max(windows)), _up(sum(windows))})),
    frames=tuple(sorted({_up(max(frames)), _up(sum(frames))})),
    patches=(_up(patches),),
  )


def _round(tokens: int) -> int:
  return -(-tokens // _LENGTH) * _LENGTH


def _up(count: int) -> int:
  return geometric_buckets(_SMALLEST, count)[-1]
