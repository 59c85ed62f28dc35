"""Config of the data source: values out of range and wrong paths are one line with the key."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from configs import tiny_defaults
from spatial_jax.config import ConfigError, build
from spatial_jax.data.source import SourceConfig, make_source
from spatial_jax.errors import DataError


def source_config(**changes) -> SourceConfig:
  """The default source with changed values: {"rooms.objects": (5, 3)}."""
  cfg = tiny_defaults.source()
  cfg.update_from_flattened_dict(changes)
  return build(SourceConfig, cfg, "config.source")


@pytest.mark.parametrize(
  ("key", "value", "rule"),
  [
    ("max_tasks_per_scene", 0, "be a whole number, at least 1"),
    ("rare_type_retries", -1, "be a whole number, at least 0"),
    ("rooms.objects", (5, 3), "be the fewest and the most objects, both from 1 to 256"),
    ("rooms.objects", (0, 3), "be the fewest and the most objects"),
    ("rooms.objects", (1, 257), "be the fewest and the most objects"),
    ("rooms.side_m", (6.0, 3.0), "be the shortest and the longest side, both from 1 to 100"),
    ("rooms.side_m", (0.0, 3.0), "be the shortest and the longest side"),
    ("rooms.l_shape_share", 1.5, "be at least 0 and at most 1"),
    ("rooms.l_shape_share", -0.1, "be at least 0 and at most 1"),
    ("camera.width_px", 0, "be at least 1 and at most 8192"),
    ("camera.height_px", -1, "be at least 1 and at most 8192"),
    ("camera.height_px", 10**6, "be at least 1 and at most 8192"),
    ("camera.field_of_view_deg", 0.0, "be at least 5 and at most 170"),
    ("camera.field_of_view_deg", 180.0, "be at least 5 and at most 170"),
    ("camera.frame_counts", (), "name at least one number of images, each from 1 to 1024"),
    ("camera.frame_counts", (1, 0), "name at least one number of images"),
    ("questions.types", (), "name at least one type of object_counting, "),
    ("questions.types", ("object_counting",) * 2, "name each type once"),
    ("questions.max_per_type", 0, "be at least 1"),
    ("questions.min_visible_pixels", 0, "be at least 1"),
    ("questions.min_visible_fraction", 1.1, "be at least 0 and at most 1"),
    ("questions.seconds_per_view", 0.0, "be above 0 and finite"),
  ],
)
def test_values_out_of_range_are_named_by_their_keys(key, value, rule):
  with pytest.raises(ConfigError) as caught:
    source_config(**{key: value})
  message = str(caught.value)
  assert message.startswith(f"config.source.{key} is {value!r} and must {rule}")
  assert "\n" not in message


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("questions.types", ("object_colour",), r"types\[0\] must be one of object_counting, .*order"),
    ("questions.instance_scope", "house", "instance_scope must be one of room, views"),
    ("kind", "videos", "kind must be one of procedural, mazes, physics, rooms, photos, files"),
    ("camera.width_px", 168.0, "width_px must be int"),
    ("camera.frame_counts", 1, "frame_counts must be a list"),
    ("rooms.objects", (1, 2, 3), "objects must have 2 items"),
    ("rooms.side_m", (3.0, math.inf), r"side_m\[1\] must be a finite number"),
    ("rooms.repeat_share", math.nan, "repeat_share must be a finite number"),
    ("camera.field_of_view_deg", math.nan, "field_of_view_deg must be a finite number"),
    ("questions.seconds_per_view", math.inf, "seconds_per_view must be a finite number"),
  ],
)
def test_unknown_names_and_wrong_types_are_named_by_their_keys(key, value, message):
  cfg = tiny_defaults.source()
  with cfg.ignore_type():
    cfg.update_from_flattened_dict({key: value})
  with pytest.raises(ConfigError, match=rf"^config\.source\..*{message}"):
    build(SourceConfig, cfg, "config.source")


def test_the_limits_of_each_range_are_allowed():
  source_config(
    **{
      "max_tasks_per_scene": 1,
      "rare_type_retries": 0,
      "rooms.objects": (1, 1),
      "rooms.side_m": (1.0, 100.0),
      "rooms.l_shape_share": 0.0,
      "rooms.repeat_share": 1.0,
      "camera.width_px": 1,
      "camera.height_px": 8192,
      "camera.field_of_view_deg": 170.0,
      "camera.frame_counts": (1, 1024),
      "questions.max_per_type": 1,
      "questions.min_visible_pixels": 1,
      "questions.min_visible_fraction": 1.0,
    }
  )


def test_types_that_no_number_of_images_allows_are_named():
  cfg = source_config(**{"questions.types": ("camera_distance",), "camera.frame_counts": (4,)})
  with pytest.raises(
    ConfigError, match=r"^config\.source\.questions\.types \('camera_distance',\)"
  ):
    make_source(cfg)


@pytest.mark.parametrize("kind", ["rooms", "photos"])
def test_paths_without_data_name_the_expected_files_and_the_key(tmp_path, kind):
  expected = {"rooms": r"arkitscenes\*\.json", "photos": r"annotations\.json"}[kind]
  (tmp_path / "file").write_text("{}" if kind == "rooms" else "[]")
  (tmp_path / "folder").mkdir()
  problems = [("gone", "does not exist"), ("folder", "contains no|does not exist")]
  problems += [("file", "contains no rooms" if kind == "rooms" else "is not a folder")]
  for name, problem in problems:
    with pytest.raises(DataError, match=problem) as caught:
      make_source(source_config(kind=kind, path=str(tmp_path / name)))
    assert str(caught.value).startswith(str(tmp_path / name))
    caught.match(f"{expected}.*set config.source.path")
    assert "\n" not in str(caught.value)
  with pytest.raises(ConfigError, match=rf"^config\.source\.path is empty; .* the {kind}"):
    make_source(source_config(kind=kind))


def test_photographs_without_a_question_are_an_error(tmp_path):
  (tmp_path / "annotations.json").write_text("[]")
  with pytest.raises(DataError, match=r"annotations\.json gives no question"):
    make_source(source_config(kind="photos", path=str(tmp_path)))


def save_photos(folder, *names):
  """Images with one car each, and their annotations."""
  corners = [[x, y, 5 + z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]
  car = {"label": "car", "bbox_2d": [32, 32, 45, 45], "corners": corners}
  projection = [[64, 0, 32], [0, 64, 32], [0, 0, 1]]
  record = {"width": 64, "height": 64, "projection": projection, "objects": [car]}
  for name in names:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / name)
  records = [record | {"image": name} for name in names]
  (folder / "annotations.json").write_text(json.dumps(records))
  return source_config(kind="photos", path=str(folder))


def test_photographs_with_the_same_name_are_an_error(tmp_path):
  with pytest.raises(DataError, match="two images have the same name"):
    make_source(save_photos(tmp_path, "a.png", "a.jpg"))


def test_training_on_photographs_is_refused(tmp_path):
  source = make_source(save_photos(tmp_path, "a.png"))
  assert len(source.held_out(100)) == len(source.examples(0, 1)) > 1
  with pytest.raises(ConfigError, match=r"^config\.source\.kind is photos"):
    source.batch(0, 0, 1)
