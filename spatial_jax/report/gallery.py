"""Saved groups of rollouts as plain values for the template."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spatial_jax.report import wording
from spatial_jax.report.drawings import ImageView, OperationView, TrueBox, drawings, image_view
from spatial_jax.report.predictions import GreedyAnswer
from spatial_jax.report.response_text import Piece, pieces
from spatial_jax.report.reward_card import RewardCard
from spatial_jax.rollout.saved_groups import SavedGroup, SavedRollout


class TurnView(NamedTuple):
  """One turn of a response; an error is a code and its detail."""

  pieces: list[Piece]
  operations: list[OperationView]
  errors: list[tuple[str, str]]
  images: list[ImageView]


class RolloutView(NamedTuple):
  """One response.

  Attributes:
    name: "sample 3", "start, greedy".
    answer: None without an answer.
    reward, advantage, score: None if unknown.
    parts: accuracy and format part of the reward, None if unknown.
    right_format: of the response and all its drawings, None if unknown.
    end_reason: in words.
    tokens: number of sampled tokens.
    valid: False after a fault of the machinery.
    turns: in order.
  """

  name: str
  answer: str | None
  reward: float | None
  parts: tuple[float, float] | None
  advantage: float | None
  score: float | None
  right_format: bool | None
  end_reason: str
  tokens: int
  valid: bool
  turns: list[TurnView]


class GroupView(NamedTuple):
  """One question and its responses; `mean` is the mean reward of a training group."""

  question_type: str
  type_name: str
  task_id: str
  question: str
  options: tuple[str, ...]
  truth: str | None
  images: list[ImageView]
  mean: float | None
  rollouts: list[RolloutView]


class StepView(NamedTuple):
  """The saved groups of a training step, or of an evaluation.

  Attributes:
    step: None for an evaluation.
    scored: whether there are true answers.
    compared: whether answers of the start are shown.
    given: first words that were given to the policy in some of the responses, "" for none.
    true_boxes: whether true boxes are drawn.
    groups: one per question.
  """

  step: int | None
  scored: bool
  compared: bool
  given: str
  true_boxes: bool
  groups: list[GroupView]


def step_view(
  groups: Sequence[SavedGroup], card: RewardCard | None, start: dict[str, GreedyAnswer]
) -> StepView:
  """What the template shows of one step.

  Args:
    groups: at least one, of one training step or of the evaluation.
    card: splits rewards into accuracy and format part; None leaves that out.
    start: greedy answers of the start by task id, shown with the answers of an evaluation.
  """
  step = groups[0].step
  views = [group_view(g, card, start.get(g.task_id) if step is None else None) for g in groups]
  turns = [t for view in views for rollout in view.rollouts for t in rollout.turns]
  return StepView(
    step=step,
    scored=groups[0].truth is not None,
    compared=step is None and any(g.task_id in start for g in groups),
    given=next((p.given for t in turns for p in t.pieces if p.given), ""),
    true_boxes=any(image.true_boxes for t in turns for image in t.images),
    groups=views,
  )


def group_view(group: SavedGroup, card: RewardCard | None, start: GreedyAnswer | None) -> GroupView:
  """What the template shows of one question: texts are unescaped.

  Rollouts of training are sorted by reward; in an evaluation the start is first.
  """
  rewards = [r.reward for r in group.rollouts if r.valid and r.reward is not None]
  rollouts = [_rollout_view(r, group, card, compared=start is not None) for r in group.rollouts]
  if group.step is not None:
    rollouts.sort(key=lambda view: (not view.valid, -(view.reward or 0.0)))
  if start is not None:
    rollouts.insert(0, _start_view(start, group))
  return GroupView(
    question_type=group.question_type,
    type_name=wording.type_name(group.question_type),
    task_id=group.task_id,
    question=group.question,
    options=group.options,
    truth=group.truth,
    images=prompt_images(group),
    mean=float(np.mean(rewards)) if rewards and group.step is not None else None,
    rollouts=rollouts,
  )


def prompt_images(group: SavedGroup) -> list[ImageView]:
  """The images of the question."""
  trajectory = group.rollouts[0].trajectory
  images = enumerate(trajectory.images[: trajectory.prompt_images], 1)
  return [image_view(image.pixels, number, []) for number, image in images]


def _rollout_view(
  rollout: SavedRollout, group: SavedGroup, card: RewardCard | None, compared: bool
) -> RolloutView:
  trajectory = rollout.trajectory
  way = "greedy" if rollout.greedy else "sampled"
  name = f"sample {trajectory.sample + 1}"
  if group.step is None:
    name = f"end, {way}" if compared else way
  prefix = _response_prefix(group)
  turns = [
    TurnView(
      pieces=pieces(turn.text, "" if number else prefix),
      operations=drawn.operations,
      errors=[(error.code.replace("_", " "), error.detail) for error in turn.errors],
      images=drawn.images,
    )
    for number, (turn, drawn) in enumerate(
      zip(trajectory.turns, drawings(trajectory, _true_boxes(group)), strict=True)
    )
  ]
  return RolloutView(
    name=name,
    answer=rollout.answer,
    reward=rollout.reward,
    parts=_parts(rollout.reward, rollout.format, rollout.score, card),
    advantage=rollout.advantage,
    score=rollout.score,
    right_format=rollout.format > 0,
    end_reason=trajectory.end_reason.replace("_", " "),
    tokens=int(trajectory.trained_T.sum()),
    valid=rollout.valid,
    turns=turns,
  )


def _start_view(start: GreedyAnswer, group: SavedGroup) -> RolloutView:
  """The answer of the start; its drawings are not saved."""
  return RolloutView(
    name="start, greedy",
    answer=start.answer,
    reward=start.reward,
    parts=None,
    advantage=None,
    score=start.score,
    right_format=None,
    end_reason=start.end_reason.replace("_", " "),
    tokens=start.tokens,
    valid=start.end_reason != "fault",
    turns=[TurnView(pieces(start.text, _response_prefix(group)), [], [], [])],
  )


def _parts(
  reward: float | None, format_: float, score: float | None, card: RewardCard | None
) -> tuple[float, float] | None:
  """Accuracy and format part of a reward."""
  if card is None or reward is None or score is None:
    return None
  part = card.format_part(format_, score)
  return reward - part, part


def _response_prefix(group: SavedGroup) -> str:
  return str(vars(group).get("response_prefix") or "")


def _true_boxes(group: SavedGroup) -> list[TrueBox]:
  return [TrueBox(b["label"], b["image"], tuple(b["box"])) for b in vars(group).get("boxes") or ()]
