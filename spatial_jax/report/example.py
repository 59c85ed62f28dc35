"""The example at the head of the page: one question with its image and its answers."""

from collections.abc import Sequence
from typing import NamedTuple

from spatial_jax.report import wording
from spatial_jax.report.drawings import ImageView
from spatial_jax.report.gallery import prompt_images
from spatial_jax.report.predictions import Answers
from spatial_jax.rollout.saved_groups import SavedGroup


class Example(NamedTuple):
  """One question.

  Attributes:
    where: "held-out question", "training question of step 50".
    question_type, question, options, truth: of the task.
    images: of the question.
    answers: (who, answer, score), answer and score None if there is none.
    note: how the example was chosen, "" if nothing was chosen.
  """

  where: str
  question_type: str
  question: str
  options: tuple[str, ...]
  truth: str | None
  images: list[ImageView]
  answers: list[tuple[str, str | None, float | None]]
  note: str


def choose_example(
  steps: Sequence[Sequence[SavedGroup]], answers: Answers, verb: str | None
) -> Example | None:
  """A held-out question that start and end answered, else one of the evaluation, else of training.

  Args:
    steps: saved groups of several steps, in order.
    answers: of the start and of the end.
    verb: the result: "rose", "fell" or "did not change"; the example does the same if one can.
  """
  groups = [group for groups in steps for group in groups]
  held_out = [group for group in groups if group.step is None]
  both = [g for g in held_out if g.task_id in answers.start and g.task_id in answers.end]
  if both:
    return _compared(both, answers, verb)
  if held_out:
    where = "Held-out question" if held_out[0].truth is not None else "Question"
    rollouts = [(r, "greedy" if r.greedy else "sampled") for r in held_out[0].rollouts[:3]]
    found = [(f"Answer, {way}", r.answer, r.score) for r, way in rollouts]
    return _example(held_out[0], where, found, "")
  trained = [groups for groups in steps if groups]
  if not trained:
    return None
  group = trained[-1][0]
  best = max(group.rollouts, key=lambda r: r.reward or 0.0)
  found = [(f"Best answer of {len(group.rollouts)} rollouts", best.answer, best.score)]
  return _example(group, f"Training question of step {group.step}", found, "")


def _compared(groups: Sequence[SavedGroup], answers: Answers, verb: str | None) -> Example:
  """The saved question that shows the result most clearly, with the counts of all questions."""
  ids = [task_id for task_id in answers.start if task_id in answers.end]
  change = {i: answers.end[i].score - answers.start[i].score for i in ids}
  rose, fell = (sum(sign * value > 0 for value in change.values()) for sign in (1, -1))
  ranks = {
    "rose": lambda group: -change[group.task_id],
    "fell": lambda group: change[group.task_id],
  }
  group = min(groups, key=ranks.get(verb or "", lambda group: abs(change[group.task_id])))
  start, end = answers.start[group.task_id], answers.end[group.task_id]
  found: list[tuple[str, str | None, float | None]]
  found = [("Start", start.answer, start.score), ("End", end.answer, end.score)]
  note = (
    f"Of {len(ids):,} questions the score rose on {rose:,}, fell on {fell:,} and stayed equal on "
    f"{len(ids) - rose - fell:,}. {_choice(len(groups), change[group.task_id], verb)}"
  )
  return _example(group, "Held-out question", found, note)


def _choice(count: int, change: float, verb: str | None) -> str:
  if verb == "rose" and change > 0:
    return f"The example has the largest rise among {count} saved questions."
  if verb == "fell" and change < 0:
    return f"The example has the largest fall among {count} saved questions."
  return f"The example has the smallest change among {count} saved questions."


def _example(
  group: SavedGroup, where: str, answers: list[tuple[str, str | None, float | None]], note: str
) -> Example:
  return Example(
    where=where,
    question_type=wording.type_name(group.question_type),
    question=group.question,
    options=group.options,
    truth=group.truth,
    images=prompt_images(group),
    answers=answers,
    note=note,
  )
