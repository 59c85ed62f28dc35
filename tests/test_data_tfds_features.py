"""Rows survive the features of TFDS, and equal examples are equal bytes in every process."""

import hashlib
import subprocess
import sys

from tensorflow_datasets.core import example_serializer

from spatial_jax.data.tfds_features import decode_row, encode_row, task_features

FULL = {
  "id": "a/1",
  "question": "Which is closer? 北 <image>",
  "answer": "B",
  "kind": "choice",
  "unit": None,
  "type": "rel",
  "scene": "s",
  "benchmark": "vsi-bench",
  "video": "walk.mp4",
  "options": ("A. sofa", "B. lamp"),
  "images": (b"\x00\xff\n", b""),
  "times_s": (0.0, 0.5),
  "extra": {"boxes": [[1, 2.5]], "note": "é"},
}
PROGRAM = """
import sys
from spatial_jax.data.tfds_features import StableWriter, encode_row, task_features
from tensorflow_datasets.core import example_serializer
features = task_features()
serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
row = {"id": "a", "question": "How far?", "answer": "2", "unit": "m", "extra": {"b": 1, "a": 2}}
example = serializer.serialize_example(features.encode_example(encode_row(row, [b"1", b"2"])))
StableWriter().write(sys.argv[1], [(0, example)])
"""


def round_trip(row, images):
  features = task_features()
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  stored = serializer.serialize_example(features.encode_example(encode_row(row, images)))
  return decode_row(features.deserialize_example_np(stored))


def test_a_full_row_survives():
  assert round_trip(FULL, FULL["images"]) == FULL


def test_absent_fields_come_back_as_none():
  row = round_trip({"id": 3, "question": "How many?", "answer": 4}, [])
  assert row["id"] == "3"
  assert row["answer"] == "4"
  assert row["options"] is None
  assert row["unit"] is None
  assert row["video"] is None
  assert row["images"] == ()
  assert row["times_s"] == ()
  assert row["extra"] == {}


def test_two_processes_write_the_same_bytes(tmp_path):
  digests = set()
  for number in range(2):
    path = tmp_path / str(number)
    subprocess.run([sys.executable, "-c", PROGRAM, str(path)], check=True)
    digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
  assert len(digests) == 1
