"""PhyX: scores per domain and reasoning type, from the predictions of an evaluation.

Source: PhyX (arXiv:2505.15929), its tables; how an answer is read and matched is in `reward.phyx`.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from spatial_jax.errors import DataError

# Of `predictions.GROUPS`; 25 subfields would be too many rows.
_GROUPS = ("category", "reasoning_type", "text_level")


def grouped_scores(predictions: pathlib.Path, column: str) -> dict[str, float]:
  """Mean score of each domain, reasoning type and text level; {} for tasks without them.

  Args:
    predictions: predictions.jsonl.
    column: of the table, "end_greedy".

  Raises:
    DataError: if a line is not a prediction.
  """
  if not predictions.exists():
    return {}
  try:
    lines = predictions.read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["column"] == column and row.get("extra")]
    scored = [(row["extra"], row["score"]) for row in rows if row["end_reason"] != "fault"]
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(
      f"{predictions} has a line that is no prediction ({error!r}); delete it and evaluate again"
    ) from error
  return scores_by_group(scored)


def scores_by_group(scored: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, float]:
  """Mean scores of pairs (extra of the task, score); a task may have several reasoning types."""
  found: dict[str, list[float]] = {}
  for extra, score in scored:
    for group in _GROUPS:
      value = extra.get(group)
      for name in value if isinstance(value, list | tuple) else [value]:
        if name:
          found.setdefault(f"{group.replace('_', ' ')}: {name}", []).append(score)
  return {name: sum(values) / len(values) for name, values in sorted(found.items())}
