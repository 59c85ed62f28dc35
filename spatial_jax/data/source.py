"""Task sources: tasks to train on and held-out tasks, never about the same rooms.

source       training tasks                             held-out tasks
procedural   rooms with a number below HELD_OUT_SEED    rooms with a higher number
rooms        four fifths of the rooms, by a hash of id  the other fifth
photos       none                                       all
"""

import dataclasses
import zlib
from typing import Literal, TypeAlias

import numpy as np

from spatial_jax.config import ConfigError, check_field
from spatial_jax.data.photos import load_photo_tasks
from spatial_jax.data.pipeline import (
  HELD_OUT_SEED,
  SceneTasks,
  held_out_tasks,
  interleave_types,
  training_batch,
)
from spatial_jax.data.vsi_rooms import load_rooms
from spatial_jax.synthetic.floorplan import ProceduralConfig
from spatial_jax.synthetic.questions import QuestionConfig, supports_views
from spatial_jax.synthetic.tasks import CameraConfig, procedural_tasks, room_tasks
from spatial_jax.types import Task

_HELD_OUT_PART = 5  # one of five real rooms is held out
_MAX_EXAMPLES_PER_SCENE = 8  # more than in a batch, because examples need fewer images


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """Where tasks come from.

  Attributes:
    kind: procedural rooms, real rooms (metadata of VSI-Bench), or photographs.
    path: folder of the real rooms or photographs; "" for procedural rooms.
    rooms: of procedural rooms.
    camera: images; the longer side limits the size of photographs.
    questions: question types and rules; photographs use `max_per_type` alone.
    max_tasks_per_scene: most tasks of one room in a batch, >= 1.
    rare_type_retries: search for tasks of rare types, >= 0; see `pipeline.training_batch`.
  """

  kind: Literal["procedural", "rooms", "photos"]
  path: str
  rooms: ProceduralConfig
  camera: CameraConfig
  questions: QuestionConfig
  max_tasks_per_scene: int
  rare_type_retries: int

  def __post_init__(self):
    check_field(self, "max_tasks_per_scene", self.max_tasks_per_scene >= 1, "be at least 1")
    check_field(self, "rare_type_retries", self.rare_type_retries >= 0, "be at least 0")


@dataclasses.dataclass(frozen=True, eq=False)
class RoomSource:
  """Rendered rooms, procedural or real.

  Attributes:
    train_tasks: scene number -> tasks of a room for training.
    eval_tasks: scene number -> tasks of a held-out room.
    first_eval_scene: the lowest number of a held-out room.
    types: question types; a batch has the same number of tasks of each.
    benchmark: the benchmark that the rooms belong to ("vsi-bench"), or None.
    max_tasks_per_scene, rare_type_retries: as in SourceConfig.
  """

  train_tasks: SceneTasks
  eval_tasks: SceneTasks
  first_eval_scene: int
  types: tuple[str, ...]
  benchmark: str | None
  max_tasks_per_scene: int
  rare_type_retries: int

  def batch(self, seed: int, step: int, count: int) -> list[Task]:
    """The `count` training tasks of one step."""
    return training_batch(
      self.train_tasks,
      0,
      seed,
      step,
      count,
      self.max_tasks_per_scene,
      self.types,
      self.rare_type_retries,
    )

  def held_out(self, count: int) -> list[Task]:
    """The first `count` held-out tasks."""
    return held_out_tasks(
      self.eval_tasks, self.first_eval_scene, count, self.max_tasks_per_scene, self.types
    )

  def examples(self, seed: int, count: int) -> list[Task]:
    """`count` training tasks for the baselines of the evaluation, without shares per type."""
    return training_batch(self.train_tasks, 0, seed, 0, count, _MAX_EXAMPLES_PER_SCENE, ())


@dataclasses.dataclass(frozen=True, eq=False)
class PhotoSource:
  """Photographs: all tasks are held out, and none are for training.

  Attributes:
    tasks: all tasks, in the order of the files.
    types: question types of the tasks.
    benchmark: None.
  """

  tasks: tuple[Task, ...]
  types: tuple[str, ...]
  benchmark: str | None

  def batch(self, seed: int, step: int, count: int) -> list[Task]:
    """Raises ConfigError: there are no training tasks."""
    raise ConfigError(
      "config.source.kind is photos, which have no training tasks; set source.kind to procedural"
      " or rooms"
    )

  def held_out(self, count: int) -> list[Task]:
    """The first `count` tasks of a fixed random order, or all of them if there are fewer."""
    order = np.random.default_rng(0).permutation(len(self.tasks))
    return interleave_types([self.tasks[i] for i in order])[:count]

  def examples(self, seed: int, count: int) -> list[Task]:
    """All tasks: photographs are too few to hold some out for the baselines."""
    return list(self.tasks)


Source: TypeAlias = RoomSource | PhotoSource


def make_source(cfg: SourceConfig) -> Source:
  """The source of the config.

  Raises:
    DataError: if its files cannot be used.
    ConfigError: if its path is empty, or no question type supports the number of images.
  """
  match cfg.kind:
    case "procedural":
      tasks_of = procedural_tasks(cfg.rooms, cfg.camera, cfg.questions)
      return _room_source(cfg, tasks_of, tasks_of, HELD_OUT_SEED, None)
    case "rooms":
      scenes = load_rooms(_path(cfg))
      train = [scene for scene in scenes if not is_held_out(scene.scene_id)]
      held_out = [scene for scene in scenes if is_held_out(scene.scene_id)]
      if not train or not held_out:
        raise ConfigError(
          f"config.source.path is {cfg.path} with {len(scenes)} rooms, too few to hold some out;"
          " add more rooms"
        )
      train_tasks, eval_tasks = (
        room_tasks(part, cfg.camera, cfg.questions) for part in (train, held_out)
      )
      return _room_source(cfg, train_tasks, eval_tasks, 0, scenes[0].benchmark)
    case "photos":
      side_px = max(cfg.camera.width_px, cfg.camera.height_px)
      tasks = load_photo_tasks(_path(cfg), 0, side_px, cfg.questions.max_per_type)
      types = tuple(dict.fromkeys(task.question_type for task in tasks))
      return PhotoSource(tuple(tasks), types, None)


def is_held_out(scene_id: str) -> bool:
  """Whether a real room is held out; depends on its id alone, not on the other rooms."""
  return zlib.crc32(scene_id.encode()) % _HELD_OUT_PART == 0


def _path(cfg: SourceConfig) -> str:
  if not cfg.path:
    raise ConfigError(f"config.source.path is empty; set it to the folder of the {cfg.kind}")
  return cfg.path


def _room_source(
  cfg: SourceConfig,
  train_tasks: SceneTasks,
  eval_tasks: SceneTasks,
  first_eval_scene: int,
  benchmark: str | None,
) -> RoomSource:
  names, counts = cfg.questions.types, cfg.camera.frame_counts
  types = tuple(name for name in names if any(supports_views(name, count) for count in counts))
  if not types:
    raise ConfigError(
      f"config.source.questions.types {names} cannot be asked about"
      f" config.source.camera.frame_counts {counts}; change one of the two"
    )
  return RoomSource(
    train_tasks,
    eval_tasks,
    first_eval_scene,
    types,
    benchmark,
    cfg.max_tasks_per_scene,
    cfg.rare_type_retries,
  )
