"""Held-out tasks -> scored answers of a policy: Task ─► Prompt ─► Trajectory ─► Prediction."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spatial_jax.data.pipeline import PipelineConfig, encode_in_order
from spatial_jax.reward.compose import score
from spatial_jax.reward.config import RewardConfig
from spatial_jax.reward.format import final_answer
from spatial_jax.reward.snra import sharpness
from spatial_jax.rollout.config import SamplingParams
from spatial_jax.rollout.encode import PromptEncoder
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.types import Params, Prompt, Prompts, Scores, Task, Trajectory, Turn

# Fields of `Task.extra` that tables group by.
GROUPS = ("category", "subfield", "reasoning_type", "text_level")


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSet:
  """The questions of an evaluation and how answers are scored: equal for all policies."""

  tasks: Sequence[Task]  # the questions
  examples: Sequence[Task]  # training tasks without media, for the median answers; may be empty
  reward: RewardConfig  # of training
  seed: int  # of sampling; policies use the same random numbers for the same question

  @functools.cached_property
  def scoring(self) -> RewardConfig:
    """The reward without what only training has."""
    return self.reward.for_evaluation()

  @functools.cached_property
  def sharpness(self) -> float:
    """Of the reward: a constant, that of the end of the schedule, so that rewards compare."""
    return float(sharpness(1.0, self.scoring.schedule))


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The answer to one question, without images: thousands of predictions are kept."""

  task_id: str
  question_type: str
  answer_kind: str
  question: str
  truth: str
  benchmark: str | None
  answer: str | None  # the text between the answer tags, None without an answer
  score: float  # see `RewardConfig.score` and `scorer`, in [0, 1]
  reward: float  # at the sharpness of the evaluation set
  parsed: bool  # whether the answer could be read
  end_reason: str = "answer"
  turns: tuple[Turn, ...] = ()
  tokens: int = 0  # sampled
  logp: float = 0.0  # mean log-probability of the sampled tokens, nats
  images: int = 0  # in the rollout, drawn ones included
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the task, see `GROUPS`
  problem: str = ""  # why the question could not be asked; "" if it was

  @property
  def valid(self) -> bool:
    """False after a fault of the machinery, which says nothing about the policy."""
    return self.end_reason != "fault"


def predict(
  engine: Engine,
  params: Params,
  evaluation_set: EvaluationSet,
  sampling_params: Sequence[SamplingParams],
  pipeline: PipelineConfig,
  on_batch: Callable[[], None] = lambda: None,
) -> list[list[Prediction]]:
  """Answers every question once per sampling setting, `engine.cfg.prompts` questions at a time.

  Args:
    engine: its group size `cfg.group` is at least the number of sampling settings.
    params: decode parameters (unstacked), on the rollout mesh.
    evaluation_set: questions and scoring.
    sampling_params: greedy or sampled; each prompt is prefilled once for all of them.
    pipeline: makes the prompts in the background.
    on_batch: called after each of `batches(...)` batches.

  Returns:
    For each sampling setting one prediction per task, in the order of the tasks.
  """
  predictions: list[list[Prediction]] = [[] for _ in sampling_params]
  size, tasks = engine.cfg.prompts, evaluation_set.tasks
  encode = PromptEncoder(engine.conversation, engine.cfg)
  stream = encode_in_order(tasks, encode, pipeline)
  for first in range(0, len(tasks), size):
    chunk = tasks[first : first + size]
    prompts = [next(stream) for _ in chunk]
    usable = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
    found = iter(_predict_batch(engine, params, evaluation_set, usable, sampling_params))
    for task, prompt in zip(chunk, prompts, strict=True):
      if isinstance(prompt, Prompt):
        row = next(found)
      else:
        row = [fault_of(task, str(prompt))] * len(predictions)
      for column, prediction in zip(predictions, row, strict=True):
        column.append(prediction)
    on_batch()
  return predictions


def _predict_batch(
  engine: Engine,
  params: Params,
  evaluation_set: EvaluationSet,
  prompts: Prompts,
  sampling_params: Sequence[SamplingParams],
) -> list[list[Prediction]]:
  """The predictions [prompts][sampling settings] of one call of the engine."""
  if not prompts:
    return []
  tasks = [prompt.task for prompt in prompts]
  job = RolloutJob(prompts, evaluation_set.seed, 0, sampling_params)
  rollouts = generate_rollouts(engine, params, job)
  scores = score(rollouts, tasks, evaluation_set.scoring, evaluation_set.sharpness)
  return [
    [
      dataclasses.replace(
        scored_answer(task, final_answer(trajectory), scores, b, g),
        end_reason=trajectory.end_reason,
        turns=trajectory.turns,
        tokens=int(trajectory.trained_T.sum()),
        logp=mean_logp(trajectory),
        images=len(trajectory.images),
      )
      for g, trajectory in enumerate(group)
    ]
    for b, (task, group) in enumerate(zip(tasks, rollouts, strict=True))
  ]


def fault_of(task: Task, problem: str) -> Prediction:
  """The prediction for a task that cannot be asked; it is left out of all statistics.

  Args:
    problem: why: its media cannot be read, or its prompt is too long.
  """
  return Prediction(
    task_id=task.task_id,
    question_type=task.question_type,
    answer_kind=task.answer_kind,
    question=task.question,
    truth=task.answer,
    benchmark=task.benchmark,
    extra=_shown_extra(task),
    answer=None,
    score=0.0,
    reward=0.0,
    parsed=False,
    end_reason="fault",
    problem=problem,
  )


def _shown_extra(task: Task) -> dict[str, Any]:
  """The fields of `task.extra` that tables group by."""
  return {name: task.extra[name] for name in GROUPS if name in task.extra}


def batches(engine: Engine, evaluation_set: EvaluationSet) -> int:
  """The number of batches of one `predict` call."""
  return math.ceil(len(evaluation_set.tasks) / engine.cfg.prompts)


def scored_answer(task: Task, answer: str | None, scores: Scores, b: int, g: int) -> Prediction:
  """The prediction of an answer without a rollout, with `scores[b, g]`."""
  return Prediction(
    task_id=task.task_id,
    question_type=task.question_type,
    answer_kind=task.answer_kind,
    question=task.question,
    truth=task.answer,
    benchmark=task.benchmark,
    extra=_shown_extra(task),
    answer=answer,
    score=float(scores.score_BG[b, g]),
    reward=float(scores.reward_BG[b, g]),
    parsed=bool(scores.parsed_BG[b, g]),
    images=len(task.media),
  )


# --- the most likely of several rollouts ---------------------------------------------------------


def mean_logp(trajectory: Trajectory) -> float:
  """Mean log-probability of the sampled tokens, nats; 0 if there are none (a fault)."""
  sampled_T = trajectory.logp_T[trajectory.trained_T]
  return float(sampled_T.mean()) if sampled_T.size else 0.0


def most_likely(group: Sequence[Trajectory], count: int) -> list[Trajectory]:
  """The `count` most likely rollouts of a group that ended with an answer, then the others."""
  return sorted(group, key=lambda t: _rank(t.end_reason, mean_logp(t)))[:count]


def most_likely_prediction(samples: Sequence[Sequence[Prediction]]) -> list[Prediction]:
  """The same for predictions [samples][questions]: the best one for each question."""
  return [
    min(group, key=lambda p: _rank(p.end_reason, p.logp)) for group in zip(*samples, strict=True)
  ]


def _rank(end_reason: str, logp: float) -> tuple[bool, float]:
  """Smaller is better. Likelihood alone would prefer endless repetition."""
  return end_reason != "answer", -logp
