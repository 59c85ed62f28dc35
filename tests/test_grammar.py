"""Grammars of prompt forms: what is the answer of a turn, and when is the turn well formed."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.config import ConfigError
from spatial_jax.data.prompt_form import read_form, shipped_forms
from spatial_jax.drawing.parser import Coordinates, parse
from spatial_jax.grammar import VILASR, Grammar, answer_of, is_well_formed
from spatial_jax.reward.format import final_answer, format_reward
from tests.reward_fixtures import rollout

BOX = '```json\n[{"index": 1, "bbox_2d": [1, 2, 30, 40], "label": "a"}]\n```'
THINK, OBSERVE, VANILLA, THINK_VANILLA = (
  Grammar("think", False, "answer", False),
  Grammar("observe", False, "answer", False),
  Grammar("", False, "", False),
  Grammar("think", False, "", False),  # a thinking model with the answer after its reasoning
)


@pytest.mark.parametrize(
  ("name", "grammar"),
  [
    ("tiny", VILASR),
    ("vilasr", VILASR),
    ("think", THINK),
    ("observe", OBSERVE),
    ("vanilla", VANILLA),
    ("think_test", VANILLA),
    ("observe_test", VANILLA),
    ("vanilla_test", VANILLA),
    ("vsi_bench", VANILLA),
  ],
)
def test_the_grammars_of_the_shipped_forms(name, grammar):
  assert read_form(name).grammar == grammar
  assert name in shipped_forms()


@pytest.mark.parametrize(
  ("grammar", "text", "answer", "well_formed"),
  [
    (THINK, "<think> a </think><answer> 3 </answer>", "3", True),
    (THINK, "<think>\na\n</think>\n\n<answer>3</answer>\n", "3", True),
    (THINK, "<think></think><answer></answer>", "", True),
    (THINK, "<think> a </think> so <answer> 3 </answer>", "3", False),
    (THINK, "<think> a </think> Action: Answer <answer> 3 </answer>", "3", False),
    (THINK, "<think> a </think><answer> 3 </answer> sure", "3", False),
    (THINK, "<think> a </think><answer> 3 </answer><answer> 4 </answer>", "4", False),
    (THINK, "<think> a </think><think> b </think><answer> 3 </answer>", "3", False),
    (THINK, "<observe> a </observe><answer> 3 </answer>", "3", False),
    (THINK, " <think> a </think><answer> 3 </answer>", "3", False),
    (THINK, "<think> a </think>", None, False),
    (THINK, "<think> a <answer> 3 </answer>", None, False),
    (THINK, "3", None, False),
    (OBSERVE, "<observe> a </observe><answer> 3 </answer>", "3", True),
    (OBSERVE, "<observe> a <think> b </think> </observe> <answer> 3 </answer>", "3", True),
    (OBSERVE, "<think> a </think><answer> 3 </answer>", "3", False),
    (OBSERVE, "<observe> <answer> 3 </answer> </observe>", None, False),
    (VANILLA, "3", "3", True),
    (VANILLA, " 3\n", "3", True),
    (VANILLA, "the chair, 2 < 3", "the chair, 2 < 3", True),
    (VANILLA, "<answer> 3 </answer>", "<answer> 3 </answer>", False),
    (VANILLA, "<THINK> 3", "<THINK> 3", False),
    (VANILLA, "", None, False),
    (VANILLA, " \n", None, False),
    (THINK_VANILLA, "<think> a </think> 3", "3", True),
    (THINK_VANILLA, "<think>\n\n</think>\n\n3", "3", True),
    (THINK_VANILLA, "3", "3", False),
    (THINK_VANILLA, "<think> a </think> <answer> 3 </answer>", "<answer> 3 </answer>", False),
    (THINK_VANILLA, "<think> a </think> ", None, False),
    (THINK_VANILLA, "<think> a", None, False),
    (VILASR, "<think> a </think> Action: Answer <answer> 3 </answer>", "3", True),
    (VILASR, f"<think> a </think> Action: Object Mapper\n{BOX}", None, True),
    (VILASR, "<think> a </think><answer> 3 </answer>", "3", False),
    (VILASR, "3", None, False),
  ],
)
def test_answer_and_form_of_a_turn(grammar, text, answer, well_formed):
  assert answer_of(text, grammar) == answer
  assert is_well_formed(text, grammar) == well_formed
  trajectory = rollout(text, grammar=grammar)
  assert final_answer(trajectory) == answer
  assert format_reward(trajectory) == float(well_formed and answer is not None)


@pytest.mark.parametrize("grammar", [THINK, OBSERVE, VANILLA, THINK_VANILLA])
def test_a_form_that_may_not_draw_reads_no_drawing(grammar):
  text = f"<think> a </think>\n{BOX}\n<answer> 3 </answer>"
  coordinates = Coordinates("pixels", ((168, 168),))
  parsed = parse(text, coordinates, grammar=grammar)
  assert (parsed.operations, parsed.errors) == ((), ())
  assert parsed.answer_text == answer_of(text, grammar)
  assert len(parse(text, coordinates).operations) == 1
  broken = parse("```json\n[{", coordinates, grammar=grammar)
  assert not broken.errors


GRAMMARS = st.builds(
  Grammar,
  st.sampled_from(["", "think", "observe"]),
  st.just(False),
  st.sampled_from(["", "answer"]),
  st.just(False),
) | st.sampled_from([VILASR, dataclasses.replace(VILASR, action=False)])
PIECES = st.sampled_from(
  ["<think>", "</think>", "<observe>", "</observe>", "<answer>", "</answer>", "Action:", " ", "4"]
)


@settings(deadline=None, max_examples=500)
@given(st.lists(PIECES, max_size=10).map("".join) | st.text(max_size=50), GRAMMARS)
def test_any_text_has_one_structure_in_any_grammar(text, grammar):
  answer = answer_of(text, grammar)
  assert answer is None or (answer in text and answer == answer.strip())
  if is_well_formed(text, grammar) and not grammar.draws:
    assert answer is not None
    assert text.startswith(f"<{grammar.reasoning}>" if grammar.reasoning else "")
  if answer is not None and grammar.reasoning:
    assert text.rindex(answer) >= text.rfind(f"</{grammar.reasoning}>")
  parse(text, Coordinates("pixels", ((168, 168),)), grammar=grammar)


@settings(deadline=None)
@given(st.text("ab \n", max_size=9), st.text("34. ", max_size=5), GRAMMARS)
def test_the_parts_of_a_grammar_in_their_order_are_well_formed(thought, number, grammar):
  reasoning = f"<{grammar.reasoning}>{thought}</{grammar.reasoning}>" if grammar.reasoning else ""
  action = " Action: Answer\n" if grammar.action else ""
  answer = f"<{grammar.answer}>{number}</{grammar.answer}>" if grammar.answer else f"{number}5"
  text = reasoning + action + answer
  assert is_well_formed(text, grammar)
  assert answer_of(text, grammar) == (number if grammar.answer else f"{number}5").strip()


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (("Think", False, "answer", False), "^reasoning is 'Think' and must be the name of a tag"),
    (("think", False, "<answer>", False), "^answer is '<answer>' and must be the name of a tag"),
    (("think", False, "think", False), "^answer is 'think' and must differ"),
    (("", True, "answer", False), "^action is True and must be false without both tags"),
    (("think", True, "", False), "^action is True and must be false without both tags"),
    (("think", False, "", True), "^draws is True and must be false without a tag of the answer"),
  ],
)
def test_a_grammar_that_no_turn_can_have_is_refused(values, message):
  with pytest.raises(ConfigError, match=message):
    Grammar(*values)
