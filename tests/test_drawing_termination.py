"""When a rollout ends: every reason, which of them counts first, and the borders of the limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatial_jax.drawing.parser import Parsed
from spatial_jax.drawing.termination import StopLimits, end_reason
from spatial_jax.types import Operation, OperationError

LIMITS = StopLimits(max_turns=3, max_images=6, max_image_tokens=100, max_response_tokens=100)


def _box(image: int = 1, x: float = 1.0, label: str = "a") -> Operation:
  return Operation("box", image, (x, 2.0, 30.0, 4.0), label)


def _said(*operations: Operation, answer: str | None = None) -> Parsed:
  return Parsed(operations, (), answer, True)


def _reason(*turns: Parsed, images: int = 2, tokens: int = 10, truncated: bool = False):
  return end_reason(turns, images, tokens, truncated, LIMITS)


def test_a_fresh_drawing_goes_on():
  assert _reason(_said(_box())) is None
  assert _reason(_said(_box()), _said(_box(x=5))) is None


@pytest.mark.parametrize(
  ("reason", "turns", "state"),
  [
    ("answer", [_said(answer="4")], {}),
    ("answer", [_said(answer="")], {}),
    ("answer", [_said(_box()), _said(_box(), answer="4")], {"tokens": 100, "truncated": True}),
    ("token_limit", [_said(_box())], {"tokens": 100}),
    ("token_limit", [_said(_box())], {"truncated": True}),
    ("token_limit", [_said()], {"truncated": True}),
    ("no_action", [_said()], {}),
    ("no_action", [Parsed((), (OperationError("bad_json", ""),), None, True)], {"images": 6}),
    ("repeated_operation", [_said(_box()), _said(_box())], {}),
    ("repeated_operation", [_said(_box()), _said(_box(2)), _said(_box(3), _box())], {}),
    ("too_many_images", [_said(_box(1), _box(2))], {"images": 5}),
    ("too_many_images", [_said(_box())], {"images": 6}),
    ("turn_limit", [_said(_box()), _said(_box(x=5)), _said(_box(x=6))], {}),
  ],
)
def test_reasons(reason, turns, state):
  assert _reason(*turns, **state) == reason


def test_limits_hold_to_the_last_one():
  assert _reason(_said(_box()), tokens=99) is None
  assert _reason(_said(_box()), images=5) is None
  assert _reason(_said(_box(1), _box(1, 9)), images=5) is None  # one index, one new image


def test_repetition_is_identity_with_an_earlier_turn():
  line = Operation("line", 1, _box().points_4, "a")
  for other in (_box(2), _box(x=2), _box(label="b"), line):
    assert _reason(_said(_box()), _said(other)) is None
  assert _reason(_said(_box(), _box())) is None  # within a turn the list merges it


@given(st.lists(st.lists(st.builds(_box, st.integers(1, 3), st.integers(0, 3))), min_size=1))
def test_a_rollout_always_ends(turns):
  """Whatever is drawn, no rollout outlives its turn limit."""
  said = [_said(*turn) for turn in turns]
  reasons = [_reason(*said[: n + 1], images=1) for n in range(len(said))]
  if len(said) >= LIMITS.turns:
    assert any(reason is not None for reason in reasons[: LIMITS.turns])
