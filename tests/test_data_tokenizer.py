"""Text to tokens: a small BPE, the prompt template, and the expansion of image tokens."""

import dataclasses
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from experiments.tiny.tokenizer import train_tokenizer
from spatial_jax.config import ConfigError, build
from spatial_jax.data.chat_template import CHATML
from spatial_jax.data.prompt_text import (
  TextConfig,
  expand_image_tokens,
  observation_text,
  prompt_text,
)
from spatial_jax.data.tokenizer import (
  IM_END,
  IMAGE_PAD,
  SPECIAL_TOKENS,
  Tokenizer,
  escape_special_tokens,
  load_tokenizer,
)
from spatial_jax.errors import DataError
from tests import dummies
from tests.rollout_fixtures import TOKENIZER, task

TEXT = TextConfig(
  system="Be brief.",
  image_line="image {index}, {width} x {height}\n",
  question="Q: {question}\nA:",
  options="",
  number_suffix="\nnumber",
  choice_suffix="\nletter",
  words_suffix="",
  observation="drawn {index}, {width} x {height}\n",
  more="go on",
  final="answer now",
)
SPECIAL_IDS = {TOKENIZER.id(token) for token in SPECIAL_TOKENS}
WILD = st.text() | st.lists(
  st.sampled_from([*SPECIAL_TOKENS, "<", "|", "<|", "|>", "{index}", "{", "im_end"])
).map("".join)


# --- tokenizer -----------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_decode_inverts_encode(text):
  ids = TOKENIZER.encode(escape_special_tokens(text))
  assert TOKENIZER.decode(ids) == unicodedata.normalize("NFC", escape_special_tokens(text))
  assert not SPECIAL_IDS & set(ids)


def test_each_digit_is_a_token():
  tokenizer = train_tokenizer(["12.5 125 1255 12 55"] * 50, 320)
  ids = tokenizer.encode(" 1255.5")
  assert [tokenizer.decode([i]) for i in ids] == [" ", "1", "2", "5", "5", ".", "5"]


def test_a_special_token_is_one_id_and_not_part_of_the_decoded_text():
  ids = TOKENIZER.encode(f"a{IM_END}b")
  assert ids.count(TOKENIZER.id(IM_END)) == 1
  assert TOKENIZER.decode(ids) == "ab"
  size = TOKENIZER.inner.get_vocab_size()
  assert sorted(SPECIAL_IDS) == list(range(size - len(SPECIAL_TOKENS), size))
  assert set(TOKENIZER.forbidden_ids()) == SPECIAL_IDS - {TOKENIZER.id(IM_END)}


def test_training_a_tokenizer_is_reproducible_and_keeps_its_vocabulary_size():
  corpus = ["the chair stands by the table"] * 3
  first, second = train_tokenizer(corpus, 290), train_tokenizer(corpus, 290)
  assert first.inner.to_str() == second.inner.to_str()
  assert 270 < first.inner.get_vocab_size() <= 290


def test_an_unusable_tokenizer_is_named(tmp_path):
  with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
  with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
    load_tokenizer(tmp_path)
  foreign = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
  with pytest.raises(DataError, match=r"no token '<\|im_end\|>'"):
    foreign.id(IM_END)


def reloaded(folder, change):
  """TOKENIZER after `change` of its file and a load."""
  inner = tokenizers.Tokenizer.from_str(TOKENIZER.inner.to_str())
  change(inner)
  inner.save(str(folder / "tokenizer.json"))
  return load_tokenizer(folder)


def set_dropout(inner):
  inner.model.dropout = 0.9


@pytest.mark.parametrize(
  "change",
  [
    lambda inner: None,
    lambda inner: inner.enable_truncation(8),
    lambda inner: inner.enable_padding(length=400),
    set_dropout,
  ],
  ids=["unchanged", "truncation", "padding", "dropout"],
)
def test_settings_that_training_left_in_the_file_change_no_token(change, tmp_path):
  text = "How far is the chair from the table? " * 9
  tokenizer = reloaded(tmp_path, change)
  assert tokenizer.encode(text) == TOKENIZER.encode(text)
  tokenizer.inner.save(str(tmp_path / "tokenizer.json"))
  assert load_tokenizer(tmp_path).encode(text) == TOKENIZER.encode(text), "nor after saving it"


@pytest.mark.parametrize("special", [True, False])
def test_tags_are_decoded_whether_or_not_the_file_calls_them_special(special, tmp_path):
  """And the tokens of the chat template are not, whatever the file calls them."""
  tags = ("<think>", "</think>", "<answer>", "</answer>")

  def add(inner):
    add_tokens = inner.add_special_tokens if special else inner.add_tokens
    add_tokens([tokenizers.AddedToken(tag, special=special, normalized=False) for tag in tags])

  tokenizer = reloaded(tmp_path, add)
  text = "<think> near </think> Action: Answer\n<answer> 4 </answer>"
  ids = tokenizer.encode(text + IM_END)
  assert {tokenizer.id(tag) for tag in tags} <= set(ids)
  assert tokenizer.decode(ids) == text
  assert tokenizer.forbidden_ids() == TOKENIZER.forbidden_ids()


