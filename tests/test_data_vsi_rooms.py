"""Real rooms: boxes as in the metadata, outlines around them, bad files named in one line."""

import copy
import json
import pathlib

import numpy as np
import pytest

from spatial_jax.data.vsi_rooms import load_rooms, outline
from spatial_jax.errors import DataError

META = pathlib.Path(__file__).parents[2] / "shared" / "data" / "vsibench_meta"
needs_meta = pytest.mark.skipif(
  not META.is_dir(), reason=f"the room metadata of VSI-Bench is not at {META}"
)

TURNED = [0.6, 0.8, 0.0, -0.8, 0.6, 0.0, 0.0, 0.0, 1.0]  # box axes in the world, row by row
ROOM = {
  "dataset": "arkitscenes",
  "room_size": 20.0,
  "room_center": [1.0, 2.0, 0.5],
  "object_bbox": {
    "table": [{"centroid": [1, 2, -0.5], "axesLengths": [2, 1, 0.8], "normalizedAxes": TURNED}],
    "tv": [{"centroid": [1, 3, 0.5], "axesLengths": [1.2, 0.1, 0.6], "normalizedAxes": TURNED}],
  },
}


def write(folder, room, name="arkitscenes.json"):
  (folder / name).write_text(json.dumps({"42": room}))
  return folder / name


def area(polygon_42):
  x, y = polygon_42.T
  return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def test_boxes_keep_their_place_and_stand_on_the_floor(tmp_path):
  (scene,) = load_rooms(write(tmp_path, ROOM))
  assert (scene.scene_id, scene.source, scene.benchmark) == (
    "arkitscenes/42",
    "vsi-rooms",
    "vsi-bench",
  )
  assert scene.room_size_m2 == 20.0
  assert area(scene.polygon_Z2) == pytest.approx(20.0)
  table, tv = scene.objects
  assert (table.category, tv.category) == ("table", "tv")
  np.testing.assert_allclose(table.centre_3, [1, 2, 0.4])
  np.testing.assert_allclose(tv.centre_3, [1, 3, 1.4])
  np.testing.assert_allclose(table.axes_33 @ [0.6, 0.8, 0.0], [1, 0, 0], atol=1e-12)
  far = max(table.corners_83().tolist(), key=lambda corner: corner @ np.array([0.6, 0.8, 0.0]))
  assert np.dot(np.array(far) - table.centre_3, [0.6, 0.8, 0.0]) == pytest.approx(1.0)


def test_a_folder_gives_the_rooms_of_all_its_files(tmp_path):
  write(tmp_path, ROOM)
  write(tmp_path, ROOM | {"dataset": "scannet"}, "scannet.json")
  (tmp_path / "rows_excerpts.json").write_text("[]")
  assert [scene.scene_id for scene in load_rooms(tmp_path)] == ["arkitscenes/42", "scannet/42"]


@pytest.mark.parametrize(("area_m2", "expected"), [(30.0, 30.0), (6.0, 6.0), (1.0, 6.0)])
def test_the_outline_has_the_annotated_area_unless_the_objects_need_more(area_m2, expected):
  points = np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 2.0], [0.0, 2.0]])
  polygon = outline(points, np.array([2.0, 1.0]), area_m2)
  assert area(polygon) == pytest.approx(expected)


def test_the_outline_moves_towards_the_room_centre():
  points = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
  polygon = outline(points, np.array([2.0, 0.5]), 16.0)
  assert area(polygon) == pytest.approx(16.0)
  assert polygon.mean(axis=0)[0] == pytest.approx(2.0)


@needs_meta
def test_the_outlines_of_238_rooms_contain_their_objects():
  scenes = load_rooms(META)
  assert len(scenes) == len({scene.scene_id for scene in scenes}) == 238
  exact = 0
  for scene in scenes:
    corners_Z3 = np.concatenate([obj.corners_83() for obj in scene.objects])
    assert abs(corners_Z3[:, 2].min()) < 1e-9
    assert corners_Z3[:, 2].max() < scene.height_m
    edges_42 = np.roll(scene.polygon_Z2, -1, axis=0) - scene.polygon_Z2
    for corner_2, (x, y) in zip(scene.polygon_Z2, edges_42, strict=True):  # all to the left
      from_Z2 = corners_Z3[:, :2] - corner_2[None]
      assert (x * from_Z2[:, 1] - y * from_Z2[:, 0]).min() > -1e-6
    exact += abs(area(scene.polygon_Z2) - scene.room_size_m2) < 1e-6
  assert exact / len(scenes) > 0.65


def broken(change):
  room = copy.deepcopy(ROOM)
  change(room)
  return room


TABLE = ("object_bbox", "table", 0)


def at(room, *path):
  for key in path:
    room = room[key]
  return room


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda r: r.pop("room_size"), "scene 42: field room_size is missing"),
    (lambda r: r.update(room_size="big"), "field room_size must be a finite number, got big"),
    (lambda r: r.update(room_size=-1), "field room_size must be above 0"),
    (lambda r: r.update(room_center=[1, 2]), r"field room_center must be finite .*\[3\]"),
    (lambda r: r.update(object_bbox=[]), "field object_bbox must be a dict"),
    (lambda r: r.update(object_bbox={}), "field object_bbox has no boxes"),
    (lambda r: at(r, "object_bbox").update(table=3), "field table must be a list"),
    (lambda r: at(r, *TABLE).pop("centroid"), r"table\[0\]: field centroid is missing"),
    (
      lambda r: at(r, *TABLE).update(centroid=[1, 2, float("nan")]),
      "field centroid must be finite",
    ),
    (lambda r: at(r, *TABLE).update(axesLengths=[1, -2, 3]), "axesLengths must not be negative"),
    (lambda r: at(r, *TABLE).update(normalizedAxes=[1] * 9), "normalizedAxes must be orthonormal"),
  ],
)
def test_a_malformed_room_names_file_scene_and_field(tmp_path, change, message):
  file = write(tmp_path, broken(change))
  with pytest.raises(DataError, match=message) as caught:
    load_rooms(file)
  assert str(caught.value).startswith(f"{file}, scene 42")
  assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files_are_named(tmp_path):
  with pytest.raises(DataError, match=r"contains no such file; expected .*arkitscenes\*\.json"):
    load_rooms(tmp_path)
  with pytest.raises(
    DataError, match=r"none\.json does not exist; expected .*config\.source\.path"
  ):
    load_rooms(tmp_path / "none.json")
  (tmp_path / "scannet.json").write_text("{")
  with pytest.raises(DataError, match=r"scannet\.json cannot be read as JSON"):
    load_rooms(tmp_path)
  (tmp_path / "scannet.json").write_text("[]")
  with pytest.raises(DataError, match="must map scene names to rooms, got a list"):
    load_rooms(tmp_path)
  (tmp_path / "scannet.json").write_text("{}")
  with pytest.raises(DataError, match="contains no rooms"):
    load_rooms(tmp_path)


def test_a_scene_in_two_files_is_an_error(tmp_path):
  write(tmp_path, ROOM)
  write(tmp_path, ROOM, "arkitscenes_copy.json")
  with pytest.raises(DataError, match=r"contains the scene arkitscenes/42 twice"):
    load_rooms(tmp_path)
