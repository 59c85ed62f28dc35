"""Tasks with a truth that no reward can read are refused before the first rollout."""

import dataclasses
import types

import pytest

from spatial_jax.data.source import PhotoSource
from spatial_jax.errors import DataError
from spatial_jax.evaluate.evaluator import load_questions
from spatial_jax.stages.grpo import GrpoStage
from tests.reward_fixtures import CFG, DISTANCE, NEAREST

SIZE = types.SimpleNamespace(tasks=8, train_tasks=8)
BROKEN = dataclasses.replace(DISTANCE, task_id="broken", answer="two or three")


def source_of(*tasks):
  return PhotoSource(tasks, tuple({task.question_type for task in tasks}), None)


def test_readable_questions_are_loaded():
  found = load_questions(source_of(DISTANCE, NEAREST), SIZE, CFG, 0)
  assert {task.task_id for task in found.tasks} == {DISTANCE.task_id, NEAREST.task_id}


def test_an_unreadable_truth_is_refused_by_the_evaluation():
  with pytest.raises(DataError, match="task broken: the truth 'two or three' cannot be read"):
    load_questions(source_of(DISTANCE, BROKEN), SIZE, CFG, 0)


def test_an_unreadable_truth_is_refused_by_training():
  engine = types.SimpleNamespace(
    cfg=types.SimpleNamespace(prompts=2),
    conversation=types.SimpleNamespace(prompt=lambda task: task),
  )
  stage = types.SimpleNamespace(seed=0, engine=engine, tasks_of=lambda *_: [NEAREST, DISTANCE])
  assert GrpoStage.prompts(stage, 0) == [NEAREST, DISTANCE]
  stage.tasks_of = lambda *_: [NEAREST, BROKEN]
  with pytest.raises(DataError, match="task broken: the truth 'two or three' cannot be read"):
    GrpoStage.prompts(stage, 0)
