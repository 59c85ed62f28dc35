"""Qwen's own tokenizer, rebuilt offline from the rank file that its releases carry.

qwen.tiktoken  "base64 rank" per line ──► vocabulary and merges ──► tokenizers.Tokenizer

Source: Qwen2Tokenizer of transformers (split, special tokens and their order).
"""

import base64
import pathlib
from collections.abc import Mapping

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from spatial_jax.data.tokenizer import QWEN_SPLIT, SPECIAL_TOKENS, Tokenizer
from spatial_jax.errors import DataError

# Behind the special tokens of the text module; the first six are plain text to a decoder.
_LATER_TOKENS = (
  "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
  "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
  "<think>", "</think>",
)  # fmt: skip


def read_ranks(path: pathlib.Path) -> dict[bytes, int]:
  """The tokens of a rank file, in order of their ranks.

  Raises:
    DataError: I/O, when there is no such file or a line is not "base64 rank".
  """
  try:
    lines = pathlib.Path(path).read_bytes().splitlines()
  except OSError as error:
    raise DataError(f"{path} cannot be read: {error}") from error
  ranks = {}
  for number, line in enumerate(lines, start=1):
    try:
      token, rank = line.split()
      ranks[base64.b64decode(token)] = int(rank)
    except ValueError as error:
      raise DataError(f"{path} line {number} is not 'base64 rank': {error}") from error
  return ranks


def qwen_tokenizer(ranks: Mapping[bytes, int]) -> Tokenizer:
  """The tokenizer of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

  A token longer than a byte was merged from two of lower rank: those that are left when its bytes
  are merged as far as tokens below its own rank allow.

  Args:
    ranks: of every token, single bytes included.
  """
  letters = _byte_letters()

  def written(token: bytes) -> str:
    return "".join(letters[byte] for byte in token)

  ordered = sorted(ranks, key=lambda token: ranks[token])
  halves = [_halves(token, ranks, ranks[token]) for token in ordered if len(token) > 1]
  merges = [(written(first), written(second)) for first, second in halves]
  vocabulary = {written(token): ranks[token] for token in ordered}
  inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
  inner.normalizer = normalizers.NFC()
  inner.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  inner.decoder = decoders.ByteLevel()
  inner.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in SPECIAL_TOKENS])
  inner.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in _LATER_TOKENS])
  return Tokenizer(inner)


def _halves(token: bytes, ranks: Mapping[bytes, int], below: int) -> tuple[bytes, bytes]:
  """The two tokens that `token` was merged from."""
  parts = [token[i : i + 1] for i in range(len(token))]
  while len(parts) > 2:
    pairs = [ranks.get(parts[i] + parts[i + 1], below) for i in range(len(parts) - 1)]
    best = min(pairs)
    if best >= below:
      raise DataError(f"token {token!r} of rank {below} is no merge of two earlier ones")
    at = pairs.index(best)
    parts[at : at + 2] = [parts[at] + parts[at + 1]]
  return parts[0], parts[1]


def _byte_letters() -> dict[int, str]:
  """The letter that stands for each byte in a byte-level BPE: itself where it can be printed."""
  printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  letters = {byte: chr(byte) for byte in printed}
  others = (byte for byte in range(256) if byte not in letters)
  return letters | {byte: chr(256 + number) for number, byte in enumerate(others)}
