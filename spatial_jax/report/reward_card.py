"""The reward card: what an answer earns during a run, and the advantages of a group."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from spatial_jax.learn.advantage import AdvantageConfig, advantage, grpo
from spatial_jax.report import svg
from spatial_jax.reward.compose import number_score, score_example, score_examples
from spatial_jax.reward.config import RewardConfig
from spatial_jax.reward.example import Example, plain_example
from spatial_jax.reward.snra import adaptive_sharpness, sharpness

EXAMPLE_ERRORS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0)  # relative, of a group of answers
_SIZE_IN = (4.6, 3.2)


def answers(error_BG: np.ndarray) -> Example:
  """Well-formed numbers with the given relative errors."""
  one_BG = np.ones_like(error_BG, np.float32)
  return plain_example(1 + error_BG, one_BG, one_BG > 0, one_BG > 0, one_BG, one_BG > 0)


def sharpness_of(reward: RewardConfig, progress: float) -> float:
  """k at `progress` in [0, 1] of a run; of an adaptive schedule that of `EXAMPLE_ERRORS`."""
  schedule = reward.schedule
  if schedule.kind != "adaptive":
    return float(sharpness(progress, schedule))
  error_G = np.square(np.array(EXAMPLE_ERRORS, np.float32))
  return float(adaptive_sharpness(error_G, error_G >= 0, schedule, reward.number == "tanh"))


@dataclasses.dataclass(frozen=True)
class RewardCard:
  """How a run rewards; an evaluation has no advantage and the sharpness of the end alone."""

  reward: RewardConfig
  advantage: AdvantageConfig | None

  @property
  def points(self) -> dict[str, float]:
    """Name of a point of the run ("start", "end", "" if k does not change) -> sharpness."""
    start, end = (sharpness_of(self.reward, progress) for progress in (0.0, 1.0))
    if self.advantage is None or start == end:
      return {"": end}
    return {"start": start, "end": end}

  def accuracy(self, error_Z: np.ndarray, k: float) -> np.ndarray:
    """Accuracy part of the reward of numbers with relative error `error_Z`, float32."""
    earn = functools.partial(score_example, sharpness=np.array(k, np.float32), cfg=self.reward)
    return np.asarray(jax.vmap(earn)(answers(error_Z)).accuracy)

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
  error_Z = np.linspace(0, 1, 201).astype(np.float32)
  score_Z = np.asarray(number_score(1 + error_Z, np.ones_like(error_Z), card.reward))
  sharpens = card.reward.numbers_sharpen
  for name, k in (card.points if sharpens else {"": 1.0}).items():
    label = f"{name} of the run, k = {k:.3g}" if name else f"k = {k:.3g}"
    label = label if sharpens else card.reward.number
    colour, width = (svg.MUTED, 1.2) if name == "start" else (svg.ACCENT, 2)
    axes.plot(error_Z, card.accuracy(error_Z, k), color=colour, linewidth=width, label=label)
  score = f"score ({card.reward.score_name})"
  axes.plot(error_Z, score_Z, ":", color=svg.INK, linewidth=1.2, label=score)
  axes.set(xlim=(0, 1), ylim=(-0.02, 1.04), xlabel="relative error of the answer")
  axes.set_ylabel("accuracy part of the reward")
  axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
  axes.figure.legend(loc="outside upper left", ncols=2)


def _draw_advantage(card: RewardCard, cfg: AdvantageConfig, axes: Axes) -> None:
  k = sharpness_of(card.reward, 1.0)
  scores = score_examples(answers(np.array([EXAMPLE_ERRORS])), card.reward, k)
  shaped_Z, plain_Z = np.asarray(advantage(scores, cfg))[0], np.asarray(grpo(scores.reward_BG))[0]
  x_Z = np.arange(len(EXAMPLE_ERRORS))
  axes.axhline(0, color=svg.MUTED, linewidth=0.8)
  axes.vlines(x_Z, 0, shaped_Z, color=svg.ACCENT, linewidth=2)
  axes.plot(x_Z, shaped_Z, "o", color=svg.ACCENT, markersize=6, label=advantage_name(cfg))
  axes.plot(x_Z, plain_Z, "o", markerfacecolor="none", color=svg.INK, markersize=8, label="GRPO")
  axes.set_xticks(x_Z, [f"{100 * error:.0f} %" for error in EXAMPLE_ERRORS])
  axes.set(xlabel="relative errors of eight answers to one question", ylabel="advantage")
  axes.margins(y=0.12)
  axes.figure.legend(loc="outside upper left", ncols=1)


def advantage_name(cfg: AdvantageConfig) -> str:
  """The form of the advantage in words."""
  name = {"mean": "GRPO", "leave_one_out": "leave-one-out"}[cfg.baseline]
  name = "GDPO" if cfg.per_component else name
  if cfg.alpha:
    name = f"{'sign-safe ' if cfg.sign_safe else ''}AP-{name}, alpha = {cfg.alpha:g}"
  return name if cfg.by_std else f"{name}, not divided by std"
