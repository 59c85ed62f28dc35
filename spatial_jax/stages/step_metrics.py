"""Statistics of the rollouts of one step."""

from collections import Counter
from typing import Any

import numpy as np

from spatial_jax.drawing.termination import END_REASONS
from spatial_jax.reward.reflection import reflections
from spatial_jax.types import Rollouts, Scores


def summarise(rollouts: Rollouts, scores: Scores, advantages_BG: np.ndarray) -> dict[str, float]:
  """Statistics of one step: means over valid rollouts, a share of groups, the number of faults."""
  valid_BG = scores.valid_BG

  def mean(values_BG: Any) -> float:
    return float(np.asarray(values_BG, np.float32)[valid_BG].mean()) if valid_BG.any() else 0.0

  def of_each(measure: Any) -> float:
    return mean([[measure(trajectory) for trajectory in group] for group in rollouts])

  def count(tool: str) -> float:
    return of_each(lambda t: sum(o.tool == tool for turn in t.turns for o in turn.operations))

  ends = Counter(t.end_reason for group in rollouts for t in group)
  total = max(sum(ends.values()), 1)
  components = {k: v for k, v in scores.components.items() if k not in ("accuracy", "score")}
  return {
    "reward": mean(scores.reward_BG),
    "reward_std": reward_std(scores),
    "accuracy": mean(scores.accuracy_BG),
    "score": mean(scores.score_BG),
    "parsed": mean(scores.parsed_BG),
    **{name: mean(value_BG) for name, value_BG in components.items()},
    "drawing_share": of_each(lambda t: any(turn.produced for turn in t.turns)),
    "boxes": count("box"),
    "lines": count("line"),
    "reflections": of_each(lambda t: reflections(t.turns)),
    "turns": of_each(lambda t: len(t.turns)),
    "response_tokens": of_each(lambda t: t.trained_T.sum()),
    "zero_variance_groups": zero_variance_share(scores),
    "advantage_abs": mean(np.abs(advantages_BG)),
    "faults": float((~valid_BG).sum()),
    **{f"end_{reason}": ends[reason] / total for reason in END_REASONS},
  }


def reward_std(scores: Scores) -> float:
  """Mean standard deviation of the valid rewards of a group, over groups with at least two."""
  return _mean([float(np.std(reward_G)) for reward_G in _usable_rewards(scores)])


def zero_variance_share(scores: Scores) -> float:
  """Share of the groups with at least two valid rollouts whose rewards are (nearly) equal."""
  return _mean([float(np.std(reward_G) < 0.01) for reward_G in _usable_rewards(scores)])


def has_variance(scores: Scores) -> np.ndarray:
  """bool [B]: groups whose valid rewards differ."""
  groups = zip(np.asarray(scores.reward_BG), scores.valid_BG, strict=True)
  return np.array(
    [np.ptp(reward_G[valid_G]) > 0 if valid_G.any() else False for reward_G, valid_G in groups]
  )


def _usable_rewards(scores: Scores) -> list[np.ndarray]:
  """The valid rewards of each group with at least two."""
  groups = zip(np.asarray(scores.reward_BG), scores.valid_BG, strict=True)
  return [reward_G[valid_G] for reward_G, valid_G in groups if valid_G.sum() > 1]


def _mean(values: list[float]) -> float:
  return float(np.mean(values)) if values else 0.0
