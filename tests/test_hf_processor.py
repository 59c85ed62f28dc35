"""A checkpoint's own processor config: both spellings, and what is wrong with it."""

import json

import pytest

from spatial_jax.errors import DataError
from spatial_jax.hf import processor
from tests import policy_fixtures as fixtures

WRITTEN = processor.to_hf(fixtures.PREPROCESS)


def put(folder, record, name=processor.IMAGES):
  (folder / name).write_text(json.dumps(record))


def test_both_spellings_of_the_bounds(tmp_path):
  put(tmp_path, WRITTEN)
  assert processor.read_processor(tmp_path) == fixtures.PREPROCESS
  old = {key: value for key, value in WRITTEN.items() if key != "size"}
  put(tmp_path, {**old, "min_pixels": 64, "max_pixels": 4096})
  assert processor.read_processor(tmp_path) == fixtures.PREPROCESS


def test_clips_have_a_file_of_their_own_or_that_of_images(tmp_path):
  put(tmp_path, WRITTEN)
  assert processor.read_processor(tmp_path, clips=True) == fixtures.PREPROCESS
  size = {"shortest_edge": 128, "longest_edge": 1024}
  put(tmp_path, {**WRITTEN, "size": size}, processor.CLIPS)
  clips = processor.read_processor(tmp_path, clips=True)
  assert (clips.min_pixels, clips.max_pixels) == (128, 1024)
  assert processor.read_processor(tmp_path) == fixtures.PREPROCESS


@pytest.mark.parametrize("key", [key for key in WRITTEN if key != "image_processor_type"])
def test_a_missing_key_is_named(key, tmp_path):
  put(tmp_path, {name: value for name, value in WRITTEN.items() if name != key})
  missing = "min_pixels" if key == "size" else key
  with pytest.raises(DataError, match=f"{processor.IMAGES}.*{missing}"):
    processor.read_processor(tmp_path)


def test_a_missing_or_broken_file_is_named(tmp_path):
  with pytest.raises(DataError, match=processor.IMAGES):
    processor.read_processor(tmp_path)
  (tmp_path / processor.IMAGES).write_text("{")
  with pytest.raises(DataError, match=processor.IMAGES):
    processor.read_processor(tmp_path)
  put(tmp_path, {**WRITTEN, "image_mean": 0.5})
  with pytest.raises(DataError, match=processor.IMAGES):
    processor.read_processor(tmp_path)
