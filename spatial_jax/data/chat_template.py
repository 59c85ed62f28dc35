"""A chat of words, pictures and clips as one text, in the template of each family.

    Message("user", (clip, "How far is the chair?"))

    Qwen2-VL, Qwen2.5-VL
      <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
      <|im_start|>user\\n<|vision_start|><|video_pad|><|vision_end|>How far ... chair?<|im_end|>\\n
      <|im_start|>assistant\\n

    Qwen3-VL: no system message of its own, and every temporal patch stands behind its time
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
  plain,
)
from spatial_jax.types import PatchedImage


@dataclasses.dataclass(frozen=True, eq=False)
class PatchedClip:
  """A clip cut into patches, with what `video` says of their times.

  Attributes:
    image: all patches.
    times_s: the second that stands for each temporal patch.
    step_s: seconds from one temporal patch to the next.
  """

  image: PatchedImage
  times_s: tuple[float, ...]
  step_s: float


Part = str | PatchedImage | PatchedClip


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn; parts in the order in which they are read."""

  role: Literal["system", "user", "assistant"]
  parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class ChatConfig:
  """What the templates of the families differ in.

  Attributes:
    system: opens a chat that has no system message; empty for none.
    written_times: each temporal patch of a clip stands alone behind its time.
    outer_pair: a clip of written times stands between <|vision_start|> and <|vision_end|> as a
      whole too: what transformers 5 gives; its earlier releases and other engines do not.
  """

  system: str
  written_times: bool
  outer_pair: bool


class Chat(NamedTuple):
  """A chat as text.

  Attributes:
    text: with one pad per picture.
    pictures: what stands at each pad, in order; the temporal patches of a clip of written times are
      pictures of their own, which is how they are seen and where they stand.
    seconds: from one temporal patch of each clip to the next.
  """

  text: str
  pictures: list[PatchedImage]
  seconds: list[float]


HELPFUL = ChatConfig("You are a helpful assistant.", written_times=False, outer_pair=False)
QWEN3 = ChatConfig("", written_times=True, outer_pair=False)


def chat_text(messages: Sequence[Message], cfg: ChatConfig) -> Chat:
  """The chat up to the assistant's own words.

  Args:
    messages: at least one.
    cfg: of the family.
  """
  pictures: list[PatchedImage] = []
  if cfg.system and messages[0].role != "system":
    messages = [Message("system", (cfg.system,)), *messages]
  turns = []
  for message in messages:
    written = "".join(_written(part, cfg, pictures) for part in message.parts)
    turns.append(f"{IM_START}{message.role}\n{written}{IM_END}\n")
  clips = [part for one in messages for part in one.parts if isinstance(part, PatchedClip)]
  text = "".join(turns) + f"{IM_START}assistant\n"
  return Chat(text, pictures, [clip.step_s for clip in clips])


def _written(part: Part, cfg: ChatConfig, pictures: list[PatchedImage]) -> str:
  if isinstance(part, str):
    return plain(part)
  if isinstance(part, PatchedImage):
    pictures.append(part)
    return f"{VISION_START}{IMAGE_PAD}{VISION_END}"
  if not cfg.written_times:
    pictures.append(part.image)
    return f"{VISION_START}{VIDEO_PAD}{VISION_END}"
  pictures += frames_of(part.image)
  shown = f"{VISION_START}{VIDEO_PAD}{VISION_END}"
  text = "".join(f"<{time:.1f} seconds>{shown}" for time in part.times_s)
  return f"{VISION_START}{text}{VISION_END}" if cfg.outer_pair else text


def frames_of(clip: PatchedImage) -> list[PatchedImage]:
  """The temporal patches of a clip, each a picture of grid (1, height, width)."""
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
