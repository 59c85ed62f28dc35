"""The reward card: what an answer earns during a run, and the advantages of a group."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from spatial_jax.learn.advantage import AdvantageConfig, ap_grpo, grpo
from spatial_jax.report import svg
from spatial_jax.reward.accuracy import mean_relative_accuracy
from spatial_jax.reward.compose import score_example
from spatial_jax.reward.config import RewardConfig
from spatial_jax.reward.example import plain_example
from spatial_jax.reward.snra import sharpness

EXAMPLE_ERRORS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0)  # relative, of a group of answers
_SIZE_IN = (4.6, 3.2)


@dataclasses.dataclass(frozen=True)
class RewardCard:
  """How a run rewards; an evaluation has no advantage and the sharpness of the end alone."""

  reward: RewardConfig
  advantage: AdvantageConfig | None

  def sharpness(self, progress: float) -> float:
    """k at `progress` in [0, 1] of the run."""
    return float(sharpness(progress, self.reward.schedule))

  @property
  def points(self) -> dict[str, float]:
    """Name of a point of the run ("start", "end", "" if k does not change) -> sharpness."""
    if self.advantage is None or self.reward.schedule.kind == "constant":
      return {"": self.sharpness(1.0)}
    return {"start": self.sharpness(0.0), "end": self.sharpness(1.0)}

  def accuracy(self, error_Z: np.ndarray, k: float) -> np.ndarray:
    """Accuracy part of the reward of numbers with relative error `error_Z`, float32."""
    ones = np.ones_like(error_Z, np.float32)
    example = plain_example(1 + error_Z, ones, ones > 0, ones > 0, 0 * ones, ones > 0)
    earn = functools.partial(score_example, sharpness=np.array(k, np.float32), cfg=self.reward)
    return np.asarray(jax.vmap(earn)(example).accuracy)

  def wrong_choice(self, k: float) -> float:
    """Accuracy part of the reward of a wrong option."""
    example = plain_example(0.0, 1.0, True, False, 0.0, True)
    return float(score_example(example, np.array(k, np.float32), self.reward).accuracy)


class CardView(NamedTuple):
  """What the template shows of a card."""

  reward: Markup
  advantage: Markup | None
  wrong_choice: str  # "0.54 at the start (k = 1) and 0.00 at the end (k = 100)"
  components: str  # "1.00 x accuracy + 0.20 x format where the score is above 0"


def card_view(card: RewardCard) -> CardView:
  """Figures and numbers of the card."""
  wrong = [
    f"{card.wrong_choice(k):.2f}{f' at the {name} (k = {k:.3g})' if name else ''}"
    for name, k in card.points.items()
  ]
  if card.reward.discrete_sharpness is not None or card.reward.choice == "exact":
    wrong = [wrong[0].split()[0]]  # choices do not follow the schedule
  advantage = None
  if card.advantage:
    draw = functools.partial(_draw_advantage, card, card.advantage)
    advantage = svg.axes_svg(draw, *_SIZE_IN, "advantages")
  return CardView(
    reward=svg.axes_svg(functools.partial(_draw_reward, card), *_SIZE_IN, "reward against error"),
    advantage=advantage,
    wrong_choice=" and ".join(wrong),
    components=sentence(card.reward),
  )


def sentence(cfg: RewardConfig) -> str:
  """The sum of the components of a reward in words."""
  weights = vars(cfg.weights)
  free = [f"{weights[name]:g} x {name}" for name in cfg.active if name not in cfg.gated]
  gated = [f"{weights[name]:g} x {name}" for name in cfg.active if name in cfg.gated]
  if gated:
    condition = f"where the score is above {cfg.score_threshold:g}"
    both = len(gated) > 1 or not free
    free.append(f"{'(' if both else ''}{' + '.join(gated)}{')' if both else ''} {condition}")
  return " + ".join(free)


def _draw_reward(card: RewardCard, axes: Axes) -> None:
  error_Z = np.linspace(0, 1, 201)
  mra_Z = jax.vmap(lambda error: mean_relative_accuracy(1 + error, np.array(1, np.float32)))(
    error_Z.astype(np.float32)
  )
  for name, k in card.points.items():
    label = f"{name} of the run, k = {k:.3g}" if name else f"k = {k:.3g}"
    colour, width = (svg.MUTED, 1.2) if name == "start" else (svg.ACCENT, 2)
    axes.plot(error_Z, card.accuracy(error_Z, k), color=colour, linewidth=width, label=label)
  axes.plot(error_Z, mra_Z, ":", color=svg.INK, linewidth=1.2, label="score (MRA)")
  axes.set(xlim=(0, 1), ylim=(-0.02, 1.04), xlabel="relative error of the answer")
  axes.set_ylabel("accuracy part of the reward")
  axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
  axes.figure.legend(loc="outside upper left", ncols=2)


def _draw_advantage(card: RewardCard, cfg: AdvantageConfig, axes: Axes) -> None:
  reward_BG = card.accuracy(np.array(EXAMPLE_ERRORS), card.sharpness(1.0))[None]
  x_Z = np.arange(len(EXAMPLE_ERRORS))
  plain_Z = np.asarray(grpo(reward_BG, by_std=cfg.by_std))[0]
  shaped_BG = ap_grpo(reward_BG, cfg.alpha, sign_safe=cfg.sign_safe, by_std=cfg.by_std)
  shaped_Z = np.asarray(shaped_BG)[0]
  form = "sign-safe AP-GRPO" if cfg.sign_safe else "AP-GRPO"
  undivided = "" if cfg.by_std else ", not divided by std"
  label = f"{form}, alpha = {cfg.alpha:g}{undivided}"
  axes.axhline(0, color=svg.MUTED, linewidth=0.8)
  axes.vlines(x_Z, 0, shaped_Z, color=svg.ACCENT, linewidth=2)
  axes.plot(x_Z, shaped_Z, "o", color=svg.ACCENT, markersize=6, label=label)
  axes.plot(x_Z, plain_Z, "o", markerfacecolor="none", color=svg.INK, markersize=8, label="GRPO")
  axes.set_xticks(x_Z, [f"{100 * error:.0f} %" for error in EXAMPLE_ERRORS])
  axes.set(xlabel="relative errors of eight answers to one question", ylabel="advantage")
  axes.margins(y=0.12)
  axes.figure.legend(loc="outside upper left", ncols=1)
