"""Numeric questions about rooms: the truth is checked on the scene, the spread on many rooms."""

import collections
import dataclasses
import functools
import re

import numpy as np
import pytest

from spatial_jax.data.held_out import HELD_OUT_SEED
from spatial_jax.report.dataset_statistics import best_constant
from spatial_jax.synthetic import numerical3d_rooms as rooms_lib
from spatial_jax.synthetic.camera_path import make_camera
from spatial_jax.synthetic.furniture import KINDS, parts_of, scaled
from spatial_jax.synthetic.numerical3d import (
  MAX_PER_TYPE,
  MAX_TASKS_PER_ROOM,
  TYPES,
  candidates,
  choose,
  make_numeric_questions,
  shows_all_walls,
  visibilities,
)
from spatial_jax.synthetic.numerical3d_balance import EDGES, KEEP, keep_probability
from spatial_jax.synthetic.question_templates import Draft
from spatial_jax.synthetic.render.renderer import render, trace

ROOMS = range(40)


@functools.cache
def room(number):
  """A room, its views and all candidates."""
  scene = rooms_lib.numerical3d_scene(number)
  views = rooms_lib.numerical3d_views(scene, number)
  return scene, views, candidates(*visibilities(scene, views), number)


def drafts_of(name):
  """(scene, views, draft) of all candidates of a type."""
  found = [(*room(number)[:2], draft) for number in ROOMS for draft in room(number)[2][name]]
  assert found, f"no room gives a question of type {name}"
  return found


def pixels_of(views, index):
  return max(int((view.instance == index).sum()) for view in views)


# --- rooms ---------------------------------------------------------------------------------------


def test_numbers_of_all_seeds_are_training_rooms_and_fit_below_the_held_out_ones():
  assert rooms_lib.MAX_ROOMS * rooms_lib.MAX_SEEDS <= HELD_OUT_SEED


def test_a_room_is_a_pure_function_of_its_number():
  scene, views, found = room(3)
  again = rooms_lib.numerical3d_scene(3)
  same = rooms_lib.numerical3d_views(again, 3)
  assert [str(obj) for obj in scene.objects] == [str(obj) for obj in again.objects]
  assert all(np.array_equal(a.depth_m, b.depth_m) for a, b in zip(views, same, strict=True))
  assert found == candidates(*visibilities(again, same), 3)
  assert rooms_lib.numerical3d_scene(4).room_size_m2 != scene.room_size_m2


def test_rooms_are_varied():
  scenes = [room(number)[0] for number in ROOMS]
  areas = [scene.room_size_m2 for scene in scenes]
  assert min(areas) < 10
  assert max(areas) > 60
  frames = {len(room(number)[1]) for number in ROOMS}
  assert {1, 8} <= frames <= set(range(1, 9))
  assert len(frames) >= 6
  largest = max(
    max(collections.Counter(o.category for o in scene.objects).values()) for scene in scenes
  )
  assert largest >= 8


def test_furniture_of_the_catalogue_stays_below_the_ceiling():
  tops = [(kind.height_m or kind.width_m)[1] for kind in rooms_lib.CATALOGUE]
  carriers = [k.height_m[1] for k in rooms_lib.CATALOGUE if k.carries]
  carried = [(k.height_m or k.width_m)[1] for k in rooms_lib.CATALOGUE if "top" in k.places]
  assert max(tops) < 2.4
  assert max(carriers) + max(carried) < 2.4


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.category}-{kind.places[0]}")
def test_a_scaled_kind_has_scaled_parts(kind):
  ranges = [r or kind.width_m for r in (kind.width_m, kind.depth_m, kind.height_m)]
  size = tuple(low for low, _ in ranges)
  larger = scaled(kind, 1.6)
  assert larger.width_m == (kind.width_m[0] * 1.6, kind.width_m[1] * 1.6)
  plain = parts_of(kind, size, kind.colours[0])
  parts = parts_of(larger, tuple(1.6 * side for side in size), kind.colours[0])
  assert len(parts) == len(plain)
  for part, before in zip(parts, plain, strict=True):
    np.testing.assert_allclose(part.centre_3, 1.6 * np.array(before.centre_3), atol=1e-6)
    np.testing.assert_allclose(part.half_3, 1.6 * np.array(before.half_3), atol=1e-6)


def test_a_trace_is_a_render_without_its_image():
  scene, views, _ = room(5)
  for view in views:
    image = render(scene, view.camera)
    np.testing.assert_array_equal(view.depth_m, image.depth_m)
    np.testing.assert_array_equal(view.instance, image.instance)
    assert view.image.size == 0
    assert trace(scene, view.camera).camera is view.camera


# --- questions -----------------------------------------------------------------------------------


def test_counted_objects_are_all_visible():
  for scene, views, draft in drafts_of("object_counting"):
    category = re.search(r"How many (.+)\(s\) are in this (room|image)\?", draft.question)
    group = [i for i, obj in enumerate(scene.objects) if obj.category == category[1]]
    assert category[2] == ("image" if len(views) == 1 else "room")
    shown = [i for i in group if pixels_of(views, i) > 0]
    assert int(draft.answer) == len(shown) == len(draft.objects) >= 2
    assert len(views) == 1 or shown == group
    assert min(pixels_of(views, i) for i in shown) >= 80


