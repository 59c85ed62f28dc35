"""Answers of the start and of the end to the held-out questions, from predictions.jsonl."""

import json
import pathlib
from typing import NamedTuple

from spatial_jax.errors import DataError
from spatial_jax.evaluate.results import END_GREEDY, PREDICTIONS, START_GREEDY


class GreedyAnswer(NamedTuple):
  """One prediction: fields as in `Prediction`, `text` of all turns."""

  answer: str | None
  score: float
  reward: float
  end_reason: str
  tokens: int
  text: str


class Answers(NamedTuple):
  """Greedy answers by task id; empty without an evaluation."""

  start: dict[str, GreedyAnswer]
  end: dict[str, GreedyAnswer]


def read_answers(workdir: pathlib.Path) -> Answers:
  """The greedy answers of predictions.jsonl, empty if the file does not exist.

  Raises:
    DataError: I/O: if a line is not a prediction.
  """
  path = workdir / PREDICTIONS
  columns: dict[str, dict[str, GreedyAnswer]] = {START_GREEDY: {}, END_GREEDY: {}}
  lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
  for number, line in enumerate(lines, 1):
    if not line:
      continue
    try:
      record = json.loads(line)
      if record["column"] in columns:
        fields = {name: record[name] for name in GreedyAnswer._fields}
        columns[record["column"]][record["task_id"]] = GreedyAnswer(**fields)
    except (ValueError, KeyError, TypeError) as error:
      raise DataError(
        f"{path} line {number} is not a prediction ({error!r}); delete the file and evaluate again"
      ) from error
  return Answers(columns[START_GREEDY], columns[END_GREEDY])
