"""The features of every TFDS data set of this project, and their rows.

    row of a JSON lines file + contents of its images ──encode_row──► example ──► array_record
    array_record ──tfds.data_source──► example ──decode_row──► row + contents of its images

TFDS writes and reads them without TensorFlow. Texts and images come back as bytes, and images are
not decoded: see `decode_row`. The fields of a row are described in docs/data.md.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import file_adapters
from tensorflow_datasets.core import writer as writer_lib
from tensorflow_datasets.proto import tf_example_pb2

FILE_FORMAT = "array_record"  # random access, and no TensorFlow to read it
_TEXTS = ("id", "question", "answer", "kind", "unit", "type", "scene", "benchmark", "video")


def task_features() -> tfds.features.FeaturesDict:
  """The features of one task.

  `images` has the contents of image files, as texts: TFDS passes texts on as bytes, 1.6 times as
  fast as scalars of bytes and 13 times as fast as images, which it decodes. Absent fields are ""
  or empty. `extra` is a JSON object.
  """
  texts = {name: tfds.features.Text() for name in _TEXTS}
  return tfds.features.FeaturesDict(
    {
      **texts,
      "options": tfds.features.Sequence(tfds.features.Text()),
      "images": tfds.features.Sequence(tfds.features.Text(doc="Contents of image files.")),
      "times_s": tfds.features.Sequence(np.float32),  # of the frames of a video
      "extra": tfds.features.Text(doc="JSON object."),
    }
  )


def encode_row(row: Mapping[str, Any], images: Sequence[bytes]) -> dict[str, Any]:
  """The example of a row; `images` are the contents of its image files, in order.

  Other fields than those of `task_features` are not stored: put them into `row["extra"]`.
  """
  texts = {name: str(row.get(name) or "") for name in _TEXTS}
  return {
    **texts,
    "answer": str(row["answer"]),
    "options": list(row.get("options") or ()),
    "images": list(images),
    "times_s": list(row.get("times_s") or ()),
    "extra": json.dumps(row.get("extra") or {}, sort_keys=True),
  }


def decode_row(example: Mapping[str, Any]) -> dict[str, Any]:
  """The row of an example: texts are str, absent texts None, `images` their contents."""
  texts = {name: example[name].decode() or None for name in _TEXTS}
  return {
    **texts,
    "answer": example["answer"].decode(),
    "options": tuple(option.decode() for option in example["options"]) or None,
    "images": tuple(example["images"]),
    "times_s": tuple(float(time) for time in example["times_s"]),
    "extra": json.loads(example["extra"]),
  }


class StableWriter(writer_lib.ExampleWriter):
  """Writes the same bytes for the same examples.

  TFDS serialises the fields of an example in an order that differs between processes.
  """

  def __init__(self):
    super().__init__(file_adapters.FileFormat(FILE_FORMAT))

  def write(self, path: epath.PathLike, examples: Iterable[tuple[Any, bytes]]) -> list[Any] | None:
    """Writes one file of a split."""
    return super().write(path, ((key, _in_order(example)) for key, example in examples))


def _in_order(example: bytes) -> bytes:
  """The same example with its fields sorted by name."""
  fields = tf_example_pb2.Example.FromString(example)  # pyright: ignore
  return fields.SerializeToString(deterministic=True)