def test_heights_are_those_of_the_only_object_of_its_category():
  for scene, views, draft in drafts_of("object_height"):
    category = re.search(r"height of the (.+), from", draft.question)[1]
    shown = [i for i, obj in enumerate(scene.objects) if obj.category == category]
    shown = [i for i in shown if len(views) > 1 or pixels_of(views, i)]
    assert list(draft.objects) == shown
    z = scene.objects[shown[0]].corners_83()[:, 2]
    assert abs(int(draft.answer) - 100 * (z.max() - z.min())) <= 0.51


def test_displacements_are_between_the_named_cameras_with_objects_in_common():
  for _, views, draft in drafts_of("camera_displacement"):
    i, j = (int(number) - 1 for number in re.findall(r"image (\d)", draft.question))
    apart = np.linalg.norm(views[i].camera.position_3 - views[j].camera.position_3)
    assert abs(float(draft.answer) - apart) < 0.051
    assert len(draft.objects) >= 2
    for view in (views[i], views[j]):
      assert min(pixels_of([view], index) for index in draft.objects) >= 150


def test_camera_distances_are_measured_in_an_image_that_shows_the_object():
  for scene, views, draft in drafts_of("camera_distance"):
    named = re.findall(r"image (\d)", draft.question)
    view = views[int(named[0]) - 1 if named else 0]
    assert bool(named) == (len(views) > 1)
    (index,) = draft.objects
    mask = view.instance == index
    assert mask.sum() >= 150
    # The nearest visible pixel is not nearer than the closest point of the box, and not far off.
    assert view.depth_m[mask].min() > 0.6 * float(draft.answer) - 0.1
    centre_m = np.linalg.norm(scene.objects[index].centre_3 - view.camera.position_3)
    assert float(draft.answer) <= centre_m + 0.05


def test_questions_about_the_room_need_a_view_of_each_wall():
  polygon_42 = np.array([[0.0, 0.0], [5.0, 0.0], [5.0, 4.0], [0.0, 4.0]])
  scene = dataclasses.replace(room(0)[0], polygon_Z2=polygon_42, objects=())
  middle_3 = np.array([2.0, 2.0, 1.5])

  def views(*headings):
    return [trace(scene, make_camera(middle_3, deg, 5.0, 75.0, 64, 64)) for deg in headings]

  assert shows_all_walls(scene, views(0.0, 90.0, 180.0, 270.0))
  assert shows_all_walls(scene, views(45.0, 225.0))  # two corners
  for missing in range(4):
    assert not shows_all_walls(scene, views(*(90.0 * i for i in range(4) if i == missing)))
  assert not shows_all_walls(scene, views(0.0, 45.0, 90.0))
  for scene_, views_, draft in drafts_of("room_size_estimation"):
    assert len(views_) > 1
    assert abs(float(draft.answer) - scene_.room_size_m2) < 0.051


def test_a_room_has_few_questions_of_each_type():
  for number in ROOMS:
    scene, views, _ = room(number)
    questions = make_numeric_questions(scene, views, number)
    counts = collections.Counter(question.question_type for question in questions)
    assert len(questions) <= MAX_TASKS_PER_ROOM
    assert all(count <= MAX_PER_TYPE[name] for name, count in counts.items())
    for question in questions:
      edges = EDGES[question.question_type]
      assert edges[0] <= float(question.answer) <= edges[-1]
      assert question.boxes or question.question_type == "room_size_estimation"
  assert sum(MAX_PER_TYPE.values()) == MAX_TASKS_PER_ROOM


# --- the choice ----------------------------------------------------------------------------------


def drafts(answers):
  found = {key: [] for key in TYPES}
  return found | {"object_abs_distance": [Draft(f"{a}", f"{a}", (), ()) for a in answers]}


def test_probabilities_are_those_of_the_table():
  for name in TYPES:
    edges = EDGES[name]
    assert len(KEEP[name]) == len(edges) - 1
    assert all(0 < value <= 1 for value in KEEP[name])
    for low, high, value in zip(edges, edges[1:], KEEP[name], strict=False):
      assert keep_probability(name, (low + high) / 2) == keep_probability(name, low) == value
    for outside in (edges[0] * 0.99, edges[-1] * 1.01, np.inf):
      assert keep_probability(name, outside) == 0.0


def test_candidates_are_kept_with_their_probability():
  kept = [
    float(draft.answer)
    for number in range(2000)
    for _, draft in choose(drafts([1.0]), number, lambda _, answer: 0.3)
  ]
  assert 500 < len(kept) < 700
  assert not choose(drafts([1.0, 2.0]), 0, lambda _, answer: 0.0)
  only = choose(drafts([1.0, 2.0, 3.0, 4.0]), 0, lambda _, answer: float(answer >= 2))
  assert [draft.answer for _, draft in only] == ["2.0", "3.0"]  # in order, and not more than two


def test_one_type_does_not_change_the_choice_of_another():
  alone = choose(drafts(range(1, 9)), 7)
  more = drafts(range(1, 9)) | {"object_counting": [Draft("", "2", (), ())] * 9}
  both = [item for item in choose(more, 7) if item[0] == "object_abs_distance"]
  assert both == alone


@pytest.mark.slow
def test_no_constant_is_a_good_answer():
  answers = collections.defaultdict(list)
  first = (rooms_lib.MAX_SEEDS - 2) * rooms_lib.MAX_ROOMS  # neither built nor measured
  for number in range(first, first + 500):
    scene = rooms_lib.numerical3d_scene(number)
    views = rooms_lib.numerical3d_views(scene, number)
    for question in make_numeric_questions(scene, views, number):
      answers[question.question_type].append(float(question.answer))
  for name in TYPES:
    assert len(answers[name]) > 100, name
    assert best_constant(np.array(answers[name])).score <= 0.45, name
