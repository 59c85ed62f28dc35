"""Shapes for one question: large enough for it, and as small as possible, to avoid padding."""

import dataclasses

from spatial_jax.data.vision_packing import VisionBuckets, geometric_buckets, window_layout
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.image_feature_cache import max_drawn_images, max_drawn_tokens
from spatial_jax.types import Prompt

_LENGTH_MULTIPLE = 64  # lengths are rounded up to multiples of it, so that there are few traces
_SMALLEST_VISION = 16  # vision buckets are this times 1, 1.5, 2, 3, 4, 6, ...


def fit_rollout_config(
  cfg: RolloutConfig, conversation: Conversation, prompt: Prompt, samples: int, decode_steps: int
) -> RolloutConfig:
  """Returns `cfg` with shapes for `samples` rollouts of one prompt and all that they may draw.

  Args:
    cfg: limits, sampling parameters and stop tokens.
    samples: number of rollouts, at least 1.
    decode_steps: tokens per chunk; a token listener is called once per chunk.
  """
  draws = conversation.form.grammar.draws
  drawn = max_drawn_images(len(prompt.images), cfg.stop) if draws else 0
  drawn_tokens = max_drawn_tokens(prompt.images, cfg.stop) if draws else 0
  shown = sum(image.tokens for image in prompt.images)
  return dataclasses.replace(
    cfg,
    prompts=1,
    group=samples,
    slots=1,
    rows=0,
    prefill=(1,),
    append=tuple(sorted({1, min(samples, cfg.append[-1])})),
    decode_steps=decode_steps,
    gather_fractions=(),
    prompt_buckets=(_round_length(len(prompt.token_ids_T)),),
    observation_buckets=_observation_buckets(cfg, conversation, prompt, drawn),
    feature_buffer_tokens=max(shown + drawn_tokens, 1),
    vision=_vision_buckets(conversation, prompt),
  )


def _observation_buckets(
  cfg: RolloutConfig, conversation: Conversation, prompt: Prompt, drawn: int
) -> tuple[int, ...]:
  """Lengths of observations of 1, 2, 4, ... images; a turn draws at most one per operation."""
  largest_count = min(drawn, cfg.limits.operations)
  if largest_count < 1:
    return (_LENGTH_MULTIPLE,)
  pixels = max((image.pixels for image in prompt.images), key=lambda pixels: pixels.size)

  def length(count: int) -> int:
    first_index = len(prompt.images) + drawn  # the longest number
    observations = [
      conversation.observation(first_index, [pixels] * count, last, has_im_end=False)
      for last in (False, True)
    ]
    return max(len(observation.token_ids_T) for observation in observations)

  first, next_image = length(1), length(2) - length(1)
  counts = {min(1 << n, largest_count) for n in range(largest_count.bit_length() + 1)}
  return tuple(sorted({_round_length(first + next_image * (count - 1)) for count in counts}))


def _vision_buckets(conversation: Conversation, prompt: Prompt) -> VisionBuckets:
  """Buckets for one image, and for all images of the prompt."""
  blocks = conversation.policy.vision.window_blocks
  grids = [image.grid_3 for image in prompt.images]
  windows = [window_layout(grid, blocks).slots for grid in grids] or [1]
  frames = [time for time, _, _ in grids] or [1]
  patches = max((height * width for _, height, width in grids), default=1)
  return VisionBuckets(
    windows=tuple(sorted({_vision_bucket(max(windows)), _vision_bucket(sum(windows))})),
    frames=tuple(sorted({_vision_bucket(max(frames)), _vision_bucket(sum(frames))})),
    patches=(_vision_bucket(patches),),
  )


def _round_length(tokens: int) -> int:
  return -(-tokens // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def _vision_bucket(count: int) -> int:
  return geometric_buckets(_SMALLEST_VISION, count)[-1]
