"""Text to tokens: a small BPE, a template that user text cannot break, pads widened to pictures."""

import dataclasses
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from spatial_jax.data.prompt_text import (
  TextConfig,
  expand_image_tokens,
  observation_text,
  prompt_text,
  response_prefix_of,
)
from spatial_jax.data.tokenizer import (
  IM_END,
  IMAGE_PAD,
  SPECIAL_TOKENS,
  Tokenizer,
  load_tokenizer,
  plain,
  train_tokenizer,
)
from spatial_jax.errors import DataError
from tests import dummies
from tests.rollout_fixtures import TOKENIZER, task

TEXT = TextConfig(
  system="Be brief.",
  image_line="picture {index}, {width} x {height}\n",
  question="Q: {question}\nA:",
  number_suffix="\nnumber",
  choice_suffix="\nletter",
  observation="drawn {index}, {width} x {height}\n",
  more="go on",
  final="answer now",
  response_prefix="",
  response_prefix_fraction=1.0,
)
SPECIAL_IDS = {TOKENIZER.id(token) for token in SPECIAL_TOKENS}
WILD = st.text() | st.lists(
  st.sampled_from([*SPECIAL_TOKENS, "<", "|", "<|", "|>", "{index}", "{", "im_end"])
).map("".join)


# --- tokenizer -----------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_text_comes_back(text):
  ids = TOKENIZER.encode(plain(text))
  assert TOKENIZER.decode(ids) == unicodedata.normalize("NFC", plain(text))
  assert not SPECIAL_IDS & set(ids)


def test_digits_stand_alone():
  tokenizer = train_tokenizer(["12.5 125 1255 12 55"] * 50, 320)
  ids = tokenizer.encode(" 1255.5")
  assert [tokenizer.decode([i]) for i in ids] == [" ", "1", "2", "5", "5", ".", "5"]


def test_special_tokens_are_one_id_and_left_out_of_text():
  ids = TOKENIZER.encode(f"a{IM_END}b")
  assert ids.count(TOKENIZER.id(IM_END)) == 1
  assert TOKENIZER.decode(ids) == "ab"
  size = TOKENIZER.inner.get_vocab_size()
  assert sorted(SPECIAL_IDS) == list(range(size - len(SPECIAL_TOKENS), size))
  assert set(TOKENIZER.forbidden_ids()) == SPECIAL_IDS - {TOKENIZER.id(IM_END)}


def test_training_is_reproducible_and_within_its_vocabulary():
  corpus = ["the chair stands by the table"] * 3
  one, other = train_tokenizer(corpus, 290), train_tokenizer(corpus, 290)
  assert one.inner.to_str() == other.inner.to_str()
  assert 270 < one.inner.get_vocab_size() <= 290


def test_loading(tmp_path):
  with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
  with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
    load_tokenizer(tmp_path)
  TOKENIZER.inner.save(str(tmp_path / "tokenizer.json"))
  assert load_tokenizer(tmp_path).encode("a chair") == TOKENIZER.encode("a chair")
  foreign = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
  with pytest.raises(DataError, match=r"no token '<\|im_end\|>'"):
    foreign.id(IM_END)


# --- conversation --------------------------------------------------------------------------------


def patched(sizes):
  return [dummies.patched(np.zeros((h, w, 3), np.uint8)) for h, w in sizes]


def test_prompt_in_full():
  choice = dataclasses.replace(
    task("x"), question="Which?", options=("A. chair", "B. sofa"), answer_kind="choice"
  )
  assert prompt_text(choice, patched([(28, 56)]), TEXT) == (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>picture 1, 56 x 28\n"
    "Q: Which?\nA. chair\nB. sofa\nletter\nA:<|im_end|>\n<|im_start|>assistant\n"
  )


def test_the_policy_goes_on_from_the_opening():
  response_prefix_fraction = dataclasses.replace(TEXT, response_prefix="<think> I mark")
  plainly = prompt_text(task("x"), patched([(28, 28)]), TEXT)
  assert (
    prompt_text(task("x"), patched([(28, 28)]), response_prefix_fraction)
    == plainly + "<think> I mark"
  )
  said = [
    observation_text(2, patched([(28, 28)]), True, words)
    for words in (TEXT, response_prefix_fraction)
  ]
  assert said[0] == said[1], "first turns only"
  none, some = (
    dataclasses.replace(response_prefix_fraction, response_prefix_fraction=share)
    for share in (0.0, 0.25)
  )
  tasks = [task(f"{number}") for number in range(400)]
  assert not any(response_prefix_of(t, none) for t in tasks)
  assert 60 < sum(response_prefix_of(t, some) == "<think> I mark" for t in tasks) < 140
  choice = dataclasses.replace(task("x"), answer_kind="choice", options=("A. a", "B. b"))
  most = dataclasses.replace(response_prefix_fraction, response_prefix_fraction=0.999)
  assert response_prefix_of(task("x"), most)
  assert not response_prefix_of(choice, most), "choices only where everything is begun so"
  assert response_prefix_of(choice, response_prefix_fraction)


def test_observation_in_full():
  said = observation_text(3, patched([(28, 56), (28, 28)]), True, TEXT)
  picture = "<|vision_start|><|image_pad|><|vision_end|>"
  assert said == (
    f"\n<|im_start|>user\n{picture}drawn 3, 56 x 28\n{picture}drawn 4, 28 x 28\n"
    "answer now<|im_end|>\n<|im_start|>assistant\n"
  )
  assert "go on" in observation_text(3, patched([(28, 28)]), False, TEXT)


@given(WILD, st.lists(WILD, max_size=3))
def test_no_question_can_speak_for_the_template(question, options):
  """Whatever a data set holds, roles, turns and pictures stay as the template has them."""
  harmless = dataclasses.replace(task("x"), question="?", options=("?",) * len(options))
  wild = dataclasses.replace(harmless, question=question, options=tuple(options))
  special = [
    [i for i in TOKENIZER.encode(prompt_text(t, patched([(28, 28)]), TEXT)) if i in SPECIAL_IDS]
    for t in (harmless, wild)
  ]
  assert special[0] == special[1]


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_widen(tokens, data):
  pad = TOKENIZER.id(IMAGE_PAD)
  images = [dummies.patched(np.zeros((2, 2, 3), np.uint8), (1, 2, 2 * n)) for n in tokens]
  ids = []
  for _ in images:
    ids += [*data.draw(st.lists(st.integers(0, 9), max_size=3)), pad]
  ids += data.draw(st.lists(st.integers(0, 9), max_size=3))
  wide, starts = expand_image_tokens(ids, images, pad)
  assert wide.dtype == np.int32
  assert len(wide) == len(ids) + sum(tokens) - len(tokens)
  narrow = wide.tolist()
  for start, count in zip(reversed(starts), reversed(tokens), strict=True):
    assert narrow[start : start + count] == [pad] * count
    narrow[start : start + count] = [pad]
  assert narrow == ids


def test_pads_and_pictures_must_agree():
  with pytest.raises(DataError, match="1 image tokens for 2 images"):
    expand_image_tokens(
      [1, TOKENIZER.id(IMAGE_PAD)], patched([(28, 28)] * 2), TOKENIZER.id(IMAGE_PAD)
    )
