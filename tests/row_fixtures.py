"""Files of tasks for tests: images, a video, rows of all kinds."""

import io
import json
import pathlib
import random

import numpy as np
from PIL import Image

from spatial_jax.data.files import FilesConfig
from spatial_jax.data.media import MAX_PIXELS
from spatial_jax.data.rows import row_schema

FILES = FilesConfig((), "", 0.25, (), "shuffled", 0.05, True)


def jpeg(number: int, height: int = 60, width: int = 80) -> bytes:
  """A small random image."""
  pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "jpeg")
  return file.getvalue()


def save_images(folder: pathlib.Path, count: int) -> list[str]:
  """Writes images, and returns their names."""
  folder.mkdir(parents=True, exist_ok=True)
  for number in range(count):
    (folder / f"{number}.jpg").write_bytes(jpeg(number))
  return [f"{number}.jpg" for number in range(count)]


def rows(images: list[str], count: int) -> list[dict]:
  """Rows of all kinds: numbers, choices, words; one or two images, frames."""
  made = []
  for number in range(count):
    first, second = images[number % len(images)], images[(number + 1) % len(images)]
    made.append(
      [
        {"question": "How far is the chair, in meters?", "answer": 2.4, "images": [first]},
        {
          "question": "Which is closer?", "answer": "B", "options": ["sofa", "lamp"],
          "images": [first, second],
        },
        {
          "question": "First <image> then <image>: what moved?", "answer": "the lamp",
          "images": [first, second],
        },
        {
          "question": "How many chairs are in this room?", "answer": 4, "unit": "count",
          "videos": [{"frames": [first, second] * 2, "fps": 2}],
        },
      ][number % 4] | {"scene": f"room-{number}"}
    )  # fmt: skip
  return made


def save_rows(path: pathlib.Path, lines: list) -> pathlib.Path:
  """Writes a JSONL file; text and bytes are written as they are."""
  path.parent.mkdir(parents=True, exist_ok=True)
  encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
  path.write_bytes(b"\n".join(encoded) + b"\n")
  return path


DAMAGES = (
  lambda row, rng: row | {"images": ["missing.jpg"]},
  lambda row, rng: row | {"answer": "about 3 m"},
  lambda row, rng: row | {"answer": 0, "kind": "number"},
  lambda row, rng: row | {"options": ["a", "b"], "answer": "z"},
  lambda row, rng: row | {"images": [".."]},
  lambda row, rng: row | {"images": ["huge.png"]},
  lambda row, rng: row | {"id": "twice"},
  lambda row, rng: {"problem": row["question"], "solution": row["answer"]},
  lambda row, rng: {k: v for k, v in row.items() if k != rng.choice(list(row))},
  lambda row, rng: row | {rng.choice(list(row_schema()["properties"])): random_value(rng)},
  lambda row, rng: row | {rng.choice(list(row)): random_value(rng)},
  lambda row, rng: row | {"question": "<image>" * rng.randrange(4) + "<video>?"},
)


def random_value(rng):
  return rng.choice(
    [
      None, "", "x" * 5000, -1, 0, 1e308, 10**400, True, [], {}, [[]], [None], {"a": 1}, "\0",
      ["a.jpg"] * 3, [{"path": 3}], [{"frames": "ab"}], "<|im_end|>", "\ud800", "3", ["A", "B"],
    ]
  )  # fmt: skip


def save_fuzzed_rows(path: pathlib.Path, count: int) -> pathlib.Path:
  """Writes rows of which most are damaged: their fields, or the bytes of their lines."""
  rng = random.Random(0)
  made = rows(save_images(path.parent, 3), count)
  side = int(MAX_PIXELS**0.5) + 1
  Image.new("1", (side, side)).save(path.parent / "huge.png")
  lines = [rng.choice(DAMAGES)(row, rng) if rng.random() < 0.7 else row for row in made]
  for number in rng.sample(range(count), count * 6 // 100):
    raw = json.dumps(lines[number]).encode()
    cut = rng.randrange(len(raw))
    lines[number] = rng.choice([raw[:cut], raw[:cut] + bytes([rng.randrange(256)]) + raw[cut:]])
    lines[number] = lines[number].replace(b"\n", b" ") or b"{"
  return save_rows(path, lines)


def save_tfds(folder: pathlib.Path, splits: dict[str, list[dict]]) -> pathlib.Path:
  """Writes a TFDS data set with the features problem, answer and images; returns its folder.

  Args:
    splits: name of each split -> its examples; images are contents of files.
  """
  import tensorflow_datasets as tfds  # takes half a second

  class Rooms(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Questions about rooms."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = folder / "package"  # without further files about the data set

    def _info(self):
      images = tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3)))
      texts = {"problem": tfds.features.Text(), "answer": tfds.features.Text()}
      features = tfds.features.FeaturesDict({**texts, "images": images})
      return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
      return {name: enumerate(self._generate_examples(made)) for name, made in splits.items()}

    def _generate_examples(self, made):
      for row in made:
        yield {**row, "images": [io.BytesIO(image) for image in row["images"]]}

  (folder / "package").mkdir(parents=True)
  builder = Rooms(data_dir=folder, file_format="array_record")
  builder.download_and_prepare()
  return pathlib.Path(builder.data_dir)
