"""The heading of the result table and the VSI-Bench score of an evaluation."""

from collections.abc import Mapping, Sequence

from spatial_jax.evaluate.benchmarks import vsi_bench
from spatial_jax.evaluate.predictions import Prediction
from spatial_jax.types import Task

VSI_BENCH = "vsi-bench"  # as in `Task.benchmark`


def heading(tasks: Sequence[Task], trained_on: str | None) -> str | None:
  """One line for the top of the result table, None without benchmark questions.

  `trained_on`: benchmarks whose rooms the policy was trained on, joined by ", "; None without one.
  """
  benchmarks = {task.benchmark for task in tasks if task.benchmark}
  if not benchmarks:
    return None
  names = ", ".join(sorted(benchmarks))
  if shared := benchmarks & set((trained_on or "").split(", ")):
    also = ", ".join(sorted(shared))
    return f"Rooms of {names}. This policy was TRAINED on other rooms of {also}."
  trained = f"trained on {trained_on}" if trained_on else "not trained on rooms of a benchmark"
  return f"Rooms of {names}. According to its checkpoint, this policy was {trained}."


def vsi_score(predictions: Sequence[Prediction]) -> float | None:
  """VSI-Bench's own average, in [0, 100], over its question types; None without one.

  Other benchmarks, other question types and faults are ignored. The answers are read by the
  benchmark's rules, which differ from `reward.parse`. Only scores on the benchmark's own videos and
  prompts can be compared with published ones; scores on rendered rooms cannot.
  """
  scores: dict[str, list[float]] = {}
  for p in predictions:
    has_score = p.question_type in (*vsi_bench.NUMBER_TYPES, *vsi_bench.CHOICE_TYPES)
    if p.benchmark == VSI_BENCH and p.valid and has_score:
      value = vsi_bench.score(p.answer or "", p.truth, p.question_type)
      scores.setdefault(p.question_type, []).append(value)
  return vsi_bench.average(scores) if scores else None


def vsi_sentence(predictions: Mapping[str, Sequence[Prediction]]) -> str | None:
  """The VSI-Bench scores of all columns in one sentence; None without one.

  Args:
    predictions: label of a column -> its predictions.
  """
  scores = {label: vsi_score(found) for label, found in predictions.items()}
  shown = [f"{label} {value:.1f}" for label, value in scores.items() if value is not None]
  return f"VSI-Bench's own average of its tasks, in percent: {'; '.join(shown)}." if shown else None
