"""The reward of a rollout: a weighted sum of components, some of which pass a gate.

    text ─► parse ─► Example arrays [B, G] ─► score_example under vmap ─► Scores [B, G]
            (host, once)                      (jitted)

The gate reads the score (MRA or exact match). The smooth accuracy is positive for every number, so
a gate on it would reward a wild guess for its format.

To add a component: 1. write a function of one Example in its own file; 2. add its name and weight
to `reward/config.py` and configs/common.py; 3. add its value in `score_example`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.errors import DataError
from spatial_jax.grammar import VILASR, Grammar, answer_of
from spatial_jax.reward.accuracy import exact_match, mean_relative_accuracy, ratio, within
from spatial_jax.reward.config import LengthConfig, RewardConfig
from spatial_jax.reward.example import Example, example_of_answer, example_of_rollout, stack
from spatial_jax.reward.format import format_of_turns
from spatial_jax.reward.parse import Expected, read_as
from spatial_jax.reward.quantity import check_unit
from spatial_jax.reward.rubric import rubric
from spatial_jax.reward.snra import adaptive_sharpness, relative_squared_error, shifted_tanh, snra
from spatial_jax.types import Array, Rollouts, Scores, Task, Turn


class Reward(NamedTuple):
  """The reward of one example, float32."""

  reward: jax.Array  # weighted and gated sum
  accuracy: jax.Array  # the accuracy, after the gate if it is gated
  components: dict[str, jax.Array]  # name -> value before weights and gate; the score is one more
  terms: dict[str, jax.Array]  # name of a component with a weight -> value after the gate


def score(
  rollouts: Rollouts,
  tasks: Sequence[Task],
  cfg: RewardConfig,
  sharpness: float | Array,
  attention_BG: Array | None = None,
) -> Scores:
  """Scores the rollouts [B][G] of the tasks [B], with the sharpness of the current step.

  Args:
    attention_BG: float32, of the attention reward; None if it was not measured.

  Raises:
    ValueError: if a rollout is not of its task, or the sharpness is not a finite number above 0.
    DataError: if the truth of a task cannot be read.
    UserError: if a user's function fails.
  """

  def attention(b: int, g: int) -> float:
    return 0.0 if attention_BG is None else float(attention_BG[b, g])

  groups = [
    stack([example_of_rollout(t, task, cfg, attention(b, g)) for g, t in enumerate(group)])
    for b, (group, task) in enumerate(zip(rollouts, tasks, strict=True))
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

      from spatial_jax.reward import compose, config, snra
      schedule = snra.Schedule("constant", k_min=20.0, k_max=20.0, midpoint=0.5, steepness=10.0)
      cfg = config.accuracy_reward("sigmoid", "exact", schedule, format_weight=0.2)
      response = "<think> Two steps. </think> Action: Answer <answer> 2.1 m </answer>"
      result = compose.reward_of_text(response, "2.0", cfg, sharpness=20.0, unit="m")

  Components that need a whole rollout (rubric, attention, length, drawing, custom) are 0.

  Args:
    response: one turn, by default think block, action and answer block.
    truth: the right answer: a number, the letter of an option, or words.
    cfg: how an answer is rewarded; its scorer is "strict", because the others read rollouts.
    sharpness: k > 0, steepness of the smooth rewards, also with an adaptive schedule.
    unit: of the truth, and of an answer without a unit: "m", "cm", "m^2", ...; "count": the answer
      counts something; None: the question asks for no unit.
    noun: the noun that may follow a count, "chair(s)"; None allows any noun.
    options: of a choice, "A. table", ...; None: the answer is a number, or in words.
    words: the answer is in words, right or wrong.
    grammar: of the response; see `spatial_jax.grammar`.

  Returns:
    "reward"; each component before weights and gate ("accuracy", "format", ...), and "score";
    "parsed", 1.0 if the answer could be read, else 0.0.

  Raises:
    DataError: if the truth cannot be read.
    ValueError: if unit, options and words do not agree, or cfg or sharpness cannot be used.
  """
  choices, right = None if options is None else tuple(options), truth if words else None
  example = _example_of_text(response, truth, Expected(choices, unit, noun, right), grammar)
  scores = score_examples(stack([stack([example])]), _of_text(cfg), sharpness)
  return {
    "reward": float(scores.reward_BG[0, 0]),
    **{name: float(value_BG[0, 0]) for name, value_BG in scores.components.items()},
    "parsed": float(scores.parsed_BG[0, 0]),
  }


def _of_text(cfg: RewardConfig) -> RewardConfig:
  """The reward of one text, without what it lacks."""
  if cfg.scorer != "strict":
    raise ValueError(f'scorer {cfg.scorer!r} reads whole rollouts; use scorer "strict"')
  return cfg.for_evaluation()


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
    terms=rewards.terms,
    weights={name: vars(cfg.weights)[name] for name in rewards.terms},
  )


@functools.partial(jax.jit, static_argnames="cfg")
def _score_all(examples_BG: Example, sharpness: jax.Array, cfg: RewardConfig) -> Reward:
  """`score_example` of all; with the adaptive schedule, each group has its own sharpness."""
  count = examples_BG.valid.shape[0]
  sharpness_B = jnp.broadcast_to(sharpness, (count,))
  if cfg.schedule.kind == "adaptive":
    error_BG = jax.vmap(jax.vmap(functools.partial(error_of, cfg=cfg)))(examples_BG)
    read_BG = examples_BG.parsed & examples_BG.valid
    one = functools.partial(adaptive_sharpness, schedule=cfg.schedule, is_tanh=cfg.number == "tanh")
    sharpness_B = jax.vmap(one)(error_BG, read_BG)
  drawing = _missing_drawings(examples_BG, cfg)

  def of_group(examples_G: Example, sharpness: jax.Array) -> Reward:
    one = functools.partial(score_example, sharpness=sharpness, cfg=cfg, missing_drawings=drawing)
    return jax.vmap(one)(examples_G)

  return jax.vmap(of_group)(examples_BG, sharpness_B)


