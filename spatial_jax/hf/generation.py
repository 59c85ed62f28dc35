"""Reads generation_config.json: the tokens that end a turn, and the sampling values of a model.

The sampling values are those that its authors recommend for answers, not those of training.
"""

import dataclasses
import json
import pathlib
from typing import Any

from spatial_jax.checks import is_finite, is_whole
from spatial_jax.errors import DataError

FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Generation:
  """What a folder says about generation; None and (): nothing."""

  stop_ids: tuple[int, ...]  # token ids that end a turn
  temperature: float | None
  top_p: float | None
  top_k: int | None


NOTHING = Generation((), None, None, None)


def read_generation(folder: pathlib.Path) -> Generation:
  """Reads the file of a Hugging Face folder or a run; `NOTHING` without one.

  Raises:
    DataError: if the file cannot be read or a value has the wrong type; the message names both.
  """
  path = folder / FILE
  if not path.is_file():
    return NOTHING
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
    given = record.get("eos_token_id")
  except (OSError, ValueError, AttributeError) as error:
    raise DataError(f"{path} cannot be read ({error}); copy it again") from error
  ids = given if isinstance(given, list) else [] if given is None else [given]
  if not all(is_whole(one, 0) for one in ids):
    raise DataError(f"{path}: eos_token_id is {given!r} and must be a token id or a list of them")
  for key in ("temperature", "top_p", "top_k"):
    value = record.get(key)
    if value is not None and not (is_whole(value, 0) if key == "top_k" else is_finite(value)):
      raise DataError(f"{path}: {key} is {value!r} and must be a number")
  return Generation(tuple(ids), record.get("temperature"), record.get("top_p"), record.get("top_k"))


def to_hf(generation: Generation) -> dict[str, Any]:
  """Returns the keys of the file, for the work directory of a run."""
  record = {"eos_token_id": list(generation.stop_ids) or None} | dataclasses.asdict(generation)
  return {key: value for key, value in record.items() if value is not None and key != "stop_ids"}
