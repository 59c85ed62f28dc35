"""One rollout and its task as the numbers that the reward signals read.

text ─► answer block ─► Reading ─► Example, scalars ─► Example, arrays [B, G]
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spatial_jax.reward.format import final_answer, format_reward
from spatial_jax.reward.parse import Expected, Reading, check_truth, expected_of, read_as
from spatial_jax.types import Array, Task, Trajectory


class Example(NamedTuple):
  """One answer with its truth: scalars for one rollout, arrays [B, G] for a whole step."""

  # float32: a number in the expected unit, the index of an option, or 1 for the right words and 0
  # for others; 0: not parsed.
  value: Array
  truth: Array  # float32, as `value`
  parsed: Array  # bool, exactly one answer could be read; false for a fault
  is_number: Array  # bool, false for a choice and for words
  format: Array  # float32, 1 if the format and every drawing operation are right, else 0
  valid: Array  # bool, false for a fault of the machinery


def example_of_rollout(trajectory: Trajectory, task: Task) -> Example:
  """Returns the example of one rollout.

  Raises:
    ValueError: if the rollout is not of this task.
    DataError: if the truth of the task cannot be read.
  """
  if trajectory.task_id != task.task_id:
    raise ValueError(f"rollout of task {trajectory.task_id} is scored against task {task.task_id}")
  return example_of_answer(
    final_answer(trajectory),
    check_truth(task),
    expected_of(task),
    format_reward(trajectory),
    trajectory.end_reason != "fault",
  )


def example_of_answer(
  answer: str | None, truth: Reading, expected: Expected, format_score: float, valid: bool
) -> Example:
  """Returns the example of one answer text, None without an answer."""
  reading = read_as(answer, expected)
  return Example(
    value=np.array(reading.value, np.float32),
    truth=np.array(truth.value, np.float32),
    parsed=np.array(reading.parsed),
    is_number=np.array(expected.is_number),
    format=np.array(format_score, np.float32),
    valid=np.array(valid),
  )


def stack(examples: Sequence[Example]) -> Example:
  """Stacks examples along a new first axis."""
  return Example(*map(np.stack, zip(*examples, strict=True)))
