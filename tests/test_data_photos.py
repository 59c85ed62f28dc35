"""Photographs: answers against sampled boxes, unique names, boxes after resizing, bad files."""

import collections
import itertools
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from spatial_jax.data.media import image_size
from spatial_jax.data.photos import box_from_corners, load_photo_tasks
from spatial_jax.errors import DataError

REAL = pathlib.Path(__file__).parents[2] / "shared" / "data" / "real3d"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the photographs are not at {REAL}")

SIZE = (400, 300)
FOCAL_PX = 200.0
PROJECTION = [[FOCAL_PX, 0, SIZE[0] / 2], [0, FOCAL_PX, SIZE[1] / 2], [0, 0, 1]]


def entry(label, x, z, size=(1.0, 1.0, 1.0), y=0.0):
  """The annotation of an upright box in front of the camera: x right, y down, z forward."""
  corners = np.array(
    [[x + sx * size[0] / 2, y + sy * size[1] / 2, z + sz * size[2] / 2]
     for sx, sy, sz in itertools.product((-1, 1), repeat=3)]
  )  # fmt: skip
  pixels = corners @ np.array(PROJECTION).T
  pixels = pixels[:, :2] / pixels[:, 2:]
  low = np.clip(pixels.min(axis=0), 0, SIZE)
  high = np.clip(pixels.max(axis=0), 0, SIZE)
  return {"label": label, "bbox_2d": [*low, *high], "corners": corners.tolist()}


def photo(folder, *objects, **changes):
  Image.new("RGB", SIZE, (90, 120, 90)).save(folder / "street.png")
  record = {
    "image": "street.png", "width": SIZE[0], "height": SIZE[1], "projection": PROJECTION,
    "objects": list(objects),
  } | changes  # fmt: skip
  (folder / "annotations.json").write_text(json.dumps([record]))
  return folder


def load(folder, seed=0, max_side_px=400, max_per_type=50):
  return load_photo_tasks(folder, seed, max_side_px, max_per_type)


def answers(folder):
  return {t.question: t.answer if t.options is None else right(t) for t in load(folder)}


def right(task):
  return task.options["AB".index(task.answer)][3:]


def test_answers_about_a_street_are_those_worked_out_by_hand(tmp_path):
  street = photo(
    tmp_path,
    entry("car", -4, 10, (2, 1.5, 4)),
    entry("car", 4, 20, (2, 1.5, 4)),
    entry("tree", 0, 6),
  )
  found = answers(street)
  camera = "What is the distance from the camera to the closest point of the {} (in meters)?"
  assert found[camera.format("tree")] == "5.5"
  assert found[camera.format("closest car")] == f"{np.hypot(3, 8):.1f}"
  assert found[camera.format("rightmost car")] == f"{np.hypot(3, 18):.1f}"
  assert [
    a for q, a in found.items() if q.startswith("Measuring") and "car and the rightmost car" in q
  ] == [f"{np.hypot(6, 6):.1f}"]
  assert [a for q, a in found.items() if "longest dimension" in q and "closest car" in q] == ["400"]
  assert found["How many car(s) in this image are less than 25 meters away from the camera?"] == "2"
  sides = {frozenset(re.findall(r"\((.*)\)", q)[0].split(", ")): a
           for q, a in found.items() if "further to the left" in q}  # fmt: skip
  assert sides == {
    frozenset({"closest car", "tree"}): "closest car",
    frozenset({"rightmost car", "tree"}): "tree",
  }
  nearer = {a for q, a in found.items() if "closer to the camera" in q}
  assert nearer == {"tree"}


def test_there_are_no_questions_about_hidden_cut_or_tiny_objects(tmp_path):
  hidden = photo(tmp_path, entry("truck", 0, 6, (4, 3, 3)), entry("car", 0, 20))
  assert all("car" not in question for question in answers(hidden))
  cut = photo(tmp_path, entry("truck", 7, 6, (4, 3, 3)), entry("tree", 0, 6))
  assert all("truck" not in question for question in answers(cut))
  tiny = photo(tmp_path, entry("car", 0, 90), entry("tree", 2, 6))
  assert all("car" not in question for question in answers(tiny))


