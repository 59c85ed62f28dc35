"""Scene number -> Scene -> camera path, rendered views -> Tasks."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from spatial_jax.synthetic.camera_path import walk
from spatial_jax.synthetic.floorplan import ProceduralConfig, procedural_scene
from spatial_jax.synthetic.questions import QuestionConfig, ask
from spatial_jax.synthetic.render.renderer import render
from spatial_jax.synthetic.scene import Scene, View
from spatial_jax.types import Task

_WALK, _ASK = 0, 1  # uses of randomness; 2 and 3 are those of data/pipeline.py


@dataclasses.dataclass(frozen=True)
class CameraConfig:
  """How a room is looked at.

  Attributes:
    width_px, height_px: of the pictures.
    field_of_view_deg: horizontal.
    frame_counts: how many pictures of a room, one of these at random.
  """

  width_px: int
  height_px: int
  field_of_view_deg: float
  frame_counts: tuple[int, ...]


def procedural_tasks(
  rooms: ProceduralConfig, camera: CameraConfig, questions: QuestionConfig
) -> Callable[[int], list[Task]]:
  """Scene number -> tasks of that procedural room; from HELD_OUT_SEED on for evaluation."""
  return lambda number: scene_tasks(procedural_scene(number, rooms), number, camera, questions)


def scene_tasks(
  scene: Scene, number: int, camera: CameraConfig, questions: QuestionConfig
) -> list[Task]:
  """Walks through the room, renders it and asks."""
  return ask(
    scene, views_of(scene, number, camera), np.random.default_rng((number, _ASK)), questions
  )


def views_of(scene: Scene, number: int, camera: CameraConfig) -> list[View]:
  """The pictures of one walk."""
  rng = np.random.default_rng((number, _WALK))
  frames = int(rng.choice(camera.frame_counts))
  size = (camera.width_px, camera.height_px)
  cameras = walk(scene, rng, frames, *size, camera.field_of_view_deg)
  return [render(scene, camera) for camera in cameras]


def room_tasks(
  scenes: Sequence[Scene], camera: CameraConfig, questions: QuestionConfig
) -> Callable[[int], list[Task]]:
  """Scene number -> tasks of a real room, another walk (named in the task ids) each time."""

  def tasks_of(number: int) -> list[Task]:
    turn, index = divmod(number, len(scenes))
    named = dataclasses.replace(questions, prefix=f"{questions.prefix}walk-{turn}/")
    return scene_tasks(scenes[index], number, camera, named)

  return tasks_of
