"""One self-contained HTML file about a run: a function of what lies in its work directory.

    metrics.jsonl ─► tiles, curves     results.json ─► table     rollouts/ ─► gallery
    config.json   ─► last section      RewardCard   ─► the reward card
    timeline.json ─► what slots and devices did in one step

Everything a model or a data set wrote is escaped by the template engine; the page loads nothing
from outside and runs no script.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from spatial_jax import metrics
from spatial_jax.errors import DataError
from spatial_jax.evaluate.results import Cell, Paired, ResultTable, read_results
from spatial_jax.report import plots
from spatial_jax.report.gallery import group_view
from spatial_jax.report.plots import RewardCard
from spatial_jax.rollout.profiling import TIMELINE
from spatial_jax.rollout.saved_groups import Group, load_groups

FILE = "report.html"

_HERE = pathlib.Path(__file__).parent
_ENDS = 0.1  # share of the steps at either end that a tile averages


@dataclasses.dataclass(frozen=True)
class About:
  """The head of the page.

  Attributes:
    title: what was done, one line.
    summary: what this is and how to read it, a few sentences of plain text.
    facts: ("policy", "Qwen2.5-VL, 4.1 M parameters"), ...
  """

  title: str
  summary: str
  facts: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Tile:
  """One number at the top: `value` large, `before` (where it came from) small."""

  label: str
  value: str
  before: str


def write_report(
  workdir: str | os.PathLike[str], about: About, card: RewardCard | None, groups_per_step: int
) -> pathlib.Path:
  """Writes `workdir/report.html` from whatever the work directory holds.

  Args:
    workdir: with metrics.jsonl, results.json, rollouts/, config.json; each may be missing, and its
      section is left out.
    about: head of the page.
    card: how the run rewards, None to leave the reward card out.
    groups_per_step: groups of rollouts shown of the first and of the last step that were kept, or
      of an evaluation.

  Returns:
    The file.

  Raises:
    UserError: I/O, naming a file of the work directory that cannot be read.
  """
  workdir = pathlib.Path(workdir)
  records, table = metrics.read(workdir), read_results(workdir)
  config = workdir / "config.json"
  page = _template().render(
    about=about,
    tiles=tiles(records, table),
    table=table,
    scale=interval_scale(table) if table else None,
    curves=plots.curves(records),
    not_finite=not_finite(records),
    timeline=_timeline_view(workdir),
    card=_card_view(card) if card else None,
    gallery=[_step_view(groups) for groups in load_groups(workdir, groups_per_step) if groups],
    config=config.read_text(encoding="utf-8") if config.exists() else None,
    css=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
  )
  path = workdir / FILE
  partial = path.with_suffix(".partial")
  # A lone surrogate in model text has no UTF-8 form; the page shows a question mark.
  partial.write_text(page, encoding="utf-8", errors="replace")
  return partial.replace(path)


def tiles(records: Sequence[dict[str, Any]], table: ResultTable | None) -> list[Tile]:
  """The numbers at the top: required differences, then means of the first and the last tenth.

  Rewards of different sharpness do not compare: theirs is left out where it moved.
  """
  found = [
    Tile(paired.label, _signed(paired.mean), f"95 % {_range(paired)}")
    for paired in (table.paired if table else ())
    if paired.required
  ][:2]
  moved = len({r.get("sharpness") for r in records}) > 1
  means = (("score", "sampled score"), *(() if moved else (("reward", "reward"),)))
  for key, label in means:
    if values := [r[key] for r in records if r.get(key) is not None]:
      count = max(1, round(_ENDS * len(values)))
      first, last = np.mean(values[:count]), np.mean(values[-count:])
      found.append(Tile(f"{label} in training", f"{last:.2f}", f"from {first:.2f}"))
  if speeds := [r["tokens_per_s"] for r in records if r.get("tokens_per_s") is not None]:
    found.append(Tile("tokens per second", f"{np.median(speeds):,.0f}", "sampled, median step"))
  if records:
    found.append(Tile("steps", str(records[-1]["step"] + 1), _hours(records)))
  return found


def not_finite(records: Sequence[dict[str, Any]]) -> list[tuple[str, list[int]]]:
  """(name, steps) of every metric that was NaN or infinite somewhere."""
  found: dict[str, list[int]] = {}
  for record in records:
    for name in record.get(metrics.NOT_FINITE, ()):
      found.setdefault(name, []).append(record["step"])
  return sorted(found.items())


def interval_scale(table: ResultTable) -> tuple[float, float]:
  """(low, high) of all intervals in the table, a little widened: the axis of its small plots."""
  rows = [row.cells for row in (*table.rows, *table.summary)] + [table.overall]
  cells = [cell for cells in rows for cell in cells.values()]
  low = min((cell.low for cell in cells), default=0.0)
  high = max((cell.high for cell in cells), default=1.0)
  margin = 0.05 * (high - low) + 1e-6
  return low - margin, high + margin


def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {"signed": _signed, "range": _range, "place": _place}
  return environment.get_template("report.html.jinja")


def _card_view(card: RewardCard) -> dict[str, Any]:
  schedule = card.reward.schedule
  ends = {"k_min": schedule.k_min, "now": card.sharpness, "k_max": schedule.k_max}
  wrong = [(name, float(k), card.wrong_choice(float(k))) for name, k in ends.items()]
  return {
    "reward": plots.reward_figure(card),
    "advantage": plots.advantage_figure(card),
    "wrong_choice": wrong[1:] if schedule.kind == "constant" else wrong,
    "constant": card.reward.discrete_sharpness is not None or card.reward.choice == "exact",
    "alpha": card.advantage.alpha,
    "sharpness": card.sharpness,
  }


def _timeline_view(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The rollouts of the last step whose timeline was kept."""
  path = workdir / TIMELINE
  if not path.exists():
    return None
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
    return {"step": record["step"], "figure": plots.timeline_figure(record)}
  except (KeyError, ValueError) as error:
    raise DataError(f"{path} cannot be read ({error!r}); delete it") from error


def _step_view(groups: Sequence[Group]) -> dict[str, Any]:
  scored = groups[0].truth is not None
  return {"step": groups[0].step, "scored": scored, "groups": [group_view(g) for g in groups]}


def _signed(value: float, digits: int = 3) -> str:
  rounded = round(value, digits) + 0.0  # never "-0.00"
  return f"{rounded:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _range(cell: Cell | Paired) -> str:
  ends = (f"{value:.2f}".replace("-", "\N{MINUS SIGN}") for value in (cell.low, cell.high))
  return " to ".join(ends)


def _place(value: float, scale: tuple[float, float]) -> str:
  """Where `value` lies on the scale, as a CSS percentage."""
  return f"{100 * (value - scale[0]) / (scale[1] - scale[0]):.2f}%"


def _hours(records: Sequence[dict[str, Any]]) -> str:
  """The time of all sittings: `time_s` starts anew with each."""
  times = [record["time_s"] for record in records if "time_s" in record]
  ends = [a for a, b in zip(times, [*times[1:], 0.0], strict=True) if b < a]
  return f"in {metrics.duration(sum(ends))}" if ends else ""
