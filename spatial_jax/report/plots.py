"""Figures of the report as inline SVG: training curves, the reward card."""

import dataclasses
import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from spatial_jax.learn.advantage import AdvantageConfig, ap_grpo, grpo
from spatial_jax.reward.accuracy import mean_relative_accuracy
from spatial_jax.reward.compose import Answer, RewardConfig, score_answer
from spatial_jax.reward.snra import sharpness

INK, MUTED, PALE, ACCENT, WARM = "#1d2530", "#7a8594", "#c9d0d9", "#1f6f8b", "#c2573a"
# In the timeline: what a slot's rollouts do, and in the strip above, what else the devices run.
_SLOT = {"decoding": ACCENT, "drawing": WARM, "idle": "#eef1f4"}
_STRIP = {"encode_images": INK, "prefill": MUTED, "append": "#d9a441"}

EXAMPLE_ERRORS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0)  # relative, of one group's answers

_STYLE: Any = {
  "svg.fonttype": "none",  # text stays text, in the page's font
  "svg.hashsalt": "report",  # the same data gives the same bytes
  "font.size": 10,
  "text.color": INK,
  "axes.edgecolor": PALE,
  "axes.labelcolor": MUTED,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#e9edf1",
  "grid.linewidth": 0.8,
  "xtick.color": MUTED,
  "ytick.color": MUTED,
  "xtick.major.size": 0,
  "ytick.major.size": 0,
  "legend.frameon": False,
}


@dataclasses.dataclass(frozen=True)
class Curve:
  """One panel: the key in metrics.jsonl, its title, and how to read it."""

  key: str
  title: str
  caption: str


CURVES = (
  Curve("reward", "Reward", "mean over the rollouts of a step"),
  Curve("score", "Sampled score", "mean relative accuracy of numbers, exact match of choices"),
  Curve("format", "Format", "share of rollouts in the right form, every drawing executed"),
  Curve("logp_difference", "Sampler against trainer", "mean |Δ log-probability| per token, nats"),
  Curve("kl_ref_k3", "Divergence from the reference", "k3 estimate per token, nats"),
  Curve("entropy_estimate", "Entropy", "minus the log-probability per token learned from, nats"),
  Curve("response_tokens", "Response length", "sampled tokens per rollout"),
  Curve("tokens_per_s", "Speed", "sampled tokens per second"),
  Curve("slot_occupancy", "Slot occupancy", "share of rows that sample, over the time of decoding"),
  Curve("programs_compiled", "Programs compiled", "new compilations in a step"),
  Curve("sharpness", "Sharpness", "k of the reward"),
  Curve("loss", "Loss", "of the update"),
)


@dataclasses.dataclass(frozen=True)
class RewardCard:
  """What the reward of a run looks like at `progress` in [0, 1] of its schedule."""

  reward: RewardConfig
  advantage: AdvantageConfig
  progress: float

  @property
  def sharpness(self) -> float:
    """k at `progress`."""
    return float(sharpness(self.progress, self.reward.schedule))

  def accuracy(self, error_Z: np.ndarray, k: float) -> np.ndarray:
    """Accuracy part of the reward for numbers that are off by `error_Z` (relative), float32."""
    ones = np.ones_like(error_Z, np.float32)
    answer = Answer((1 + error_Z).astype(np.float32), ones, ones > 0, ones > 0, 0 * ones, ones > 0)
    earn = functools.partial(score_answer, sharpness=np.array(k, np.float32), cfg=self.reward)
    return np.asarray(jax.vmap(earn)(answer).accuracy)

  def wrong_choice(self, k: float) -> float:
    """Accuracy part of the reward for a wrong option."""
    zero, one = np.array(0, np.float32), np.array(1, np.float32)
    answer = Answer(zero, one, one > 0, zero > 0, zero, one > 0)
    return float(score_answer(answer, np.array(k, np.float32), self.reward).accuracy)


def curves(records: Sequence[dict[str, Any]]) -> list[tuple[Curve, Markup]]:
  """One panel per curve that the records hold: single steps pale, their moving average dark."""
  panels = []
  for curve in CURVES:
    points = [(r["step"], r[curve.key]) for r in records if r.get(curve.key) is not None]
    if points:
      step_Z, value_Z = np.array(points, np.float64).T
      panels.append((curve, _svg(functools.partial(_draw_curve, step_Z, value_Z), 4.0, 2.0)))
  return panels


def smooth(value_Z: np.ndarray) -> np.ndarray:
  """Centred moving average over a tenth of the curve, narrower at its ends."""
  radius = len(value_Z) // 20
  total_Z = np.concatenate([[0.0], np.cumsum(value_Z)])
  place_Z = np.arange(len(value_Z))
  reach_Z = np.minimum(np.minimum(place_Z, len(value_Z) - 1 - place_Z), radius)
  low_Z, high_Z = place_Z - reach_Z, place_Z + reach_Z + 1
  return (total_Z[high_Z] - total_Z[low_Z]) / (high_Z - low_Z)


def reward_figure(card: RewardCard) -> Markup:
  """Reward against relative error: now, at both ends of the schedule, and MRA beside them."""
  return _svg(functools.partial(_draw_reward, card), 5.6, 3.3)


def advantage_figure(card: RewardCard) -> Markup:
  """Advantages of an example group of eight answers, now: plain GRPO and as configured."""
  return _svg(functools.partial(_draw_advantage, card), 5.6, 3.3)


