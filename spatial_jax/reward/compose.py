"""The reward of a rollout: a weighted and gated sum of signals.

    text ─► parse ─► Example arrays [B, G] ─► score_example under vmap ─► Scores [B, G]
            (host, once)                      (jitted)

The gate reads the hard score (MRA or exact match). The smooth accuracy is positive for every
number, so a gate on it would reward a wild guess for its format.

To add a reward signal: 1. write a function of one Example in its own file; 2. add its weight to
`RewardConfig` and configs/common.py; 3. add its component and its term in `score_example`; 4. add
its metric and its part of the page, see CONTRIBUTING.md.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.config import check_choice, check_number
from spatial_jax.errors import DataError
from spatial_jax.grammar import VILASR, Grammar, answer_of
from spatial_jax.reward.accuracy import exact_match, mean_relative_accuracy, ratio
from spatial_jax.reward.example import Example, example_of_answer, example_of_rollout, stack
from spatial_jax.reward.format import format_of_turns
from spatial_jax.reward.parse import Expected, read_as
from spatial_jax.reward.quantity import check_unit
from spatial_jax.reward.snra import Schedule, relative_squared_error, shifted_tanh, snra
from spatial_jax.types import Array, Rollouts, Scores, Task, Turn


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """How a rollout is rewarded."""

  # Accuracy reward of a number: SNRA, its shifted-tanh form, MRA, or vsGRPO's linear ratio.
  number: Literal["sigmoid", "tanh", "mra", "ratio"]
  # Of a choice: the curve of `number` at the error 1 - exact match (the sigmoid if `number` has no
  # curve), or 0 and 1.
  choice: Literal["smooth", "exact"]
  schedule: Schedule  # sharpness over the run
  # The constant sharpness of choices, > 0; None: choices follow the schedule. At sharpness 1 a
  # wrong choice is rewarded 0.54.
  discrete_sharpness: float | None
  strict_mra: bool  # the hard score compares with < (ViLaSR's training reward) instead of <=
  # In [-1, 1): the gate is open where the hard score is above it; if negative, always.
  score_threshold: float
  format_weight: float  # w >= 0, the reward of the format; an exact answer is rewarded 1
  # "format" gates the format part alone, so that smooth accuracy stays a dense signal; "all" gates
  # the sum, as ViLaSR's Eq. 2 is written.
  gate: Literal["format", "all"]

  def __post_init__(self):
    check_choice(self, "number", "choice", "gate")
    if self.discrete_sharpness is not None:
      check_number(self, "discrete_sharpness", above=0)
    check_number(self, "score_threshold", at_least=-1, below=1)
    check_number(self, "format_weight", at_least=0)


class Reward(NamedTuple):
  """The reward of one example, float32."""

  reward: jax.Array  # weighted and gated sum
  accuracy: jax.Array  # the accuracy part of `reward`, after the gate
  components: dict[str, jax.Array]  # signal name -> value before weights and gate


def score(
  rollouts: Rollouts, tasks: Sequence[Task], cfg: RewardConfig, sharpness: float | Array
) -> Scores:
  """Scores the rollouts [B][G] of the tasks [B], with the sharpness of the current step.

  Raises:
    ValueError: if a rollout is not of its task, or the sharpness is not a finite number above 0.
    DataError: if the truth of a task cannot be read.
  """
  groups = [
    stack([example_of_rollout(trajectory, task) for trajectory in group])
    for group, task in zip(rollouts, tasks, strict=True)
  ]
  return score_examples(stack(groups), cfg, sharpness)


def reward_of_text(
  response: str,
  truth: str,
  cfg: RewardConfig,
  sharpness: float,
  *,
  unit: str | None = None,
  noun: str | None = None,
  options: Sequence[str] | None = None,
  words: bool = False,
  grammar: Grammar = VILASR,
) -> dict[str, float]:
  """Scores the text of one response, as training scores a rollout of one turn.

      from spatial_jax.reward.compose import RewardConfig, reward_of_text
      from spatial_jax.reward.snra import Schedule
      schedule = Schedule("constant", k_min=20.0, k_max=20.0, midpoint=0.5, steepness=10.0)
      cfg = RewardConfig("sigmoid", "exact", schedule, None, False, 0.0, 0.2, "format")
      response = "<think> Two steps. </think> Action: Answer <answer> 2.1 m </answer>"
      result = reward_of_text(response, "2.0", cfg, sharpness=20.0, unit="m")

  Args:
    response: one turn, by default think block, action and answer block.
    truth: the right answer: a number, the letter of an option, or words.
    cfg: how an answer is rewarded.
    sharpness: k > 0, steepness of the smooth rewards.
    unit: of the truth, and of an answer without a unit: "m", "cm", "m^2", ...; "count": the answer
      counts something; None: the question asks for no unit.
    noun: the noun that may follow a count, "chair(s)"; None allows any noun.
    options: of a choice, "A. table", ...; None: the answer is a number, or in words.
    words: the answer is in words, right or wrong.
    grammar: of the response; see `spatial_jax.grammar`.

  Returns:
    "reward"; each component before weights and gate ("accuracy", "score", "format"); "parsed",
    1.0 if the answer could be read, else 0.0.

  Raises:
    DataError: if the truth cannot be read.
    ValueError: if the unit is unknown, a choice or words have a unit, words have options, or the
      sharpness is not a finite number above 0.
  """
  choices, right = None if options is None else tuple(options), truth if words else None
  example = _example_of_text(response, truth, Expected(choices, unit, noun, right), grammar)
  scores = score_examples(stack([stack([example])]), cfg, sharpness)
  return {
    "reward": float(scores.reward_BG[0, 0]),
    **{name: float(value_BG[0, 0]) for name, value_BG in scores.components.items()},
    "parsed": float(scores.parsed_BG[0, 0]),
  }


def _example_of_text(response: str, truth: str, expected: Expected, grammar: Grammar) -> Example:
  """The example of one response text; errors as in `reward_of_text`."""
  options, unit = expected.options, expected.unit
  if options is not None and unit is not None:
    raise ValueError(f"a choice has no unit, got unit {unit!r} and options")
  if expected.words is not None and not (options is None and unit is None):
    raise ValueError(f"an answer in words has no unit {unit!r} and no options {options!r}")
  check_unit(unit)
  reading = read_as(truth, expected)
  if not reading.parsed:
    raise DataError(f"the truth {truth!r} cannot be read as {expected.description}; fix it")
  turn = Turn(0, 0, response, (), (), True, ())
  answer = answer_of(response, grammar)
  return example_of_answer(answer, reading, expected, format_of_turns([turn], grammar), True)


def score_examples(examples_BG: Example, cfg: RewardConfig, sharpness: float | Array) -> Scores:
  """Scores examples; a rollout with a reward that is not finite becomes invalid.

  Returns:
    Scores, NumPy arrays [B, G]. An invalid rollout has reward 0 and counts as a fault.

  Raises:
    ValueError: if the sharpness is not a finite number above 0.
  """
  if not 0 < float(sharpness) < np.inf:
    raise ValueError(f"sharpness is {float(sharpness):g} and must be a finite number above 0")
  rewards = jax.device_get(_score_all(examples_BG, jnp.asarray(sharpness, jnp.float32), cfg))
  finite_BG = np.logical_and.reduce(
    [np.isfinite(value_BG) for value_BG in jax.tree.leaves(rewards)]
  )
  rewards = jax.tree.map(lambda value_BG: np.where(finite_BG, value_BG, np.float32(0)), rewards)
  return Scores(
    reward_BG=rewards.reward,
    accuracy_BG=rewards.accuracy,
    score_BG=rewards.components["score"],
    format_BG=rewards.components["format"],
    valid_BG=np.asarray(examples_BG.valid) & finite_BG,
    parsed_BG=np.asarray(examples_BG.parsed),
    components=rewards.components,
  )


@functools.partial(jax.jit, static_argnames="cfg")
def _score_all(examples_BG: Example, sharpness: jax.Array, cfg: RewardConfig) -> Reward:
  one = functools.partial(score_example, sharpness=sharpness, cfg=cfg)
  return jax.vmap(jax.vmap(one))(examples_BG)


def score_example(example: Example, sharpness: Array, cfg: RewardConfig) -> Reward:
  """Scores one example: its signals, weighted and gated. Works under jit and vmap.

      gate "format":  reward = accuracy + [score > beta] * (w * format)
      gate "all":     reward = [score > beta] * (accuracy + w * format)

  Args:
    example: scalars. Accuracy and score of an answer that could not be read are 0.
    sharpness: float32 scalar k.
    cfg: static.

  Source: ViLaSR (arXiv:2506.09965, Eq. 2) for "all"; the hard gate beside a smooth accuracy is
  ours.
  """
  mra = mean_relative_accuracy(example.value, example.truth, cfg.strict_mra)
  exact = exact_match(example.value, example.truth)

  def of_kind(number: jax.Array, choice: jax.Array) -> jax.Array:
    return jnp.where(example.parsed, jnp.where(example.is_number, number, choice), 0.0)

  choice = _choice_accuracy(exact, sharpness, cfg)
  components = {
    "accuracy": of_kind(_number_accuracy(example, mra, sharpness, cfg), choice),
    "score": of_kind(mra, exact),
    "format": jnp.asarray(example.format, jnp.float32),
  }
  gate = (components["score"] > cfg.score_threshold).astype(jnp.float32)
  accuracy = components["accuracy"] if cfg.gate == "format" else gate * components["accuracy"]
  reward = accuracy + gate * (cfg.format_weight * components["format"])
  return Reward(reward, accuracy, components)


def _number_accuracy(
  example: Example, mra: jax.Array, sharpness: Array, cfg: RewardConfig
) -> jax.Array:
  error = relative_squared_error(example.value, example.truth)
  match cfg.number:
    case "sigmoid":
      return snra(error, sharpness)
    case "tanh":
      return shifted_tanh(error, sharpness)
    case "mra":
      return mra
    case "ratio":
      return ratio(example.value, example.truth, "linear")


def _choice_accuracy(exact: jax.Array, sharpness: Array, cfg: RewardConfig) -> jax.Array:
  if cfg.choice == "exact":
    return exact
  curve = shifted_tanh if cfg.number == "tanh" else snra
  return curve(1.0 - exact, sharpness if cfg.discrete_sharpness is None else cfg.discrete_sharpness)
