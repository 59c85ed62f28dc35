"""Held-out tasks -> answers of a policy, scored: Task ─► Prompt ─► Trajectory ─► Prediction."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from spatial_jax.evaluate.best_of_n import mean_logp, rank
from spatial_jax.reward.compose import Answer, RewardConfig, score, score_answer
from spatial_jax.reward.format import final_answer
from spatial_jax.reward.parse import read
from spatial_jax.rollout.config import SamplingParams
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.scheduler import generate_rollouts
from spatial_jax.types import Params, Scores, Task, Trajectory, Turn

GREY = 128  # of 255


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSet:
  """What is asked and how it is marked: the same for every way of answering.

  Attributes:
    tasks: the questions.
    reward: what is rewarded.
    sharpness: of the reward; a constant, so that rewards can be compared.
    seed: of sampling. Two policies draw the same random numbers for the same question.
  """

  tasks: Sequence[Task]
  reward: RewardConfig
  sharpness: float
  seed: int


@dataclasses.dataclass(frozen=True)
class Prediction:
  """One question as it was answered, without pictures: thousands of these are kept.

  Attributes:
    task_id, question_type, answer_kind, question, truth: of the task.
    benchmark: of the task.
    answer: what stood in the answer tags, None where there was no answer.
    hard: MRA of a number, exact match of a choice, in [0, 1].
    reward: at the exam's sharpness.
    parsed: whether the answer could be read.
    end_reason: of the rollout.
    turns: what was said and drawn.
    tokens: sampled.
    logp: their mean log-probability.
    pictures: shown and drawn.
  """

  task_id: str
  question_type: str
  answer_kind: str
  question: str
  truth: str
  benchmark: str | None
  answer: str | None
  score_: float
  reward: float
  parsed: bool
  end_reason: str
  turns: tuple[Turn, ...]
  tokens: int
  logp: float
  pictures: int

  @property
  def valid(self) -> bool:
    """False where machinery broke: says nothing about the policy."""
    return self.end_reason != "fault"


def evaluate_policy(
  engine: Engine,
  params: Params,
  evaluation_set: EvaluationSet,
  sampling_params: Sequence[SamplingParams],
  grey: bool,
  advance: Callable[[], None] = lambda: None,
) -> list[list[Prediction]]:
  """Asks every question once in each mode, `engine.cfg.prompts` at a time.

  Args:
    engine: with as many rollouts per prompt (`cfg.group`) as there are modes, or more.
    params: decode parameters (unstacked), on the rollout mesh.
    exam: questions and marks.
    modes: greedy, or at which temperatures. Questions are read once for all of them.
    grey: every picture is replaced by grey of its size, to show what answers owe to the pictures.
    advance: called after each of `calls(...)` calls of the engine.

  Returns:
    For each mode one record per task, in order.
  """
  answered: list[list[Prediction]] = [[] for _ in sampling_params]
  size = engine.cfg.prompts
  for first in range(0, len(evaluation_set.tasks), size):
    tasks = evaluation_set.tasks[first : first + size]
    prompts = [engine.conversation.prompt(greyed(task) if grey else task) for task in tasks]
    rollouts = generate_rollouts(engine, params, prompts, evaluation_set.seed, 0, sampling_params)
    scores = score(rollouts, tasks, evaluation_set.reward, evaluation_set.sharpness)
    for b, (task, group) in enumerate(zip(tasks, rollouts, strict=True)):
      for g, (trajectory, records) in enumerate(zip(group, answered, strict=True)):
        records.append(_answered(task, trajectory, scores, b, g))
    advance()
  return answered


def calls(engine: Engine, evaluation_set: EvaluationSet) -> int:
  """How often `evaluate_policy` calls the engine."""
  return math.ceil(len(evaluation_set.tasks) / engine.cfg.prompts)


def best_of(answers: Sequence[Sequence[Prediction]]) -> list[Prediction]:
  """Of several answers to each question, the one that the policy finds likeliest.

  Args:
    answers: of several samples, each one per task in order.
  """
  return [
    min(samples, key=lambda answer: rank(answer.end_reason, answer.logp))
    for samples in zip(*answers, strict=True)
  ]


def greyed(task: Task) -> Task:
  """The task with every picture replaced by mid grey of the same size."""
  return dataclasses.replace(task, images=tuple(np.full_like(image, GREY) for image in task.images))


def baseline_answers(examples: Sequence[Task]) -> dict[str, str]:
  """Question type -> the answer to give when nothing is seen.

  The median of its numbers, the most frequent letter of its choices (the first in the alphabet of
  equally frequent ones).

  Args:
    examples: tasks to learn from, of the kind that will be asked.
  """
  answers: dict[str, list[str]] = {}
  kinds = {}
  for task in examples:
    answers.setdefault(task.question_type, []).append(task.answer)
    kinds[task.question_type] = task.answer_kind
  return {
    name: f"{np.median(np.array(given, np.float64)):g}"
    if kinds[name] == "number"
    else min(Counter(given).items(), key=lambda item: (-item[1], item[0]))[0]
    for name, given in answers.items()
  }


def baseline_predictions(
  evaluation_set: EvaluationSet, typical: Mapping[str, str]
) -> list[Prediction]:
  """The typical answers, marked as if given in perfect form; a type without one earns 0."""
  given = [typical.get(task.question_type) for task in evaluation_set.tasks]
  readings = [read(answer, task) for answer, task in zip(given, evaluation_set.tasks, strict=True)]
  parsed = np.array([reading.parsed for reading in readings])
  truths = [read(task.answer, task).value for task in evaluation_set.tasks]
  answers = Answer(
    value=np.array([reading.value for reading in readings], np.float32),
    truth=np.array(truths, np.float32),
    parsed=parsed,
    is_number=np.array([task.answer_kind == "number" for task in evaluation_set.tasks]),
    format=np.ones(len(given), np.float32),
    valid=np.ones(len(given), bool),
  )
  mark = functools.partial(
    score_answer,
    sharpness=np.array(evaluation_set.sharpness, np.float32),
    cfg=evaluation_set.reward,
  )
  earned = jax.vmap(mark)(answers)
  return [
    _record(task, given[i], float(earned.score_[i]), float(earned.reward[i]), bool(parsed[i]), None)
    for i, task in enumerate(evaluation_set.tasks)
  ]


def _answered(task: Task, trajectory: Trajectory, scores: Scores, b: int, g: int) -> Prediction:
  score_, reward = float(scores.score_BG[b, g]), float(scores.reward_BG[b, g])
  parsed = bool(scores.parsed_BG[b, g])
  return _record(task, final_answer(trajectory), score_, reward, parsed, trajectory)


def _record(
  task: Task,
  answer: str | None,
  score_: float,
  reward: float,
  parsed: bool,
  trajectory: Trajectory | None,
) -> Prediction:
  return Prediction(
    task_id=task.task_id,
    question_type=task.question_type,
    answer_kind=task.answer_kind,
    question=task.question,
    truth=task.answer,
    benchmark=task.benchmark,
    answer=answer,
    score_=score_,
    reward=reward,
    parsed=parsed,
    end_reason=trajectory.end_reason if trajectory else "answer",
    turns=trajectory.turns if trajectory else (),
    tokens=int(trajectory.trained_T.sum()) if trajectory else 0,
    logp=mean_logp(trajectory) if trajectory else 0.0,
    pictures=len(trajectory.images) if trajectory else len(task.images),
  )