def test_ambiguous_names_are_not_used(tmp_path):
  level = photo(tmp_path, entry("car", -3, 10), entry("car", 3, 10.2), entry("car", 0, 10.1))
  assert all("closest car" not in question for question in answers(level))
  cars = [entry("car", x, 20) for x in (-6, 3, 7)]
  occluded = photo(tmp_path, entry("truck", -3, 6, (4, 3, 3)), *cars)
  # The truck hides the leftmost car, so that "the second from the left" could be another car.
  assert all("second car from the left" not in question for question in answers(occluded))
  unsure = photo(tmp_path, entry("car", -2, 9.9), entry("car", 2, 12))
  assert not any("less than 10 m" in question for question in answers(unsure))


def test_boxes_scale_with_the_image(tmp_path):
  street = photo(tmp_path, entry("tree", 0, 6))
  (large, *_), (small, *_) = load(street), load(street, max_side_px=100)
  assert image_size(large.media[0]) == (300, 400)
  assert image_size(small.media[0]) == (75, 100)
  np.testing.assert_allclose(np.array(small.boxes[0].box_4) * 4, large.boxes[0].box_4)
  assert load(street, max_side_px=9999)[0].media[0].data.shape == (300, 400, 3)


def test_the_corners_of_a_box_may_have_any_order():
  rng = np.random.default_rng(0)
  for _ in range(20):
    axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    size = rng.uniform(0.3, 4, 3)
    signs = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
    corners = rng.permutation(np.round((signs * size) @ axes + 5.0, 3))
    solid = box_from_corners("car", corners, "here")
    np.testing.assert_allclose(np.sort(solid.size_3), np.sort(size), atol=3e-3)
    np.testing.assert_allclose(solid.axes_33 @ solid.axes_33.T, np.eye(3), atol=1e-9)
    rebuilt = solid.corners_83()
    assert max(np.linalg.norm(rebuilt - corner, axis=1).min() for corner in corners) < 5e-3
  with pytest.raises(DataError, match="here: field corners must be the 8 corners of a box"):
    box_from_corners("car", rng.normal(size=(8, 3)), "here")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"image": 3}, "field image must be a str"),
    ({"width": None}, "street.png: field width must be a finite number"),
    ({"width": 640}, r"street.png is 400 x 300 px but its annotation says 640 x 300"),
    ({"image": "gone.png"}, "gone.png does not exist"),
    ({"projection": [[1, 2], [3, 4]]}, "street.png: field projection must be finite numbers"),
    ({"projection": [[1, 2], [3]]}, "street.png: field projection must be finite numbers"),
    ({"objects": [{"label": "car"}]}, "street.png, object 0: field corners is missing"),
    ({"objects": [entry("car", 0, 9) | {"bbox_2d": [1, 2, 3]}]}, "field bbox_2d must be finite"),
    ({"objects": [entry("car", 0, 9) | {"label": None}]}, "field label must be a str"),
  ],
)
def test_invalid_annotations_are_named_in_one_line(tmp_path, changes, message):
  with pytest.raises(DataError, match=message) as caught:
    load(photo(tmp_path, **changes))
  assert str(tmp_path) in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_broken_image_and_a_broken_list_are_named(tmp_path):
  photo(tmp_path, entry("tree", 0, 6))
  (tmp_path / "street.png").write_bytes(b"not an image")
  with pytest.raises(DataError, match=r"street\.png cannot be read as an image"):
    load(tmp_path)
  (tmp_path / "annotations.json").write_text("{}")
  with pytest.raises(DataError, match=r"annotations\.json must be a list"):
    load(tmp_path)
  (tmp_path / "annotations.json").unlink()
  with pytest.raises(DataError, match=r"annotations\.json does not exist"):
    load(tmp_path)


# --- the nine photographs ----------------------------------------------------------------------


def named(record, words):
  """The annotated object with this name, determined from the annotations again."""
  match = re.fullmatch(
    r"(closest|leftmost|rightmost|second)? ?(.+?)(?: from the (left|right))?", words
  )
  rank, label, side = match.groups()
  group = [obj for obj in record["objects"] if obj["label"] == label]
  if rank is None:
    (only,) = group
    return only
  if rank == "closest":
    return min(group, key=camera_m)
  group.sort(key=lambda obj: obj["bbox_2d"][0] + obj["bbox_2d"][2])
  place = {"leftmost": 0, "rightmost": -1, "second": 1 if side == "left" else -2}[rank]
  return group[place]


