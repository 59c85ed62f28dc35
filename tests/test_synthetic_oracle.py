"""Demonstrations: correct, reproducible, with the configured fraction of drawings."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatial_jax.config import ConfigError
from spatial_jax.synthetic.oracle import DemonstrationConfig, demonstrate
from spatial_jax.types import ObjectBox
from tests import rollout_fixtures as fixtures

BOXES = st.lists(
  st.builds(
    ObjectBox,
    st.sampled_from(("chair", "table", "lamp")),
    st.integers(0, 1),
    st.tuples(*[st.floats(0, 20, width=16)] * 4),
    st.one_of(st.just(math.nan), st.floats(0.5, 9)),
  ),
  max_size=6,
)


def task(boxes):
  return dataclasses.replace(fixtures.task("room/x", ((24, 24),) * 2), boxes=tuple(boxes))


def script(boxes, share=1.0, most=4, seed=0):
  cfg = DemonstrationConfig(share, most)
  return demonstrate(task(boxes), np.random.default_rng(seed), cfg)


@given(BOXES, st.integers(0, 9), st.sampled_from((0.0, 0.5, 1.0)))
def test_a_demonstration_draws_all_boxes_or_none(boxes, seed, share):
  turns = script(boxes, share, seed=seed)
  assert turns == script(boxes, share, seed=seed)
  *drawing, answer = turns
  assert answer.answer == "2.1"
  assert not answer.operations
  if not 0 < len(boxes) <= 4:
    assert not drawing
  elif share in (0.0, 1.0):
    assert len(drawing) == share
  for turn in drawing:
    assert turn.answer is None
    assert [o.points_4 for o in turn.operations] == [box.box_4 for box in boxes]
    assert [o.image for o in turn.operations] == [box.image + 1 for box in boxes]
    labels = [(o.image, o.label) for o in turn.operations]
    assert len(set(labels)) == len(labels), "no box replaces another"
    for box in boxes:
      assert f"the {box.label}" in turn.think


def box(label, distance, image=0, place=(-0.04, 2.06)):
  return ObjectBox(label, image, (1.0, 2.0, 3.0, 4.0), distance, place)


@pytest.mark.parametrize(
  ("boxes", "think"),
  [
    ([], ""),
    ([box("chair", math.nan)], ""),
    ([box("chair", 2.14)], "chair 2.1 m."),
    (
      [box("chair", 2.1), box("sofa", 3.04, place=(-1.26, 2.7)), box("chair", 1.2, 1)],
      "chair 0.0 2.1; sofa -1.3 2.7: sofa -1.3 0.6.",
    ),
    ([box(name, 1.0) for name in "abcdef"], ""),
  ],
)
def test_reasoning_states_known_distances_and_places(boxes, think):
  assert script(boxes, 0.0)[-1].think == think


def test_reasoning_states_the_text_of_the_right_option():
  boxes = (box("chair", 2.1), box("sofa", 3.0, place=(1.0, 2.0)))
  choice = dataclasses.replace(task(boxes), options=("A. left", "B. right"), answer="B")
  (turn,) = demonstrate(choice, np.random.default_rng(0), DemonstrationConfig(0.0, 2))
  assert turn.think == "chair 0.0 2.1; sofa 1.0 2.0: sofa 1.0 -0.1: right."
  assert turn.answer == "B"


def test_reasoning_states_no_steps_between_more_than_three_places():
  four = [box(name, 1.0, place=(1.0, 2.0)) for name in "abcd"]
  assert script(four, 0.0)[-1].think == "; ".join(f"{n} 1.0 2.0" for n in "abcd") + "."
  assert "c 1.0 2.0: b 0.0 0.0; c 0.0 0.0." in script(four[:3], 0.0)[-1].think


def test_reasoning_is_empty_if_a_place_is_unknown():
  assert script([box("chair", 2.1), box("sofa", 3.0, place=(math.nan, 1.0))], 0.0)[-1].think == ""


def test_labels_in_one_image_differ():
  (drawing, _) = script([box("chair", 1.0), box("chair", 2.0), box("chair", 2.0, 1)])
  assert [o.label for o in drawing.operations] == ["chair", "chair 2", "chair"]


def test_the_draw_fraction_is_the_fraction_of_drawings():
  drawn = sum(len(script([box("chair", 1.0)], 0.3, seed=seed)) - 1 for seed in range(1000))
  assert 250 < drawn < 350


@pytest.mark.parametrize(
  ("fraction", "boxes", "message"),
  [
    (-0.1, 2, "draw_fraction is -0.1 and must be at least 0 and at most 1"),
    (1.1, 2, "draw_fraction is 1.1"),
    (math.nan, 2, "draw_fraction is nan"),
    (0.5, -1, "max_boxes is -1 and must be at least 0"),
  ],
)
def test_values_out_of_range_are_refused(fraction, boxes, message):
  with pytest.raises(ConfigError, match=message):
    DemonstrationConfig(fraction, boxes)
