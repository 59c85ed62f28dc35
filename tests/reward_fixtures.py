"""Tasks, rollouts and a config for tests of rewards."""

import dataclasses

import numpy as np

from spatial_jax.grammar import VILASR
from spatial_jax.reward.config import accuracy_reward
from spatial_jax.reward.snra import Schedule
from spatial_jax.types import Task, Trajectory, Turn

SCHEDULE = Schedule(kind="sigmoid", k_min=1.0, k_max=100.0, midpoint=0.5, steepness=10.0)
CFG = accuracy_reward("sigmoid", "smooth", SCHEDULE, format_weight=0.5)
DISTANCE = Task(
  task_id="distance",
  question_type="object_abs_distance",
  question="What is the distance between the bed and the lamp (in meters)?",
  options=None,
  answer="2.0",
  answer_kind="number",
  unit=None,
  media=(),
  source="procedural",
  scene_id="room-0",
  benchmark=None,
  boxes=(),
)
NEAREST = dataclasses.replace(
  DISTANCE,
  task_id="nearest",
  question_type="object_rel_distance",
  question="Which object is the closest to the bed?",
  options=("A. lamp", "B. chair", "C. sofa", "D. ball"),
  answer="B",
  answer_kind="choice",
)
DRAWING = '<think> Mark it. </think> Action: Object Mapper\n```json\n[{"index": 1}]\n```'


def answering(text):
  """The text of a last turn."""
  return f"<think> So. </think> Action: Answer\n<answer> {text} </answer>"


def turn(text, executable=True, errors=()):
  """A turn with the flags that drawing has set."""
  return Turn(0, 0, text, (), tuple(errors), executable, ())


def rollout(*turns, task=DISTANCE, end_reason="answer", sample=0, grammar=VILASR):
  """A trajectory with only texts and flags; a str is a turn without errors."""
  empty = np.zeros(0, np.int32)
  return Trajectory(
    task_id=task.task_id,
    sample=sample,
    seed_path=(0, 0, 0, sample),
    temperature=1.0,
    forbidden_ids=(),
    token_ids_T=empty,
    position_TA=np.zeros((0, 3), np.int32),
    trained_T=np.zeros(0, bool),
    logp_T=np.zeros(0, np.float32),
    policy_step_T=empty,
    images=(),
    image_start=(),
    prompt_length=0,
    prompt_images=0,
    turns=tuple(turn(t) if isinstance(t, str) else t for t in turns),
    end_reason=end_reason,
    grammar=grammar,
  )