def edges_of(obj):
  """The three edges at the first corner."""
  corners = np.array(obj["corners"])
  for triple in itertools.combinations(range(1, 8), 3):
    edges = corners[list(triple)] - corners[0][None]
    volume = abs(np.linalg.det(edges))
    if abs(volume - np.prod(np.linalg.norm(edges, axis=1))) < 1e-3 * volume:
      return edges
  raise AssertionError("no box")


def solid_points(obj, steps):
  """A grid of points in the box and on its faces."""
  weights = np.stack(np.meshgrid(*[np.linspace(0, 1, steps)] * 3), -1).reshape(-1, 3)
  return np.array(obj["corners"])[:1] + weights @ edges_of(obj)


def camera_m(obj):
  return float(np.linalg.norm(solid_points(obj, 24), axis=1).min())


def gap_m(a, b):
  first, second = solid_points(a, 12), solid_points(b, 12)
  return float(np.sqrt(((first[:, None] - second[None]) ** 2).sum(-1)).min())


@needs_real
def test_sampling_confirms_the_answers_about_nine_photographs():
  records = {
    f"photos/{pathlib.Path(r['image']).stem}": r
    for r in json.loads((REAL / "annotations.json").read_text())
  }
  tasks = load(REAL, max_side_px=448, max_per_type=6)
  types = collections.Counter(task.question_type for task in tasks)
  assert len(tasks) >= 60
  numbers = {"object_counting", "camera_distance", "object_abs_distance", "object_size_estimation"}
  assert set(types) == numbers | {"left_right", "closer_to_camera"}
  assert len({task.task_id for task in tasks}) == len(tasks)
  assert {task.scene_id for task in tasks} == set(records)
  for task in tasks:
    assert (task.source, task.benchmark) == ("photos", None)
    assert max(image_size(task.media[0])) == 448
    check(task, records[task.scene_id])


def check(task, record):
  if task.question_type == "object_counting":
    label, limit = re.match(r"How many (.+)\(s\) .* than (\d+) meters", task.question).groups()
    near = [o for o in record["objects"] if o["label"] == label and camera_m(o) < float(limit)]
    assert int(task.answer) == len(near) == len(task.boxes)
  elif task.question_type == "camera_distance":
    words = re.search(r"point of the (.+) \(in", task.question).group(1)
    assert abs(camera_m(named(record, words)) - float(task.answer)) < 0.05 + 0.02
  elif task.question_type == "object_size_estimation":
    words = re.search(r"height\) of the (.+), measured", task.question).group(1)
    longest_m = np.linalg.norm(edges_of(named(record, words)), axis=1).max()
    assert abs(longest_m * 100 - int(task.answer)) <= 0.5 + 1e-9
  elif task.question_type == "object_abs_distance":
    a, b = re.search(r"between the (.+) and the (.+) \(in", task.question).groups()
    sampled = gap_m(named(record, a), named(record, b))
    assert -0.06 < sampled - float(task.answer) < 0.05 + 0.12
  else:
    first, second = (named(record, option[3:]) for option in task.options)
    key = camera_m if task.question_type == "closer_to_camera" else lambda o: sum(o["bbox_2d"][::2])
    assert "AB"[int(key(second) < key(first))] == task.answer
  width = record["width"]
  for box in task.boxes:
    tops = [np.array(obj["bbox_2d"]) * 448 / width for obj in record["objects"]]
    assert min(np.abs(top - box.box_4).max() for top in tops) < 1e-6


@needs_real
def test_questions_depend_on_the_seed_and_letters_are_balanced():
  key = lambda tasks: [(t.task_id, t.question, t.options, t.answer) for t in tasks]  # noqa: E731
  tasks = load(REAL, max_side_px=64)
  assert key(tasks) == key(load(REAL, max_side_px=64))
  assert key(tasks) != key(load(REAL, seed=1, max_side_px=64))
  letters = collections.Counter(task.answer for task in tasks if task.options)
  assert abs(letters["A"] - letters["B"]) <= 4
