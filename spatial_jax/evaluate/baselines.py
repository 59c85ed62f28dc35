"""Baselines that need no training: constants, fitted constants, and images of another scene."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from spatial_jax.evaluate.predictions import EvaluationSet, Prediction, scored_answer
from spatial_jax.reward.compose import number_score, score_examples
from spatial_jax.reward.config import RewardConfig
from spatial_jax.reward.example import example_of_answer, stack
from spatial_jax.reward.parse import check_truth, expected_of, read
from spatial_jax.types import ImageRef, Task

# Factors that a fitted constant may be, a ratio of 1.02 apart.
FACTORS_Z = np.exp(np.linspace(-np.log(4.0), np.log(4.0), 141)).astype(np.float32)


def constant_answers(examples: Sequence[Task]) -> dict[str, str]:
  """Question type -> the best answer without an image.

  The median of numbers; the most frequent letter of choices, and words (of equally frequent ones
  the first in the alphabet). If a type has answers of several kinds, those of the most frequent
  kind decide.
  """
  answers: dict[str, dict[str, list[str]]] = collections.defaultdict(dict)
  for task in examples:
    kind = task.answer_kind
    answer = str(check_truth(task).value) if kind == "number" else task.answer
    answers[task.question_type].setdefault(kind, []).append(answer)
  found = {}
  for name, by_kind in answers.items():
    kind, values = max(by_kind.items(), key=lambda item: len(item[1]))
    counts = collections.Counter(values)
    found[name] = (
      f"{np.median(np.array(values, np.float64)):g}"
      if kind == "number"
      else min(counts.items(), key=lambda item: (-item[1], item[0]))[0]
    )
  return found


def predict_constant(evaluation_set: EvaluationSet, answers: Mapping[str, str]) -> list[Prediction]:
  """Predictions of `constant_answers`; a question type without an answer scores 0."""
  given = [answers.get(task.question_type) for task in evaluation_set.tasks]
  return score_texts(evaluation_set, given)


def predict_fitted_factor(
  evaluation_set: EvaluationSet, predictions: Sequence[Prediction]
) -> list[Prediction]:
  """Numeric answers of a policy times one constant factor per question type; choices unchanged.

  The factor maximises the mean score. It is cross-fitted: each half of the questions of a
  type uses the factor of the other half, so that no question is used to fit its own factor. What
  training gains over this baseline is more than a calibration of scale.

  Args:
    evaluation_set: with the true answers.
    predictions: of the policy before training, in the order of the tasks, as the result is.
  """
  tasks = evaluation_set.tasks
  readings = [read(p.answer, task) for p, task in zip(predictions, tasks, strict=True)]
  value_Z = np.array([reading.value for reading in readings], np.float64)
  truth_Z = np.array([read(task.answer, task).value for task in tasks], np.float64)
  size_Z = np.where(truth_Z, np.abs(truth_Z), 1.0)
  relative_Z = (value_Z / size_Z).astype(np.float32)
  sign_Z = np.sign(truth_Z).astype(np.float32)
  factor_Z = np.ones(len(tasks), np.float64)
  by_type = collections.defaultdict(list)
  for i, (task, reading) in enumerate(zip(tasks, readings, strict=True)):
    if task.answer_kind == "number" and reading.parsed:
      by_type[task.question_type].append(i)
  for indices in by_type.values():
    halves = np.array(indices[::2], int), np.array(indices[1::2], int)
    for half, other in (halves, halves[::-1]):
      factor_Z[half] = best_factor(relative_Z[other], sign_Z[other], evaluation_set.scoring)
  given = [
    f"{value * factor:g}" if factor != 1 else prediction.answer
    for prediction, value, factor in zip(predictions, value_Z, factor_Z, strict=True)
  ]
  return score_texts(evaluation_set, given)


def best_factor(value_Z: np.ndarray, truth_Z: np.ndarray, reward: RewardConfig) -> float:
  """The factor in [1/4, 4] that maximises the mean score of factor * value; 1 without values."""
  if not len(value_Z):
    return 1.0
  scaled_FZ = FACTORS_Z[:, None] * value_Z[None]
  score_FZ = np.asarray(number_score(scaled_FZ, np.broadcast_to(truth_Z, scaled_FZ.shape), reward))
  score_F = score_FZ.mean(axis=1)
  best = np.flatnonzero(score_F >= score_F.max() - 1e-6)
  return float(FACTORS_Z[best[np.argmin(np.abs(np.log(FACTORS_Z[best])))]])


def other_image_tasks(tasks: Sequence[Task]) -> list[Task] | None:
  """The same questions, each with the images of another scene, to measure the use of the image.

  The images come from the next task of the same question type, scene apart and with as many
  images; if there is none, from the next task of any type.

  Returns:
    One task per task, or None if a task has no such partner.
  """
  changed = []
  for i, task in enumerate(tasks):
    partners = [
      other
      for other in (*tasks[i + 1 :], *tasks[:i])
      if other.scene_id != task.scene_id and _media_kinds(other) == _media_kinds(task)
    ]
    if not partners:
      return None
    same_type = (other for other in partners if other.question_type == task.question_type)
    partner = next(same_type, partners[0])
    changed.append(dataclasses.replace(task, media=partner.media, boxes=()))
  return changed


def _media_kinds(task: Task) -> list[bool]:
  return [isinstance(one, ImageRef) for one in task.media]


def score_texts(evaluation_set: EvaluationSet, texts: Sequence[str | None]) -> list[Prediction]:
  """Predictions of given answer texts, scored as if their format were right."""
  tasks = evaluation_set.tasks
  examples = [
    example_of_answer(text, read(task.answer, task), expected_of(task), 1.0, True)
    for text, task in zip(texts, tasks, strict=True)
  ]
  batch = stack([stack([example]) for example in examples])
  scores = score_examples(batch, evaluation_set.scoring, evaluation_set.sharpness)
  return [scored_answer(task, texts[b], scores, b, 0) for b, task in enumerate(tasks)]
