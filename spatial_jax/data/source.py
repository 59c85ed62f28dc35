"""Which tasks a run trains on and which it is asked about: never the same rooms.

procedural   numbers below HELD_OUT_SEED train             numbers above are held out
rooms        four fifths of the rooms, by a hash of the id  the other fifth
photos       none                                           all
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Literal

import numpy as np

from spatial_jax.config import ConfigError
from spatial_jax.data import pipeline
from spatial_jax.data.photos import load_photo_tasks
from spatial_jax.data.pipeline import HELD_OUT_SEED, TasksOf
from spatial_jax.data.vsi_rooms import load_rooms
from spatial_jax.synthetic.floorplan import ProceduralConfig
from spatial_jax.synthetic.questions import QuestionConfig, fits
from spatial_jax.synthetic.tasks import CameraConfig, procedural_tasks, room_tasks
from spatial_jax.types import Task

_PARTS = 5  # one part in so many real rooms is held out
_PER_ROOM = 8  # tasks of one room where answers alone are wanted: pictures cost, these do not


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """Where tasks come from.

  Attributes:
    kind: procedural rooms, real rooms (VSI-Bench metadata), or photographs.
    path: of the real rooms or photographs; "" for procedural ones.
    rooms: of procedural rooms.
    camera: pictures; photographs get no larger than its longer side.
    questions: what is asked; photographs take `max_per_type` alone.
    max_tasks_per_scene: most tasks of one room in a batch.
    rare_type_retries: how long a batch to learn from waits for rare types; see `loader.batch`.
  """

  kind: Literal["procedural", "rooms", "photos"]
  path: str
  rooms: ProceduralConfig
  camera: CameraConfig
  questions: QuestionConfig
  max_tasks_per_scene: int
  rare_type_retries: int


@dataclasses.dataclass(frozen=True)
class Source:
  """Tasks to learn from and tasks to be asked.

  Attributes:
    batch: (seed, step, count) -> tasks to learn from; raises ConfigError where there are none.
    held_out: count -> tasks to be asked, the same ones each time; fewer where there are fewer.
    examples: (seed, count) -> tasks of the same kind as `held_out` to take typical answers from.
    types: question types that share a batch, and the held-out tasks, evenly.
    benchmark: whose rooms these are ("vsi-bench"), None when nobody's.
  """

  batch: Callable[[int, int, int], list[Task]]
  held_out: Callable[[int], list[Task]]
  examples: Callable[[int, int], list[Task]]
  types: tuple[str, ...]
  benchmark: str | None


def make_source(cfg: SourceConfig) -> Source:
  """The source that the config names.

  Raises:
    DataError: I/O, when its files cannot be used.
    ConfigError: on the host, when a path is missing or nothing can be asked.
  """
  if cfg.kind != "procedural" and not cfg.path:
    raise ConfigError(f"source.path is empty; set it to the folder of the {cfg.kind}")
  match cfg.kind:
    case "procedural":
      tasks_of = procedural_tasks(cfg.rooms, cfg.camera, cfg.questions)
      return _of_rooms(cfg, tasks_of, tasks_of, HELD_OUT_SEED, None)
    case "rooms":
      scenes = load_rooms(cfg.path)
      parts = [
        [scene for scene in scenes if is_held_out(scene.scene_id) == out] for out in (False, True)
      ]
      if not all(parts):
        raise ConfigError(f"{len(scenes)} rooms in {cfg.path} are too few to hold some out")
      train, out = (room_tasks(part, cfg.camera, cfg.questions) for part in parts)
      return _of_rooms(cfg, train, out, 0, scenes[0].benchmark)
    case "photos":
      side_px = max(cfg.camera.width_px, cfg.camera.height_px)
      tasks = load_photo_tasks(cfg.path, 0, side_px, cfg.questions.max_per_type)
      return _of_photos(tasks)


def is_held_out(scene_id: str) -> bool:
  """Whether a real room is for evaluation: its name alone decides, not what lies beside it."""
  return zlib.crc32(scene_id.encode()) % _PARTS == 0


def _of_rooms(
  cfg: SourceConfig, tasks_of: TasksOf, held_out_of: TasksOf, first: int, benchmark: str | None
) -> Source:
  asked, counts = cfg.questions.types, cfg.camera.frame_counts
  types = tuple(name for name in asked if any(fits(name, count) for count in counts))
  if not types:
    raise ConfigError(
      f"source.questions.types {asked} cannot be asked about source.camera.frame_counts {counts}"
    )

  def batch(seed: int, step: int, count: int) -> list[Task]:
    return pipeline.batch(
      tasks_of, 0, seed, step, count, cfg.max_tasks_per_scene, types, cfg.rare_type_retries
    )

  def held_out(count: int) -> list[Task]:
    return pipeline.held_out(held_out_of, first, count, cfg.max_tasks_per_scene, types)

  def examples(seed: int, count: int) -> list[Task]:
    return pipeline.batch(
      tasks_of, 0, seed, 0, count, _PER_ROOM, ()
    )  # a median needs no even share

  return Source(batch, held_out, examples, types, benchmark)


def _of_photos(tasks: list[Task]) -> Source:
  """Photographs are too few to be split: typical answers come from the questions themselves."""

  def refuse(seed: int, step: int, count: int) -> list[Task]:
    raise ConfigError("photographs are for evaluation; set source.kind to procedural or rooms")

  types = tuple(dict.fromkeys(task.question_type for task in tasks))
  order = np.random.default_rng(0).permutation(len(tasks))
  asked = pipeline.types_in_turn([tasks[i] for i in order])
  return Source(refuse, lambda count: asked[:count], lambda seed, count: tasks, types, None)
