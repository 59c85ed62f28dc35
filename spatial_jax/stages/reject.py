"""Reflective rejection sampling: sample, keep what is right and reflects, fine-tune on it.

    kept = correct  AND  every operation executable  AND  reflective (Eq. 5)

The cold-start filter is the same without reflection, and with at least three turns.

Source: ViLaSR (arXiv:2506.09965, Eq. 5-6, section on cold start).
"""

import dataclasses
import pathlib
from collections import Counter

from spatial_jax.config import check_field, check_number, check_whole
from spatial_jax.reward.reflection import is_reflective
from spatial_jax.stages.collect import Row, row_of
from spatial_jax.stages.sft import ImitationConfig
from spatial_jax.types import Prompts, Rollouts, Scores, Trajectory

TESTS = ("sampled", "correct", "executable", "reflective", "long_enough", "kept")


@dataclasses.dataclass(frozen=True)
class KeepConfig:
  """Which rollouts are kept."""

  min_score: float  # the score is above it, in [0, 1)
  executable: bool  # the format is right and every operation was drawn
  reflective: bool
  min_turns: int
  per_task: int  # rollouts of one task that are kept at most, the best first

  def __post_init__(self):
    check_number(self, "min_score", at_least=0, below=1)
    check_whole(self, "min_turns", "per_task", at_least=1)
    for name in ("executable", "reflective"):
      check_field(self, name, isinstance(vars(self)[name], bool), "be True or False")


@dataclasses.dataclass(frozen=True)
class RejectConfig:
  """The config of a stage of rejection sampling."""

  path: str  # rows.jsonl of an earlier sampling, which is used again; "": sample
  tasks: int  # that are sampled, `rollout.group` rollouts each
  keep: KeepConfig
  train: ImitationConfig  # on the kept rows

  def __post_init__(self):
    check_whole(self, "tasks", at_least=1)


def keep(
  cfg: KeepConfig, prompts: Prompts, rollouts: Rollouts, scores: Scores, folder: pathlib.Path
) -> tuple[list[Row], Counter]:
  """The rows of the rollouts that pass, and counts by (question type, test); see `collect.Keep`."""
  rows: list[Row] = []
  counts: Counter = Counter()
  for b, (prompt, group) in enumerate(zip(prompts, rollouts, strict=True)):
    name, passed = prompt.task.question_type, []
    counts.update({(name, test): 0 for test in TESTS})
    for g, trajectory in enumerate(group):
      if not scores.valid_BG[b, g]:
        continue
      value = float(scores.score_BG[b, g])
      tests = passes(cfg, trajectory, value, bool(scores.format_BG[b, g] == 1.0))
      counts.update((name, test) for test in ("sampled", *(t for t, ok in tests.items() if ok)))
      if all(tests.values()):
        passed.append((value, g, trajectory))
    best = sorted(passed, key=lambda one: (-one[0], one[1]))[: cfg.per_task]
    counts[name, "kept"] += len(best)
    rows += [
      row_of(prompt.task, f"{prompt.task.task_id}#{g}", folder, {"turns": trajectory})
      for _, g, trajectory in best
    ]
  return rows, counts


def passes(
  cfg: KeepConfig, trajectory: Trajectory, score: float, executable: bool
) -> dict[str, bool]:
  """The result of each test; a test that the config switches off is passed by all."""
  answered = trajectory.end_reason == "answer"
  return {
    "correct": answered and score > cfg.min_score,
    "executable": not cfg.executable or executable,
    "reflective": not cfg.reflective or is_reflective(trajectory.turns),
    "long_enough": len(trajectory.turns) >= cfg.min_turns,
  }


def best_and_worst(
  min_gap: float, prompts: Prompts, rollouts: Rollouts, scores: Scores, folder: pathlib.Path
) -> tuple[list[Row], Counter]:
  """One pair per task for DPO: the response of the highest and of the lowest reward.

  Both ended with an answer. Arguments and result as in `collect.Keep`.
  """
  rows: list[Row] = []
  counts: Counter = Counter()
  for b, (prompt, group) in enumerate(zip(prompts, rollouts, strict=True)):
    name = prompt.task.question_type
    usable = [
      (float(scores.reward_BG[b, g]), trajectory)
      for g, trajectory in enumerate(group)
      if scores.valid_BG[b, g] and trajectory.end_reason == "answer"
    ]
    counts[name, "sampled"] += len(group)
    if not usable:
      continue
    best, worst = max(usable, key=lambda one: one[0]), min(usable, key=lambda one: one[0])
    if best[0] - worst[0] > min_gap:
      counts[name, "kept"] += 1
      responses = {"turns": best[1], "rejected": worst[1]}
      row = row_of(prompt.task, prompt.task.task_id, folder, responses)
      rows.append(row)
  return rows, counts