def timeline_figure(record: dict[str, Any]) -> Markup:
  """Slots over the seconds of one step's rollouts, from `Timeline.record`."""
  slots = max((len(chunk["active"]) for chunk in record["chunks"]), default=1)
  return _svg(functools.partial(_draw_timeline, record), 9.0, 1.4 + 0.12 * slots)


def _draw_timeline(record: dict[str, Any], axes: Axes) -> None:
  """Each slot's bar is as full as its rows are at work; above, what else the devices ran."""
  for chunk in record["chunks"]:
    length = chunk["end_s"] - chunk["start_s"]
    active_B = np.asarray(chunk["active"]) / chunk["group"]
    drawing_B = np.asarray(chunk["drawing"]) / chunk["group"]
    slot_B = np.arange(len(active_B))
    rest_B = 1 - active_B - drawing_B
    bottom_B = slot_B.astype(np.float64)
    shares = (active_B, drawing_B, rest_B)
    for share_B, colour in zip(shares, _SLOT.values(), strict=True):
      place = {"bottom": bottom_B, "align": "edge", "color": colour, "linewidth": 0}
      axes.bar(chunk["start_s"], 0.9 * share_B, length, **place)
      bottom_B = bottom_B + 0.9 * share_B
  slots = max((len(chunk["active"]) for chunk in record["chunks"]), default=1)
  for program, colour in _STRIP.items():
    of = [span for span in record["programs"] if span["program"] == program]
    spans = [(span["start_s"], span["end_s"] - span["start_s"]) for span in of]
    axes.broken_barh(spans, (slots + 0.5, max(0.05 * slots, 0.8)), color=colour, linewidth=0)
  names = _SLOT | {("tower" if name == "encode_images" else name): c for name, c in _STRIP.items()}
  handles = [Patch(color=colour, label=name) for name, colour in names.items()]
  axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=6, fontsize=9)
  axes.set(xlim=(0, record["total_s"]), xlabel="seconds", ylabel="slot", yticks=[])
  axes.grid(visible=False)


def _draw_curve(step_Z: np.ndarray, value_Z: np.ndarray, axes: Axes) -> None:
  axes.plot(step_Z, value_Z, color=PALE, linewidth=0.8)
  axes.plot(step_Z, smooth(value_Z), color=ACCENT, linewidth=1.8, solid_capstyle="round")
  if len(step_Z) == 1:
    axes.plot(step_Z, value_Z, "o", color=ACCENT, markersize=4)
  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  axes.yaxis.set_major_locator(MaxNLocator(4))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
  axes.set_xlabel("step")


def _draw_reward(card: RewardCard, axes: Axes) -> None:
  schedule, now = card.reward.schedule, card.sharpness
  error_Z = np.linspace(0, 1, 201)
  mra_Z = jax.vmap(lambda error: mean_relative_accuracy(1 + error, np.array(1, np.float32)))(
    error_Z.astype(np.float32)
  )
  axes.plot(error_Z, mra_Z, ":", color=MUTED, linewidth=1.2, label="MRA (hard score)")
  if schedule.kind != "constant":
    for name, k in (("start", float(schedule.k_min)), ("end", float(schedule.k_max))):
      colour = WARM if name == "end" else MUTED
      label = f"{name} of the schedule, k = {k:g}"
      axes.plot(error_Z, card.accuracy(error_Z, k), color=colour, linewidth=1.4, label=label)
  label = f"now, k = {now:.3g}"
  axes.plot(error_Z, card.accuracy(error_Z, now), color=ACCENT, linewidth=2.4, label=label)
  axes.set(xlim=(0, 1), ylim=(-0.02, 1.04), xlabel="relative error of the answer", ylabel="reward")
  axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
  axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.06), fontsize=9)


def _draw_advantage(card: RewardCard, axes: Axes) -> None:
  reward_BG = card.accuracy(np.array(EXAMPLE_ERRORS), card.sharpness)[None]
  cfg, place_Z = card.advantage, np.arange(len(EXAMPLE_ERRORS))
  plain_Z = np.asarray(grpo(reward_BG, by_std=cfg.by_std))[0]
  shaped_BG = ap_grpo(reward_BG, cfg.alpha, sign_safe=cfg.sign_safe, by_std=cfg.by_std)
  shaped_Z = np.asarray(shaped_BG)[0]
  axes.axhline(0, color=MUTED, linewidth=0.8)
  axes.plot(place_Z, plain_Z, "o", color="white", markeredgecolor=MUTED, markersize=8, label="GRPO")
  form = "sign-safe AP-GRPO" if cfg.sign_safe else "AP-GRPO"
  undivided = "" if cfg.by_std else ",\nnot divided by the deviation"
  label = f"{form}, alpha = {cfg.alpha:g}{undivided}"
  axes.vlines(place_Z, 0, shaped_Z, color=ACCENT, linewidth=2)
  axes.plot(place_Z, shaped_Z, "o", color=ACCENT, markersize=6, label=label)
  axes.set_xticks(place_Z, [f"{100 * error:.0f} %" for error in EXAMPLE_ERRORS])
  axes.set(xlabel="relative errors of a group of eight", ylabel="advantage")
  axes.margins(y=0.15)
  axes.legend(loc="lower left", fontsize=9)


def _svg(draw: Callable[[Axes], None], width_in: float, height_in: float) -> Markup:
  """An inline <svg> that takes the width of its column."""
  with mpl.rc_context(_STYLE):
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    draw(figure.add_subplot())
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
  text = buffer.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
  text = re.sub(r'<g id="[^"]*">', "<g>", text)  # ids must not repeat on the page
  text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', text, count=1)
  return Markup(re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
