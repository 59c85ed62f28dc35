"""The structure of a turn, the answer of a rollout and its format reward."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.drawing.parser import Coordinates, parse
from spatial_jax.grammar import TAGS, VILASR, answer_of, is_well_formed
from spatial_jax.reward.format import final_answer, format_reward
from spatial_jax.types import OperationError
from tests.reward_fixtures import DRAWING, answering, rollout, turn

COORDINATES = Coordinates("pixels", ((168, 168),))


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("<answer> 4 </answer>", "4"),
    ("<answer></answer>", ""),
    ("<answer>b\nc</answer>", "b\nc"),
    ("<think> a </think> Action: Answer\n<answer> 4 </answer>", "4"),
    ("a </think> <answer> 4 </answer>", "4"),  # the chat template writes <think>
    ("<answer>a</answer><answer>b</answer>", "b"),
    ("<think> a </think> <answer> 3 </answer> or <answer> 4 </answer>", "4"),
    ("<think> <answer> 2 </answer> </think> <answer> 3 </answer>", "3"),
    ("<answer> 2 <answer> 3 </answer>", "3"),
    ("<answer> 3 </answer> </answer>", "3"),
    ("<answer> 3 </answer> <answer> 4", "3"),
    ("<think> <answer> 2 </answer> </think> Action: Answer", None),
    ("<think> <answer> 2 </answer>", None),
    ("<think> a </think> <think> <answer> 2 </answer>", None),
    ("<think> a </think> <think> <answer> 2 </answer> </think>", None),
    ("<answer> 2 </answer> <think> a </think>", None),
    ("<answer> 4", None),
    ("</answer> 4 <answer>", None),
    ("4", None),
    ("", None),
  ],
)
def test_the_last_answer_block_after_the_reasoning_counts(text, answer):
  assert answer_of(text, VILASR) == answer
  parsed = parse(text, COORDINATES)
  assert parsed.answer_text == answer
  assert parsed.has_answer == (answer is not None)


@pytest.mark.parametrize(
  ("text", "well_formed"),
  [
    ("<think> a </think> Action: Answer\n<answer> 4 </answer>", True),
    ("<think> a </think> Action: Answer\n<answer> 4 </answer>\n", True),
    ("<think></think>Action:", True),
    ("<think>a\nb</think>\n\nAction: Path Tracer\n```json\n[]\n```\n", True),
    ("<think> a </think> b Action: Answer", False),
    ("<think> a Action: Answer", False),
    (" <think> a </think> Action: Answer", False),
    ("<think> a <think> b </think> Action: Answer <answer> 4 </answer>", False),
    ("<think> a </think> Action: Answer <answer> 4 </answer> <think> b </think>", False),
    ("<think> a </think> Action: Answer <answer> 4 </answer> I am sure.", False),
    ("<think> a </think> Action: Answer <answer> 4 </answer> <answer> 5 </answer>", False),
    ("<think> a </think> Action: Answer </answer> 4 <answer>", False),
    ("<think> a <answer> 4 </answer> </think> Action: Answer", False),
    ("<answer> 4 </answer>", False),
    ("", False),
  ],
)
def test_a_well_formed_turn_is_think_block_action_and_answer(text, well_formed):
  assert is_well_formed(text, VILASR) == well_formed
  assert parse(text, COORDINATES).well_formed == well_formed


PIECES = st.sampled_from([*TAGS, "Action:", " ", "\n", "4", "a"])


@settings(deadline=None, max_examples=500)
@given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=50))
def test_any_text_has_one_structure(text):
  answer = answer_of(text, VILASR)
  assert answer is None or not any(tag in answer for tag in ("<answer>", "</answer>"))
  if answer is not None:
    assert text.rindex("<answer>") > text.rfind("</think>")
  if is_well_formed(text, VILASR) and answer is None:
    assert "<answer>" not in text
    assert "</answer>" not in text


@pytest.mark.parametrize(
  ("turns", "reward"),
  [
    ([answering("2")], 1.0),
    ([DRAWING, answering("2")], 1.0),
    ([DRAWING, DRAWING, answering("2")], 1.0),
    ([turn(DRAWING, executable=False), answering("2")], 0.0),
    ([turn(DRAWING, errors=[OperationError("bad_json", "")]), answering("2")], 0.0),
    ([DRAWING.replace("</think>", ""), answering("2")], 0.0),
    ([DRAWING.replace("Action:", "Do:"), answering("2")], 0.0),
    (["Sure! " + DRAWING, answering("2")], 0.0),
    ([DRAWING, "<answer> 2 </answer>"], 0.0),
    ([DRAWING, answering("2") + answering("2")], 0.0),
    ([DRAWING, answering("2") + " <answer> 2 </answer>"], 0.0),
    ([DRAWING + "<answer> 2 </answer>", answering("2")], 0.0),
    ([DRAWING + "<answer>", answering("2")], 0.0),
    ([DRAWING, answering("2").replace("</answer>", "")], 0.0),
    (["<think> <answer> 2 </answer> </think> Action: Answer"], 0.0),
    (["<think> <answer> 2 </answer> </think> Action: Answer <answer> 2 </answer>"], 0.0),
    ([answering("2") + " <think>"], 0.0),
    ([DRAWING], 0.0),
    ([], 0.0),
  ],
)
def test_format_is_one_if_every_turn_is_right(turns, reward):
  assert format_reward(rollout(*turns)) == reward


@pytest.mark.parametrize(
  ("turns", "end_reason", "answer"),
  [
    ([DRAWING, answering("2.0")], "answer", "2.0"),
    ([answering("a\nb")], "answer", "a\nb"),
    ([answering("2"), answering("3")], "answer", "3"),
    ([answering("2") + answering("3")], "answer", "3"),
    (["<think> <answer> 2 </answer> </think> Action: Answer"], "answer", None),
    (["</answer> 2 <answer>"], "answer", None),
    ([DRAWING], "no_action", None),
    ([answering("2")], "token_limit", None),
    ([answering("2")], "fault", None),
    ([], "fault", None),
  ],
)
def test_the_final_answer_is_that_of_the_last_turn(turns, end_reason, answer):
  assert final_answer(rollout(*turns, end_reason=end_reason)) == answer


def test_a_drawing_turn_with_an_answer_in_its_reasoning_draws():
  block = '```json\n[{"index": 1, "bbox_2d": [1, 2, 30, 40], "label": "a"}]\n```'
  text = f"<think> maybe <answer> 2 </answer> </think> Action: Object Mapper\n{block}"
  parsed = parse(text, COORDINATES)
  assert not parsed.has_answer
  assert len(parsed.operations) == 1
  assert format_reward(rollout(text, answering("2"))) == 0.0
