"""Questions against a checker that shares no function with the generator.

The checker parses the text of a question. It samples points on the faces of boxes, computes
directions with complex numbers, and takes counts and first appearances from the instance ids.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from spatial_jax.config import build
from spatial_jax.data.vsi_rooms import load_rooms
from spatial_jax.errors import DataError
from spatial_jax.synthetic import geometry
from spatial_jax.synthetic import question_templates as templates
from spatial_jax.synthetic.camera_path import make_camera, make_camera_path
from spatial_jax.synthetic.floorplan import ProceduralConfig, procedural_scene
from spatial_jax.synthetic.questions import (
  QuestionConfig,
  QuestionType,
  answer_kind,
  assign_letters,
  make_questions,
)
from spatial_jax.synthetic.render.renderer import render
from spatial_jax.synthetic.scene import Scene, SceneObject

META = pathlib.Path(__file__).parents[2] / "shared" / "data" / "vsibench_meta"
needs_meta = pytest.mark.skipif(
  not META.is_dir(), reason=f"the room metadata of VSI-Bench is not at {META}"
)

ALL = get_args(QuestionType)
CONFIG = QuestionConfig(ALL, 6, 30, 0.3, "room", 2.0, "")
ROOMS = ProceduralConfig(objects=(6, 14), side_m=(3.5, 6.5), l_shape_share=0.3, repeat_share=0.3)
STEP_M = 0.03  # between sampled points
SAMPLED_M = 0.006  # most that sampling overestimates a distance of 0.2 m or more


# --- the checker -------------------------------------------------------------------------------


def grid(obj, step_m, ends=True):
  """Points on the six faces of a box, at most `step_m` apart along its axes."""
  lines = [
    np.linspace(-s / 2, s / 2, max(2, int(np.ceil(s / step_m)) + 1)) for s in map(float, obj.size_3)
  ]
  faces = []
  for axis, side in itertools.product(range(3), (0, -1)):
    cut = [line[[side]] if i == axis else line for i, line in enumerate(lines)]
    faces.append(np.stack(np.meshgrid(*cut), -1).reshape(-1, 3))
  local = np.concatenate(faces)
  return sum(local[:, [i]] * obj.axes_33[[i]] for i in range(3)) + obj.centre_3[None]


@functools.lru_cache(maxsize=256)
def cloud(obj):
  points = grid(obj, STEP_M)
  return points, cKDTree(points)


def sampled_m(a, b):
  return float(cloud(b)[1].query(cloud(a)[0])[0].min())


def corners_of(obj):
  half = [obj.size_3[i] / 2 * obj.axes_33[i] for i in range(3)]
  return [obj.centre_3 + x * half[0] + y * half[1] + z * half[2]
          for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]  # fmt: skip


def flat(point):
  return complex(point[0], point[1])


def quadrant(turn):
  return ("front" if turn.real > 0 else "back") + ("-left" if turn.imag > 0 else "-right")


def third(turn):
  """Left, right or back; back is a turn of 135 degrees or more to either side."""
  if turn.real < 0 and abs(turn.imag) <= -turn.real:
    return "back"
  return "left" if turn.imag > 0 else "right"


class Checker:
  """The truth of one scene and its views."""

  def __init__(self, scene, views, cfg):
    self.scene, self.views, self.cfg = scene, views, cfg
    self.pixels = [
      [int(np.sum(view.instance == i)) for i in range(len(scene.objects))] for view in views
    ]

  def group(self, category):
    members = [i for i, obj in enumerate(self.scene.objects) if obj.category == category]
    if self.cfg.instance_scope == "views":
      members = [i for i in members if any(row[i] for row in self.pixels)]
    for i in members:  # all objects of a question are clearly visible
      assert max(row[i] for row in self.pixels) >= self.cfg.min_visible_pixels, category
    return members

  def only(self, category):
    (index,) = self.group(category)
    return self.scene.objects[index]

  def check(self, task):
    method = task.question_type.removeprefix("object_").removeprefix("obj_")
    method = "rel_direction" if method.startswith("rel_direction") else method
    options = [option[3:] for option in task.options or ()]
    assert [option[:3] for option in task.options or ()] == ["A. ", "B. ", "C. ", "D. "][
      : len(options)
    ]
    assert len(set(options)) == len(options)
    getattr(self, method)(task, options, options and options["ABCD".index(task.answer)])

  def counting(self, task, _, __):
    (category,) = re.fullmatch(r"How many (.+)\(s\) are in .*\?", task.question).groups()
    assert int(task.answer) == len(self.group(category)) > 1

  def abs_distance(self, task, _, __):
    a, b = re.search(r"between the (.+) and the (.+) \(in", task.question).groups()
    distance = sampled_m(self.only(a), self.only(b))
    assert distance >= 0.2
    assert -0.05 - 1e-9 <= distance - float(task.answer) <= 0.05 + SAMPLED_M
    assert re.fullmatch(r"\d+\.\d", task.answer)

  def size_estimation(self, task, _, __):
    (category,) = re.search(r"height\) of the (.+), measured", task.question).groups()
    corners = corners_of(self.only(category))
    edges = [np.linalg.norm(corners[0] - corners[i]) for i in (1, 2, 4)]
    assert abs(max(edges) * 100 - int(task.answer)) <= 0.5 + 1e-9

  def room_size_estimation(self, task, _, __):
    assert len(self.views) > 1
    outline = [flat(point) for point in self.scene.polygon_Z2]
    area = sum((a.conjugate() * b).imag for a, b in itertools.pairwise([*outline, outline[0]])) / 2
    truth = area if self.scene.source == "procedural" else self.scene.room_size_m2
    assert abs(truth - float(task.answer)) <= 0.05 + 1e-9

  def camera_distance(self, task, _, __):
    assert len(self.views) == 1
    (category,) = re.search(r"point of the (.+) \(in", task.question).groups()
    distance = cloud(self.only(category))[1].query(self.views[0].camera.position_3)[0]
    assert -0.05 - 1e-9 <= distance - float(task.answer) <= 0.05 + SAMPLED_M

  def rel_distance(self, task, options, answer):
    listed, category = re.search(r"\((.+)\) is the closest to the (.+)\?", task.question).groups()
    assert listed == ", ".join(options)
    assert len(options) == 4
    target = self.only(category)
    distances = {
      o: min(sampled_m(target, self.scene.objects[i]) for i in self.group(o)) for o in options
    }
    assert min(distances, key=distances.__getitem__) == answer
    ordered = [0.0, *sorted(distances.values())]
    assert all(b - a >= 0.15 - 2 * SAMPLED_M for a, b in itertools.pairwise(ordered))
    many = any(len(self.group(o)) > 1 for o in options)
    assert many == task.question.endswith("measure to the closest.")

  def rel_direction(self, task, options, answer):
    p, o, q = re.match(
      r"If I am standing by the (.+) and facing the (.+), is the (.+) to (?:my|the) ", task.question
    ).groups()
    standing, facing, queried = self.only(p), self.only(o), self.only(q)
    for a, b in itertools.combinations((standing, facing, queried), 2):
      assert 0.3 - 1e-9 <= sampled_m(a, b) <= 5.0 + SAMPLED_M
    eye, ahead = flat(standing.centre_3), flat(facing.centre_3) - flat(standing.centre_3)
    level = task.question_type.rpartition("_")[2]
    name = quadrant if level == "hard" else third
    turn = (flat(queried.centre_3) - eye) / ahead
    assert name(turn) == answer
    assert len(options) == {"easy": 2, "medium": 3, "hard": 4}[level]
    assert sum(name((flat(c) - eye) / ahead) != answer for c in corners_of(queried)) <= 2
    tilts = (0,) if level == "hard" else (-9.99, 9.99)
    assert all(name(turn * np.exp(1j * np.radians(tilt))) == answer for tilt in tilts)
    if level == "hard":
      assert np.degrees(np.angle(turn)) % 90 <= 80

  def appearance_order(self, task, options, answer):
    listed = re.search(r"in the video: (.+)\?", task.question).group(1).split(", ")
    assert len(options) == 4
    assert all(sorted(option.split(", ")) == sorted(listed) for option in options)
    seconds = []
    for category in answer.split(", "):
      members = [i for i, obj in enumerate(self.scene.objects) if obj.category == category]
      counts = [max(row[i] for i in members) for row in self.pixels]
      first = next(view for view, count in enumerate(counts) if count)
      assert counts[first] >= self.cfg.min_visible_pixels
      seconds.append(round(first * self.cfg.seconds_per_view))
    assert all(later - earlier > 1 for earlier, later in itertools.pairwise(seconds))

  def boxes(self, task):
    """Every box is the tight box of one instance of the label, at the sampled distance."""
    for box in task.boxes:
      view = self.views[box.image]
      fits = []
      for i, obj in enumerate(self.scene.objects):
        rows, columns = np.nonzero(view.instance == i)
        if obj.category == box.label and len(rows):
          tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
          distance = cloud(obj)[1].query(view.camera.position_3)[0]
          fits.append(tight == box.box_4 and abs(distance - box.distance_m) < SAMPLED_M)
      assert any(fits), task.task_id


def check_scene(scene, frames, seed, cfg):
  """Makes questions about one scene, checks each and returns the tasks."""
  rng = np.random.default_rng(seed)
  cameras = make_camera_path(scene, rng, frames, 112, 84, 75.0)
  views = [render(scene, camera, shadows=False) for camera in cameras]
  checker = Checker(scene, views, cfg)
  tasks = make_questions(scene, views, rng, cfg)
  for task in tasks:
    checker.check(task)
    checker.boxes(task)
    assert task.answer_kind == answer_kind(task.question_type)
    assert (task.scene_id, task.benchmark) == (scene.scene_id, scene.benchmark)
    assert len(task.media) == frames
  assert len({task.task_id for task in tasks}) == len(tasks)
  assert len({(task.question, task.answer) for task in tasks}) == len(tasks)
  return tasks


@pytest.mark.parametrize(
  ("frames", "scope"),
  [(1, "views"), (1, "room"), (6, "views"), pytest.param(6, "room", marks=pytest.mark.slow)],
)
def test_the_checker_confirms_every_answer_about_procedural_rooms(frames, scope):
  cfg = dataclasses.replace(CONFIG, instance_scope=scope)
  types = set()
  for seed in range(12):
    tasks = check_scene(procedural_scene(seed + 100 * frames, ROOMS), frames, seed, cfg)
    types |= {task.question_type for task in tasks}
  missing = set(ALL) - types - {"obj_appearance_order", "object_rel_distance"}
  assert missing == ({"room_size_estimation"} if frames == 1 else {"camera_distance"})


@needs_meta
def test_the_checker_confirms_every_answer_about_real_rooms():
  types = set()
  for index, scene in enumerate(load_rooms(META)[::14]):
    frames, scope = (1, "views") if index % 3 == 0 else (6, "room")
    cfg = dataclasses.replace(CONFIG, instance_scope=scope, min_visible_fraction=0.1)
    types |= {task.question_type for task in check_scene(scene, frames, index, cfg)}
  assert types >= set(ALL) - {"obj_appearance_order", "object_rel_distance"}  # rare: few categories


# --- real rows of the benchmark ----------------------------------------------------------------


def all_visible(scene):
  """Visibility with every object."""
  groups = {}
  for index, obj in enumerate(scene.objects):
    groups.setdefault(obj.category, []).append(index)
  return templates.Visibility(
    scene, [], [], {name: tuple(group) for name, group in groups.items()}, {}, {}
  )


@needs_meta
def test_rows_of_the_benchmark_are_reproduced():
  rooms = {scene.scene_id: scene for scene in load_rooms(META)}
  rows = json.loads((META / "rows_excerpts.json").read_text())
  assert len(rows) == 5
  for row in rows:
    visibility = all_visible(rooms[f"{row['dataset']}/{row['scene_name']}"])
    rng = np.random.default_rng(0)
    drafts = {
      "object_counting": lambda: templates.counting(visibility, rng, templates.COUNT_IN_ROOM),  # noqa: B023
      "object_size_estimation": lambda: templates.size(visibility, rng),  # noqa: B023
      "room_size_estimation": lambda: templates.room_size(visibility),  # noqa: B023
      "object_rel_direction_hard": lambda: templates.direction(visibility, rng, "hard"),  # noqa: B023
    }[row["question_type"]]()
    wanted = row.get("question") or (
      templates.SIZE.format(c=row["object"]) if "object" in row else None
    )
    (draft,) = [draft for draft in drafts if wanted in (None, draft.question)]
    answer = row.get("ground_truth") or row["computed_answer"]
    if row.get("options"):
      assert sorted((draft.answer, *draft.wrong)) == sorted(option[3:] for option in row["options"])
      answer = row["options"]["ABCD".index(answer)][3:]
    assert draft.answer == answer
    if "computed_angle_ccw_deg" in row:
      stand, face, asked = (visibility.scene.objects[i].centre_3[:2] for i in draft.objects)
      angle = geometry.direction_deg(stand, face, asked[None])[0]
      assert round(angle, 1) == row["computed_angle_ccw_deg"]


# --- distances ---------------------------------------------------------------------------------


def random_box(rng, tilted):
  axes = np.linalg.qr(rng.normal(size=(3, 3)))[0] if tilted else turned(rng.uniform(0, 360))
  return SceneObject("box", "", rng.uniform(-1, 1, 3), rng.uniform(0.05, 1.2, 3), axes, ())


def turned(yaw_deg):
  c, s = np.cos(np.radians(yaw_deg)), np.sin(np.radians(yaw_deg))
  return np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])


def test_box_distance_is_the_smallest_distance_of_sampled_points():
  rng = np.random.default_rng(0)
  apart = 0
  for trial in range(120):
    a, b = random_box(rng, trial % 2 == 0), random_box(rng, trial % 2 == 0)
    exact, sampled = geometry.box_distance_m(a, b), sampled_m(a, b)
    assert exact == pytest.approx(geometry.box_distance_m(b, a), abs=1e-9)
    if exact == 0.0:  # a sampled point is inside the other box, or the faces cross
      inside = min(geometry.point_distance_m(cloud(a)[0], b).min(),
                   geometry.point_distance_m(cloud(b)[0], a).min())  # fmt: skip
      assert inside < STEP_M
      continue
    apart += 1
    assert -1e-9 <= sampled - exact <= (SAMPLED_M if exact >= 0.2 else 1.5 * STEP_M)
  assert 30 < apart < 110


def test_box_distance_rounds_like_the_point_grids_of_the_benchmark():
  """Grids of 5 cm overestimate by 2 cm or less; only distances near .x5 round differently."""
  rng = np.random.default_rng(1)
  differences, same = [], []
  while len(differences) < 100:
    a, b = random_box(rng, False), random_box(rng, False)
    exact = geometry.box_distance_m(a, b)
    if exact >= templates.MIN_DISTANCE_M:
      coarse = float(cKDTree(grid(b, 0.05)).query(grid(a, 0.05))[0].min())
      differences.append(coarse - exact)
      same.append(round(coarse, 1) == round(exact, 1))
  assert min(differences) >= -1e-9
  assert max(differences) < 0.02
  assert np.mean(same) >= 0.95


@pytest.mark.parametrize(
  ("centre", "yaw", "expected"),
  [
    ((3.0, 0.0, 0.0), 0, 2.0),  # face to face
    ((3.0, 3.0, 0.0), 0, 2 * 2**0.5),  # edge to edge, parallel
    ((3.0, 3.0, 3.0), 0, 2 * 3**0.5),  # corner to corner
    ((3.0, 0.0, 0.0), 45, 2.5 - 0.5**0.5),  # edge to face
    ((0.2, 0.1, 0.0), 30, 0.0),  # overlap
    ((1.0, 0.0, 0.0), 0, 0.0),  # touch
  ],
)
def test_box_distance_of_unit_cubes(centre, yaw, expected):
  a = SceneObject("a", "", np.zeros(3), np.ones(3), np.eye(3), ())
  b = SceneObject("b", "", np.array(centre), np.ones(3), turned(yaw), ())
  assert geometry.box_distance_m(a, b) == pytest.approx(expected, abs=1e-9)


def test_the_closest_points_of_crossed_edges_are_inside_both():
  """Two long crossed bars, one above the other, each on an edge: no corner is near."""
  roll = np.array([[1, 0, 0], [0, 0.5**0.5, 0.5**0.5], [0, -(0.5**0.5), 0.5**0.5]])
  a = SceneObject("a", "", np.zeros(3), np.array([4.0, 1.0, 1.0]), roll, ())
  b = SceneObject("b", "", np.array([0, 0, 3.0]), np.array([4.0, 1.0, 1.0]), roll @ turned(90), ())
  assert geometry.box_distance_m(a, b) == pytest.approx(3 - 2**0.5, abs=1e-9)


@pytest.mark.parametrize(
  ("angle", "hard", "medium", "near"),
  [
    (0.0, "front-left", "left", (False, True)),
    (37.7, "front-left", "left", (False, False)),
    (80.1, "front-left", "left", (True, False)),
    (90.0, "back-left", "left", (False, False)),
    (134.9, "back-left", "left", (False, True)),
    (135.0, "back-left", "back", (False, True)),
    (180.0, "back-right", "back", (False, False)),
    (225.0, "back-right", "right", (False, True)),
    (355.0, "front-right", "right", (True, True)),
  ],
)
def test_angles_have_the_sectors_of_the_benchmark(angle, hard, medium, near):
  turn = np.radians(angle)
  point = np.array([[1 - 2 * np.sin(turn), 2 + 2 * np.cos(turn)]])
  measured = geometry.direction_deg(np.array([1.0, 2.0]), np.array([1.0, 5.0]), point)[0]
  assert min(abs(measured - angle), 360 - abs(measured - angle)) < 1e-9
  assert (geometry.sector(angle, "hard"), geometry.sector(angle, "medium")) == (hard, medium)
  assert tuple(geometry.near_boundary(angle, level) for level in ("hard", "medium")) == near


# --- a scene made by hand ----------------------------------------------------------------------


def make_object(category, x, y, size=(0.6, 0.6, 0.6)):
  return SceneObject(category, "red", np.array([x, y, size[2] / 2]), np.array(size), np.eye(3), ())


def scene_of(*objects):
  square = np.array([[-4.0, -4.0], [4.0, -4.0], [4.0, 4.0], [-4.0, 4.0]])
  return Scene("hand/1", "procedural", square, 2.6, 64.0, objects, (), None)


def turning_views(scene, *headings_deg):
  position_3 = np.array([0.0, 0.0, 1.4])
  cameras = [make_camera(position_3, heading, 18.0, 60.0, 96, 72) for heading in headings_deg]
  return [render(scene, camera, shadows=False) for camera in cameras]


AROUND = scene_of(
  make_object("chair", 2.5, 0),
  make_object("lamp", 0, 2.5),
  make_object("bin", -2.5, 0),
  make_object("sofa", 0, -2.5, (1.6, 0.8, 0.7)),
)


def questions(scene, views, *types, seed=0, **changes):
  cfg = dataclasses.replace(CONFIG, types=types, **changes)
  return make_questions(scene, views, np.random.default_rng(seed), cfg)


def test_appearance_order_is_the_order_of_the_views():
  views = turning_views(AROUND, 180, 90, 0, 270)
  (task,) = questions(AROUND, views, "obj_appearance_order")
  assert task.options["ABCD".index(task.answer)][3:] == "bin, lamp, chair, sofa"
  Checker(AROUND, views, CONFIG).check(task)
  assert [(box.label, box.image) for box in task.boxes] == [
    ("bin", 0), ("lamp", 1), ("chair", 2), ("sofa", 3)
  ]  # fmt: skip
  assert not questions(
    AROUND, views, "obj_appearance_order", seconds_per_view=1.0
  )  # 1 s apart is too close


def test_wordings_are_those_of_the_benchmark():
  views = turning_views(AROUND, 180, 90, 0, 270)
  by_type = {task.question_type: task for task in questions(AROUND, views, *ALL)}
  assert by_type["room_size_estimation"].question == (
    "What is the size of this room (in square meters)? \n"
    "If multiple rooms are shown, estimate the size of the combined space."
  )
  assert by_type["room_size_estimation"].answer == "64.0"
  assert re.fullmatch(
    r"Measuring from the closest point of each object, what is the direct distance between the \w+ "
    r"and the \w+ \(in meters\)\?",
    by_type["object_abs_distance"].question,
  )
  assert re.fullmatch(
    r"What is the length of the longest dimension \(length, width, or height\) of the \w+, "
    r"measured in centimeters\?",
    by_type["object_size_estimation"].question,
  )
  start = r"If I am standing by the (\w+) and facing the (\w+), is the (\w+) to "
  ends = {
    "easy": r"the left or the right of the \2\?",
    "medium": r"my left, right, or back\?\nAn object is to my back if I would have to turn at "
    r"least 135 degrees in order to face it\.",
    "hard": r"my front-left, front-right, back-left, or back-right\?\nThe directions refer to the "
    r"quadrants of a Cartesian plane \(if I am standing at the origin and facing along the "
    r"positive y-axis\)\.",
  }
  for level, end in ends.items():
    assert re.fullmatch(start + end, by_type[f"object_rel_direction_{level}"].question)


def test_questions_are_about_visible_objects_only():
  views = turning_views(AROUND, 0)
  tasks = questions(AROUND, views, *ALL)
  assert {task.question_type for task in tasks} == {"camera_distance", "object_size_estimation"}
  assert all("chair" in task.question for task in tasks)
  assert not questions(AROUND, views, *ALL, min_visible_pixels=100_000)


def test_the_instance_scope_decides_whether_invisible_instances_count():
  scene = scene_of(
    make_object("chair", 3, 0), make_object("chair", 3, 1), make_object("chair", -3, 0)
  )
  ahead, around = turning_views(scene, 8), turning_views(scene, 8, 180)
  assert not questions(scene, ahead, "object_counting", instance_scope="room")
  (one_view,) = questions(scene, ahead, "object_counting", instance_scope="views")
  assert (one_view.question, one_view.answer) == ("How many chair(s) are in this image?", "2")
  (room,) = questions(scene, around, "object_counting", instance_scope="room")
  assert (room.question, room.answer) == ("How many chair(s) are in this room?", "3")
  (two_views,) = questions(scene, around, "object_counting", instance_scope="views")
  assert (two_views.question, two_views.answer) == ("How many chair(s) are in these images?", "3")
  # One visible chair is "the chair" only if the instances in the views count.
  behind = turning_views(scene, 180)
  assert not questions(scene, behind, "camera_distance", instance_scope="room")
  assert len(questions(scene, behind, "camera_distance", instance_scope="views")) == 1


def test_there_are_no_questions_about_hidden_objects():
  scene = scene_of(
    make_object("ball", 3.5, 0, (0.3, 0.3, 0.3)), make_object("cabinet", 2.5, 0.3, (0.6, 0.7, 0.8))
  )
  views = turning_views(scene, 0)
  tasks = questions(scene, views, "camera_distance", min_visible_pixels=1, min_visible_fraction=0.5)
  assert [task.boxes[0].label for task in tasks] == ["cabinet"]


def test_questions_of_a_type_depend_on_the_seed_but_not_on_other_types():
  views = turning_views(AROUND, 180, 90, 0, 270)
  key = lambda tasks: [(t.task_id, t.question, t.options, t.answer) for t in tasks]  # noqa: E731
  everything = key(questions(AROUND, views, *ALL))
  assert everything == key(questions(AROUND, views, *ALL))
  assert everything != key(questions(AROUND, views, *ALL, seed=1))
  alone = key(questions(AROUND, views, "object_rel_direction_hard"))
  assert alone == [entry for entry in everything if "direction_hard" in entry[0]]
  (first, *_) = questions(
    AROUND, views, "object_abs_distance", task_id_prefix="walk3/", max_per_type=1
  )
  assert first.task_id == "walk3/hand/1/object_abs_distance/0"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_right_answers_are_spread_evenly_over_the_letters(count):
  drafts = [templates.Draft("{options}?", "right", tuple("wxyz"[: count - 1]), ())] * (4 * count)
  results = list(assign_letters(drafts, np.random.default_rng(0)))
  assert sorted(answer for _, _, answer in results) == sorted("ABCD"[:count] * 4)
  for question, options, answer in results:
    assert options["ABCD".index(answer)] == f"{answer}. right"
    assert question == ", ".join(option[3:] for option in options) + "?"


def test_unknown_question_types_are_refused():
  fields = dataclasses.asdict(CONFIG)
  assert build(QuestionConfig, fields) == CONFIG
  with pytest.raises(ValueError, match=r"types\[0\] must be one of object_counting"):
    build(QuestionConfig, fields | {"types": ["object_colour"]})
  with pytest.raises(DataError, match=r"object_colour.*is unknown"):
    answer_kind("object_colour")
  assert answer_kind("left_right") == "choice"


@given(st.floats(-180, 180), st.floats(0, 60), st.floats(-3, 3), st.floats(-3, 3))
def test_a_place_on_the_floor_is_right_and_ahead_of_the_camera(heading, down, right_m, ahead_m):
  """The tilt of the camera does not change the place."""
  position_3 = np.array([1.0, 2.0, 1.5])
  camera = make_camera(position_3, heading, down, 75.0, 64, 64)
  turn = np.radians(heading)
  ahead_2, right_2 = np.array([np.cos(turn), np.sin(turn)]), np.array([np.sin(turn), -np.cos(turn)])
  point_3 = np.append(position_3[:2] + ahead_m * ahead_2 + right_m * right_2, 0.3)
  assert geometry.floor_place_m(point_3, camera) == pytest.approx((right_m, ahead_m), abs=1e-6)
