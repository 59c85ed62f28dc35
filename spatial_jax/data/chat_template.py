"""Writes a chat of text, images and videos as one text, in the template of each family.

    Message("user", (clip, "How far is the chair?"))

    Qwen2-VL, Qwen2.5-VL
      <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
      <|im_start|>user\\n<|vision_start|><|video_pad|><|vision_end|>How far ... chair?<|im_end|>\\n
      <|im_start|>assistant\\n

    Qwen3-VL: no default system message; the time in seconds precedes each temporal patch
      <|im_start|>user\\n<0.3 seconds><|vision_start|><|video_pad|><|vision_end|><1.4 seconds> ...

Source: the chat templates and processors of the three families in transformers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from spatial_jax.data.tokenizer import (
  IM_END,
  IM_START,
  IMAGE_PAD,
  VIDEO_PAD,
  VISION_END,
  VISION_START,
  escape_special_tokens,
)
from spatial_jax.types import PatchedImage


@dataclasses.dataclass(frozen=True, eq=False)
class PatchedClip:
  """The frames of a video as patches."""

  image: PatchedImage  # the patches of all frames
  times_s: tuple[float, ...]  # of each temporal patch
  step_s: float  # from one temporal patch to the next


Part = str | PatchedImage | PatchedClip


@dataclasses.dataclass(frozen=True)
class Message:
  """One message of a chat; `parts` are in reading order."""

  role: Literal["system", "user", "assistant"]
  parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class ChatConfig:
  """The differences between the chat templates of the families.

  `outer_vision_pair`: with `timestamps`, the whole clip is also enclosed in <|vision_start|> and
  <|vision_end|>. transformers 5 does this; its earlier releases and other engines do not.
  """

  default_system: str  # of a chat without a system message; "": none
  timestamps: bool  # the time in seconds is written before each temporal patch of a clip
  outer_vision_pair: bool


class Chat(NamedTuple):
  """A chat as text.

  With `timestamps`, each temporal patch of a clip is an image of its own.
  """

  text: str  # has one pad token per entry of `images`, in the same order
  images: list[PatchedImage]
  step_s: list[float]  # of each clip


QWEN2_CHAT = ChatConfig("You are a helpful assistant.", timestamps=False, outer_vision_pair=False)
QWEN3_CHAT = ChatConfig("", timestamps=True, outer_vision_pair=False)


def chat_text(messages: Sequence[Message], cfg: ChatConfig) -> Chat:
  """Writes a chat of at least one message; the text ends where the assistant's reply begins."""
  images: list[PatchedImage] = []
  if cfg.default_system and messages[0].role != "system":
    messages = [Message("system", (cfg.default_system,)), *messages]
  turns = []
  for message in messages:
    content = "".join(_part_text(part, cfg, images) for part in message.parts)
    turns.append(f"{IM_START}{message.role}\n{content}{IM_END}\n")
  clips = [part for message in messages for part in message.parts if isinstance(part, PatchedClip)]
  text = "".join(turns) + f"{IM_START}assistant\n"
  return Chat(text, images, [clip.step_s for clip in clips])


def _part_text(part: Part, cfg: ChatConfig, images: list[PatchedImage]) -> str:
  """Returns the text of one part and appends its images to `images`."""
  if isinstance(part, str):
    return escape_special_tokens(part)
  if isinstance(part, PatchedImage):
    images.append(part)
    return f"{VISION_START}{IMAGE_PAD}{VISION_END}"
  video = f"{VISION_START}{VIDEO_PAD}{VISION_END}"
  if not cfg.timestamps:
    images.append(part.image)
    return video
  images += split_clip(part.image)
  text = "".join(f"<{time:.1f} seconds>{video}" for time in part.times_s)
  return f"{VISION_START}{text}{VISION_END}" if cfg.outer_vision_pair else text


def split_clip(clip: PatchedImage) -> list[PatchedImage]:
  """Splits a clip into its temporal patches, each an image of grid (1, height, width)."""
  time, height, width = clip.grid_3
  return [
    dataclasses.replace(
      clip,
      content_hash=f"{clip.content_hash}/{number}",
      patches_PX=patches,
      grid_3=(1, height, width),
    )
    for number, patches in enumerate(np.split(clip.patches_PX, time))
  ]
