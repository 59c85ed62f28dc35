"""Rollouts worth looking at: kept beside a run, and laid out for the page.

workdir/rollouts/000120/0.json            one question: what was asked, rewards, answers
workdir/rollouts/000120/0_sample_3.json   its rollouts, see trajectory.py
workdir/rollouts/000120/images/           their pictures
workdir/rollouts/evaluation/...           the same of an evaluation
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from spatial_jax.errors import DataError
from spatial_jax.reward.format import final_answer
from spatial_jax.rollout import trajectory as trajectory_lib
from spatial_jax.types import Prompts, Rollouts, Scores, Trajectory

FOLDER = "rollouts"


EVALUATION = "evaluation"


@dataclasses.dataclass(frozen=True, eq=False)
class SavedRollout:
  """One rollout of a group with what it earned; fields as in `Scores`.

  Attributes:
    reward, hard: None where nobody knows the truth.
    advantage: None where nothing is learnt from it.
    greedy: the likeliest token each time; else sampled.
  """

  trajectory: Trajectory
  answer: str | None
  reward: float | None
  advantage: float | None
  score_: float | None
  format: float
  valid: bool
  greedy: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """One question and the rollouts that answered it.

  Attributes:
    step: of training; None in an evaluation.
    truth: the right answer; None where nobody knows it.
  """

  step: int | None
  task_id: str
  question_type: str
  question: str
  options: tuple[str, ...]
  truth: str | None
  rollouts: tuple[SavedRollout, ...]


def groups_of(
  prompts: Prompts,
  rollouts: Rollouts,
  scores: Scores,
  advantages_BG: np.ndarray | None,
  step: int | None,
  greedy: Sequence[bool] = (),
) -> list[Group]:
  """One group per prompt, of a training step or (without advantages and step) an evaluation.

  `greedy` says which rollouts took no chances; (): none.
  """
  return [
    Group(
      step=step,
      task_id=prompt.task.task_id,
      question_type=prompt.task.question_type,
      question=prompt.task.question,
      options=prompt.task.options or (),
      truth=prompt.task.answer,
      rollouts=tuple(
        SavedRollout(
          trajectory=trajectory,
          answer=final_answer(trajectory),
          reward=float(scores.reward_BG[b, g]),
          advantage=None if advantages_BG is None else float(advantages_BG[b, g]),
          score_=float(scores.score_BG[b, g]),
          format=float(scores.format_BG[b, g]),
          valid=bool(scores.valid_BG[b, g]),
          greedy=g < len(greedy) and greedy[g],
        )
        for g, trajectory in enumerate(rollouts[b])
      ),
    )
    for b, prompt in enumerate(prompts)
  ]


def most_drawings_first(groups: list[Group], count: int) -> list[Group]:
  """The groups in which most rollouts drew, `count` of them: what is worth looking at."""
  drew = [
    sum(any(turn.produced for turn in s.trajectory.turns) for s in group.rollouts)
    for group in groups
  ]
  order = sorted(range(len(groups)), key=lambda i: -drew[i])
  return [groups[i] for i in order[:count]]


def save_groups(groups: list[Group], workdir: str | os.PathLike[str]) -> None:
  """Keeps the groups of one step; saving a step again (after a resume) replaces it."""
  for number, group in enumerate(groups):
    name = EVALUATION if group.step is None else f"{group.step:06d}"
    folder = pathlib.Path(workdir) / FOLDER / name
    for index, sibling in enumerate(group.rollouts):
      trajectory_lib.save(sibling.trajectory, folder / f"{number}_sample_{index}.json")
    record = vars(group) | {"rollouts": [dict(vars(sibling)) for sibling in group.rollouts]}
    for sibling in record["rollouts"]:
      del sibling["trajectory"]
    (folder / f"{number}.json").write_text(json.dumps(record), encoding="utf-8")


def load_groups(workdir: str | os.PathLike[str], per_step: int) -> list[list[Group]]:
  """`per_step` groups of the first and of the last step that were kept, and of an evaluation.

  Returns:
    A list for each of these that there is.

  Raises:
    DataError: I/O, naming the file that cannot be read.
  """
  root = pathlib.Path(workdir) / FOLDER
  steps = sorted(root.glob("[0-9]*"), key=lambda path: int(path.name))
  shown = steps[:1] + steps[1:][-1:] + list(root.glob(EVALUATION))
  return [[_load(folder, number) for number in _numbers(folder)[:per_step]] for folder in shown]


def _numbers(folder: pathlib.Path) -> list[int]:
  return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal())


def _load(folder: pathlib.Path, number: int) -> Group:
  path = folder / f"{number}.json"
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
    rollouts = tuple(
      SavedRollout(trajectory_lib.load(folder / f"{number}_sample_{index}.json"), **fields)
      for index, fields in enumerate(record["rollouts"])
    )
    return Group(**record | {"rollouts": rollouts, "options": tuple(record["options"])})
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f"{path} is not a group of rollouts ({error}); remove {folder}") from error
