"""Processor files of Hugging Face: every form of them, and what is wrong with them."""

import json

import pytest

from spatial_jax.errors import DataError
from spatial_jax.hf import processor
from tests import policy_fixtures as fixtures

WRITTEN = processor.to_hf(fixtures.PREPROCESS)
OLD = {key: value for key, value in WRITTEN.items() if key != "size"}


def put(folder, record, name=processor.IMAGE_FILE):
  (folder / name).write_text(json.dumps(record))


def bounds(folder, **more):
  cfg = processor.read_processor(folder, **more)
  return cfg.min_pixels, cfg.max_pixels


@pytest.mark.parametrize(
  ("record", "expected"),
  [
    (WRITTEN, (64, 4096)),
    ({**OLD, "min_pixels": 64, "max_pixels": 4096}, (64, 4096)),
    ({**WRITTEN, "min_pixels": 128, "max_pixels": 1024}, (128, 1024)),
    ({**WRITTEN, "max_pixels": 1024}, (64, 1024)),
    ({**WRITTEN, "min_pixels": 128}, (128, 4096)),
    ({**WRITTEN, "min_pixels": None, "max_pixels": None}, (64, 4096)),
  ],
)
def test_min_and_max_pixels_override_size(record, expected, tmp_path):
  put(tmp_path, record)
  assert bounds(tmp_path) == expected


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_same_settings(tmp_path):
  pytest.importorskip("torch", reason="needs torch (extra bench)")
  from transformers import AutoImageProcessor

  nested = {"image_processor": {**WRITTEN, "image_mean": [0.5] * 3, "max_pixels": 2048}}
  for name, record in (
    (processor.IMAGE_FILE, WRITTEN),
    (processor.IMAGE_FILE, {**WRITTEN, "min_pixels": 128, "max_pixels": None}),
    (processor.NESTED_FILE, nested),  # beside the other file, which it overrides
  ):
    put(tmp_path, record, name)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    ours = processor.read_processor(tmp_path)
    size = (theirs.size["shortest_edge"], theirs.size["longest_edge"])
    assert size == (ours.min_pixels, ours.max_pixels)
    assert list(theirs.image_mean) == list(ours.mean)


def test_videos_have_settings_of_their_own_or_those_of_images(tmp_path):
  put(tmp_path, WRITTEN)
  assert processor.read_processor(tmp_path, video=True) == fixtures.PREPROCESS
  put(tmp_path, {**WRITTEN, "min_pixels": 128}, processor.VIDEO_FILE)
  assert bounds(tmp_path, video=True) == (128, 4096)
  assert bounds(tmp_path) == (64, 4096)


def test_the_nested_file_comes_first(tmp_path):
  """transformers 5 writes it alone; a folder that was saved twice has all three files."""
  nested = {"image_processor": {**WRITTEN, "max_pixels": 256}, "processor_class": "Qwen2_5_VL"}
  put(tmp_path, nested, processor.NESTED_FILE)
  assert processor.processor_file(tmp_path) == tmp_path / processor.NESTED_FILE
  assert bounds(tmp_path) == bounds(tmp_path, video=True) == (64, 256)
  put(tmp_path, WRITTEN)
  put(tmp_path, {**WRITTEN, "max_pixels": 1024}, processor.VIDEO_FILE)
  assert (bounds(tmp_path), bounds(tmp_path, video=True)) == ((64, 256), (64, 1024))
  nested["video_processor"] = {**WRITTEN, "max_pixels": 512}
  put(tmp_path, nested, processor.NESTED_FILE)
  assert bounds(tmp_path, video=True) == (64, 512)


def test_a_nested_file_of_transformers_4_has_no_settings(tmp_path):
  put(tmp_path, {"processor_class": "Qwen2_5_VLProcessor"}, processor.NESTED_FILE)
  assert processor.processor_file(tmp_path) is None
  put(tmp_path, WRITTEN)
  assert processor.read_processor(tmp_path) == fixtures.PREPROCESS


@pytest.mark.parametrize("key", [key for key in WRITTEN if key != "image_processor_type"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_missing_key_is_named(key, nested, tmp_path):
  record = {name: value for name, value in WRITTEN.items() if name != key}
  name = processor.NESTED_FILE if nested else processor.IMAGE_FILE
  put(tmp_path, {"image_processor": record} if nested else record, name)
  missing = "min_pixels" if key == "size" else key
  with pytest.raises(DataError, match=f"/{name}: '{missing}' is missing"):
    processor.read_processor(tmp_path)


@pytest.mark.parametrize(
  "change",
  [
    {"do_resize": False},
    {"do_rescale": False},
    {"do_normalize": False},
    {"rescale_factor": 1 / 127.5},
    {"resample": 2},
    {"image_mean": 0.5},
    {"image_mean": [0.5]},
    {"image_std": [0.5, 0.5, 0.0]},
    {"max_pixels": 32},
    {"max_pixels": "many"},
    {"patch_size": None},
  ],
)
def test_settings_that_would_change_the_pixels_are_refused(change, tmp_path):
  put(tmp_path, {**WRITTEN, **change})
  with pytest.raises(DataError, match=f"{processor.IMAGE_FILE} cannot be used: "):
    processor.read_processor(tmp_path)


def test_a_missing_or_broken_file_is_named(tmp_path):
  with pytest.raises(DataError, match=processor.IMAGE_FILE):
    processor.read_processor(tmp_path)
  (tmp_path / processor.IMAGE_FILE).write_text("{")
  with pytest.raises(DataError, match=processor.IMAGE_FILE):
    processor.read_processor(tmp_path)
  put(tmp_path, [WRITTEN])
  with pytest.raises(DataError, match=processor.IMAGE_FILE):
    processor.read_processor(tmp_path)
  (tmp_path / processor.NESTED_FILE).write_text("{")
  with pytest.raises(DataError, match=f"/{processor.NESTED_FILE}"):
    processor.read_processor(tmp_path)
