"""Groups of rollouts that a run saves for the report.

workdir/rollouts/000120/0.json            one question: task, rewards, answers
workdir/rollouts/000120/0_sample_3.json   one rollout of it, see trajectory.py
workdir/rollouts/000120/images/           the images of the rollouts of this step
workdir/rollouts/evaluation/...           the same for an evaluation
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spatial_jax.errors import DataError
from spatial_jax.reward.format import final_answer, format_reward
from spatial_jax.rollout import trajectory as trajectory_lib
from spatial_jax.types import Prompt, Prompts, Rollouts, Scores, Trajectory
from spatial_jax.workdir import write_text

FOLDER = "rollouts"
EVALUATION = "evaluation"


@dataclasses.dataclass(frozen=True, eq=False)
class SavedRollout:
  """One rollout of a group; reward and score as in `Scores`, None without a true answer."""

  trajectory: Trajectory
  name: str  # "sample 3", "start, greedy"
  answer: str | None  # None without an answer
  reward: float | None
  score: float | None
  advantage: float | None  # None if no update uses the rollout
  format: float
  valid: bool  # False after a fault
  parts: dict[str, float]  # component of the reward -> weight * value after the gate


class TrueBox(NamedTuple):
  """Where an object of the question is; `image` counts from 0."""

  label: str
  image: int
  box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the resized image


@dataclasses.dataclass(frozen=True, eq=False)
class SavedGroup:
  """One question and its rollouts."""

  step: int | None  # of training; None in an evaluation
  task_id: str
  question_type: str
  question: str
  options: tuple[str, ...]
  truth: str | None  # None if unknown
  boxes: tuple[TrueBox, ...]
  response_prefix: str  # the given beginning of every response, "" for none
  rollouts: tuple[SavedRollout, ...]


def make_saved_groups(
  prompts: Prompts,
  rollouts: Rollouts,
  scores: Scores | None,
  advantages_BG: np.ndarray | None = None,
  step: int | None = None,
  names: Sequence[str] = (),
  response_prefix: str = "",
) -> list[SavedGroup]:
  """Returns one group per prompt.

  Args:
    prompts, rollouts: of a training step, an evaluation or a question by hand.
    scores: None without true answers.
    advantages_BG: of a training step, else None.
    step: training step, else None.
    names: of the rollouts of a group; (): "sample 1", ...
    response_prefix: of the conversation.
  """
  groups = []
  for b, (prompt, group) in enumerate(zip(prompts, rollouts, strict=True)):
    saved = [
      SavedRollout(
        trajectory=trajectory,
        name=names[g] if names else f"sample {trajectory.sample + 1}",
        answer=final_answer(trajectory),
        reward=None if scores is None else float(scores.reward_BG[b, g]),
        score=None if scores is None else float(scores.score_BG[b, g]),
        advantage=None if advantages_BG is None else float(advantages_BG[b, g]),
        format=format_reward(trajectory),
        valid=trajectory.end_reason != "fault" and (scores is None or bool(scores.valid_BG[b, g])),
        parts=_parts(scores, b, g),
      )
      for g, trajectory in enumerate(group)
    ]
    task = prompt.task
    groups.append(
      SavedGroup(
        step=step,
        task_id=task.task_id,
        question_type=task.question_type,
        question=task.question,
        options=task.options or (),
        truth=task.answer or None,
        boxes=_true_boxes(prompt),
        response_prefix=response_prefix,
        rollouts=tuple(saved),
      )
    )
  return groups


def _parts(scores: Scores | None, b: int, g: int) -> dict[str, float]:
  """What each component adds to a reward."""
  if scores is None:
    return {}
  return {name: scores.weights[name] * float(v[b, g]) for name, v in scores.terms.items()}


def _true_boxes(prompt: Prompt) -> tuple[TrueBox, ...]:
  """The boxes of the task, scaled from its images to the resized ones."""
  boxes = []
  for box in prompt.task.boxes:
    height, width = prompt.original_sizes[box.image]
    resized = prompt.images[box.image].pixels
    x, y = resized.shape[1] / width, resized.shape[0] / height
    x1, y1, x2, y2 = box.box_4
    boxes.append(TrueBox(box.label, box.image, (x * x1, y * y1, x * x2, y * y2)))
  return tuple(boxes)


def most_drawings_first(groups: list[SavedGroup], count: int) -> list[SavedGroup]:
  """Returns the `count` groups in which most rollouts drew."""
  drew = [
    sum(any(turn.produced for turn in r.trajectory.turns) for r in group.rollouts)
    for group in groups
  ]
  order = sorted(range(len(groups)), key=lambda i: -drew[i])
  return [groups[i] for i in order[:count]]


def save_groups(groups: list[SavedGroup], workdir: str | os.PathLike[str]) -> None:
  """Writes the groups of one step; saving a step again, after a resume, replaces it."""
  for number, group in enumerate(groups):
    name = EVALUATION if group.step is None else f"{group.step:06d}"
    folder = pathlib.Path(workdir) / FOLDER / name
    if number == 0:
      shutil.rmtree(folder, ignore_errors=True)
    for index, rollout in enumerate(group.rollouts):
      trajectory_lib.save(rollout.trajectory, folder / f"{number}_sample_{index}.json")
    rollouts = [
      {key: value for key, value in vars(rollout).items() if key != "trajectory"}
      for rollout in group.rollouts
    ]
    boxes = [box._asdict() for box in group.boxes]
    record = vars(group) | {"rollouts": rollouts, "boxes": boxes}
    write_text(folder / f"{number}.json", json.dumps(record))


def load_groups(workdir: str | os.PathLike[str], per_step: int) -> list[list[SavedGroup]]:
  """Reads groups of the first and the last saved step, and of the evaluation.

  Args:
    per_step: maximum number of groups per step.

  Returns:
    A list of groups for each of the three that exists.

  Raises:
    DataError: if a file cannot be read; the message names it.
  """
  root = pathlib.Path(workdir) / FOLDER
  steps = sorted(root.glob("[0-9]*"), key=lambda path: int(path.name))
  shown = steps[:1] + steps[1:][-1:] + list(root.glob(EVALUATION))
  return [[_load(folder, number) for number in _numbers(folder)[:per_step]] for folder in shown]


def _numbers(folder: pathlib.Path) -> list[int]:
  return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal())


def _load(folder: pathlib.Path, number: int) -> SavedGroup:
  path = folder / f"{number}.json"
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
    rollouts = tuple(
      SavedRollout(trajectory_lib.load(folder / f"{number}_sample_{index}.json"), **fields)
      for index, fields in enumerate(record["rollouts"])
    )
    boxes = tuple(TrueBox(b["label"], b["image"], tuple(b["box"])) for b in record["boxes"])
    options = tuple(record["options"])
    return SavedGroup(**record | {"rollouts": rollouts, "options": options, "boxes": boxes})
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f"{path} is not a group of rollouts ({error}); remove {folder}") from error