def error_of(example: Example, cfg: RewardConfig) -> jax.Array:
  """The error of an answer that was read: squared and relative, or 1 - exact match."""
  error = relative_squared_error(example.value, example.truth)
  return jnp.where(example.is_number, error, 1.0 - exact_match(example.value, example.truth))


def score_example(
  example: Example, sharpness: Array, cfg: RewardConfig, missing_drawings: float | Array = 0.0
) -> Reward:
  """Scores one example: its components, weighted and gated. Works under jit and vmap.

  reward = sum_c w_c * gate_c * component_c,   gate_c = [score > threshold] if c is gated, else 1

  Args:
    example: scalars. Accuracy and score of an answer that could not be read are 0.
    sharpness: float32 scalar k.
    cfg: static.
    missing_drawings: float32 in [0, 1], of the step, see `DrawingConfig`.

  Source: ViLaSR (arXiv:2506.09965, Eq. 2) gates accuracy and format; the hard gate beside a smooth
  accuracy is ours.
  """

  def of_kind(number: jax.Array, choice: jax.Array) -> jax.Array:
    return jnp.where(example.parsed, jnp.where(example.is_number, number, choice), 0.0)

  exact = exact_match(example.value, example.truth)
  accuracy = of_kind(
    _number_accuracy(example, sharpness, cfg), _choice_accuracy(exact, sharpness, cfg)
  )
  hard = of_kind(number_score(example.value, example.truth, cfg), exact)
  if cfg.scorer != "strict":
    given = jnp.asarray(example.released, jnp.float32)
    accuracy, hard = (jnp.where(jnp.isnan(given), own, given) for own in (accuracy, hard))
  format_score = jnp.asarray(example.format, jnp.float32)
  gate = (hard > cfg.score_threshold).astype(jnp.float32)
  attention = jnp.asarray(example.attention, jnp.float32)
  components = {
    "accuracy": accuracy,
    "format": format_score,
    "rubric": rubric(hard, format_score, example.rubric, cfg.rubric),
    "attention": attention * hard if cfg.attention.gated else attention,
    "length": length_component(example.tokens, cfg.length),
    "drawing": jnp.where(example.drew, missing_drawings, 0.0),
    "custom": jnp.asarray(example.custom, jnp.float32),
  }
  terms = {
    name: gate * components[name] if name in cfg.gated else components[name] for name in cfg.active
  }
  weighted = [vars(cfg.weights)[name] * term for name, term in terms.items()]
  reward = sum(weighted[1:], weighted[0])
  shown = {name: components[name] for name in ("accuracy", "format", *cfg.active)}
  accuracy = gate * accuracy if "accuracy" in cfg.gated else accuracy
  return Reward(reward, accuracy, {**shown, "score": hard}, terms)


def length_component(tokens: Array, cfg: LengthConfig) -> jax.Array:
  """The length component of a number of sampled tokens; see `LengthConfig`."""
  tokens = jnp.asarray(tokens, jnp.float32)
  if cfg.kind == "overlong":
    over = (tokens - cfg.soft_tokens) / max(cfg.max_tokens - cfg.soft_tokens, 1)
    return -jnp.clip(over, 0.0, 1.0)
  return jnp.maximum(1.0 - jnp.abs(tokens - cfg.soft_tokens) / cfg.soft_tokens, 0.0)


def _missing_drawings(examples_BG: Example, cfg: RewardConfig) -> jax.Array:
  """max(0, 1 - share of the valid rollouts that draw / target)."""
  valid_BG = jnp.asarray(examples_BG.valid)
  drew = jnp.sum(valid_BG & jnp.asarray(examples_BG.drew)).astype(jnp.float32)
  share = drew / jnp.maximum(jnp.sum(valid_BG), 1).astype(jnp.float32)
  return jnp.maximum(1.0 - share / cfg.drawing.target, 0.0)


def number_score(answer: Array, truth: Array, cfg: RewardConfig) -> jax.Array:
  """The score of numbers, `cfg.score`; elementwise."""
  if cfg.score == "tolerance":
    return within(answer, truth, cfg.tolerance)
  return mean_relative_accuracy(answer, truth, cfg.score == "strict_mra")


def _number_accuracy(example: Example, sharpness: Array, cfg: RewardConfig) -> jax.Array:
  error = relative_squared_error(example.value, example.truth)
  match cfg.number:
    case "sigmoid":
      return snra(error, sharpness)
    case "tanh":
      return shifted_tanh(error, sharpness)
    case "mra":
      return mean_relative_accuracy(example.value, example.truth, cfg.score == "strict_mra")
    case "ratio":
      return ratio(example.value, example.truth, cfg.ratio)
    case "tolerance":
      return within(example.value, example.truth, cfg.tolerance)


def _choice_accuracy(exact: jax.Array, sharpness: Array, cfg: RewardConfig) -> jax.Array:
  if cfg.choice == "exact":
    return exact
  curve = shifted_tanh if cfg.number == "tanh" else snra
  return curve(1.0 - exact, sharpness if cfg.discrete_sharpness is None else cfg.discrete_sharpness)
