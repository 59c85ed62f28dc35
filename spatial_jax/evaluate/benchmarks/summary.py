"""What a score on a published benchmark is worth: its own scoring, and who was trained on it."""

from collections.abc import Sequence

from spatial_jax.evaluate.benchmarks.vsi_bench import (
  CHOICE_TYPES,
  NUMBER_TYPES,
  vsi_bench,
  vsi_bench_average,
)
from spatial_jax.evaluate.predictions import Prediction
from spatial_jax.types import Task

VSI_BENCH = "vsi-bench"


def heading(tasks: Sequence[Task], trained_on: str | None) -> str | None:
  """One line to stand above a table of benchmark questions, None when there is none among them."""
  asked = {task.benchmark for task in tasks} - {None}
  if not asked:
    return None
  names = ", ".join(sorted(name for name in asked if name))
  if trained_on in asked:
    return f"Rooms of {names}. This policy was TRAINED on other rooms of {trained_on}."
  trained = f"trained on {trained_on}" if trained_on else "not trained on a benchmark's rooms"
  return f"Rooms of {names}. This policy was {trained}, as far as its checkpoint records."


def vsi_score(answers: Sequence[Prediction]) -> float | None:
  """VSI-Bench's own average, in [0, 100], over those of its question types that were asked.

  Answers are read by the benchmark's code, which is laxer and stricter than ours in places. Its
  rooms are rendered here, so this compares runs with one another, not with published figures.

  Returns:
    None when no answer is to a question of its kind.
  """
  scores: dict[str, list[float]] = {}
  for a in answers:
    if a.benchmark == VSI_BENCH and a.valid and a.question_type in NUMBER_TYPES + CHOICE_TYPES:
      score = vsi_bench(a.answer or "", a.truth, a.question_type)
      scores.setdefault(a.question_type, []).append(score)
  return vsi_bench_average(scores) if scores else None
