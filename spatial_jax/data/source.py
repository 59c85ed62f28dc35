"""Task sources: tasks to train on and held-out tasks, never about the same rooms.

source       training tasks                             held-out tasks
procedural   rooms with a number below HELD_OUT_SEED    rooms with a higher number
mazes        images, likewise                           images, likewise
physics      problems, likewise                         problems, likewise
rooms        four fifths of the rooms, by a hash of id  the other fifth
photos       none                                       all
files        rows of JSONL files and TFDS folders       rows that say so, another file, or one scene
                                                        in ten

    scene number ──► Scene ──► camera path, render ──► questions ──► Tasks    (rooms)
    photographs  ──────────────────────────────────────────────────► Tasks

A batch is a pure function of (seed, step), so that a run resumes from its step number alone.
"""

import dataclasses
import math
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np

from spatial_jax.config import ConfigError, check_whole
from spatial_jax.data.background import prefetch
from spatial_jax.data.files import FilesConfig, FileSource, open_files, split_paths
from spatial_jax.data.held_out import HELD_OUT_SEED, is_held_out
from spatial_jax.data.jsonl import CheckTask
from spatial_jax.data.photos import load_photo_tasks
from spatial_jax.data.pipeline import Encode, Item, PipelineConfig, PromptBatch, prompt_batches
from spatial_jax.data.task_order import interleave_types, limit_per_type, sample_tasks
from spatial_jax.data.vsi_rooms import load_rooms
from spatial_jax.errors import DataError
from spatial_jax.synthetic.floorplan import ProceduralConfig
from spatial_jax.synthetic.mazes import MazeConfig, maze_tasks
from spatial_jax.synthetic.physics import CATEGORIES, PhysicsConfig, physics_tasks
from spatial_jax.synthetic.questions import QuestionConfig, supports_views
from spatial_jax.synthetic.solver import Solver, SolverConfig
from spatial_jax.synthetic.tasks import CameraConfig, procedural_tasks, room_tasks
from spatial_jax.types import ScriptTurn, Task
from spatial_jax.workdir import to_path

SceneTasks = Callable[[int], list[Task]]  # scene number -> all tasks of the scene

_HELD_OUT_STREAM, _BATCH_STREAM = 2, 3  # of random numbers; synthetic/tasks.py has 0 and 1
_HELD_OUT_RETRIES = 4  # `rare_type_retries` of held-out tasks
_MAX_BOXES = 3  # of a demonstrated drawing: more are too many tokens
_REPLACEMENTS = 1 << 16  # added to the number of the refill per attempt to replace a task
_MOST_ATTEMPTS = 16  # to replace tasks of a step
_MAX_EMPTY_SCENES = 32  # scenes without a task in a row before the configuration is refused
_MAX_EXAMPLES_PER_SCENE = 8  # more than in a batch, because examples need fewer images
# Kind of source -> its name in titles.
SOURCE_NAMES = {
  "procedural": "procedural rooms",
  "mazes": "mazes and tangled lines",
  "physics": "problems of physics",
  "rooms": "real rooms",
  "photos": "photographs",
  "files": "your data",
}


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """Where tasks come from."""

  # rooms: real ones, by the metadata of VSI-Bench. files: a user's own data, see docs/data.md.
  kind: Literal["procedural", "mazes", "physics", "rooms", "photos", "files"]
  # Folder of the real rooms or photographs; data files, joined by commas; "" for procedural rooms.
  path: str
  files: FilesConfig
  rooms: ProceduralConfig
  camera: CameraConfig  # the longer side also limits the size of photographs
  questions: QuestionConfig  # photographs use `max_per_type` alone
  mazes: MazeConfig
  physics: PhysicsConfig
  max_tasks_per_scene: int  # in a batch, >= 1
  rare_type_retries: int  # >= 0; see `RoomSource.batch`

  def __post_init__(self):
    check_whole(self, "max_tasks_per_scene", at_least=1)
    check_whole(self, "rare_type_retries", at_least=0)


