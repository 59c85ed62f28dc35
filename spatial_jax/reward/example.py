"""One rollout and its task as the numbers that the reward signals read.

text ─► answer block ─► Reading ─► Example, scalars ─► Example, arrays [B, G]
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from spatial_jax.reward.config import RewardConfig
from spatial_jax.reward.custom import Response, custom_reward
from spatial_jax.reward.format import final_answer, format_reward
from spatial_jax.reward.parse import Expected, Reading, check_truth, expected_of, read_as
from spatial_jax.reward.phyx import matches_choice, matches_open
from spatial_jax.reward.rubric import RubricTerms, rubric_terms
from spatial_jax.reward.vilasr_release import release_accuracy
from spatial_jax.types import Array, Task, Trajectory

_SMALL_TRUTH = 1e-2
_LARGEST = 1e38  # float32


class Example(NamedTuple):
  """One answer with its truth: scalars for one rollout, arrays [B, G] for a whole step."""

  # float32: a number in the expected unit (of a small truth: both enlarged alike), the index of an
  # option, or 1 for the right words and 0 for others; 0: not parsed.
  value: Array
  truth: Array  # float32, as `value`
  parsed: Array  # bool, exactly one answer could be read; false for a fault
  is_number: Array  # bool, false for a choice and for words
  format: Array  # float32, 1 if the format and every drawing operation are right, else 0
  valid: Array  # bool, false for a fault of the machinery
  released: Array  # float32, score of `RewardConfig.scorer`; NaN for "strict"
  tokens: Array  # float32, sampled tokens
  drew: Array  # bool, at least one drawing was executed
  custom: Array  # float32, of the user's function; 0 without one
  attention: Array  # float32, of the attention reward before its gate; 0 if it was not measured
  rubric: RubricTerms


def example_of_rollout(
  trajectory: Trajectory, task: Task, cfg: RewardConfig, attention: float = 0.0
) -> Example:
  """Returns the example of one rollout.

  Raises:
    ValueError: if the rollout is not of this task.
    DataError: if the truth of the task cannot be read.
    UserError: if a user's function fails.
  """
  if trajectory.task_id != task.task_id:
    raise ValueError(f"rollout of task {trajectory.task_id} is scored against task {task.task_id}")
  answer, valid = final_answer(trajectory), trajectory.end_reason != "fault"
  example = example_of_answer(
    answer, check_truth(task), expected_of(task), format_reward(trajectory), valid
  )
  return example._replace(
    released=np.array(_released(trajectory, task, cfg) if valid else 0.0, np.float32),
    tokens=np.array(trajectory.trained_T.sum(), np.float32),
    drew=np.array(any(turn.produced for turn in trajectory.turns)),
    custom=np.array(_custom(trajectory, task, answer, cfg) if valid else 0.0, np.float32),
    attention=np.array(attention, np.float32),
    rubric=rubric_terms(trajectory, task, answer, cfg.rubric)
    if "rubric" in cfg.active and valid
    else example.rubric,
  )


def example_of_answer(
  answer: str | None, truth: Reading, expected: Expected, format_score: float, valid: bool
) -> Example:
  """Returns the example of one answer text, None without an answer."""
  reading = read_as(answer, expected)
  value, true_value = reading.value, truth.value
  if expected.is_number:
    value, true_value = _enlarged(value, true_value)
  return plain_example(value, true_value, reading.parsed, expected.is_number, format_score, valid)


def _enlarged(value: float, truth: float) -> tuple[float, float]:
  """Answer and truth times a power of two, if the truth is small: 1.6e-19 J.

  All rewards of numbers are relative. float32 and the constants that avoid a division by 0 are made
  for numbers near 1.
  """
  if not 0 < abs(truth) < _SMALL_TRUTH:
    return value, truth
  scale = math.ldexp(1.0, -math.frexp(truth)[1])
  return max(-_LARGEST, min(value * scale, _LARGEST)), truth * scale


def plain_example(
  value: Any, truth: Any, parsed: Any, is_number: Any, format_score: Any, valid: Any
) -> Example:
  """Returns an example with the answer alone; the other signals are 0. Arrays of one shape."""
  zero = np.zeros(np.shape(value), np.float32)
  return Example(
    value=np.asarray(value, np.float32),
    truth=np.asarray(truth, np.float32),
    parsed=np.asarray(parsed, bool),
    is_number=np.asarray(is_number, bool),
    format=np.asarray(format_score, np.float32),
    valid=np.asarray(valid, bool),
    released=zero + np.float32(np.nan),
    tokens=zero,
    drew=zero > 0,
    custom=zero,
    attention=zero,
    rubric=RubricTerms(zero, zero, zero, zero + np.float32(np.nan)),
  )


def stack(examples: Sequence[Example]) -> Example:
  """Stacks examples along a new first axis."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)


def _released(trajectory: Trajectory, task: Task, cfg: RewardConfig) -> float:
  """The score of the scorer of a released code; NaN for "strict"."""
  match cfg.scorer:
    case "strict":
      return np.nan
    case "vilasr_release":
      return release_accuracy(trajectory.text, task)
    case "phyx":
      if task.answer_kind == "choice":
        return float(matches_choice(trajectory.text, task.answer))
      return float(matches_open(trajectory.text, str(task.extra.get("key") or task.answer)))


def _custom(trajectory: Trajectory, task: Task, answer: str | None, cfg: RewardConfig) -> float:
  if "custom" not in cfg.active:
    return 0.0
  response = Response(
    text=trajectory.text,
    answer=answer,
    task=task,
    turns=trajectory.turns,
    tokens=int(trajectory.trained_T.sum()),
    end_reason=trajectory.end_reason,
    sample=trajectory.sample,
  )
  return custom_reward(cfg.custom, response)
