"""Builds Qwen's tokenizer from the rank file of its releases, without a download.

qwen.tiktoken  "base64 rank" per line ──► vocabulary and merges ──► tokenizers.Tokenizer

Source: Qwen2Tokenizer of transformers (split, special tokens and their order).
"""

import base64
import pathlib
from collections.abc import Mapping

import tokenizers
from tokenizers import models

from experiments.tiny.tokenizer import byte_level_tokenizer
from spatial_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from spatial_jax.errors import DataError

# Their ids follow those of SPECIAL_TOKENS. `decode` of the tokenizer keeps them.
_LATER_TOKENS = (
  "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
  "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
  "<think>", "</think>",
)  # fmt: skip


def read_ranks(path: pathlib.Path) -> dict[bytes, int]:
  """Reads a rank file.

  Args:
    path: text file with one "base64 rank" per line.

  Returns:
    Rank of each token, in the order of the file.

  Raises:
    DataError: if the file cannot be read or a line has another form.
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
  """Builds the tokenizer of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

  A token of several bytes was merged from two tokens of lower rank. To find them, its bytes are
  merged with all tokens of lower rank until two tokens are left.

  Args:
    ranks: rank of every token, single bytes included.

  Returns:
    The tokenizer.

  Raises:
    DataError: if a token cannot be merged from two tokens of lower rank.
  """
  letters = _byte_letters()

  def to_letters(token: bytes) -> str:
    return "".join(letters[byte] for byte in token)

  ordered = sorted(ranks, key=lambda token: ranks[token])
  halves = [_halves(token, ranks, ranks[token]) for token in ordered if len(token) > 1]
  merges = [(to_letters(first), to_letters(second)) for first, second in halves]
  vocabulary = {to_letters(token): ranks[token] for token in ordered}
  inner = byte_level_tokenizer(models.BPE(vocabulary, merges))
  inner.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in SPECIAL_TOKENS])
  inner.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in _LATER_TOKENS])
  return Tokenizer(inner)


def _halves(token: bytes, ranks: Mapping[bytes, int], rank: int) -> tuple[bytes, bytes]:
  """Returns the two tokens that `token` was merged from."""
  parts = [token[i : i + 1] for i in range(len(token))]
  while len(parts) > 2:
    pair_ranks = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
    best = min(pair_ranks)
    if best >= rank:
      raise DataError(f"token {token!r} of rank {rank} is no merge of two tokens of lower rank")
    at = pair_ranks.index(best)
    parts[at : at + 2] = [parts[at] + parts[at + 1]]
  return parts[0], parts[1]


def _byte_letters() -> dict[int, str]:
  """Returns the letter of each byte in a byte-level BPE: a printable byte is its own letter."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  letters = {byte: chr(byte) for byte in printable}
  others = (byte for byte in range(256) if byte not in letters)
  return letters | {byte: chr(256 + number) for number, byte in enumerate(others)}
