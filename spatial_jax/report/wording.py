"""Numbers, names and results in words."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from spatial_jax.evaluate import results
from spatial_jax.evaluate.results import Paired, ResultTable

MINUS = "\N{MINUS SIGN}"
ENDS = 0.1  # share of the steps at either end of a run that are averaged
FEW = 30  # a mean over fewer questions is drawn pale

_TYPES = {
  "object_counting": "number of objects",
  "object_abs_distance": "absolute distance between objects",
  "object_size_estimation": "size of an object",
  "room_size_estimation": "size of the room",
  "object_rel_distance": "relative distance between objects",
  "object_rel_direction_easy": "relative direction, easy",
  "object_rel_direction_medium": "relative direction, medium",
  "object_rel_direction_hard": "relative direction, hard",
  "obj_appearance_order": "order of appearance",
  "route_planning": "route planning",
  "camera_distance": "distance from the camera",
  "left_right": "left or right",
  "closer_to_camera": "closer to the camera",
}


def type_name(question_type: str) -> str:
  """A question type in words; an unknown one without underscores."""
  return _TYPES.get(question_type, question_type.replace("_", " "))


def signed(value: float, digits: int = 3) -> str:
  """ "+0.074", "−0.011", never "−0.000"."""
  rounded = round(value, digits) + 0.0
  return f"{rounded:+.{digits}f}".replace("-", MINUS)


def interval(paired: Paired) -> str:
  """ "+0.051 to +0.097"."""
  return f"{signed(paired.low)} to {signed(paired.high)}"


def typeset(label: str) -> str:
  """Text with true signs, and no line break before %: "end - start" -> "end − start"."""
  text = re.sub(r"(?<= )-(?=[ \d])", MINUS, label)
  return text.replace(" x ", " \N{MULTIPLICATION SIGN} ").replace(" %", "\N{NO-BREAK SPACE}%")


def findings(table: ResultTable) -> list[str]:
  """The other results of the evaluation, a sentence each.

  Sharpening is mentioned only if the sampled score rose.
  """
  by_pair = {(p.after, p.before): p for p in table.paired if p.measure == "score"}
  found = []
  compared = (results.END_GREEDY, results.START_GREEDY) in by_pair
  sampled = by_pair.get((results.END_SAMPLED, results.START_SAMPLED))
  if sampled and compared:
    found.append(f"The {results.describe(sampled, table)}.")
  best = by_pair.get((results.END_SAMPLED, results.START_BEST_TEMPERATURE))
  if sampled and best and sampled.low > 0:
    found.append(_sharpening(best, table))
  subject = "The greedy score at the end" if compared else "The greedy score"
  others = {
    results.START_FITTED: "that of the start times one fitted factor per question type",
    results.MEDIAN: "that of the median answer per question type",
    results.END_OTHER_IMAGE: "that of the same policy on images of other rooms",
  }
  for key, other in others.items():
    if paired := by_pair.get((results.END_GREEDY, key)):
      relation = {"rose": "is above", "fell": "is below"}.get(paired.verb, "does not differ from")
      found.append(f"{subject} {relation} {other} ({table.overall[key].mean:.3f}).")
  return found


def reward_sentence(records: Sequence[dict[str, Any]]) -> str | None:
  """Why the reward falls, None if the sharpness is constant."""
  ks = [r["sharpness"] for r in records if r.get("sharpness") is not None]
  if not ks or max(ks) - min(ks) < 1e-6 * max(map(abs, ks)):
    return None
  reward, score = (ends(records, key) for key in ("reward", "score"))
  first, last = f"{ks[0]:.3g}", f"{ks[-1]:.3g}"
  rises = f"the sharpness k rises from {first} to {last}, so the same error earns less"
  if reward and score and reward[1] < reward[0] and score[1] >= score[0]:
    return f"The reward falls from {reward[0]:.2f} to {reward[1]:.2f} because {rises}."
  return f"{rises.capitalize()}; rewards of different steps do not compare."


def ends(records: Sequence[dict[str, Any]], key: str) -> tuple[float, float] | None:
  """Means of a metric over the first and the last tenth of the steps, None without a value."""
  values = [record[key] for record in records if record.get(key) is not None]
  if not values:
    return None
  count = max(1, round(ENDS * len(values)))
  return float(np.mean(values[:count])), float(np.mean(values[-count:]))


def schedule_sentence(config: dict[str, Any]) -> str | None:
  """What the schedules did not reach, None if they ended with the run; `config` is config.json."""
  optimizer = config.get("learn", {}).get("optimizer", {})
  steps = config.get("loop", {}).get("steps")
  stage = "".join(config.get("stages", ()))  # of a run with several, each folder has one
  if stage in ("sft", "reject", "dpo"):
    part = config["reject"]["train"] if stage == "reject" else config[stage]
    optimizer, steps = part["optimizer"], part["steps"]
  warmup, total = optimizer.get("warmup_steps"), optimizer.get("total_steps")
  if None in (steps, warmup, total):
    return None
  if steps <= warmup:
    return (
      f"The learning rate warms up for {warmup} steps and the run has {steps}: it hardly moved."
    )
  if steps < total:
    return f"The schedules are made for {total} steps and the run has {steps}: they did not end."
  return None


def _sharpening(best: Paired, table: ResultTable) -> str:
  label = next(c.label for c in table.columns if c.key == results.START_BEST_TEMPERATURE)
  score = f"{table.overall[best.before].mean:.3f}"
  if best.low > 0:
    return (
      f"This is more than sharpening: the best temperature of the start gives {score} ({label})."
    )
  amount = "more" if best.high < 0 else "as much"
  return f"A lower temperature at the start gives {amount} without training: {score} ({label})."
