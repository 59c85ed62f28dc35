"""Training curves from metrics.jsonl: the main ones, and further ones for a fold."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from spatial_jax.report import svg, wording

_MAIN_IN, _FURTHER_IN = (4.6, 2.3), (3.1, 1.9)
_NOT_FROM_ZERO = "The axis does not start at 0."


class Curve(NamedTuple):
  """One panel."""

  key: str  # of the metric in metrics.jsonl
  title: str
  caption: str  # what the metric is, with its unit
  share: bool  # the value lies in [0, 1], and so does the axis


class Panel(NamedTuple):
  """A drawn curve: `sentence` is a remark below the caption, "" for none."""

  curve: Curve
  figure: Markup
  sentence: str


HELD_OUT = Curve(
  "held_out_score", "Held-out score", "greedy answers to held-out questions", share=True
)
SCORE = Curve("score", "Score", "mean of sampled answers", share=True)
REWARD = Curve("reward", "Reward", "above: mean over rollouts; below: sharpness k", share=False)
LENGTH = Curve("response_tokens", "Response length", "sampled tokens per rollout", share=False)
DRAWING = Curve("drawing_share", "Drawing", "share of rollouts with a drawn image", share=True)
_ROLLOUTS = (SCORE, REWARD, LENGTH, DRAWING)
_DEMONSTRATIONS = (
  Curve("loss", "Loss", "mean negative log-likelihood per token, nats", share=False),
  LENGTH._replace(caption="trained tokens per demonstration"),
  DRAWING._replace(caption="share of demonstrations with a drawn image"),
)
_PAIRS = (
  Curve("loss", "Loss", "mean over pairs", share=False),
  Curve(
    "pairs_right", "Pairs in the right order", "share whose preferred one gained more", share=True
  ),
  Curve("margin", "Margin", "β times the gain of the preferred over the other answer", share=False),
)
# The main curves of each stage; others have those of rollouts.
MAIN = {"sft": _DEMONSTRATIONS, "reject": _DEMONSTRATIONS, "dpo": _PAIRS}
FURTHER = (
  Curve("format", "Format", "share of responses in the right format", share=True),
  Curve("zero_variance_groups", "Equal rewards", "share of groups without a signal", share=True),
  Curve("entropy_estimate", "Entropy", "estimate per token, nats", share=False),
  Curve("kl_ref_k3", "Divergence from the reference", "k3 per token, nats", share=False),
  Curve("loss", "Loss", "of the update", share=False),
  Curve("reward_chosen", "Preferred answers", "β times the gain in log-probability", share=False),
  Curve("reward_rejected", "Other answers", "β times the gain in log-probability", share=False),
  Curve("grad_norm", "Gradient norm", "before clipping", share=False),
  Curve(
    "logp_difference", "Sampler against trainer", "mean |Δ log-probability|, nats", share=False
  ),
  Curve("tokens_per_s", "Speed", "sampled tokens per second", share=False),
  Curve("slot_occupancy", "Slot occupancy", "share of rows that sample while decoding", share=True),
  Curve("device_idle_share", "Idle devices", "share of the rollout time", share=True),
  Curve("programs_compiled", "Compilations", "new programs in a step", share=False),
)


def held_out_panel(records: Sequence[dict[str, Any]]) -> Panel | None:
  """The held-out score, on an axis that shows its change; None without a value in the records."""
  points = _points(records, HELD_OUT.key)
  if not points:
    return None
  low, high = min(y for _, y in points), max(y for _, y in points)
  margin = max(0.25 * (high - low), 0.02)
  limits = max(0.0, low - margin), min(1.0, high + margin)
  figure = svg.two_layouts(
    lambda _, axes: _draw_curve(points, limits, axes, ticks=6), (2.5, 2.5), HELD_OUT.title
  )
  return Panel(HELD_OUT, figure, _NOT_FROM_ZERO if limits[0] > 0 else "")


def main_panels(records: Sequence[dict[str, Any]]) -> list[Panel]:
  """The main curves of the stage; those without a value in the records are left out."""
  panels = []
  for curve in _main(records):
    points = _points(records, curve.key)
    if not points:
      continue
    if curve is REWARD:
      k_points = _points(records, "sharpness")
      draw = functools.partial(_draw_reward, points, k_points)
      caption = curve.caption if k_points else "mean over rollouts"
      figure = svg.figure_svg(draw, *_MAIN_IN, curve.title)
      sentence = wording.reward_sentence(records) or ""
      panels.append(Panel(curve._replace(caption=caption), figure, sentence))
    else:
      panels.append(_panel(curve, points, _MAIN_IN, from_zero=True))
  return panels


def further_panels(records: Sequence[dict[str, Any]]) -> list[Panel]:
  """Curves of the machinery, for a fold."""
  shown = {curve.key for curve in _main(records)}
  points = {curve: _points(records, curve.key) for curve in FURTHER if curve.key not in shown}
  return [
    _panel(curve, found, _FURTHER_IN, from_zero=False) for curve, found in points.items() if found
  ]


def further_title(records: Sequence[dict[str, Any]]) -> str:
  """The name of the fold with the further curves."""
  named = ": format, entropy, loss, speed, devices" if _main(records) is _ROLLOUTS else ""
  return f"Further curves{named}"


def _main(records: Sequence[dict[str, Any]]) -> tuple[Curve, ...]:
  """The main curves of the stage that wrote the records."""
  return MAIN.get(records[-1].get("stage", ""), _ROLLOUTS) if records else _ROLLOUTS


def smooth(value_Z: np.ndarray) -> np.ndarray:
  """Centred moving average over a tenth of the curve, over fewer values near its ends."""
  radius = len(value_Z) // 20
  total_Z = np.concatenate([[0.0], np.cumsum(value_Z)])
  index_Z = np.arange(len(value_Z))
  reach_Z = np.minimum(np.minimum(index_Z, len(value_Z) - 1 - index_Z), radius)
  low_Z, high_Z = index_Z - reach_Z, index_Z + reach_Z + 1
  return (total_Z[high_Z] - total_Z[low_Z]) / (high_Z - low_Z)


def _points(records: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
  return [(r["step"], r[key]) for r in records if r.get(key) is not None]


def _panel(
  curve: Curve, points: list[tuple[int, float]], size_in: tuple[float, float], from_zero: bool
) -> Panel:
  limits = (-0.02, 1.03) if curve.share else None
  if not limits and from_zero:
    low, high = min(0.0, *(y for _, y in points)), max(0.0, *(y for _, y in points))
    limits = (low, 1.15 * high or float(low == 0.0))
  draw = functools.partial(_draw_curve, points, limits)
  return Panel(curve, svg.axes_svg(draw, *size_in, curve.title), "" if limits else _NOT_FROM_ZERO)


def _draw_curve(
  points: list[tuple[int, float]],
  limits: tuple[float, float] | None,
  axes: Axes,
  ticks: int = 4,
) -> None:
  step_Z, value_Z = np.array(points, np.float64).T
  axes.plot(step_Z, value_Z, color=svg.PALE, linewidth=0.8)
  axes.plot(step_Z, smooth(value_Z), color=svg.ACCENT, linewidth=1.8, solid_capstyle="round")
  if len(step_Z) < 20:
    axes.plot(step_Z, value_Z, "o", color=svg.ACCENT, markersize=4)
  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  axes.yaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
  axes.set_xlabel("step")
  if limits:
    axes.set_ylim(*limits)


def _draw_reward(
  points: list[tuple[int, float]], k_points: list[tuple[int, float]], figure: Figure
) -> None:
  """The reward above its sharpness, on one axis of steps."""
  limits = (min(0.0, *(y for _, y in points)) - 0.02, max(1.0, *(y for _, y in points)) + 0.04)
  if not k_points:
    _draw_curve(points, limits, figure.add_subplot())
    return
  reward, k = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
  _draw_curve(points, limits, reward)
  reward.set_xlabel("")
  k.plot(*zip(*k_points, strict=True), color=svg.INK, linewidth=1.4)
  k.set(ylabel="k", xlabel="step", ylim=(0, 1.15 * max(y for _, y in k_points)))
  k.yaxis.set_major_locator(MaxNLocator(2))
