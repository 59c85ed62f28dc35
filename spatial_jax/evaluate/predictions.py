"""Held-out tasks -> scored answers of a policy: Task ─► Prompt ─► Trajectory ─► Prediction."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from spatial_jax.evaluate.best_of_n import mean_logp, rank
from spatial_jax.reward.compose import RewardConfig, score
from spatial_jax.reward.format import final_answer
from spatial_jax.rollout.config import SamplingParams
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.types import Params, Scores, Task, Trajectory, Turn


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSet:
  """The questions of an evaluation and how answers are scored: equal for all policies.

  Attributes:
    tasks: the questions.
    reward: how an answer is scored.
    sharpness: of the reward; a constant, so that rewards can be compared.
    seed: of sampling. Two policies use the same random numbers for the same question.
  """

  tasks: Sequence[Task]
  reward: RewardConfig
  sharpness: float
  seed: int


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The answer to one question, without images: thousands of predictions are kept.

  Attributes:
    task_id, question_type, answer_kind, question, truth, benchmark: of the task.
    answer: the text between the answer tags, None without an answer.
    score: MRA of a number, exact match of a choice, in [0, 1].
    reward: at the sharpness of the evaluation set.
    parsed: whether the answer could be read.
    end_reason: of the rollout.
    turns: text and drawing operations.
    tokens: number of sampled tokens.
    logp: their mean log-probability.
    images: number of images in the rollout, drawn ones included.
  """

  task_id: str
  question_type: str
  answer_kind: str
  question: str
  truth: str
  benchmark: str | None
  answer: str | None
  score: float
  reward: float
  parsed: bool
  end_reason: str
  turns: tuple[Turn, ...]
  tokens: int
  logp: float
  images: int

  @property
  def valid(self) -> bool:
    """False after a fault of the machinery, which says nothing about the policy."""
    return self.end_reason != "fault"


def predict(
  engine: Engine,
  params: Params,
  evaluation_set: EvaluationSet,
  sampling_params: Sequence[SamplingParams],
  on_batch: Callable[[], None] = lambda: None,
) -> list[list[Prediction]]:
  """Answers every question once per sampling setting, `engine.cfg.prompts` questions at a time.

  Args:
    engine: its group size `cfg.group` is at least the number of sampling settings.
    params: decode parameters (unstacked), on the rollout mesh.
    evaluation_set: questions and scoring.
    sampling_params: greedy or sampled; each prompt is prefilled once for all of them.
    on_batch: called after each of `batches(...)` batches.

  Returns:
    For each sampling setting one prediction per task, in the order of the tasks.
  """
  predictions: list[list[Prediction]] = [[] for _ in sampling_params]
  size = engine.cfg.prompts
  for first in range(0, len(evaluation_set.tasks), size):
    tasks = evaluation_set.tasks[first : first + size]
    prompts = [engine.conversation.prompt(task) for task in tasks]
    job = RolloutJob(prompts, evaluation_set.seed, 0, sampling_params)
    rollouts = generate_rollouts(engine, params, job)
    scores = score(rollouts, tasks, evaluation_set.reward, evaluation_set.sharpness)
    for b, (task, group) in enumerate(zip(tasks, rollouts, strict=True)):
      for g, (trajectory, column) in enumerate(zip(group, predictions, strict=True)):
        column.append(_of_trajectory(task, trajectory, scores, b, g))
    on_batch()
  return predictions


def batches(engine: Engine, evaluation_set: EvaluationSet) -> int:
  """The number of batches of one `predict` call."""
  return math.ceil(len(evaluation_set.tasks) / engine.cfg.prompts)


def most_likely_prediction(samples: Sequence[Sequence[Prediction]]) -> list[Prediction]:
  """For each question the sample with the highest mean log-probability, answers first.

  Args:
    samples: [samples][questions].
  """
  return [
    min(group, key=lambda prediction: rank(prediction.end_reason, prediction.logp))
    for group in zip(*samples, strict=True)
  ]


def constant_prediction(
  task: Task, answer: str | None, score: float, reward: float, parsed: bool
) -> Prediction:
  """The prediction of a baseline that samples nothing."""
  return Prediction(
    task_id=task.task_id,
    question_type=task.question_type,
    answer_kind=task.answer_kind,
    question=task.question,
    truth=task.answer,
    benchmark=task.benchmark,
    answer=answer,
    score=score,
    reward=reward,
    parsed=parsed,
    end_reason="answer",
    turns=(),
    tokens=0,
    logp=0.0,
    images=len(task.images),
  )


def _of_trajectory(
  task: Task, trajectory: Trajectory, scores: Scores, b: int, g: int
) -> Prediction:
  constant = constant_prediction(
    task,
    final_answer(trajectory),
    float(scores.score_BG[b, g]),
    float(scores.reward_BG[b, g]),
    bool(scores.parsed_BG[b, g]),
  )
  return dataclasses.replace(
    constant,
    end_reason=trajectory.end_reason,
    turns=trajectory.turns,
    tokens=int(trajectory.trained_T.sum()),
    logp=mean_logp(trajectory),
    images=len(trajectory.images),
  )
