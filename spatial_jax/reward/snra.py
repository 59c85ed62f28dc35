"""Smooth numeric rewards: error -> reward in [0, 1], sharper as training proceeds.

    error   0 %    5 %   10 %   20 %   50 %  100 %
    k = 1   1.000  .999  .995   .980   .876   .538     early: rough guesses differ in reward
    k = 100 1.000  .876  .538   .036   .000   .000     late: only near-exact answers are rewarded

The formulas of Smooth Operator (arXiv:2601.07695) were not available verbatim; the forms here are
reconstructed from its summaries (squared relative error, mirrored sigmoid, range [0, 1]).
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.config import check_choice, check_field, check_number
from spatial_jax.types import Array

TRUTH_EPSILON = 1e-6  # the smallest |truth| that an error is divided by


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["k_min", "k_max", "midpoint", "steepness"],
  meta_fields=["kind"],
)
@dataclasses.dataclass(frozen=True)
class Schedule:
  """Sharpness as a function of progress u in [0, 1]; a pytree with a static `kind`.

      sigmoid    k_min + (k_max - k_min) * sigmoid(steepness * (u - midpoint))
      linear     k_min + (k_max - k_min) * u
      cosine     k_min + (k_max - k_min) * (1 - cos(pi u)) / 2
      geometric  k_min * (k_max / k_min) ** u
      constant   k_max
      adaptive   that at which an answer with the `midpoint` quantile of the errors of its group
                 earns one half, within [k_min, k_max]; see `adaptive_sharpness`

  Attributes:
    kind: the curve.
    k_min, k_max: bounds of the sharpness, unitless, 0 < k_min <= k_max; the sigmoid comes near
      them and does not reach them.
    midpoint: the progress in [0, 1] at which the sigmoid is half way, or the quantile of
      "adaptive"; other curves ignore it.
    steepness: of the sigmoid, unitless, > 0; other curves ignore it.

  Raises:
    FieldError: if a Python number is out of range. Arrays are not checked.

  Source: the sigmoid is that of PhysSim-VLM, a third-party reading of arXiv:2601.07695; the others
  are ours.
  """

  kind: Literal["sigmoid", "linear", "cosine", "geometric", "constant", "adaptive"]
  k_min: float | Array
  k_max: float | Array
  midpoint: float | Array
  steepness: float | Array

  def __post_init__(self):
    numbers = (self.k_min, self.k_max, self.midpoint, self.steepness)
    if not all(isinstance(number, int | float | str) for number in numbers):
      return  # arrays: under jit their values are unknown
    check_choice(self, "kind")
    check_number(self, "k_min", "k_max", "steepness", above=0)
    grows = self.kind == "constant" or float(self.k_max) >= float(self.k_min)
    check_field(self, "k_max", grows, f"be at least k_min, {self.k_min}")
    check_number(self, "midpoint", at_least=0, at_most=1)


def sharpness(progress: float | Array, schedule: Schedule) -> jax.Array:
  """Returns the sharpness k at a point of the run.

  Args:
    progress: step / total steps, in [0, 1]; values outside are clipped.
    schedule: the curve.

  Returns:
    float32, shape of `progress`.
  """
  u = jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)
  k_min = jnp.asarray(schedule.k_min, jnp.float32)
  k_max = jnp.asarray(schedule.k_max, jnp.float32)
  match schedule.kind:
    case "sigmoid":
      steepness = jnp.asarray(schedule.steepness, jnp.float32)
      fraction = jax.nn.sigmoid(steepness * (u - jnp.asarray(schedule.midpoint, jnp.float32)))
    case "linear":
      fraction = u
    case "cosine":
      fraction = (1.0 - jnp.cos(np.float32(np.pi) * u)) / 2.0
    case "geometric":
      return k_min * jnp.exp(u * jnp.log(k_max / k_min))
    case "constant" | "adaptive":  # "adaptive" where there is no group: in an evaluation
      fraction = jnp.ones_like(u)
  return k_min + (k_max - k_min) * fraction


def adaptive_sharpness(
  error_G: Array, read_G: Array, schedule: Schedule, is_tanh: bool = False
) -> jax.Array:
  """Returns the sharpness of one group, at which a quantile of its answers earns one half.

      k = ln 3 / quantile of the errors,   limited to [k_min, k_max]       (tanh: half of it)

  The quantile is `schedule.midpoint`; 0.5 is the median. A group of rough guesses gets a flat curve
  and a group of near-exact ones a steep curve, so that the rewards of both differ.

  Args:
    error_G: float32, squared relative errors, or 1 - score.
    read_G: bool, answers that could be read; without one the sharpness is k_min.
    schedule: of kind "adaptive".
    is_tanh: the curve is `shifted_tanh`, which has the half at half the sharpness.

  Returns:
    float32 [].

  Source: the outlook of Smooth Operator (arXiv:2601.07695) asks for adaptive sharpness; the form is
  ours.
  """
  count = jnp.sum(read_G)
  ordered_G = jnp.sort(jnp.where(read_G, jnp.asarray(error_G, jnp.float32), jnp.inf))
  place = jnp.asarray(schedule.midpoint, jnp.float32) * (count - 1).astype(jnp.float32)
  index = jnp.clip(jnp.ceil(place).astype(jnp.int32), 0, ordered_G.shape[0] - 1)
  half = np.float32(np.log(3.0) / (2.0 if is_tanh else 1.0))
  k_min, k_max = (jnp.asarray(k, jnp.float32) for k in (schedule.k_min, schedule.k_max))
  k = half / jnp.maximum(ordered_G[index], 1e-30)
  return jnp.where(count > 0, jnp.clip(k, k_min, k_max), k_min)


def relative_squared_error(answer: float | Array, truth: float | Array) -> jax.Array:
  """Returns the squared relative error of one answer.

  delta = ((answer - truth) / max(|truth|, 1e-6))^2

  Args:
    answer, truth: float32, finite, in the same unit.

  Returns:
    float32 >= 0, unitless; inf where float32 overflows (rewarded 0).

  Source: Smooth Operator, arXiv:2601.07695 (relative form reconstructed).
  """
  answer, truth = jnp.asarray(answer, jnp.float32), jnp.asarray(truth, jnp.float32)
  return jnp.square((answer - truth) / jnp.maximum(jnp.abs(truth), TRUTH_EPSILON))


def snra(error: float | Array, sharpness: float | Array) -> jax.Array:
  """Smooth numeric reward of one answer: 1 at no error, falling to 0, steeper as `sharpness` grows.

  r = 2 * sigmoid(-sharpness * error)

  Args:
    error: float32, squared relative error ((answer - truth) / truth)^2, >= 0, unitless; for a
      discrete score in [0, 1] it is 1 - score. A negative error counts as 0.
    sharpness: float32, k in (0, inf), unitless; an array, so that a schedule never recompiles.

  Returns:
    float32 in [0, 1]; NaN if the error is NaN.

  Source: Smooth Operator, arXiv:2601.07695 (form reconstructed).
  """
  k = jnp.asarray(sharpness, jnp.float32)
  return 2.0 * jax.nn.sigmoid(-k * _at_least_zero(error))


def shifted_tanh(error: float | Array, sharpness: float | Array) -> jax.Array:
  """The tanh form of the smooth reward; it equals `snra` at twice the sharpness.

  r = 1 - tanh(sharpness * error) = 2 * sigmoid(-2 * sharpness * error)

  Args:
    error: float32, as for `snra`.
    sharpness: float32, k in (0, inf), unitless.

  Returns:
    float32 in [0, 1]; NaN if the error is NaN.

  Source: Smooth Operator, arXiv:2601.07695 ("Shifted-Tanh"; form reconstructed).
  """
  k = jnp.asarray(sharpness, jnp.float32)
  return 1.0 - jnp.tanh(k * _at_least_zero(error))


def _at_least_zero(error: float | Array) -> jax.Array:
  """Negative errors become 0, NaN stays; unlike `maximum` it keeps the slope at 0."""
  error = jnp.asarray(error, jnp.float32)
  return jnp.where(error < 0.0, 0.0, error)
