"""Entry point: python -m spatial_jax.tools.reward_card --config=configs/NAME.py [--steps=0,100,199]

What a config rewards, before anything is trained. At some steps of the run it prints reward,
deviation and advantage of eight answers with given errors, which are one group, and the share of
groups with random errors whose rewards are all equal. --out=card.png draws reward and advantage
against the error. A config with conditions has a card for each of them.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import config_flags
from rich import box
from rich.console import Console
from rich.table import Table

from spatial_jax.cli import CONFIG_HELP, launch, no_arguments
from spatial_jax.config import build
from spatial_jax.errors import UserError
from spatial_jax.learn.advantage import AdvantageConfig, advantage
from spatial_jax.prepare import conditions_of
from spatial_jax.report.reward_card import EXAMPLE_ERRORS, answers, sentence, sharpness_of
from spatial_jax.reward.compose import score_examples
from spatial_jax.reward.config import RewardConfig
from spatial_jax.types import Scores
from spatial_jax.workdir import to_path

# Standard deviations of the relative errors of random groups: an exact to a rough policy.
SPREADS = (0.05, 0.3, 0.6)
_GROUPS = 2000
_WIDTH = 110  # of the output to a file
_LEAST_STD = 0.01  # of the rewards of a group that teaches something


class CardStep(NamedTuple):
  """Rewards and advantages at one step of a run."""

  step: int
  sharpness: float
  reward_Z: np.ndarray  # of an answer with each of `EXAMPLE_ERRORS`
  std: float  # of the rewards of these answers as one group
  advantage_Z: np.ndarray  # of these answers as one group
  zero_variance: dict[float, float]  # of `SPREADS` -> share of random groups with equal rewards


def card_steps(
  reward: RewardConfig, cfg: AdvantageConfig, steps: Sequence[int], total: int, group: int
) -> list[CardStep]:
  """The card at some steps of a run.

  Args:
    steps: from 0 to `total`.
    total: steps of the run.
    group: rollouts of a prompt.
  """
  found = []
  for step in steps:
    k = sharpness_of(reward, step / total)
    scores = score_examples(answers(np.array([EXAMPLE_ERRORS])), reward, k)
    advantage_BG = np.asarray(advantage(scores, cfg))
    found.append(
      CardStep(
        step=step,
        sharpness=k,
        reward_Z=scores.reward_BG[0],
        std=float(scores.reward_BG[0].std(ddof=1)),
        advantage_Z=advantage_BG[0],
        zero_variance={spread: _equal_share(reward, spread, k, group) for spread in SPREADS},
      )
    )
  return found


def _equal_share(reward: RewardConfig, spread: float, k: float, group: int) -> float:
  """The share of random groups whose rewards have a deviation below 0.01."""
  error_BG = np.abs(np.random.default_rng(0).normal(0, spread, (_GROUPS, group)))
  scores: Scores = score_examples(answers(error_BG), reward, k)
  return float(np.mean(scores.reward_BG.std(axis=1) < _LEAST_STD))


def show(steps: Sequence[CardStep], reward: RewardConfig, console: Console) -> None:
  """Prints the tables."""
  console.print(f"reward = {sentence(reward)}", markup=False)
  names = [f"{100 * error:g} %" for error in EXAMPLE_ERRORS]
  for title in ("reward", "advantage"):
    table = Table("step", "k", *names, *(["std"] if title == "reward" else []), box=box.SIMPLE_HEAD)
    table.title = f"{title} of an answer with this relative error"
    for one in steps:
      values = one.reward_Z if title == "reward" else one.advantage_Z
      extra = [f"{one.std:.2f}"] if title == "reward" else []
      cells = [f"{value:.2f}" for value in values]
      table.add_row(str(one.step), f"{one.sharpness:.3g}", *cells, *extra)
    console.print(table)
  table = Table("step", *(f"{spread:g}" for spread in SPREADS), box=box.SIMPLE_HEAD)
  table.title = "share of groups with equal rewards, by the deviation of the relative errors"
  for one in steps:
    table.add_row(str(one.step), *(f"{share:.0%}" for share in one.zero_variance.values()))
  console.print(table)


def draw(steps: Sequence[CardStep], reward: RewardConfig, path: pathlib.Path) -> None:
  """Draws reward and advantage against the error."""
  figure = Figure(figsize=(9, 3.4), layout="constrained")
  left, right = figure.subplots(1, 2)
  error_Z = np.linspace(0, 1, 201)
  # An adaptive schedule would adapt to the points of the curve.
  constant = dataclasses.replace(reward.schedule, kind="constant")
  fixed = dataclasses.replace(reward, schedule=constant)
  for one in steps:
    scores = score_examples(answers(error_Z[None]), fixed, one.sharpness)
    left.plot(error_Z, scores.reward_BG[0], label=f"step {one.step}, k = {one.sharpness:.3g}")
    right.plot(EXAMPLE_ERRORS, one.advantage_Z, "o-", markersize=4)
  left.set(xlabel="relative error", ylabel="reward", xlim=(0, 1))
  right.set(xlabel="relative error", ylabel="advantage in a group of these answers")
  right.axhline(0, color="0.5", linewidth=0.8)
  left.legend(frameon=False)
  figure.savefig(path, dpi=150)


def main(arguments: Sequence[str]) -> None:
  """Reads the command line and prints the card of each condition that learns from rewards."""
  no_arguments(arguments)
  jax.config.update("jax_platforms", "cpu")
  for name, settings in conditions_of(CONFIG.value).items():
    if "grpo" in settings["stages"] or not name:
      if name:
        print(f"condition {name}")
      print_card(settings, name)


def print_card(settings: dict[str, Any], name: str) -> None:
  """Prints the card of one condition, and draws it if --out is given."""
  reward = build(RewardConfig, settings["learn"]["reward"], "config.learn.reward")
  cfg = build(AdvantageConfig, settings["learn"]["advantage"], "config.learn.advantage")
  total = settings["loop"]["steps"]
  default = sorted({0, total // 4, total // 2, 3 * total // 4, total})
  wrong = [text for text in STEPS.value if not text.isdecimal() or int(text) > total]
  if wrong:
    raise UserError(f"--steps has {wrong[0]}; the run has steps 0 to {total}")
  steps = [int(text) for text in STEPS.value] or default
  found = card_steps(reward, cfg, steps, total, settings["rollout"]["group"])
  console = Console()
  show(found, reward, console if console.is_terminal else Console(width=_WIDTH))
  if OUT.value:
    path = to_path(OUT.value)
    path = path.with_stem(f"{path.stem}-{name}") if name else path
    draw(found, reward, path)
    print(f"wrote {path}")


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
  STEPS = flags.DEFINE_list("steps", [], "steps of the run, joined by commas")
  OUT = flags.DEFINE_string("out", "", "PNG, PDF or SVG to draw")
  flags.mark_flag_as_required("config")
  launch(main, "stopped")
