"""One self-contained HTML file about a run, made from the files of its work directory.

    results.json, predictions.jsonl ─► result, scores, differences
    metrics.jsonl                   ─► key figures, training curves
    rollouts/                       ─► example, gallery
    timeline.json                   ─► programs on the devices during one step
    config.json                     ─► last section
    RewardCard                      ─► reward and advantage

The template engine escapes every text of a model or a data set; the page loads nothing from
outside and runs no script.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from spatial_jax import metrics
from spatial_jax.errors import DataError
from spatial_jax.evaluate.results import (
  END_GREEDY,
  END_SAMPLED,
  MEDIAN,
  START_GREEDY,
  START_SAMPLED,
  ResultTable,
  headline,
  read_results,
  score_change,
)
from spatial_jax.report import curves, result_plots, timeline_plot, wording
from spatial_jax.report.example import choose_example, score_changes
from spatial_jax.report.gallery import step_view
from spatial_jax.report.reward_card import RewardCard, card_view
from spatial_jax.rollout.profiling import TIMELINE
from spatial_jax.rollout.saved_groups import load_groups
from spatial_jax.workdir import CONFIG, write_text

FILE = "report.html"

_HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class About:
  """The head of the page."""

  title: str  # of the run, one line
  summary: str  # what the run is, a few sentences of plain text
  facts: tuple[tuple[str, str], ...]  # ("policy", "Qwen2.5-VL, 4.1 M parameters"), ...


class KeyFigure(NamedTuple):
  """One number at the head of the page: `value` is large, `context` is small."""

  label: str
  value: str
  context: str


def write_report(
  workdir: str | os.PathLike[str], about: About, card: RewardCard | None, groups_per_step: int
) -> pathlib.Path:
  """Writes `workdir/report.html` from the files of the work directory.

  Args:
    workdir: with metrics.jsonl, results.json, predictions.jsonl, rollouts/, timeline.json and
      config.json; the section of a missing file is left out.
    about: head of the page.
    card: how the run rewards; None leaves the section out.
    groups_per_step: number of groups shown of the first saved step, of the last saved step, and of
      the evaluation.

  Returns:
    The path of the page.

  Raises:
    UserError: I/O: if a file of the work directory cannot be read; names the file.
  """
  workdir = pathlib.Path(workdir)
  records, table = metrics.read(workdir), read_results(workdir)
  steps = [groups for groups in load_groups(workdir, groups_per_step) if groups]
  steps.sort(key=lambda groups: groups[0].step is not None)  # the evaluation first
  config = _config_text(workdir)
  change = score_change(table) if table else None
  page = page_template("report.html.jinja").render(
    about=about,
    example=choose_example(steps, score_changes(workdir), change.verb if change else None),
    result=headline(table) if table else None,
    key_figures=key_figures(records, table),
    table=table,
    few=wording.FEW,
    findings=wording.findings(table) if table else [],
    dots=result_plots.dot_plot(table) if table else None,
    forest=result_plots.forest_plot(table.paired) if table else None,
    held_out=curves.held_out_panel(records),
    curves=curves.main_panels(records),
    further_curves=curves.further_panels(records),
    further_title=curves.further_title(records),
    not_finite=not_finite(records),
    schedule=_schedule(config),
    card=card_view(card) if card else None,
    gallery=[step_view(groups, card) for groups in steps],
    timeline=_timeline_view(workdir),
    config=config,
    css=style_sheet("report.css"),
  )
  # A lone surrogate in model text has no UTF-8 form; the page shows a question mark.
  write_text(workdir / FILE, page.encode("utf-8", "replace").decode("utf-8"))
  return workdir / FILE


def style_sheet(name: str) -> Markup:
  """Returns a style sheet of this folder, for the head of a page."""
  return Markup((_HERE / name).read_text(encoding="utf-8"))


def key_figures(records: Sequence[dict[str, Any]], table: ResultTable | None) -> list[KeyFigure]:
  """The numbers at the head: held-out scores, else the score in training; speed and duration."""
  found = []
  overall = table.overall if table else {}
  for label, key, start in (
    ("greedy score", END_GREEDY, START_GREEDY),
    ("sampled score", END_SAMPLED, START_SAMPLED),
  ):
    if key in overall:
      before = overall.get(start)
      context = f"from {before.mean:.2f} at the start" if before else "held-out questions"
      found.append(KeyFigure(label, f"{overall[key].mean:.2f}", context))
  if MEDIAN in overall:
    found.append(
      KeyFigure("median answer", f"{overall[MEDIAN].mean:.2f}", "baseline without images")
    )
  if not overall and (score := wording.ends(records, "score")):
    found.append(KeyFigure("score in training", f"{score[1]:.2f}", f"from {score[0]:.2f}, sampled"))
  if speeds := [r["tokens_per_s"] for r in records if r.get("tokens_per_s") is not None]:
    found.append(KeyFigure("tokens per second", f"{np.median(speeds):,.0f}", "median of the steps"))
  if records:
    found.append(KeyFigure("steps", f"{records[-1]['step'] + 1:,}", _duration(records)))
  return found


def not_finite(records: Sequence[dict[str, Any]]) -> list[tuple[str, list[int]]]:
  """(name, steps) of every metric that was NaN or infinite in a step."""
  found: dict[str, list[int]] = {}
  for record in records:
    for name in record.get(metrics.NOT_FINITE, ()):
      found.setdefault(name, []).append(record["step"])
  return sorted(found.items())


def page_template(name: str) -> jinja2.Template:
  """Returns a template of this folder; it escapes every text that it is given."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {
    "signed": wording.signed,
    "interval": wording.interval,
    "typeset": wording.typeset,
    "type_name": wording.type_name,
  }
  return environment.get_template(name)


def _config_text(workdir: pathlib.Path) -> str | None:
  path = workdir / CONFIG
  return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None


def _schedule(config: str | None) -> str | None:
  """A remark on schedules that did not end with the run."""
  try:
    return wording.schedule_sentence(json.loads(config)) if config else None
  except (ValueError, AttributeError, TypeError, KeyError):
    return None  # another form of config, which is shown as text


def _timeline_view(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The rollouts of the last step with a saved timeline."""
  path = workdir / TIMELINE
  if not path.exists():
    return None
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
    return {"step": record["step"], "figure": timeline_plot.timeline_figure(record)}
  except (KeyError, TypeError, ValueError) as error:
    raise DataError(f"{path} cannot be read ({error!r}); delete it") from error


def _duration(records: Sequence[dict[str, Any]]) -> str:
  """The time of the run; `time_s` starts anew each time the run is resumed."""
  times = [record["time_s"] for record in records if "time_s" in record]
  ends = [a for a, b in zip(times, [*times[1:], 0.0], strict=True) if b < a]
  return f"in {metrics.duration(sum(ends))}" if ends else ""