def test_template_tokens_without_the_special_flag_are_not_decoded(tmp_path):
  inner = tokenizers.Tokenizer.from_str(
    TOKENIZER.inner.to_str().replace('"special":true', '"special":false')
  )
  inner.save(str(tmp_path / "tokenizer.json"))
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.decode(tokenizer.encode(f"4{IM_END}")) == "4"
  assert tokenizer.forbidden_ids() == TOKENIZER.forbidden_ids()


# --- conversation --------------------------------------------------------------------------------


def patched(sizes):
  return [dummies.patched(np.zeros((h, w, 3), np.uint8)) for h, w in sizes]


def test_prompt_in_full():
  choice = dataclasses.replace(
    task("x"), question="Which?", options=("A. chair", "B. sofa"), answer_kind="choice"
  )
  assert prompt_text(choice, patched([(28, 56)]), TEXT, CHATML) == (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>image 1, 56 x 28\n"
    "Q: Which?\nA. chair\nB. sofa\nletter\nA:<|im_end|>\n<|im_start|>assistant\n"
  )


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TextConfig)])
def test_special_tokens_in_the_texts_are_refused(field):
  with pytest.raises(ConfigError, match=rf"^{field} is .* and must contain no special token"):
    dataclasses.replace(TEXT, **{field: "{question} <|image_pad|>"})


def test_observation_in_full():
  text = observation_text(3, patched([(28, 56), (28, 28)]), True, TEXT, CHATML)
  image = "<|vision_start|><|image_pad|><|vision_end|>"
  assert text == (
    f"\n<|im_start|>user\n{image}drawn 3, 56 x 28\n{image}drawn 4, 28 x 28\n"
    "answer now<|im_end|>\n<|im_start|>assistant\n"
  )
  assert "go on" in observation_text(3, patched([(28, 28)]), False, TEXT, CHATML)


@pytest.mark.parametrize(
  ("key", "template", "problem"),
  [
    ("question", 'Answer as {"answer": 4}. {question}', r"unknown field \{\"answer\"\}"),
    ("question", "{question} {index}", r"unknown field \{index\}"),
    ("question", "{question.real}", r"unknown field \{question\.real\}"),
    ("question", "{question[0]}", r"unknown field \{question\[0\]\}"),
    ("question", "Which one?", r"must contain \{question\}"),
    ("question", "{{question}}", r"must contain \{question\}"),
    ("question", "{question:.2f}", "is not a template"),
    ("image_line", "image {number}\n", r"unknown field \{number\}"),
    ("image_line", "image {}\n", r"unknown field \{\}"),
    ("image_line", "image {index:{places}}\n", "is not a template"),
    ("image_line", "image {index!x}\n", "is not a template"),
    ("observation", "{", "is not a template"),
    ("observation", "image {index}}", "is not a template"),
    ("observation", "image {0}", r"unknown field \{0\}"),
  ],
)
def test_a_template_that_cannot_be_filled_is_refused_by_its_key(key, template, problem):
  with pytest.raises(ConfigError, match=rf"^config\.text\.{key} .*{problem}") as caught:
    build(TextConfig, dataclasses.asdict(TEXT) | {key: template}, "config.text")
  assert "\n" not in str(caught.value)


def test_doubled_braces_are_braces_of_the_text():
  cfg = dataclasses.replace(TEXT, question='{{"answer": 4}} {question}', image_line="{index:>3}")
  assert '  1{"answer": 4} How far' in prompt_text(task("x"), patched([(28, 28)]), cfg, CHATML)


@given(WILD, st.lists(WILD, max_size=3))
def test_a_question_cannot_add_special_tokens_to_its_prompt(question, options):
  """Roles, turns and images stay as in the template, whatever the data contain."""
  harmless = dataclasses.replace(task("x"), question="?", options=("?",) * len(options))
  wild = dataclasses.replace(harmless, question=question, options=tuple(options))
  special = [
    [
      i
      for i in TOKENIZER.encode(prompt_text(t, patched([(28, 28)]), TEXT, CHATML))
      if i in SPECIAL_IDS
    ]
    for t in (harmless, wild)
  ]
  assert special[0] == special[1]


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_image_tokens_are_repeated_once_per_merged_patch(tokens, data):
  pad = TOKENIZER.id(IMAGE_PAD)
  images = [dummies.patched(np.zeros((2, 2, 3), np.uint8), (1, 2, 2 * n)) for n in tokens]
  ids = []
  for _ in images:
    ids += [*data.draw(st.lists(st.integers(0, 9), max_size=3)), pad]
  ids += data.draw(st.lists(st.integers(0, 9), max_size=3))
  expanded, starts = expand_image_tokens(ids, images, pad)
  assert expanded.dtype == np.int32
  assert len(expanded) == len(ids) + sum(tokens) - len(tokens)
  contracted = expanded.tolist()
  for start, count in zip(reversed(starts), reversed(tokens), strict=True):
    assert contracted[start : start + count] == [pad] * count
    contracted[start : start + count] = [pad]
  assert contracted == ids


def test_more_images_than_image_tokens_are_refused():
  with pytest.raises(DataError, match="1 image tokens for 2 images"):
    expand_image_tokens(
      [1, TOKENIZER.id(IMAGE_PAD)], patched([(28, 28)] * 2), TOKENIZER.id(IMAGE_PAD)
    )
