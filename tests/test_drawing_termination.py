"""The end of a rollout: every reason, their order, and the bounds of the limits."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatial_jax.config import ConfigError
from spatial_jax.drawing.parser import Parsed
from spatial_jax.drawing.termination import StopLimits, end_reason
from spatial_jax.types import Operation, OperationError

LIMITS = StopLimits(
  max_turns=3, max_images=6, max_image_tokens=100, max_response_tokens=100, near_duplicate_px=0.0
)


def _box(image: int = 1, x: float = 1.0, label: str = "a") -> Operation:
  return Operation("box", image, (x, 2.0, 30.0, 4.0), label)


def _turn(*operations: Operation, answer: str | None = None) -> Parsed:
  return Parsed(operations, (), answer, True)


def _reason(*turns: Parsed, images: int = 2, tokens: int = 10, truncated: bool = False):
  return end_reason(turns, images, tokens, truncated, LIMITS)


def test_a_rollout_with_a_new_drawing_continues():
  assert _reason(_turn(_box())) is None
  assert _reason(_turn(_box()), _turn(_box(x=5))) is None


@pytest.mark.parametrize(
  ("reason", "turns", "state"),
  [
    ("answer", [_turn(answer="4")], {}),
    ("answer", [_turn(answer="")], {}),
    ("answer", [_turn(_box()), _turn(_box(), answer="4")], {"tokens": 100, "truncated": True}),
    ("token_limit", [_turn(_box())], {"tokens": 100}),
    ("token_limit", [_turn(_box())], {"truncated": True}),
    ("token_limit", [_turn()], {"truncated": True}),
    ("no_action", [_turn()], {}),
    ("no_action", [Parsed((), (OperationError("bad_json", ""),), None, True)], {"images": 6}),
    ("repeated_operation", [_turn(_box()), _turn(_box())], {}),
    ("repeated_operation", [_turn(_box()), _turn(_box(2)), _turn(_box(3), _box())], {}),
    ("too_many_images", [_turn(_box(1), _box(2))], {"images": 5}),
    ("too_many_images", [_turn(_box())], {"images": 6}),
    ("turn_limit", [_turn(_box()), _turn(_box(x=5)), _turn(_box(x=6))], {}),
  ],
)
def test_the_first_reason_that_applies_is_given(reason, turns, state):
  assert _reason(*turns, **state) == reason


def test_near_duplicates_end_a_rollout_if_the_option_is_on():
  """Two boxes or lines a few pixels apart; another image, tool or place is new."""
  near = dataclasses.replace(LIMITS, near_duplicate_px=3.0)

  def reason(one: Operation, other: Operation, limits: StopLimits = near):
    return end_reason([_turn(one), _turn(other)], 2, 10, False, limits)

  moved = dataclasses.replace(_box(x=3), label="another name")
  assert reason(_box(x=1), moved) == "repeated_operation"
  assert reason(_box(x=1), moved, LIMITS) is None
  assert reason(_box(x=1), _box(x=5)) is None
  assert reason(_box(1, 1), _box(2, 1)) is None
  line = dataclasses.replace(_box(x=1), tool="line")
  assert reason(_box(x=1), line) is None
  assert reason(line, dataclasses.replace(_box(x=2), tool="line")) == "repeated_operation"


def test_a_rollout_continues_up_to_its_limits():
  assert _reason(_turn(_box()), tokens=99) is None
  assert _reason(_turn(_box()), images=5) is None
  assert _reason(_turn(_box(1), _box(1, 9)), images=5) is None  # one index, one new image


def test_a_repetition_is_an_equal_operation_of_an_earlier_turn():
  line = Operation("line", 1, _box().points_4, "a")
  for other in (_box(2), _box(x=2), _box(label="b"), line):
    assert _reason(_turn(_box()), _turn(other)) is None
  assert _reason(_turn(_box(), _box())) is None  # equal operations of one turn are merged


@given(st.lists(st.lists(st.builds(_box, st.integers(1, 3), st.integers(0, 3))), min_size=1))
def test_a_rollout_always_ends(turns):
  """No sequence of drawings exceeds the turn limit."""
  parsed = [_turn(*turn) for turn in turns]
  reasons = [_reason(*parsed[: n + 1], images=1) for n in range(len(parsed))]
  if len(parsed) >= LIMITS.max_turns:
    assert any(reason is not None for reason in reasons[: LIMITS.max_turns])


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("max_turns", 0), ("max_images", -1), ("max_image_tokens", -1), ("max_response_tokens", 0),
    ("max_turns", 1.5), ("max_images", None), ("max_response_tokens", True),
  ],
)  # fmt: skip
def test_stop_limits_out_of_range_are_refused(field, value):
  with pytest.raises(ConfigError, match=f"^{field} is .* and must be "):
    dataclasses.replace(LIMITS, **{field: value})
