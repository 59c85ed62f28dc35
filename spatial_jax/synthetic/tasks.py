"""Scene number -> Scene -> camera path, rendered views -> Tasks."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from spatial_jax.config import check_field
from spatial_jax.synthetic.camera_path import make_camera_path
from spatial_jax.synthetic.floorplan import ProceduralConfig, procedural_scene
from spatial_jax.synthetic.questions import QuestionConfig, make_questions
from spatial_jax.synthetic.render.renderer import render
from spatial_jax.synthetic.scene import Scene, View
from spatial_jax.types import Task

_CAMERA_STREAM, _QUESTION_STREAM = 0, 1  # of random numbers; data/source.py has 2 and 3
_MAX_SIDE_PX, _MAX_FRAMES = 8192, 1024  # limits of the config
_FIELD_OF_VIEW_DEG = (5.0, 170.0)


@dataclasses.dataclass(frozen=True)
class CameraConfig:
  """Images of a room.

  Attributes:
    width_px, height_px: size of the images, 1 to 8192.
    field_of_view_deg: horizontal, 5 to 170.
    frame_counts: possible numbers of images of a room, 1 to 1024 each; each room draws one.
  """

  width_px: int
  height_px: int
  field_of_view_deg: float
  frame_counts: tuple[int, ...]

  def __post_init__(self):
    for name in ("width_px", "height_px"):
      valid = 1 <= vars(self)[name] <= _MAX_SIDE_PX
      check_field(self, name, valid, f"be at least 1 and at most {_MAX_SIDE_PX}")
    low_deg, high_deg = _FIELD_OF_VIEW_DEG
    check_field(
      self,
      "field_of_view_deg",
      low_deg <= self.field_of_view_deg <= high_deg,
      f"be at least {low_deg:g} and at most {high_deg:g}",
    )
    check_field(
      self,
      "frame_counts",
      bool(self.frame_counts) and all(1 <= count <= _MAX_FRAMES for count in self.frame_counts),
      f"name at least one number of images, each from 1 to {_MAX_FRAMES}",
    )


def procedural_tasks(
  rooms: ProceduralConfig, camera: CameraConfig, questions: QuestionConfig
) -> Callable[[int], list[Task]]:
  """A function from a scene number to the tasks of that procedural room."""
  return lambda number: scene_tasks(procedural_scene(number, rooms), number, camera, questions)


def scene_tasks(
  scene: Scene, number: int, camera: CameraConfig, questions: QuestionConfig
) -> list[Task]:
  """Renders views of a room and makes questions about them; `number` seeds both."""
  rng = np.random.default_rng((number, _QUESTION_STREAM))
  return make_questions(scene, render_views(scene, number, camera), rng, questions)


def render_views(scene: Scene, number: int, cfg: CameraConfig) -> list[View]:
  """The rendered views of one camera path; `number` seeds the path."""
  rng = np.random.default_rng((number, _CAMERA_STREAM))
  frames = int(rng.choice(cfg.frame_counts))
  cameras = make_camera_path(scene, rng, frames, cfg.width_px, cfg.height_px, cfg.field_of_view_deg)
  return [render(scene, camera) for camera in cameras]


def room_tasks(
  scenes: Sequence[Scene], camera: CameraConfig, questions: QuestionConfig
) -> Callable[[int], list[Task]]:
  """A function from a scene number to the tasks of a real room.

  Numbers from len(scenes) on visit the rooms again with other camera paths; task ids contain the
  number of the visit.
  """

  def tasks_of(number: int) -> list[Task]:
    visit, index = divmod(number, len(scenes))
    prefix = f"{questions.task_id_prefix}walk-{visit}/"
    visit_questions = dataclasses.replace(questions, task_id_prefix=prefix)
    return scene_tasks(scenes[index], number, camera, visit_questions)

  return tasks_of
