"""Writes the prompt of a task, and the observation of drawn images, as text.

A conversation is one string: the texts of a form (`prompt_form`) in the chat template of the model
(`chat_template`). Each image is one pad token, later repeated once per merged patch:

    <|im_start|>system\\n ... <|im_end|>\\n<|im_start|>user\\n
    <|vision_start|><|image_pad|><|vision_end|> image line ... question <|im_end|>\\n
    <|im_start|>assistant\\n  [sampled turn]<|im_end|>  \\n<|im_start|>user\\n [drawn image] ...

Source: ViLaSR, arXiv:2506.09965 (conversation).
"""

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence

import numpy as np

from spatial_jax.config import FieldError, check_field
from spatial_jax.data.chat_template import ChatTemplate
from spatial_jax.data.clip import PatchedClip
from spatial_jax.data.tokenizer import (
  IMAGE_PAD,
  SPECIAL_TOKENS,
  VISION_END,
  VISION_START,
  escape_special_tokens,
)
from spatial_jax.errors import DataError
from spatial_jax.types import IMAGE_MARK, VIDEO_MARK, PatchedImage, Task

IMAGE_TOKENS = f"{VISION_START}{IMAGE_PAD}{VISION_END}"
_MARKS = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}")


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The text around a question. Three values are templates with fields in braces.

  The fields of `image_line` and `observation` are {index} from 1, {width} and {height} in pixels.
  """

  system: str  # content of the system message; empty: the chat template may add its own
  image_line: str  # template, after each image of the prompt
  question: str  # template; its field {question} has options and suffix already appended
  options: str  # line before the options of a choice; empty for none
  number_suffix: str  # appended to a question whose answer is a number
  choice_suffix: str
  words_suffix: str
  observation: str  # template, after each drawn image
  more: str  # after the last drawn image, if the policy may draw again
  final: str  # after the last drawn image, if the policy must answer now

  def __post_init__(self):
    for name, text in vars(self).items():
      rule = "contain no special token, which only the conversation writes"
      check_field(self, name, not any(token in text for token in SPECIAL_TOKENS), rule)
    image = {"index": 1, "width": 28, "height": 28}
    _check_template("image_line", self.image_line, image)
    _check_template("question", self.question, {"question": "?"})
    _check_template("observation", self.observation, image)
    if not any(field == "question" for field in _fields(self.question)):
      raise FieldError("question must contain {question}; write it where the question belongs")


def _check_template(key: str, template: str, values: Mapping[str, int | str]) -> None:
  """Raises FieldError if `template` cannot be filled with `values`."""
  try:
    unknown = [field for field in _fields(template) if field not in values]
    problem = f"has the unknown field {{{unknown[0]}}}" if unknown else ""
    if not problem:
      template.format_map(values)
  except (ValueError, LookupError, TypeError) as error:
    problem = f"is not a template: {error}"
  if problem:
    fields = ", ".join(f"{{{field}}}" for field in values)
    raise FieldError(f"{key} {problem}; its fields are {fields}; write {{{{ and }}}} for a brace")


def _fields(template: str) -> list[str]:
  """Returns the field names of a template; raises ValueError for a single brace."""
  return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]


def prompt_text(
  task: Task,
  media: Sequence[PatchedImage | PatchedClip],
  cfg: TextConfig,
  template: ChatTemplate,
) -> str:
  """Writes the prompt of a task, up to the response, with one pad token per image.

  Images and clips replace the marks in the question, in order; without marks they come first.

  Raises:
    DataError: if the numbers of marks and of media differ, or the template refuses the messages.
  """
  shown = _media_texts(media, cfg)
  pieces = _MARKS.split(escape_special_tokens(task.question))
  if len(pieces) == 1:
    first, question = "".join(shown), pieces[0]
  elif len(pieces) == len(shown) + 1:
    first, question = "", "".join(map("".join, zip(pieces, [*shown, ""], strict=True)))
  else:
    marks = f"{IMAGE_MARK} and {VIDEO_MARK}"
    raise DataError(
      f"the question has {len(pieces) - 1} marks {marks} for {len(shown)} images and videos; "
      "write one for each, or none"
    )
  options = [escape_special_tokens(option) for option in task.options or ()]
  lines = [question, *([cfg.options] if options and cfg.options else []), *options]
  suffix = {"choice": cfg.choice_suffix, "number": cfg.number_suffix, "words": cfg.words_suffix}
  question = cfg.question.format(question="\n".join(lines) + suffix[task.answer_kind])
  return template.prompt(cfg.system, first + question)


def _media_texts(media: Sequence[PatchedImage | PatchedClip], cfg: TextConfig) -> list[str]:
  """The text in the place of each image and clip; each part of a clip counts as an image."""
  texts, index = [], 1
  for one in media:
    if isinstance(one, PatchedClip):
      texts.append(one.text)
      index += len(one.images)
    else:
      texts.append(IMAGE_TOKENS + _image_line(cfg.image_line, index, one))
      index += 1
  return texts


def observation_text(
  first_index: int,
  images: Sequence[PatchedImage],
  last: bool,
  cfg: TextConfig,
  template: ChatTemplate,
) -> str:
  """Writes the observation of drawn images: the text between <|im_end|> and the next turn.

  Args:
    first_index: index, from 1, of the first new image.
    images: the new images, at least one.
    last: the policy must answer in the next turn.
    cfg, template: text around the images, and around their message.

  Returns:
    The text, with one pad token per image.
  """
  lines = [
    IMAGE_TOKENS + _image_line(cfg.observation, index, image)
    for index, image in enumerate(images, first_index)
  ]
  ending = cfg.final if last else cfg.more
  return template.observation("".join(lines) + ending)


def given_observation(text: str, images: int, template: ChatTemplate) -> str:
  """`observation_text` with the text of a data row.

  Args:
    text: with a mark <image> for each image; without marks the images come first.
    images: their number.

  Raises:
    DataError: if the numbers of marks and images differ.
  """
  pieces = escape_special_tokens(text).split(IMAGE_MARK)
  if len(pieces) == 1:
    return template.observation(IMAGE_TOKENS * images + pieces[0])
  if len(pieces) != images + 1:
    raise DataError(
      f"an observation has {len(pieces) - 1} marks {IMAGE_MARK} for {images} images; write one for "
      "each, or none"
    )
  return template.observation(IMAGE_TOKENS.join(pieces))


def expand_image_tokens(
  token_ids: Sequence[int], images: Sequence[PatchedImage], *pads: int
) -> tuple[np.ndarray, tuple[int, ...]]:
  """Repeats the pad token of each image once per merged patch.

      ids     a  PAD  b        images: one of 3 merged patches
      result  a  PAD PAD PAD  b,   starts (1,)

  Args:
    token_ids: ids of the text.
    images: images and clips in the order of their pad tokens.
    pads: ids of the pad tokens.

  Returns:
    int32 [T] ids, and the index of the first token of each image.

  Raises:
    DataError: if the numbers of pad tokens and images differ.
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
