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
  """One rollout of a group with its scores.

  Attributes:
    trajectory: the rollout.
    answer: what it answered, None without an answer.
    reward, score: as in `Scores`; None if the true answer is unknown.
    advantage: None if no update uses the rollout.
    format, valid: as in `Scores`.
    greedy: every token was the most likely one; otherwise tokens were sampled.
  """

  trajectory: Trajectory
  answer: str | None
  reward: float | None
  advantage: float | None
  score: float | None
  format: float
  valid: bool
  greedy: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class SavedGroup:
  """One question and its rollouts.

  Attributes:
    step: training step; None in an evaluation.
    task_id, question_type, question, options: of the task.
    truth: the true answer; None if it is unknown.
    rollouts: of the question.
  """

  step: int | None
  task_id: str
  question_type: str
  question: str
  options: tuple[str, ...]
  truth: str | None
  rollouts: tuple[SavedRollout, ...]


def make_saved_groups(
  prompts: Prompts,
  rollouts: Rollouts,
  scores: Scores,
  advantages_BG: np.ndarray | None,
  step: int | None,
  greedy: Sequence[bool] = (),
) -> list[SavedGroup]:
  """Returns one group per prompt.

  Args:
    prompts, rollouts, scores: of a training step or an evaluation.
    advantages_BG: of a training step; None in an evaluation.
    step: training step; None in an evaluation.
    greedy: for each rollout of a group, whether it is greedy; (): none is.
  """
  return [
    SavedGroup(
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
          score=float(scores.score_BG[b, g]),
          format=float(scores.format_BG[b, g]),
          valid=bool(scores.valid_BG[b, g]),
          greedy=g < len(greedy) and greedy[g],
        )
        for g, trajectory in enumerate(rollouts[b])
      ),
    )
    for b, prompt in enumerate(prompts)
  ]


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
    for index, rollout in enumerate(group.rollouts):
      trajectory_lib.save(rollout.trajectory, folder / f"{number}_sample_{index}.json")
    record = vars(group) | {"rollouts": [dict(vars(rollout)) for rollout in group.rollouts]}
    for fields in record["rollouts"]:
      del fields["trajectory"]
    (folder / f"{number}.json").write_text(json.dumps(record), encoding="utf-8")


def load_groups(workdir: str | os.PathLike[str], per_step: int) -> list[list[SavedGroup]]:
  """Reads groups of the first and the last saved step, and of the evaluation.

  Args:
    workdir: of the run.
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
    return SavedGroup(**record | {"rollouts": rollouts, "options": tuple(record["options"])})
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f"{path} is not a group of rollouts ({error}); remove {folder}") from error
