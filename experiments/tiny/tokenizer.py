"""Byte-level BPE tokenizers of Qwen's form: the empty one, and training.

Source: split of Qwen2.5's tokenizer.
"""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from spatial_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer

# Qwen2's split: contractions, words with one leading sign, single digits, punctuation, whitespace.
QWEN_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
  """Trains a byte-level BPE tokenizer with Qwen's split and special tokens.

  Args:
    texts: the corpus.
    vocabulary: number of ids, at least 256 + len(SPECIAL_TOKENS).

  Returns:
    The tokenizer; the special tokens have the highest ids.
  """
  inner = byte_level_tokenizer(models.BPE())
  trainer = trainers.BpeTrainer(
    vocab_size=vocabulary - len(SPECIAL_TOKENS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  inner.train_from_iterator(texts, trainer)
  inner.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in SPECIAL_TOKENS])
  return Tokenizer(inner)


def byte_level_tokenizer(model: models.BPE) -> tokenizers.Tokenizer:
  """Returns a tokenizer of this BPE model with Qwen's normalizer, split and decoder."""
  inner = tokenizers.Tokenizer(model)
  inner.normalizer = normalizers.NFC()
  inner.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  inner.decoder = decoders.ByteLevel()
  return inner
