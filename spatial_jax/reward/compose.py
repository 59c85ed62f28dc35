"""The reward of a rollout: gated composition of accuracy and format.

    text ─► parse ─► Answer arrays [B, G] ─► score_answer, lifted by vmap ─► Scores [B, G]
            (host, once)                     (jitted, for one answer)

The gate reads a *hard* score (MRA or exact match). The smooth reward is positive for every number,
so a gate on it would pay a wild guess for its perfect drawings.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.reward.accuracy import exact_match, mean_relative_accuracy, ratio
from spatial_jax.reward.format import final_answer, format_reward
from spatial_jax.reward.parse import read
from spatial_jax.reward.snra import Schedule, relative_squared_error, shifted_tanh, snra
from spatial_jax.types import Array, Rollouts, Scores, Task, Trajectory


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """What is rewarded.

  Attributes:
    number: accuracy reward of a number: "sigmoid" (SNRA), "tanh" (its shifted-tanh form), "mra",
      or "ratio" (vsGRPO, linear).
    choice: accuracy reward of a choice: "smooth" (the curve of `number` on the error 1 - exact
      match; the sigmoid where `number` has no curve) or "exact" (0 or 1).
    schedule: sharpness over the run.
    discrete_sharpness: a constant sharpness for choices, None to let them follow the schedule. At
      sharpness 1 a wrong choice still gets 0.54.
    strict_mra: the hard score compares with < (ViLaSR's training reward) instead of <=.
    score_threshold: beta; the gate is open where hard score > beta.
    format_weight: w, what format and executability are worth beside an accuracy of 1.
    gate: "format" gates the format part alone, so that smooth accuracy stays a dense signal;
      "all" gates the sum, as ViLaSR's Eq. 2 is written.
  """

  number: Literal["sigmoid", "tanh", "mra", "ratio"]
  choice: Literal["smooth", "exact"]
  schedule: Schedule
  discrete_sharpness: float | None
  strict_mra: bool
  score_threshold: float
  format_weight: float
  gate: Literal["format", "all"]


class Reward(NamedTuple):
  """What one answer earns, float32: the parts of `Scores` that are computed."""

  reward: jax.Array
  accuracy: jax.Array
  score_: jax.Array


class Answer(NamedTuple):
  """One answer and its truth as numbers; [B, G] for a whole step.

  Attributes:
    value, truth: float32, numbers in the unit asked for, or indices of options; value is 0 where
      not parsed.
    parsed: bool, exactly one answer could be read; false for a fault.
    is_number: bool, false for a choice.
    format: float32, 1 where format and every operation were right.
    usable: bool, false for a fault.
  """

  value: Array
  truth: Array
  parsed: Array
  is_number: Array
  format: Array
  valid: Array


def score(
  rollouts: Rollouts, tasks: Sequence[Task], cfg: RewardConfig, sharpness: float | Array
) -> Scores:
  """Scores the rollouts of one step.

  Args:
    rollouts: [B][G] trajectories.
    tasks: [B], the task of each group.
    cfg: what is rewarded.
    sharpness: float32 scalar, of the current step.

  Returns:
    Scores, NumPy arrays [B, G].

  Raises:
    ValueError: on the host, when a group is not of its task or a task's answer cannot be read.
  """
  answers = _stack(
    [
      _stack([_answer(trajectory, task) for trajectory in group])
      for group, task in zip(rollouts, tasks, strict=True)
    ]
  )
  rewards = _score_all(answers, jnp.asarray(sharpness, jnp.float32), cfg)
  return Scores(
    reward_BG=np.asarray(rewards.reward),
    accuracy_BG=np.asarray(rewards.accuracy),
    score_BG=np.asarray(rewards.score_),
    format_BG=np.asarray(answers.format),
    valid_BG=np.asarray(answers.valid),
    parsed_BG=np.asarray(answers.parsed),
  )


def score_answer(answer: Answer, sharpness: Array, cfg: RewardConfig) -> Reward:
  """Scores one answer.

      gate "format":  reward = accuracy + [hard > beta] * w * format
      gate "all":     reward = [hard > beta] * (accuracy + w * format)

  An answer that could not be read, a fault's among them, earns 0.

  Args:
    answer: scalars.
    sharpness: float32 scalar k.
    cfg: what is rewarded; static.

  Returns:
    Scalars.

  Source: ViLaSR (arXiv:2506.09965, Eq. 2) for "all"; the hard gate beside a smooth accuracy is
  ours.
  """
  parsed = jnp.asarray(answer.parsed).astype(jnp.float32)
  exact = exact_match(answer.value, answer.truth)
  mra = mean_relative_accuracy(answer.value, answer.truth, cfg.strict_mra)
  score_ = parsed * jnp.where(answer.is_number, mra, exact)
  accuracy = parsed * jnp.where(
    answer.is_number,
    _number_accuracy(answer, sharpness, mra, cfg),
    _choice_accuracy(exact, sharpness, cfg),
  )
  gate = (score_ > cfg.score_threshold).astype(jnp.float32)
  if cfg.gate == "all":
    accuracy = gate * accuracy
  return Reward(accuracy + gate * cfg.format_weight * answer.format, accuracy, score_)


@functools.partial(jax.jit, static_argnames="cfg")
def _score_all(answers_BG: Answer, sharpness: jax.Array, cfg: RewardConfig) -> Reward:
  one = functools.partial(score_answer, sharpness=sharpness, cfg=cfg)
  return jax.vmap(jax.vmap(one))(answers_BG)


def _number_accuracy(answer: Answer, sharpness: Array, mra: Array, cfg: RewardConfig) -> Array:
  error = relative_squared_error(answer.value, answer.truth)
  match cfg.number:
    case "sigmoid":
      return snra(error, sharpness)
    case "tanh":
      return shifted_tanh(error, sharpness)
    case "mra":
      return mra
    case "ratio":
      return ratio(answer.value, answer.truth, "linear")


def _choice_accuracy(exact: Array, sharpness: Array, cfg: RewardConfig) -> Array:
  if cfg.choice == "exact":
    return exact
  curve = shifted_tanh if cfg.number == "tanh" else snra
  return curve(1.0 - exact, sharpness if cfg.discrete_sharpness is None else cfg.discrete_sharpness)


def _stack(answers: list[Answer]) -> Answer:
  return jax.tree.map(lambda *leaves: np.stack(leaves), *answers)


def _answer(trajectory: Trajectory, task: Task) -> Answer:
  """Reads one rollout and its truth on the host."""
  if trajectory.task_id != task.task_id:
    raise ValueError(f"rollout of task {trajectory.task_id} is scored against task {task.task_id}")
  truth = read(task.answer, task)
  if not truth.parsed:
    raise ValueError(
      f"task {task.task_id}: answer {task.answer!r} is no {task.answer_kind} as its question asks "
      f"for it ({task.question!r}, options {task.options})"
    )
  reading = read(final_answer(trajectory), task)
  return Answer(
    value=np.array(reading.value, np.float32),
    truth=np.array(truth.value, np.float32),
    parsed=np.array(reading.parsed),
    is_number=np.array(task.answer_kind == "number"),
    format=np.array(format_reward(trajectory), np.float32),
    valid=np.array(trajectory.end_reason != "fault"),
  )
