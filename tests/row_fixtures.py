"""Files of tasks for tests: images, a video, rows of all kinds."""

import io
import json
import pathlib

import numpy as np
from PIL import Image

from spatial_jax.data.files import FilesConfig

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
