"""Values of a config that follow from the model, from the data and from the memory.

    model folder ──► mesh, pixel bounds, normalisation        model_values
    some prompts ──► lengths, buckets                         data_values
    memory plan  ──► slots, rows of a microbatch, buffers     largest_fitting, buffer_values

`prepare` puts them into a config where it has None.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spatial_jax.config import build
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.vision_packing import geometric_buckets, window_layout
from spatial_jax.hf.model_zoo import parameter_count
from spatial_jax.learn.losses import KlConfig
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.reward.config import RewardConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.memory import MemoryPlan
from spatial_jax.stages.updates import image_batches
from spatial_jax.types import Prompt

Settings = dict[str, Any]  # a config as nested dicts

# Rates of adapters in vsGRPO, for 7B and for 2B, and of full tuning in ViLaSR.
_RATE, _SMALL_RATE, _FULL_RATE = 5e-6, 1e-5, 1e-6
_SMALL = 4.5e9  # parameters
_MULTIPLE = 128  # lengths are rounded up to it: the TPU kernel reads blocks of this length
_MOST_BUCKETS = 3  # of one kind: each is a trace of a program
_MEASURED_QUANTILES = (0.5, 0.9, 1.0)
# Responses of the papers: ViLaSR draws in up to 13,312 tokens and 10 turns; a form without drawing
# is one turn, vsGRPO's answers are short.
_DRAWING = {"max_turns": 10, "response": 13312, "turn": 2048}
_PLAIN = {"max_turns": 1, "response": 1024, "turn": 1024}
# Images that a rollout is expected to draw, for the buffers; a rollout with many more ends early.
_DRAWN_IMAGES = 4
_MARGIN = 0.92  # of the memory, for the scratch of the rollout programs and what no plan knows
_MICRO_ROWS = (8, 4, 2, 1)
_MOST_PROMPTS = 32  # per step: ViLaSR's number
# ViLaSR's prompts: 16 frames of 256 tokens and 1,024 tokens of text.
_ASSUMED_TOKENS, _ASSUMED_IMAGES, _ASSUMED_SIDE = 5120, 16, 32


class PromptSize(NamedTuple):
  """The size of one prompt."""

  tokens: int
  grids: tuple[tuple[int, int, int], ...]  # of its images, in patches

  @property
  def visual_tokens(self) -> int:
    """Merged tokens of all images."""
    return sum(math.prod(grid) // 4 for grid in self.grids)


ASSUMED = PromptSize(_ASSUMED_TOKENS, ((1, _ASSUMED_SIDE, _ASSUMED_SIDE),) * _ASSUMED_IMAGES)


def size_of(prompt: Prompt) -> PromptSize:
  """Returns the size of a prompt."""
  return PromptSize(len(prompt.token_ids_T), tuple(image.grid_3 for image in prompt.images))


# --- from the model ------------------------------------------------------------------------------


def model_values(
  shape: QwenVLConfig,
  image: PreprocessConfig,
  video: PreprocessConfig,
  devices: int,
  local_devices: int,
  usable: int,
  adapters: bool,
) -> dict[str, Any]:
  """Returns the values that belong to the model and to the devices.

  Args:
    image, video: settings of its processor.
    devices, local_devices: of all processes, and of one.
    usable: bytes of one device.
    adapters: whether adapters are trained.
  """
  rate = _RATE if parameter_count(shape) > _SMALL else _SMALL_RATE
  tensor = tensor_devices(shape, local_devices, usable)
  return {
    "mesh.data": 1,
    "mesh.fsdp": devices // tensor,
    "mesh.tensor": tensor,
    "preprocess.patch_size": image.patch_size,
    "preprocess.merge_size": image.merge_size,
    "preprocess.temporal_size": image.temporal_size,
    "preprocess.min_pixels": image.min_pixels,
    "preprocess.max_pixels": image.max_pixels,
    "preprocess.mean": image.mean,
    "preprocess.std": image.std,
    "video.min_pixels": video.min_pixels,
    "video.max_pixels": video.max_pixels,
    "learn.optimizer.learning_rate": rate if adapters else _FULL_RATE,
  }


def tensor_devices(shape: QwenVLConfig, local_devices: int, usable: int) -> int:
  """Returns over how many devices of a process heads and feed-forward width are sharded.

  The fewest whose memory holds the bfloat16 weights four times, so that caches and state have room;
  at most the number of key/value heads, which it divides.
  """
  weights = 2 * parameter_count(shape)
  divisors = [n for n in range(1, local_devices + 1) if local_devices % n == 0]
  fitting = [n for n in divisors if shape.decoder.kv_heads % n == 0]
  return next((n for n in fitting if 4 * weights <= n * usable), fitting[-1])


# --- from the data -------------------------------------------------------------------------------


def data_values(
  settings: Settings,
  sizes: Sequence[PromptSize],
  draws: bool,
  conversation: Conversation | None,
  shape: QwenVLConfig,
) -> dict[str, Any]:
  """Returns lengths and buckets for prompts of the given sizes.

  Args:
    settings: rollout.prompts and .group are read, what is not None of rollout.stop, and in learn
      what `image_batches` reads.
    sizes: of some prompts of the data, at least one.
    draws: whether the prompt form draws.
    conversation: measures observations; None: their text is assumed.
  """
  rollout, stop = settings["rollout"], settings["rollout"]["stop"]
  usual = _DRAWING if draws else _PLAIN
  response = stop["max_response_tokens"] or usual["response"]
  frame = max((h * w for size in sizes for _, h, w in size.grids), default=4) // 4
  shown = max(size.visual_tokens for size in sizes)
  images = max(len(size.grids) for size in sizes)
  drawn = max(stop["max_images"] - images, 0) * frame if draws else 0
  limit = stop["max_image_tokens"] or shown + drawn
  expected = min(_DRAWN_IMAGES * frame, limit - shown) if draws else 0
  lengths = buckets([size.tokens for size in sizes])
  prompts, group = -(-rollout["prompts"] // _image_batches(settings["learn"])), rollout["group"]
  return {
    "rollout.stop.max_turns": usual["max_turns"],
    "rollout.stop.max_response_tokens": response,
    "rollout.stop.max_image_tokens": limit,
    "rollout.max_tokens_per_turn": min(usual["turn"], response),
    "rollout.prompt_buckets": lengths,
    "rollout.observation_buckets": _observation_buckets(frame, images, draws, conversation),
    "rollout.suffix_block_edges": _edges(response),
    "rollout.append": (8,) if draws else (1,),
    "rollout.vision": _vision_of_prompts(sizes, shape),
    "learn.prefix_buckets": lengths,
    "learn.vision": _vision_of_update(sizes, prompts, group * expected, shape),
    "learn.micro.lengths": _row_lengths(response + 1),
  }


def _image_batches(learn: Settings) -> int:
  reward = build(RewardConfig, learn["reward"], "config.learn.reward")
  kl = build(KlConfig, learn["loss"]["kl"], "config.learn.loss.kl")
  return image_batches(learn["minibatches"], reward, kl)


def buffer_values(
  settings: Settings, sizes: Sequence[PromptSize], slots: int, draws: bool
) -> dict[str, Any]:
  """Returns the values that depend on the number of slots."""
  stop = settings["rollout"]["stop"]
  frame = max((h * w for size in sizes for _, h, w in size.grids), default=4) // 4
  shown = max(size.visual_tokens for size in sizes)
  one = max(stop["max_image_tokens"] - shown, 0) if draws else 0
  usual = slots * (shown + settings["rollout"]["group"] * _DRAWN_IMAGES * frame * draws)
  return {
    "rollout.slots": slots,
    "rollout.prefill": tuple(sorted({1, min(slots, 4)})),
    "rollout.feature_buffer_tokens": max(usual, shown, one, 1),
    "evaluation.prompts": 4 * slots,
    "evaluation.slots": slots,
  }


def buckets(lengths: Sequence[int]) -> tuple[int, ...]:
  """Returns ascending padded lengths: the median, nine tenths and the largest, rounded up."""
  found = np.quantile(np.asarray(lengths), _MEASURED_QUANTILES, method="higher")
  return tuple(sorted({_round(int(length)) for length in found}))


def _round(length: int) -> int:
  return -(-length // _MULTIPLE) * _MULTIPLE


def _edges(response: int) -> tuple[int, ...]:
  """Most responses are short, and a block that no row has reached is skipped."""
  return tuple(sorted({_round(response // part) for part in (8, 3)} - {_round(response)}))


def _row_lengths(longest: int) -> tuple[int, ...]:
  return tuple(sorted({_round(longest // part) for part in (8, 3)} | {_round(longest)}))


def _observation_buckets(
  frame: int, images: int, draws: bool, conversation: Conversation | None
) -> tuple[int, ...]:
  """Lengths of observations of one image, and of as many as one turn draws."""
  if not draws:
    return (_MULTIPLE,)
  text = 128
  if conversation is not None:
    pixels = np.zeros((conversation.preprocess.patch_size * 2,) * 2 + (3,), np.uint8)
    last = (conversation.observation(images + 99, [pixels], last) for last in (False, True))
    text = max(len(segment.token_ids_T) for segment in last)
  return tuple(sorted({_round(count * (frame + text)) for count in (1, 2, 4)}))


def _windows(grid: tuple[int, int, int], shape: QwenVLConfig) -> int:
  return window_layout(grid, shape.vision.window_blocks).slots


def _vision_of_prompts(
  sizes: Sequence[PromptSize], shape: QwenVLConfig
) -> dict[str, tuple[int, ...]]:
  """One image, and all images of a prompt: a call encodes as many images as fit the largest."""
  windows = [[_windows(grid, shape) for grid in size.grids] for size in sizes]
  frames = [[grid[0] for grid in size.grids] for size in sizes]
  patches = max((h * w for size in sizes for _, h, w in size.grids), default=4)
  return {
    "windows": _one_and_all(windows),
    "frames": _one_and_all(frames),
    "patches": (_round(patches),),
  }


def _one_and_all(counts: Sequence[Sequence[int]]) -> tuple[int, ...]:
  one = max((count for each in counts for count in each), default=1)
  whole = max(max(map(sum, counts)), 4 * one)
  return tuple(sorted({geometric_buckets(16, n)[-1] for n in (one, whole)}))


def _vision_of_update(
  sizes: Sequence[PromptSize], prompts: int, drawn: int, shape: QwenVLConfig
) -> dict[str, tuple[int, ...]]:
  """All images of a batch of the update: of usual prompts, and of the largest with drawings."""
  each = _vision_of_prompts(sizes, shape)
  blocks = shape.vision.window_blocks
  longest = buckets([size.tokens for size in sizes])[-1]  # a prompt may have more than was measured
  windows = [sum(_windows(grid, shape) for grid in size.grids) for size in sizes]
  windows.append(longest // blocks**2)
  frames = [sum(grid[0] for grid in size.grids) for size in sizes]
  frame = max((h * w for size in sizes for _, h, w in size.grids), default=4) // 4

  def of_batch(counts: Sequence[int], more: int) -> tuple[int, ...]:
    usual, most = prompts * int(np.mean(counts[: len(sizes)]) + 1), prompts * (max(counts) + more)
    return tuple(sorted({geometric_buckets(16, n)[-1] for n in (usual, most)}))

  return {
    "windows": _at_least(of_batch(windows, -(-drawn // blocks**2)), each["windows"]),
    "frames": _at_least(of_batch(frames, -(-drawn // frame)), each["frames"]),
    "patches": each["patches"],
  }


def _at_least(sizes: tuple[int, ...], others: tuple[int, ...]) -> tuple[int, ...]:
  """The sizes, the last one at least as large as the last of the others."""
  return tuple(sorted({*sizes[:-1], max(sizes[-1], others[-1])}))


# --- from the memory -----------------------------------------------------------------------------


def prompts_to_try(devices: int, processes: int) -> list[int]:
  """Returns numbers of prompts per step and process, the largest first.

  Args:
    devices: of one process, over which rows are sharded, times the minibatches of a step; it
      divides each number.
    processes: which share the prompts of a step.
  """
  most = max(_MOST_PROMPTS // (devices * processes), 1)
  return [devices * (most >> k) for k in range(most.bit_length())]


def largest_fitting(
  settings: Settings,
  plan_of: Callable[[int, int], MemoryPlan],
  data_devices: int,
) -> tuple[int, int, bool]:
  """Returns the most slots, and the most rows of a microbatch, that fit; and whether they do.

  Args:
    settings: values that are not None are kept.
    plan_of: (slots, rows of a microbatch) -> plan.
    data_devices: the slots are a multiple of it.
  """
  prompts = settings["rollout"]["prompts"]
  given_slots, given_rows = settings["rollout"]["slots"], settings["learn"]["micro"]["rows"]
  halves = [prompts >> k for k in range(prompts.bit_length())]
  rounded = [-(-count // data_devices) * data_devices for count in halves]
  slots_tried = [given_slots] if given_slots else list(dict.fromkeys(rounded))
  rows_tried = [given_rows] if given_rows else list(_MICRO_ROWS)

  plans = [(count, plan_of(count, rows_tried[-1])) for count in slots_tried]
  fitting = [count for count, plan in plans if plan.rollouts <= _MARGIN * plan.device]
  slots = fitting[0] if fitting else slots_tried[-1]
  updates = [(count, plan_of(slots, count)) for count in rows_tried]
  rows = [count for count, plan in updates if plan.update <= _MARGIN * plan.device]
  return slots, (rows or rows_tried)[0 if rows else -1], bool(fitting and rows)
