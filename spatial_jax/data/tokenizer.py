"""Text to tokens and back: a `tokenizers` tokenizer, special tokens, BPE training.

Source: special tokens and split of Qwen2.5's tokenizer.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from spatial_jax.errors import DataError

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


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
