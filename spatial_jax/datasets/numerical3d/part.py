"""Rooms in a row -> one part of Numerical3D: a zip file with rows and images.

    tasks.jsonl          one row per task, as in docs/data.md
    <room>/<frame>.jpg   the images, once per room

The bytes of a part depend on the source, the seed and the numbers of its rooms alone.
"""

import dataclasses
import functools
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

from PIL import Image

from spatial_jax.config import check_field, check_whole
from spatial_jax.data.held_out import HELD_OUT_SEED, is_held_out
from spatial_jax.data.vsi_rooms import load_rooms
from spatial_jax.synthetic.numerical3d import (
  MAX_TASKS_PER_ROOM,
  UNITS,
  Question,
  make_numeric_questions,
)
from spatial_jax.synthetic.numerical3d_rooms import (
  FIELD_OF_VIEW_DEG,
  MAX_ROOMS,
  MAX_SEEDS,
  numerical3d_scene,
  numerical3d_views,
)
from spatial_jax.synthetic.render.renderer import render
from spatial_jax.synthetic.scene import Scene, View

Split: TypeAlias = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
PROCEDURAL, METADATA = "rooms", "meta:"  # sources
TASKS_FILE = "tasks.jsonl"

_JPEG_QUALITY = 92  # 12 kB per image of 224 x 224
_WALKS = 8  # camera paths through a real room; a procedural room has one
_WALK_STEP = MAX_ROOMS // _WALKS  # between the numbers of two walks through a room
_PART_HELD_OUT = 20  # one of 20 tasks about procedural rooms is held out
_REAL_PART_HELD_OUT = 5  # as is one of 5 real rooms
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class BuildSettings:
  """What the bytes of the data set depend on."""

  source: str  # "rooms": procedural; "meta:PATH": real, from the metadata files of VSI-Bench
  seed: int  # other seeds are other procedural rooms, or other camera paths through real rooms
  tasks: int  # of all splits
  rooms_per_part: int  # changes nothing but the size of the parts

  def __post_init__(self):
    valid = self.source == PROCEDURAL or self.source.startswith(METADATA)
    check_field(self, "source", valid, "be rooms or meta:PATH")
    check_whole(self, "seed", at_least=0, at_most=MAX_SEEDS - 1)
    check_whole(self, "tasks", at_least=len(SPLITS))
    check_whole(self, "rooms_per_part", at_least=1)

  def tasks_of(self, split: Split) -> int:
    """Number of tasks of a split; there may be fewer about real rooms."""
    part = _PART_HELD_OUT if self.source == PROCEDURAL else _REAL_PART_HELD_OUT
    held_out = max(1, self.tasks // part)
    return held_out if split == "held_out" else self.tasks - held_out


def rooms_of(settings: BuildSettings, split: Split) -> int:
  """Number of rooms of a split."""
  return MAX_ROOMS if settings.source == PROCEDURAL else len(_real_rooms(settings.source, split))


def write_part(path: pathlib.Path, settings: BuildSettings, split: Split, index: int) -> int:
  """Writes one part in one rename, so that it is never half written.

  Returns:
    Its number of tasks.
  """
  first = index * settings.rooms_per_part
  last = min(first + settings.rooms_per_part, rooms_of(settings, split))
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  rows: list[dict[str, Any]] = []
  with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as part:
    for room in range(first, last):
      for scene, number, name in _walks(settings, split, room):
        if _is_full(rows, scene):
          break
        rows += _add_walk(part, scene, number, name, rows)
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    part.writestr(zipfile.ZipInfo(TASKS_FILE, _ZIP_DATE), lines)
  with open(partial, "rb") as written:
    os.fsync(written.fileno())
  partial.replace(path)
  return len(rows)


def read_part(path: pathlib.Path) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
  """The rows of a part, each with the contents of its images."""
  with zipfile.ZipFile(path) as part:
    for line in part.read(TASKS_FILE).decode().splitlines():
      row = json.loads(line)
      yield row, [part.read(name) for name in row["images"]]


def count_tasks(path: pathlib.Path) -> int:
  """Number of tasks of a part."""
  with zipfile.ZipFile(path) as part:
    return part.read(TASKS_FILE).count(b"\n")


def _walks(settings: BuildSettings, split: Split, room: int) -> Iterator[tuple[Scene, int, str]]:
  """(scene, number that seeds its camera path and questions, name of its tasks) of each walk."""
  first = settings.seed * MAX_ROOMS + room
  if settings.source == PROCEDURAL:
    number = first + (HELD_OUT_SEED if split == "held_out" else 0)
    scene = numerical3d_scene(number)
    if scene is not None:
      yield scene, number, scene.scene_id
  else:
    scene = _real_rooms(settings.source, split)[room]
    for walk in range(_WALKS):
      yield scene, first + walk * _WALK_STEP, f"{scene.scene_id}/walk-{walk}"


@functools.cache
def _real_rooms(source: str, split: Split) -> tuple[Scene, ...]:
  scenes = load_rooms(source.removeprefix(METADATA))
  return tuple(scene for scene in scenes if is_held_out(scene.scene_id) == (split == "held_out"))


def _is_full(rows: Sequence[dict[str, Any]], scene: Scene) -> bool:
  return sum(row["scene"] == scene.scene_id for row in rows) >= MAX_TASKS_PER_ROOM


def _add_walk(
  part: zipfile.ZipFile, scene: Scene, number: int, name: str, rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
  """Adds the images of one walk to the part and returns its rows, if it gives new questions."""
  views = numerical3d_views(scene, number)
  if views is None:
    return []
  asked = [row["question"] for row in rows if row["scene"] == scene.scene_id]
  questions = [
    question
    for question in make_numeric_questions(scene, views, number)
    if question.question not in asked
  ][: MAX_TASKS_PER_ROOM - len(asked)]
  if not questions:
    return []
  images = [f"{number}/{i}.jpg" for i in range(len(views))]
  for image, view in zip(images, views, strict=True):
    part.writestr(zipfile.ZipInfo(image, _ZIP_DATE), _jpeg(scene, view))
  return [
    _row(scene, number, f"{name}/{question.question_type}/{i}", question, images)
    for i, question in enumerate(questions)
  ]


def _jpeg(scene: Scene, view: View) -> bytes:
  buffer = io.BytesIO()
  image = Image.fromarray(render(scene, view.camera).image)
  image.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
  return buffer.getvalue()


def _row(
  scene: Scene, number: int, name: str, question: Question, images: list[str]
) -> dict[str, Any]:
  boxes = [
    {
      "label": box.label,
      "image": box.image,
      "box": [int(value) for value in box.box_4],
      "distance_m": round(box.distance_m, 3),
    }
    for box in question.boxes
  ]
  return {
    "id": name,
    "question": question.question,
    "answer": question.answer,
    "kind": "number",
    "unit": UNITS[question.question_type],
    "type": question.question_type,
    "scene": scene.scene_id,
    "benchmark": scene.benchmark,
    "images": images,
    "extra": {
      "room": number,
      "room_source": scene.source,
      "field_of_view_deg": FIELD_OF_VIEW_DEG,
      "boxes": boxes,
    },
  }
