"""Saved groups of rollouts as plain values for the template."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spatial_jax.evaluate.results import LABELS, START_GREEDY
from spatial_jax.report.drawings import ImageView, OperationView, drawings, image_view
from spatial_jax.report.reward_card import RewardCard
from spatial_jax.rollout.saved_groups import SavedGroup, SavedRollout

_BLOCKS = re.compile(
  r"<(?:think|observe)>(?P<think>.*?)(?:</(?:think|observe)>|(?=```|<answer>)|\Z)"
  r"|Action:(?P<action>[^\n<`]*)"
  r"|```(?:json)?(?P<code>.*?)(?:```|\Z)"
  r"|<answer>(?P<answer>.*?)</answer>",
  re.DOTALL,
)


class Piece(NamedTuple):
  """A part of a response without its tags."""

  kind: str  # "think", "action", "code", "answer", or "plain" for everything else
  given: str  # first words that were given to the policy, "" if it sampled all of them
  text: str  # the other words


class TurnView(NamedTuple):
  """One turn of a response; an error is a code and its detail."""

  pieces: list[Piece]
  operations: list[OperationView]
  errors: list[tuple[str, str]]
  images: list[ImageView]


class RolloutView(NamedTuple):
  """One response."""

  saved: SavedRollout
  parts: str  # "0.91 accuracy + 0.20 format"; "" if there is one component or none
  end_reason: str  # in words
  tokens: int  # sampled
  turns: list[TurnView]


class GroupView(NamedTuple):
  """One question and its responses; `mean` is the mean reward of a training group."""

  saved: SavedGroup
  images: list[ImageView]
  mean: float | None
  rollouts: list[RolloutView]


class StepView(NamedTuple):
  """The saved groups of a training step, or of an evaluation."""

  step: int | None  # None for an evaluation
  scored: bool  # whether there are true answers
  compared: bool  # whether answers of the start are shown
  given: str  # first words that were given to the policy in some responses, "" for none
  true_boxes: bool  # whether true boxes are drawn
  groups: list[GroupView]


def step_view(groups: Sequence[SavedGroup], card: RewardCard | None) -> StepView:
  """What the template shows of one step.

  Args:
    groups: at least one, of one training step or of the evaluation.
    card: splits rewards into accuracy and format part; None leaves that out.
  """
  views = [group_view(group, card) for group in groups]
  rollouts = [rollout for view in views for rollout in view.rollouts]
  turns = [turn for rollout in rollouts for turn in rollout.turns]
  return StepView(
    step=groups[0].step,
    scored=groups[0].truth is not None,
    compared=any(rollout.saved.name == LABELS[START_GREEDY] for rollout in rollouts),
    given=next((p.given for turn in turns for p in turn.pieces if p.given), ""),
    true_boxes=any(image.true_boxes for turn in turns for image in turn.images),
    groups=views,
  )


def group_view(group: SavedGroup, card: RewardCard | None) -> GroupView:
  """What the template shows of one question; training rollouts are sorted by reward."""
  rewards = [r.reward for r in group.rollouts if r.valid and r.reward is not None]
  rollouts = [_rollout_view(rollout, group, card) for rollout in group.rollouts]
  if group.step is not None:
    rollouts.sort(key=lambda view: (not view.saved.valid, -(view.saved.reward or 0.0)))
  mean = float(np.mean(rewards)) if rewards and group.step is not None else None
  return GroupView(group, prompt_images(group), mean, rollouts)


def prompt_images(group: SavedGroup) -> list[ImageView]:
  """The images of the question."""
  trajectory = group.rollouts[0].trajectory
  images = enumerate(trajectory.images[: trajectory.prompt_images], 1)
  return [image_view(image.pixels, number, []) for number, image in images]


def pieces(text: str, prefix: str) -> list[Piece]:
  """Cuts the text of a turn; only tags and outer blanks are dropped.

      "<think> far </think> Action: Answer\\n<answer> 2 </answer>"
      -> think "far", action "Answer", answer "2"

  Args:
    text: of one turn, as the policy wrote it.
    prefix: given words that the text begins with, "" for none.
  """
  given = len(prefix) if text.startswith(prefix) else 0
  spans, end = [], 0
  for match in _BLOCKS.finditer(text):
    kind = str(match.lastgroup)
    spans += [("plain", end, match.start()), (kind, *match.span(kind))]
    end = match.end()
  spans.append(("plain", end, len(text)))
  cut = [(kind, start, min(max(start, given), stop), stop) for kind, start, stop in spans]
  return [
    Piece(kind, text[start:sampled].strip(), text[sampled:stop].strip())
    for kind, start, sampled, stop in cut
    if text[start:stop].strip()
  ]


def _rollout_view(rollout: SavedRollout, group: SavedGroup, card: RewardCard | None) -> RolloutView:
  trajectory = rollout.trajectory
  parts = " + ".join(f"{value:.2f} {name}" for name, value in rollout.parts.items())
  drawn = drawings(trajectory, group.boxes)
  turns = [
    TurnView(
      pieces=pieces(turn.text, "" if number else group.response_prefix),
      operations=drawn[number].operations,
      errors=[(error.code.replace("_", " "), error.detail) for error in turn.errors],
      images=drawn[number].images,
    )
    for number, turn in enumerate(trajectory.turns)
  ]
  end_reason = trajectory.end_reason.replace("_", " ")
  parts = parts if len(rollout.parts) > 1 else ""
  return RolloutView(rollout, parts, end_reason, int(trajectory.trained_T.sum()), turns)
