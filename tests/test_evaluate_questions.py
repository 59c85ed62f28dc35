"""Tasks with a truth that no reward can read are refused before the first rollout."""

import dataclasses
import types

import pytest

from spatial_jax.data.source import PhotoSource
from spatial_jax.errors import DataError
from spatial_jax.evaluate.evaluator import load_questions
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
