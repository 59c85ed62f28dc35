"""VSI-Bench scores, exactly as the benchmark's own code computes them, quirks included.

Answers are read by the benchmark's rules, not by `reward.parse`: both are reported.
"""

from collections.abc import Mapping, Sequence

import numpy as np

DIRECTION_TYPES = (
  "object_rel_direction_easy",
  "object_rel_direction_medium",
  "object_rel_direction_hard",
)
NUMBER_TYPES = (
  "object_counting",
  "object_abs_distance",
  "object_size_estimation",
  "room_size_estimation",
)
CHOICE_TYPES = ("object_rel_distance", *DIRECTION_TYPES, "route_planning", "obj_appearance_order")

# The eight tasks in the order of the benchmark's table.
TASKS = (
  *NUMBER_TYPES,
  "object_rel_distance",
  "object_rel_direction",
  "route_planning",
  "obj_appearance_order",
)


def score(prediction: str, truth: str, question_type: str) -> float:
  """Returns the score of one prediction.

  Only the first word of the prediction counts (words are separated by blanks), without full stops
  at its end. A choice scores 1 if it equals the truth in upper or lower case ("a." is right, "A:"
  is wrong). A number scores

      MRA = mean over c in {.50, ..., .95} of [ |p - t| / t <= 1 - c ]

  in float64, divided by t and not by |t|. A word that `float` cannot read scores 0.

  Args:
    prediction: the answer of the model.
    truth: the ground_truth of the row.
    question_type: the question_type of the row.

  Returns:
    A score in [0, 1].

  Raises:
    ValueError: if the question type is unknown.
    ZeroDivisionError: if the truth of a number is 0, as in the benchmark's code.

  Source: lmms_eval/tasks/vsibench/utils.py of vision-x-nyu/thinking-in-space (arXiv:2412.14171).
  """
  word = prediction.split(" ")[0].rstrip(".").strip()
  if question_type in CHOICE_TYPES:
    return float(word.lower() == truth.lower())
  if question_type not in NUMBER_TYPES:
    raise ValueError(_unknown(question_type))
  answer, target = _float(word), _float(truth)
  if answer is None or target is None:
    return 0.0
  if target == 0:
    raise ZeroDivisionError(f"the truth {truth!r} of {question_type} is 0; MRA divides by it")
  return float(np.mean(abs(answer - target) / target <= 1 - np.linspace(0.5, 0.95, 10)))


def task_scores(scores_by_type: Mapping[str, float | Sequence[float]]) -> dict[str, float]:
  """Returns the mean score of each task, in the benchmark's order.

  The three direction types are one task: the unweighted mean of their means.

  Args:
    scores_by_type: question type -> its scores, or their mean, in [0, 1].

  Returns:
    Task -> mean in [0, 1], for the tasks that have scores.

  Raises:
    ValueError: if a question type is unknown or has no scores.
  """
  means = {}
  for question_type, scores in scores_by_type.items():
    if question_type not in (*NUMBER_TYPES, *CHOICE_TYPES):
      raise ValueError(_unknown(question_type))
    if not np.size(scores):
      raise ValueError(f"{question_type} has no scores")
    means[question_type] = float(np.mean(scores))
  directions = [means[name] for name in DIRECTION_TYPES if name in means]
  if directions:
    means["object_rel_direction"] = sum(directions) / len(directions)
  return {task: means[task] for task in TASKS if task in means}


def average(scores_by_type: Mapping[str, float | Sequence[float]]) -> float:
  """Returns the overall score: the unweighted mean of the tasks, times 100.

  Args:
    scores_by_type: as for `task_scores`. The benchmark has all ten types; if some are missing, the
      mean is over the others.

  Returns:
    A score in [0, 100].

  Raises:
    ValueError: if there are no scores.
  """
  tasks = task_scores(scores_by_type)
  if not tasks:
    raise ValueError("no VSI-Bench scores to average")
  return 100.0 * sum(tasks.values()) / len(tasks)


def _unknown(question_type: str) -> str:
  types = ", ".join((*NUMBER_TYPES, *CHOICE_TYPES))
  return f"{question_type!r} is not a VSI-Bench question type; use one of {types}"


def _float(text: str) -> float | None:
  try:
    return float(text)
  except ValueError:
    return None
