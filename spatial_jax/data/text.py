"""Text to tokens and back: chat template, drawing conversation, BPE of the embedded policy.

A conversation is one string; each picture is one pad token, widened to its merged patches:

    <|im_start|>system\\n ... <|im_end|>\\n<|im_start|>user\\n
    <|vision_start|><|image_pad|><|vision_end|> image line ... question <|im_end|>\\n
    <|im_start|>assistant\\n  [sampled turn]<|im_end|>  \\n<|im_start|>user\\n [drawn image] ...

Source: ViLaSR, arXiv:2506.09965 (conversation); Qwen2.5-VL's chat template (roles, special tokens).
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from spatial_jax.config import ConfigError
from spatial_jax.errors import DataError
from spatial_jax.types import PatchedImage, Task

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
PICTURE = f"{VISION_START}{IMAGE_PAD}{VISION_END}"

# The order of Qwen2.5's own special tokens, so that ids follow the merges in the same sequence.
SPECIAL_TOKENS = (
  END_OF_TEXT, IM_START, IM_END,
  "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
  "<|quad_start|>", "<|quad_end|>", VISION_START, VISION_END, "<|vision_pad|>",
  IMAGE_PAD, VIDEO_PAD,
)  # fmt: skip

# Qwen2's split: contractions, words with one leading sign, single digits, punctuation, whitespace.
QWEN_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
  opening: str
  opened: float

  def __post_init__(self):
    if not 0 <= self.opened <= 1:
      raise ConfigError(f"config.text.opened must lie in [0, 1], got {self.opened}")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A `tokenizers` tokenizer with the ids that the rest of the system asks for by name."""

  inner: tokenizers.Tokenizer

  def encode(self, text: str) -> list[int]:
    """Token ids of a text; special tokens written out in it become their ids."""
    return self.inner.encode(text, add_special_tokens=False).ids

  def decode(self, token_ids: Sequence[int]) -> str:
    """The text of token ids, special tokens left out."""
    return self.inner.decode(list(token_ids), skip_special_tokens=True)

  def id(self, token: str) -> int:
    """The id of one special token. Raises DataError (host) when the vocabulary lacks it."""
    found = self.inner.token_to_id(token)
    if found is None:
      raise DataError(f"the tokenizer has no token {token!r}; use the tokenizer of a Qwen-VL model")
    return found

  def forbidden_ids(self) -> tuple[int, ...]:
    """Ids the policy must never sample: all special tokens but <|im_end|>."""
    ids = (self.inner.token_to_id(token) for token in SPECIAL_TOKENS if token != IM_END)
    return tuple(sorted(i for i in ids if i is not None))


def load_tokenizer(folder: pathlib.Path) -> Tokenizer:
  """Reads `tokenizer.json` of a Hugging Face folder. Raises DataError (I/O) naming the file."""
  path = pathlib.Path(folder) / "tokenizer.json"
  if not path.is_file():
    raise DataError(f"{path} does not exist; a checkpoint folder needs its tokenizer.json")
  try:
    return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
  except Exception as error:  # the library has no error of its own
    raise DataError(f"{path} cannot be read ({error}); copy it again") from error


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
  """A byte-level BPE with Qwen's split and special tokens, learned from `texts`.

  Args:
    texts: the corpus.
    vocabulary: number of ids, special tokens included; at least 256 + the special tokens.
  """
  inner = tokenizers.Tokenizer(models.BPE())
  inner.normalizer = normalizers.NFC()
  inner.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  inner.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocabulary - len(SPECIAL_TOKENS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  inner.train_from_iterator(texts, trainer)
  inner.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in SPECIAL_TOKENS])
  return Tokenizer(inner)


def plain(text: str) -> str:
  """User text that cannot name a special token: "<|" is broken up."""
  return text.replace("<|", "< |")


def prompt_text(task: Task, images: Sequence[PatchedImage], cfg: TextConfig) -> str:
  """The whole prompt of a task up to the assistant's own words, one pad per picture."""
  lines = [plain(task.question)]
  if task.options is not None:
    lines += [plain(option) for option in task.options]
  suffix = {"choice": cfg.choice_suffix, "number": cfg.number_suffix, "words": ""}
  question = cfg.question.format(question="\n".join(lines) + suffix[task.answer_kind])
  pictures = "".join(
    PICTURE + _image_line(cfg.image_line, index, image) for index, image in enumerate(images, 1)
  )
  system = f"{IM_START}system\n{cfg.system}{IM_END}\n" if cfg.system else ""
  asked = f"{system}{IM_START}user\n{pictures}{question}{IM_END}\n"
  return f"{asked}{IM_START}assistant\n{opening_of(task, cfg)}"


def opening_of(task: Task, cfg: TextConfig) -> str:
  """What the answer to this task has to begin with, often ""; the task alone decides."""
  chosen = zlib.crc32(task.task_id.encode()) < cfg.opened * 2**32
  return cfg.opening if chosen and (task.answer_kind == "number" or cfg.opened == 1) else ""


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
    PICTURE + _image_line(cfg.observation, index, image)
    for index, image in enumerate(images, first_index)
  ]
  ending = cfg.final if last else cfg.more
  return f"\n{IM_START}user\n{''.join(lines)}{ending}{IM_END}\n{IM_START}assistant\n"


def widen(
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
