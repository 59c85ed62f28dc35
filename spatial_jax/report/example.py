"""The example at the head of the page: one question with its image and its answers."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from spatial_jax.errors import DataError
from spatial_jax.evaluate.results import END_GREEDY, LABELS, PREDICTIONS, START_GREEDY
from spatial_jax.report.drawings import ImageView
from spatial_jax.report.gallery import prompt_images
from spatial_jax.rollout.saved_groups import SavedGroup, SavedRollout

_GOALS = {"rose": "the largest rise", "fell": "the largest fall"}


class Example(NamedTuple):
  """One question."""

  where: str  # "Held-out question", "Training question of step 50"
  group: SavedGroup
  images: list[ImageView]
  answers: list[tuple[str, SavedRollout]]  # of whom, answer
  note: str  # how the example was chosen, "" if nothing was chosen


def score_changes(workdir: pathlib.Path) -> list[float]:
  """Greedy score at the end minus that at the start of each question in predictions.jsonl.

  Returns:
    Nothing if the file does not exist or has no start.

  Raises:
    DataError: I/O: if a line is not a prediction.
  """
  path = workdir / PREDICTIONS
  scores: dict[str, dict[str, float]] = {}
  lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line) if line else {"column": "", "task_id": "", "score": 0.0}
      scores.setdefault(record["column"], {})[record["task_id"]] = float(record["score"])
    except (ValueError, KeyError, TypeError) as error:
      raise DataError(
        f"{path} line {number} is not a prediction ({error!r}); delete the file and evaluate again"
      ) from error
  start, end = scores.get(START_GREEDY, {}), scores.get(END_GREEDY, {})
  return [end[task_id] - start[task_id] for task_id in start if task_id in end]


def choose_example(
  steps: Sequence[Sequence[SavedGroup]], changes: Sequence[float], verb: str | None
) -> Example | None:
  """A held-out question that start and end answered, else one of the evaluation, else of training.

  Args:
    steps: saved groups of several steps, in order; no step is empty.
    changes: of the score of every held-out question; may be empty.
    verb: the result, `Paired.verb`; the example does the same if one can.
  """
  held_out = [group for groups in steps for group in groups if group.step is None]
  both = [group for group in held_out if LABELS[START_GREEDY] in _by_name(group)]
  if both:
    return _compared(both, changes, verb)
  if held_out:
    where = "Held-out question" if held_out[0].truth is not None else "Question"
    answers = [(f"Answer, {rollout.name}", rollout) for rollout in held_out[0].rollouts[:3]]
    return Example(where, held_out[0], prompt_images(held_out[0]), answers, "")
  if not steps:
    return None
  group = steps[-1][0]
  best = max(group.rollouts, key=lambda r: r.reward or 0.0)
  answers = [(f"Best answer of {len(group.rollouts)} rollouts", best)]
  where = f"Training question of step {group.step}"
  return Example(where, group, prompt_images(group), answers, "")


def _compared(groups: Sequence[SavedGroup], changes: Sequence[float], verb: str | None) -> Example:
  """The saved question that shows the result most clearly, with the counts of all questions."""

  def change(group: SavedGroup) -> float:
    start, end = (_by_name(group)[LABELS[key]].score or 0.0 for key in (START_GREEDY, END_GREEDY))
    return end - start

  sign = {"rose": 1, "fell": -1}.get(verb or "", 0)
  group = max(groups, key=lambda g: sign * change(g) if sign else -abs(change(g)))
  goal = _GOALS[str(verb)] if sign * change(group) > 0 else "the smallest change"
  note = f"The example has {goal} among the {len(groups)} questions below."
  if changes:
    rose, fell = (sum(sign * value > 0 for value in changes) for sign in (1, -1))
    note = (
      f"Of {len(changes):,} questions the score rose on {rose:,}, fell on {fell:,} and stayed "
      f"equal on {len(changes) - rose - fell:,}. {note}"
    )
  start, end = (_by_name(group)[LABELS[key]] for key in (START_GREEDY, END_GREEDY))
  answers = [("Start", start), ("End", end)]
  return Example("Held-out question", group, prompt_images(group), answers, note)


def _by_name(group: SavedGroup) -> Mapping[str, SavedRollout]:
  return {rollout.name: rollout for rollout in group.rollouts}
