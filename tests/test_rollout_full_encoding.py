"""Tokens of multi-turn drawing traces equal the full encoding of the conversation by transformers.

A trace is built turn by turn, from sampled tokens and observations. The reference renders the whole
conversation with the chat template of the family, tokenises it once, and repeats image tokens.
"""

import dataclasses

import numpy as np
import pytest
import transformers

from spatial_jax.data.chat_template import ChatTemplate
from spatial_jax.data.prompt_form import PromptForm
from spatial_jax.data.prompt_text import IMAGE_TOKENS, TextConfig
from spatial_jax.drawing.parser import WIDE_LIMITS
from spatial_jax.grammar import VILASR
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.demonstration import Demonstrator
from spatial_jax.synthetic.solver import Solver, SolverConfig
from spatial_jax.types import Trajectory
from tests import policy_fixtures
from tests import rollout_fixtures as fixtures
from tests.policy_fixtures import PREPROCESS, VIDEO_CONFIG, with_ids
from tests.rollout_fixtures import STYLE, TOKENIZER, VOCABULARY
from tests.test_chat_template import QWEN2_VL, QWEN3_VL

# Family -> chat template; Qwen2.5-VL's is Qwen2-VL's.
FAMILIES = {
  "qwen2_vl/tied": QWEN2_VL,
  "qwen2_5_vl/tied": QWEN2_VL,
  "qwen3_vl/tied": QWEN3_VL,
}
WORDS = TextConfig(
  system="You look at rooms.",
  image_line="image {index}, {width} x {height}\n",
  question="### Question:\n{question}\n",
  options="",
  number_suffix=" A number.",
  choice_suffix="",
  words_suffix="",
  observation="The index is {index}.\n",
  more="Go on.",
  final="Answer now.",
)


def policy_config(family: str) -> QwenVLConfig:
  configs = policy_fixtures.family_configs()
  name = family if family in configs else next(n for n in configs if n.startswith("qwen2_5"))
  cfg = configs[name]
  decoder = dataclasses.replace(cfg.decoder, vocabulary=VOCABULARY)
  return dataclasses.replace(with_ids(cfg.vision, decoder, TOKENIZER), family=cfg.family)


def trace(family: str) -> Trajectory:
  """A wrong box, the right one, and the answer, about two images."""
  cfg = policy_config(family)
  patch = cfg.vision.patch_size
  preprocess = dataclasses.replace(PREPROCESS, patch_size=patch)
  template = ChatTemplate(FAMILIES[family], family)
  form = PromptForm(WORDS, VILASR)
  conversation = Conversation(TOKENIZER, form, template, preprocess, VIDEO_CONFIG, cfg)
  solver = Solver(SolverConfig(1.0, 1.0, 3))
  demonstrator = Demonstrator(conversation, STYLE, WIDE_LIMITS, solver, None)
  side = 2 * patch * 3
  return demonstrator(fixtures.task("two", ((side, side), (side, 2 * side))))


def user(text: str) -> dict:
  """A message of the user with its images as parts."""
  first, *rest = text.split(IMAGE_TOKENS)
  parts = [{"type": "text", "text": first}] if first else []
  for piece in rest:
    parts += [{"type": "image"}, {"type": "text", "text": piece}]
  return {"role": "user", "content": parts}


def full_encoding(trajectory: Trajectory, source: str) -> np.ndarray:
  """The tokens of the rendered conversation, image tokens repeated."""
  sizes = [image.pixels.shape[:2] for image in trajectory.images]
  lines = [f"{IMAGE_TOKENS}image {i}, {w} x {h}\n" for i, (h, w) in enumerate(sizes[:2], 1)]
  question = "### Question:\nHow far is the chair? A number.\n"
  messages = [
    {"role": "system", "content": WORDS.system},
    user("".join(lines) + question),
  ]
  for number, turn in enumerate(trajectory.turns):
    messages.append({"role": "assistant", "content": turn.text})
    if turn.produced:
      ending = "Answer now." if number == len(trajectory.turns) - 2 else "Go on."
      messages.append(user(f"{IMAGE_TOKENS}The index is {3 + number}.\n{ending}"))
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=TOKENIZER.inner, chat_template=source
  )
  text = tokenizer.apply_chat_template(messages, tokenize=False)
  pad = TOKENIZER.id("<|image_pad|>")
  found, images = [], iter(trajectory.images)
  for token in TOKENIZER.inner.encode(text, add_special_tokens=False).ids:
    found += [token] * (next(images).tokens if token == pad else 1)
  return np.array(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_a_trace_are_those_of_its_full_encoding(family):
  trajectory = trace(family)
  assert len(trajectory.turns) == 3
  assert len(trajectory.images) == 4
  expected = full_encoding(trajectory, FAMILIES[family])
  count = len(trajectory.token_ids_T)
  np.testing.assert_array_equal(trajectory.token_ids_T, expected[:count])
  newline = TOKENIZER.inner.encode("\n").ids
  np.testing.assert_array_equal(expected[count:], newline, "the line after the last <|im_end|>")
