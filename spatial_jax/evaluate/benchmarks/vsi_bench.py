"""Scores of published benchmarks, exactly as their own code computes them, quirks included."""

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

# The eight tasks in the order in which they are reported.
VSI_BENCH_TASKS = (
  *NUMBER_TYPES,
  "object_rel_distance",
  "object_rel_direction",
  "route_planning",
  "obj_appearance_order",
)


def vsi_bench(prediction: str, truth: str, question_type: str) -> float:
  """Score of one VSI-Bench prediction.

  The prediction is its first word (split at blanks alone) without full stops at its end. A choice
  scores 1 when it equals the truth in any case ("a." is right, "A:" is wrong). A number scores

      MRA = mean over c in {.50, ..., .95} of [ |p - t| / t <= 1 - c ]

  in float64, divided by t and not by |t|; what `float` cannot read scores 0.

  Args:
    prediction: what the model answered.
    truth: the row's ground_truth.
    question_type: the row's question_type.

  Returns:
    A score in [0, 1].

  Raises:
    ValueError: on the host, for an unknown question type.
    ZeroDivisionError: on the host, for a number with truth 0, as in the benchmark's code.

  Source: lmms_eval/tasks/vsibench/utils.py of vision-x-nyu/thinking-in-space (arXiv:2412.14171).
  """
  word = prediction.split(" ")[0].rstrip(".").strip()
  if question_type in CHOICE_TYPES:
    return float(word.lower() == truth.lower())
  if question_type not in NUMBER_TYPES:
    known = ", ".join((*NUMBER_TYPES, *CHOICE_TYPES))
    raise ValueError(f"{question_type!r} is no VSI-Bench question type; they are {known}")
  answer, target = _float(word), _float(truth)
  if answer is None or target is None:
    return 0.0
  return float(np.mean(abs(answer - target) / target <= 1 - np.linspace(0.5, 0.95, 10)))


def vsi_bench_tasks(scores_by_type: Mapping[str, float | Sequence[float]]) -> dict[str, float]:
  """Mean score of each task, in the benchmark's order; the direction types become one task.

  Args:
    scores_by_type: per question type its scores, or their mean, in [0, 1].

  Returns:
    Task -> mean in [0, 1], for the tasks that were asked. Direction types are averaged unweighted.

  Raises:
    ValueError: on the host, for an unknown question type or one without scores.
  """
  means = {}
  for question_type, scores in scores_by_type.items():
    if question_type not in (*NUMBER_TYPES, *CHOICE_TYPES):
      raise ValueError(f"{question_type!r} is no VSI-Bench question type")
    if not np.size(scores):
      raise ValueError(f"{question_type} has no scores")
    means[question_type] = float(np.mean(scores))
  directions = [means[name] for name in DIRECTION_TYPES if name in means]
  if directions:
    means["object_rel_direction"] = sum(directions) / len(directions)
  return {task: means[task] for task in VSI_BENCH_TASKS if task in means}


def vsi_bench_average(scores_by_type: Mapping[str, float | Sequence[float]]) -> float:
  """The benchmark's overall score: unweighted mean of its tasks, times 100.

  Args:
    scores_by_type: as for `vsi_bench_tasks`; the benchmark has all ten types. Over fewer types the
      mean is of those present.

  Returns:
    A score in [0, 100].

  Raises:
    ValueError: on the host, when there is no score at all.
  """
  tasks = vsi_bench_tasks(scores_by_type)
  if not tasks:
    raise ValueError("no VSI-Bench scores to average")
  return 100.0 * sum(tasks.values()) / len(tasks)


def _float(text: str) -> float | None:
  try:
    return float(text)
  except ValueError:
    return None
