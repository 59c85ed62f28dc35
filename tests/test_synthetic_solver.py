"""Responses of the solver: right, reproducible, drawn on the images, mistakes corrected."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import tiny_defaults
from spatial_jax.config import ConfigError, build
from spatial_jax.data.source import SourceConfig, make_source, solver_of
from spatial_jax.drawing.canvas import DrawnImage, draw
from spatial_jax.reward.parse import read
from spatial_jax.reward.principles import names_principle
from spatial_jax.reward.reflection import is_reflective
from spatial_jax.reward.units import dimension, read_measure
from spatial_jax.rollout.demonstration import demonstration_trajectory
from spatial_jax.synthetic.solver import Solver, SolverConfig
from spatial_jax.types import ObjectBox, Turn
from tests import rollout_fixtures as fixtures

KINDS = pytest.mark.parametrize("kind", ["procedural", "mazes", "physics"])
SIDE_PX = 140


def source(kind):
  cfg = tiny_defaults.source()
  cfg.kind = kind
  cfg.camera.update({"width_px": SIDE_PX, "height_px": SIDE_PX, "frame_counts": (1, 2)})
  cfg.questions.min_visible_pixels = 80
  cfg.mazes.size_px = cfg.physics.size_px = SIDE_PX
  return build(SourceConfig, cfg.to_dict())


@functools.cache
def tasks(kind):
  return make_source(source(kind)).examples(0, 48)


def responses(kind, draw_fraction=1.0, correct_fraction=0.0):
  solver = solver_of(source(kind), draw_fraction, correct_fraction)
  return [(task, solver(task)) for task in tasks(kind)]


def drawn_images(task, script):
  """The images of a task and those that the turns of a response draw, in their order."""
  images = [DrawnImage(image.data, ()) for image in task.media]
  for turn in script:
    for operation in turn.operations:
      assert 1 <= operation.image <= len(images), "an image that exists before the turn"
      height, width = images[operation.image - 1].pixels.shape[:2]
      assert all(0 <= x <= width for x in operation.points_4[::2])
      assert all(0 <= y <= height for y in operation.points_4[1::2])
    images += draw(images, turn.operations, fixtures.STYLE)
  return images


def as_turns(script):
  return [Turn(0, 0, turn.think, turn.operations, (), True, ()) for turn in script]


# --- all tasks -----------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_the_last_turn_answers_right_and_no_other_turn_answers(kind, fraction):
  for task, script in responses(kind, fraction, fraction):
    *drawing, last = script
    assert all(turn.answer is None and turn.operations for turn in drawing)
    assert not last.operations
    found, truth = (read(text, task) for text in (last.answer, task.answer))
    assert found.parsed
    assert found.value == pytest.approx(truth.value)


@KINDS
def test_the_same_task_always_has_the_same_response(kind):
  first, again = (responses(kind, 0.5, 0.5) for _ in range(2))
  assert [script for _, script in first] == [script for _, script in again]


@KINDS
def test_operations_lie_in_the_images_and_are_drawn(kind):
  for task, script in responses(kind, 1.0, 0.5):
    images = drawn_images(task, script)
    drawn = images[len(task.media) :]
    assert len(drawn) >= sum(bool(turn.operations) for turn in script)
    originals = {image.data.tobytes() for image in task.media}
    assert originals.isdisjoint(image.pixels.tobytes() for image in drawn)


@KINDS
def test_without_drawing_there_is_only_an_answer(kind):
  assert all(len(script) == 1 for _, script in responses(kind, 0.0, 1.0))


@pytest.mark.parametrize("kind", ["procedural", "mazes"])
def test_the_draw_fraction_is_the_fraction_that_draws(kind):
  possible = [len(script) > 1 for _, script in responses(kind, 1.0)]
  some = [len(script) > 1 for _, script in responses(kind, 0.5)]
  assert sum(possible) > 24
  assert not any(half and not full for full, half in zip(possible, some, strict=True))
  assert 0.25 < sum(some) / sum(possible) < 0.75


# --- rooms ---------------------------------------------------------------------------------------


def test_mistakes_are_as_frequent_as_the_config_says():
  counts = [
    sum(len(script) == 3 for _, script in responses("procedural", 1.0, share))
    for share in (0.0, 0.5, 1.0)
  ]
  drawing = sum(len(script) > 1 for _, script in responses("procedural"))
  assert counts[0] == 0
  assert 0.25 * drawing < counts[1] < 0.75 * drawing
  assert counts[2] == drawing


def check_correction(script, right_boxes):
  """One box of the first turn is wrong, the second turn draws it at its place."""
  first, second, _ = script
  (right,) = second.operations
  wrong = [o for o in first.operations if (o.image, o.label) == (right.image, right.label)]
  assert len(wrong) == 1
  assert wrong[0].points_4 != right.points_4
  assert right in right_boxes
  assert [o if o != wrong[0] else right for o in first.operations] == list(right_boxes)
  assert is_reflective(as_turns(script))
  return wrong[0], right


def test_a_mistaken_box_is_followed_by_the_right_one():
  plain = dict(zip(*zip(*responses("procedural", 1.0, 0.0), strict=True), strict=True))
  moved = []
  for task, script in responses("procedural", 1.0, 1.0):
    if len(script) > 1:
      wrong, right = check_correction(script, plain[task][0].operations)
      moved.append(overlap(wrong.points_4, right.points_4))
      last = drawn_images(task, script)[-1]
      alone = draw([DrawnImage(i.data, ()) for i in task.media], (right,), fixtures.STYLE)
      np.testing.assert_array_equal(last.pixels, alone[0].pixels)
  assert np.median(moved) < 0.3, "a mistake can be seen"


def overlap(a, b):
  """Intersection over union."""
  width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
  height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
  areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
  return width * height / (sum(areas) - width * height)


SPAN = st.tuples(st.integers(0, 23), st.integers(0, 23)).filter(lambda s: s[0] + 3 <= s[1])
BOXES = st.lists(
  st.builds(
    lambda label, image, x, y: ObjectBox(label, image, (x[0], y[0], x[1], y[1]), 2.0),
    st.sampled_from(("chair", "table", "lamp")),
    st.integers(0, 1),
    SPAN,
    SPAN,
  ),
  min_size=1,
  max_size=3,
)


@given(BOXES, st.integers(0, 99))
def test_every_box_can_be_mistaken_and_stays_in_its_image(boxes, number):
  task = fixtures.task(f"room/{number}", ((24, 24), (24, 24)))
  task = dataclasses.replace(task, boxes=tuple(boxes))
  plain, script = (Solver(SolverConfig(1.0, share, 3))(task) for share in (0.0, 1.0))
  wrong, right = check_correction(script, plain[0].operations)
  x1, y1, x2, y2 = wrong.points_4
  assert 0 <= x1 < x2 <= 23
  assert 0 <= y1 < y2 <= 23
  assert [int(x) for x in wrong.points_4] != [int(x) for x in right.points_4], "in whole pixels"
  drawn_images(task, script)


def test_more_boxes_than_the_limit_are_not_drawn():
  box = ObjectBox("chair", 0, (1.0, 2.0, 9.0, 12.0), 2.0)
  task = dataclasses.replace(fixtures.task("room"), boxes=(box,) * 3)
  assert len(Solver(SolverConfig(1.0, 1.0, 2))(task)) == 1
  assert len(Solver(SolverConfig(1.0, 1.0, 3))(task)) == 3


# --- mazes ---------------------------------------------------------------------------------------


def test_the_segments_are_the_path_from_its_start_to_its_end():
  for task, script in responses("mazes"):
    segments = [o for turn in script for o in turn.operations]
    points = [segments[0].points_4[:2], *(o.points_4[2:] for o in segments)]
    assert [list(point) for point in points] == task.extra["path"]
    for a, b in itertools.pairwise(segments):
      assert a.points_4[2:] == b.points_4[:2], "no gap"
    assert {o.tool for o in segments} == {"line"}
    assert len({o.label for o in segments}) == len(segments), "no segment replaces another"


def test_each_turn_draws_on_the_image_of_the_turn_before():
  for task, script in responses("mazes"):
    images = drawn_images(task, script)
    turns = script[:-1]
    assert len(images) == 1 + len(turns)
    for number, turn in enumerate(turns, 1):
      assert {o.image for o in turn.operations} == {number}
    assert len(images[-1].operations) == sum(len(turn.operations) for turn in turns)


def test_the_last_image_shows_the_whole_path():
  for task, script in responses("mazes"):
    shown = drawn_images(task, script)[-1].pixels.astype(int)
    changed = np.abs(shown - task.media[0].data).max(axis=2) > 0
    for x, y in task.extra["path"]:
      near = changed[max(0, int(y) - 2) : int(y) + 3, max(0, int(x) - 2) : int(x) + 3]
      assert near.any(), "every corner is marked"


def test_a_maze_that_is_resized_is_traced_without_a_gap():
  """Drawn images have the size that the policy sees, and the path is in pixels of the task."""
  path = [[10.0, 10.0], [40.0, 10.0], [40.0, 40.0], [10.0, 40.0], [10.0, 30.0], [30.0, 30.0]]
  task = fixtures.task("maze", ((50, 50),))
  task = dataclasses.replace(task, source="mazes", extra={"path": path})
  script = Solver(SolverConfig(1.0, 0.0, 3))(task)
  conversation = fixtures.conversation()
  prompt = conversation.prompt(task)
  shown = prompt.images[0].pixels.shape[0] / 50
  assert shown != 1
  found = demonstration_trajectory(conversation, prompt, script, fixtures.STYLE)
  segments = [o.points_4 for turn in found.turns for o in turn.operations]
  expected = [(*a, *b) for a, b in itertools.pairwise(path)]
  np.testing.assert_allclose(segments, shown * np.array(expected), atol=0.5)


# --- physics -------------------------------------------------------------------------------------


def test_a_response_about_physics_reasons_before_it_answers_with_the_unit():
  for task, (turn,) in responses("physics", 1.0, 1.0):
    assert names_principle(turn.think, task.extra["subfield"], task.extra["principle"])
    assert "=" in turn.think
    if task.answer_kind == "number":
      measure = read_measure(turn.answer)
      assert dimension(measure.unit) == dimension(task.unit)
    else:
      assert turn.answer == task.answer


# --- what has no solver --------------------------------------------------------------------------


def test_tasks_without_a_known_truth_have_no_solver():
  cfg = dataclasses.replace(source("mazes"), kind="files")
  with pytest.raises(ConfigError, match=r"config\.source\.kind is files, for which nothing writes"):
    solver_of(cfg, 1.0, 0.0)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ((1.1, 0.0, 3), "draw_fraction is 1.1 and must be at least 0 and at most 1"),
    ((0.5, -0.1, 3), "correct_fraction is -0.1"),
    ((0.5, 0.5, -1), "max_boxes is -1 and must be a whole number, at least 0"),
  ],
)
def test_values_out_of_range_are_refused(values, message):
  with pytest.raises(ConfigError, match=message):
    SolverConfig(*values)
