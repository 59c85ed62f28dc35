"""Task -> the text of its prompt; drawn images -> the text of an observation.

A conversation is one string. Each image is one pad token, expanded to its merged patches:

    <|im_start|>system\\n ... <|im_end|>\\n<|im_start|>user\\n
    <|vision_start|><|image_pad|><|vision_end|> image line ... question <|im_end|>\\n
    <|im_start|>assistant\\n  [sampled turn]<|im_end|>  \\n<|im_start|>user\\n [drawn image] ...

Source: ViLaSR, arXiv:2506.09965 (conversation); Qwen2.5-VL's chat template (roles, special tokens).
"""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from spatial_jax.config import ConfigError
from spatial_jax.data.tokenizer import IM_END, IM_START, IMAGE_PAD, VISION_END, VISION_START, plain
from spatial_jax.errors import DataError
from spatial_jax.types import PatchedImage, Task

IMAGE_TOKENS = f"{VISION_START}{IMAGE_PAD}{VISION_END}"


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The words around a question. Braces name what is filled in.

  Attributes:
    system: content of the system turn; empty leaves the turn out.
    image_line: after each picture of the prompt; {index} from 1, {width}, {height} in pixels.
    question: {question}, with options and suffix already joined.
    number_suffix, choice_suffix: joined behind the question.
    observation: after each drawn picture.
    more: after the last drawn picture when the policy may draw again.
    final: instead of `more` when it may not.
    opening: words put into the policy's mouth, which its first turn goes on from; never trained.
    opened: share of the questions for a number whose answer is begun so, in [0, 1]; 1: of all
      questions.
  """

  system: str
  image_line: str
  question: str
  number_suffix: str
  choice_suffix: str
  observation: str
  more: str
  final: str
  response_prefix: str
  response_prefix_fraction: float

  def __post_init__(self):
    if not 0 <= self.response_prefix_fraction <= 1:
      raise ConfigError(
        "config.text.response_prefix_fraction must lie in [0, 1], "
        f"got {self.response_prefix_fraction}"
      )


def prompt_text(task: Task, images: Sequence[PatchedImage], cfg: TextConfig) -> str:
  """The whole prompt of a task up to the assistant's own words, one pad per picture."""
  lines = [plain(task.question)]
  if task.options is not None:
    lines += [plain(option) for option in task.options]
  suffix = {"choice": cfg.choice_suffix, "number": cfg.number_suffix, "words": ""}
  question = cfg.question.format(question="\n".join(lines) + suffix[task.answer_kind])
  pictures = "".join(
    IMAGE_TOKENS + _image_line(cfg.image_line, index, image)
    for index, image in enumerate(images, 1)
  )
  system = f"{IM_START}system\n{cfg.system}{IM_END}\n" if cfg.system else ""
  asked = f"{system}{IM_START}user\n{pictures}{question}{IM_END}\n"
  return f"{asked}{IM_START}assistant\n{response_prefix_of(task, cfg)}"


def response_prefix_of(task: Task, cfg: TextConfig) -> str:
  """What the answer to this task has to begin with, often ""; the task alone decides."""
  chosen = zlib.crc32(task.task_id.encode()) < cfg.response_prefix_fraction * 2**32
  return (
    cfg.response_prefix
    if chosen and (task.answer_kind == "number" or cfg.response_prefix_fraction == 1)
    else ""
  )


def observation_text(
  first_index: int, images: Sequence[PatchedImage], last: bool, cfg: TextConfig
) -> str:
  """What follows the policy's <|im_end|> after a drawing: the new pictures and what to do next.

  Args:
    first_index: visible index (from 1) of the first new picture.
    images: the new pictures, at least one.
    last: whether the policy must answer now.
  """
  lines = [
    IMAGE_TOKENS + _image_line(cfg.observation, index, image)
    for index, image in enumerate(images, first_index)
  ]
  ending = cfg.final if last else cfg.more
  return f"\n{IM_START}user\n{''.join(lines)}{ending}{IM_END}\n{IM_START}assistant\n"


def expand_image_tokens(
  token_ids: Sequence[int], images: Sequence[PatchedImage], *pads: int
) -> tuple[np.ndarray, tuple[int, ...]]:
  """Repeats each picture's single pad token once per merged patch.

      ids     a  PAD  b        images: one of 3 tokens
      result  a  PAD PAD PAD  b,   starts (1,)

  Args:
    token_ids: of the text.
    images: images and clips in order of their pads.
    pads: the ids that stand for one.

  Returns:
    int32 [T] ids and the first token of each picture.

  Raises:
    DataError: on the host, when the number of pads is not the number of pictures.
  """
  ids = np.asarray(token_ids, np.int32)
  places = np.flatnonzero(np.isin(ids, pads))
  if len(places) != len(images):
    raise DataError(f"the text has {len(places)} image tokens for {len(images)} images")
  repeats = np.ones(len(ids), np.int64)
  repeats[places] = [image.tokens for image in images]
  starts = (np.cumsum(repeats) - repeats)[places]
  return np.repeat(ids, repeats), tuple(int(start) for start in starts)


def _image_line(template: str, index: int, image: PatchedImage) -> str:
  height, width = image.pixels.shape[:2]
  return template.format(index=index, width=width, height=height)