@dataclasses.dataclass(frozen=True, eq=False)
class RoomSource:
  """Rendered rooms, procedural or real."""

  train_tasks: SceneTasks
  eval_tasks: SceneTasks  # of held-out rooms
  first_eval_scene: int  # the lowest number of a held-out room
  types: tuple[str, ...]  # a batch has the same number of tasks of each; (): no shares
  benchmark: str | None  # that the rooms belong to ("vsi-bench")
  max_tasks_per_scene: int
  rare_type_retries: int

  def batch(self, seed: int, step: int, count: int, refill: int = 0) -> list[Task]:
    """The `count` training tasks of one step: the same number of each of `types`.

    `refill` chooses further tasks of the same step.

    The first rare_type_retries * count / max_tasks_per_scene scenes fill the share of each type.
    Tasks of any type fill the rest. More retries find more tasks of rare types and render more
    scenes.

    Raises:
      DataError: if scene after scene gives no task.
    """
    more = (refill,) if refill else ()
    rng = _generator(seed, step, *more, _BATCH_STREAM)
    first = int(rng.integers(2**40)) % (HELD_OUT_SEED // 2)
    types = [self.types[int(i)] for i in rng.permutation(len(self.types))]
    return self._collect(self.train_tasks, first, count, types, lambda _: rng)

  def held_out(self, count: int) -> list[Task]:
    """The first `count` held-out tasks, with shares as in `batch`."""

    def generator_of(number: int) -> np.random.Generator:
      return _generator(number, _HELD_OUT_STREAM)

    patient = dataclasses.replace(self, rare_type_retries=_HELD_OUT_RETRIES)
    first = self.first_eval_scene
    return patient._collect(self.eval_tasks, first, count, self.types, generator_of)

  def examples(self, seed: int, count: int) -> list[Task]:
    """`count` training tasks for the baselines of the evaluation, without shares per type."""
    plain = dataclasses.replace(self, types=(), max_tasks_per_scene=_MAX_EXAMPLES_PER_SCENE)
    return plain.batch(seed, 0, count)

  def _collect(
    self,
    tasks_of: SceneTasks,
    number: int,
    count: int,
    types: Sequence[str],
    generator_of: Callable[[int], np.random.Generator],
  ) -> list[Task]:
    """`count` tasks of the scenes from `number` on.

    If `types` do not divide `count`, the first types get one more.
    """
    share, more = divmod(count, max(1, len(types)))
    left = Counter({name: share + (rank < more) for rank, name in enumerate(types)})
    any_type_from = number
    if types:
      any_type_from += self.rare_type_retries * math.ceil(count / self.max_tasks_per_scene)
    chosen: list[Task] = []
    misses = 0
    while len(chosen) < count:
      tasks, rng = tasks_of(number), generator_of(number)
      misses = 0 if tasks else misses + 1
      if misses == _MAX_EMPTY_SCENES:
        raise DataError(
          f"{_MAX_EMPTY_SCENES} rooms in a row gave no question; lower"
          " config.source.questions.min_visible_pixels or min_visible_fraction, or add types"
        )
      if number < any_type_from:
        tasks = limit_per_type(tasks, left, rng)
      tasks = sample_tasks(tasks, min(self.max_tasks_per_scene, count - len(chosen)), rng)
      left.subtract(task.question_type for task in tasks)
      chosen += tasks
      number += 1
    return chosen


@dataclasses.dataclass(frozen=True, eq=False)
class PhotoSource:
  """Photographs for evaluation alone: there are no training tasks."""

  tasks: tuple[Task, ...]  # all, in the order of the files
  types: tuple[str, ...]  # question types of the tasks
  benchmark: str | None

  def batch(self, seed: int, step: int, count: int, refill: int = 0) -> list[Task]:
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


Source: TypeAlias = RoomSource | PhotoSource | FileSource


def make_source(
  cfg: SourceConfig,
  check: CheckTask = lambda _: None,
  on_row: Callable[[], None] = lambda: None,
) -> Source:
  """The source of the config.

  Args:
    check: raises DataError for a task of a file that cannot be scored.
    on_row: called for every row of a file, for a progress bar.

  Raises:
    DataError: if its files cannot be used.
    ConfigError: if its path is empty, or no question type supports the number of images.
  """
  match cfg.kind:
    case "procedural":
      tasks_of = procedural_tasks(cfg.rooms, cfg.camera, cfg.questions)
      return _room_source(cfg, tasks_of, tasks_of, HELD_OUT_SEED, None)
    case "mazes":
      types = cfg.mazes.types
      return _picture_source(cfg, maze_tasks(cfg.mazes), types)
    case "physics":
      types = cfg.physics.categories or CATEGORIES
      return _picture_source(cfg, physics_tasks(cfg.physics), types)
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
    case "files":
      _path(cfg)  # refuses ""
      return open_files(split_paths(cfg.path), cfg.files, check, on_row)


def prompt_stream(
  source: Source, encode: Encode[Item], seed: int, first_step: int, count: int, cfg: PipelineConfig
) -> Iterator[PromptBatch[Item]]:
  """Yields the prompts of each step from `first_step` on; arguments as in `prompt_batches`.

  Rooms are rendered in a thread, step by step, because a room gives several tasks of a step. A task
  that cannot be encoded is replaced by another task.
  """
  if isinstance(source, FileSource):
    return prompt_batches(source.dataset(seed), encode, seed, first_step, count, cfg)

  def prompts_of(step: int) -> PromptBatch[Item]:
    return _usable(source, encode, seed, step, 0, count)

  return prefetch(prompts_of, first_step, cfg.steps_ahead)


def _usable(
  source: Source, encode: Encode[Item], seed: int, step: int, refill: int, count: int
) -> PromptBatch[Item]:
  """Encodes `count` tasks of a step. A task that cannot be encoded is replaced by another task.

  Args:
    refill: number of the refill, 0 for the tasks of the step itself.

  Raises:
    DataError: if no task of an attempt can be used.
  """
  found: list[Item] = []
  replaced: list[str] = []
  attempt = 0
  while len(found) < count:
    more = refill + attempt * _REPLACEMENTS
    before = len(found)
    for task in source.batch(seed, step, count - before, more):
      try:
        found.append(encode(task))
      except DataError as error:
        replaced.append(str(error))
    if len(found) == before and (not found or attempt >= _MOST_ATTEMPTS):
      raise DataError(replaced[-1])
    attempt += 1
  return PromptBatch(found, tuple(replaced))


def refill_prompts(
  source: Source, encode: Encode[Item], seed: int, step: int, refill: int, count: int
) -> PromptBatch[Item]:
  """The prompts of `count` further tasks of a step, for dynamic sampling.

  Args:
    encode: makes the prompt of a task.
    refill: number of the refill in this step, from 1.
  """
  if isinstance(source, FileSource):
    cfg = PipelineConfig(workers=0, steps_ahead=1)
    return next(prompt_batches(source.dataset(seed, refill), encode, seed, step, count, cfg))
  return _usable(source, encode, seed, step, refill, count)


def solver_of(
  cfg: SourceConfig, draw_fraction: float, correct_fraction: float
) -> Callable[[Task], tuple[ScriptTurn, ...]]:
  """Returns the solver of synthetic tasks: it writes a correct response from the truth.

  Args:
    draw_fraction, correct_fraction: as in `SftConfig`.

  Raises:
    ConfigError: if the tasks are not synthetic.
  """
  if cfg.kind not in ("procedural", "rooms", "mazes", "physics"):
    raise ConfigError(
      f"config.source.kind is {cfg.kind}, for which nothing writes demonstrations; give rows with "
      "turns (config.sft.path)"
    )
  return Solver(SolverConfig(draw_fraction, correct_fraction, _MAX_BOXES))


def _path(cfg: SourceConfig) -> pathlib.Path:
  if not cfg.path:
    what = "your data files" if cfg.kind == "files" else f"the folder of the {cfg.kind}"
    raise ConfigError(f"config.source.path is empty; set it to {what}")
  return to_path(cfg.path)


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
  limits = (cfg.max_tasks_per_scene, cfg.rare_type_retries)
  return RoomSource(train_tasks, eval_tasks, first_eval_scene, types, benchmark, *limits)


def _picture_source(cfg: SourceConfig, tasks_of: SceneTasks, types: Sequence[str]) -> RoomSource:
  """Images by number, as rooms."""
  limits = (cfg.max_tasks_per_scene, cfg.rare_type_retries)
  return RoomSource(tasks_of, tasks_of, HELD_OUT_SEED, tuple(types), None, *limits)


def _generator(*numbers: int) -> np.random.Generator:
  """A generator keyed by the numbers. The last is a stream > 0: NumPy ignores zeros at the end."""
  return np.random.default_rng(numbers)
