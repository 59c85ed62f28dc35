"""Text to tokens and back: a wrapper of a `tokenizers` tokenizer, and Qwen's special tokens."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import tokenizers
from tokenizers import models

from spatial_jax.errors import DataError

FILE = "tokenizer.json"
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
# In the order of Qwen2.5's tokenizer, so that their ids follow the merges in the same sequence.
SPECIAL_TOKENS = (
  END_OF_TEXT, IM_START, IM_END,
  "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
  "<|quad_start|>", "<|quad_end|>", VISION_START, VISION_END, "<|vision_pad|>",
  IMAGE_PAD, VIDEO_PAD,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A `tokenizers` tokenizer of a Qwen-VL model."""

  inner: tokenizers.Tokenizer

  def encode(self, text: str) -> list[int]:
    """Returns the token ids of a text; a special token in the text becomes its id."""
    return self.inner.encode(text, add_special_tokens=False).ids

  def decode(self, token_ids: Sequence[int]) -> str:
    """Returns the text of token ids without Qwen's special tokens.

    Other tokens are kept even if the file marks them as special. Some fine-tuned tokenizers mark
    <think> and <answer>, and the text of an answer needs these tags.
    """
    kept = [token_id for token_id in token_ids if token_id not in self._special_ids]
    return self.inner.decode(kept, skip_special_tokens=False)

  def id(self, token: str) -> int:
    """Returns the id of a token.

    Raises:
      DataError: if the vocabulary does not contain the token.
    """
    found = self.inner.token_to_id(token)
    if found is None:
      raise DataError(f"the tokenizer has no token {token!r}; use the tokenizer of a Qwen-VL model")
    return found

  @functools.cached_property
  def used_ids(self) -> frozenset[int]:
    """The ids that belong to a token. Fine-tuned tokenizers may leave gaps between them."""
    return frozenset(self.inner.get_vocab(with_added_tokens=True).values())

  def forbidden_ids(self) -> tuple[int, ...]:
    """Returns the ids that the policy must never sample: all special tokens except <|im_end|>."""
    return tuple(sorted(self._special_ids - {self.inner.token_to_id(IM_END)}))

  @functools.cached_property
  def _special_ids(self) -> frozenset[int]:
    ids = (self.inner.token_to_id(token) for token in SPECIAL_TOKENS)
    return frozenset(i for i in ids if i is not None)


def load_tokenizer(folder: pathlib.Path) -> Tokenizer:
  """Reads `tokenizer.json` of a Hugging Face folder.

  Truncation, padding and BPE dropout are switched off. Training code leaves these settings in the
  file, and they would cut a prompt or change its tokens without a message.

  Raises:
    DataError: if the file is missing or cannot be read; the message names the file.
  """
  path = pathlib.Path(folder) / FILE
  if not path.is_file():
    raise DataError(f"{path} does not exist; copy {FILE} of the policy into this folder")
  try:
    inner = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library has no exception type of its own
    raise DataError(f"{path} cannot be read ({error}); copy or download it again") from error
  inner.no_truncation()
  inner.no_padding()
  if isinstance(inner.model, models.BPE):
    inner.model.dropout = None
  return Tokenizer(inner)


def escape_special_tokens(text: str) -> str:
  """Returns a text that contains no special token: a space is put into every "<|"."""
  return text.replace("<|", "< |")
