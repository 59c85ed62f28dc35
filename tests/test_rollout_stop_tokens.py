"""Stop tokens of a config: what may end a turn, and what is then no longer forbidden."""

import dataclasses
import json
from typing import Any, cast

import pytest
import tokenizers

from spatial_jax.config import ConfigError
from spatial_jax.data.tokenizer import END_OF_TEXT, IM_END, IM_START, IMAGE_PAD, Tokenizer
from spatial_jax.rollout.engine import forbidden_ids, stop_ids
from spatial_jax.rollout.request import (
  add_tokens,
  end_turn,
  finish,
  invariant_violation,
  start_request,
)
from tests import rollout_fixtures as fixtures

CONVERSATION = fixtures.conversation()
END, STOP = (CONVERSATION.tokenizer.id(token) for token in (END_OF_TEXT, IM_END))


def config(*tokens):
  return dataclasses.replace(fixtures.ROLLOUT, stop_tokens=tokens, max_tokens_per_turn=64)


def test_end_of_text_may_be_a_stop_token_and_is_then_not_forbidden():
  """Base policies end their text with it."""
  for tokens, expected in (((END_OF_TEXT,), (END,)), ((IM_END, END_OF_TEXT), (STOP, END))):
    stops = stop_ids(CONVERSATION, config(*tokens))
    assert stops == expected
    assert set(forbidden_ids(CONVERSATION, stops)) == set(CONVERSATION.forbidden_ids) - {END}
  assert END in forbidden_ids(CONVERSATION, stop_ids(CONVERSATION, config(IM_END)))


def test_a_turn_that_ends_with_end_of_text_is_complete():
  engine = fixtures.make_engine(cast(Any, None), config(END_OF_TEXT))
  prompt = engine.conversation.prompt(fixtures.task("room"))
  request = start_request(engine, prompt, 0, (), fixtures.SAMPLED)
  ids = [*engine.conversation.tokenizer.encode(fixtures.ANSWER_TURN), END]
  assert add_tokens(engine, request, ids, [0.0] * len(ids))
  end_turn(engine, request, 0)
  trajectory = finish(request)
  assert invariant_violation(engine, trajectory) is None
  assert trajectory.end_reason == "answer"
  assert trajectory.turns[0].text == fixtures.ANSWER_TURN


@pytest.mark.parametrize("token", [IMAGE_PAD, IM_START, "<|vision_pad|>", "<|gone|>"])
def test_a_token_that_is_never_sampled_cannot_be_a_stop_token(token):
  with pytest.raises(ConfigError, match=r"^config\.rollout\.stop_tokens.*" + token.strip("<|>")):
    stop_ids(CONVERSATION, config(IM_END, token))


def test_ids_without_a_token_are_forbidden_wherever_they_are():
  record = json.loads(CONVERSATION.tokenizer.inner.to_str())
  vocabulary = record["model"]["vocab"]
  gap = max(vocabulary.values()) - 3
  vocabulary = {token: number for token, number in vocabulary.items() if number != gap}
  special = {token["content"]: token["id"] for token in record["added_tokens"]}
  record["model"] |= {"vocab": vocabulary | special, "merges": []}
  inner = tokenizers.Tokenizer.from_str(json.dumps(record))
  conversation = dataclasses.replace(CONVERSATION, tokenizer=Tokenizer(inner))
  assert set(conversation.forbidden_ids) == {gap, *CONVERSATION.forbidden_ids}
