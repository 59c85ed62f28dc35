"""Group advantages: GRPO, and AP-GRPO, which scales an advantage by the accuracy of its rollout.

The paper does not expand AP; what it keeps is the absolute scale of the reward.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from spatial_jax.checks import is_finite
from spatial_jax.config import check_choice, check_field
from spatial_jax.types import Array, Scores

# Added to the standard deviation. The rewards of a group in which every answer is wrong differ by
# about 1e-7; a smaller epsilon would turn that noise into advantages of 1.5.
STD_EPSILON = 1e-6
# The square of a larger reward overflows float32, and would make the whole group NaN.
REWARD_LIMIT = 1e18

Baseline = Literal["mean", "leave_one_out"]


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
  """How advantages are computed from rewards."""

  alpha: float  # exponent of the accuracy factor, >= 0; 0 is GRPO, 1 is AP-GRPO
  sign_safe: bool  # scale a negative advantage by (1 - accuracy)^alpha instead of accuracy^alpha
  by_std: bool  # divide by the standard deviation of the group, as GRPO does
  # What a reward is compared with: the mean of its group, or of the others of its group.
  baseline: Baseline
  per_component: bool  # divide each component of the reward by its own deviation, as GDPO does

  def __post_init__(self):
    valid = is_finite(self.alpha) and self.alpha >= 0
    check_field(self, "alpha", valid, "be a finite number, at least 0")
    for name in ("sign_safe", "by_std", "per_component"):
      check_field(self, name, isinstance(vars(self)[name], bool), "be True or False")
    check_choice(self, "baseline")
    valid = not self.per_component or self.by_std
    check_field(self, "by_std", valid, "be True with per_component, which divides by deviations")
    valid = not self.per_component or self.baseline == "mean"
    check_field(self, "baseline", valid, "be mean with per_component")


def advantage(scores: Scores, cfg: AdvantageConfig) -> jax.Array:
  """Advantages of the rollouts of one step.

  The format reward is part of the reward that is compared within the group, and not part of the
  accuracy factor.

  Args:
    scores: [B, G].
    cfg: which form.

  Returns:
    float32 [B, G], 0 where not valid.
  """
  valid_BG = scores.valid_BG
  if cfg.per_component:
    advantage_BG = gdpo(scores.terms, scores.weights, valid_BG)
  elif cfg.baseline == "leave_one_out":
    advantage_BG = leave_one_out(scores.reward_BG, valid_BG, by_std=cfg.by_std)
  else:
    advantage_BG = grpo(scores.reward_BG, valid_BG, by_std=cfg.by_std)
  return scale_by_accuracy(
    advantage_BG, scores.accuracy_BG, cfg.alpha, valid_BG, sign_safe=cfg.sign_safe
  )


def grpo(
  rewards_BG: Array,
  valid_BG: Array | None = None,
  *,
  by_std: bool = True,
  epsilon: float = STD_EPSILON,
) -> jax.Array:
  """Group advantages: rewards relative to the mean of their group.

      A = (r - mean r) / (std r + epsilon)       std with divisor n - 1, over the n valid rollouts
      by_std = False:  A = r - mean r

  If all rewards of a group are equal, its advantages are exactly 0; its tokens still count in the
  normalisation of the loss. The division gives a group of
  nearly equal rewards the same influence as a group in which half of the answers are wrong; with
  few rollouts these small differences are mostly noise.

  Args:
    rewards_BG: float32. A reward that is NaN, infinite or larger than 1e18 is not valid.
    valid_BG: bool, false for a rollout that is left out; None: all rollouts are valid.
    by_std: whether to divide by the standard deviation.

  Returns:
    float32 [B, G]; 0 where not valid, and in a group with fewer than two valid rollouts.

  Source: DeepSeekMath (arXiv:2402.03300); n - 1 and 1e-6 as in EasyR1, which trained ViLaSR
  (arXiv:2506.09965); without the deviation: Dr. GRPO (arXiv:2503.20783).
  """
  deviation_BG, count_B1 = _deviations(rewards_BG, valid_BG)
  return deviation_BG / (_std(deviation_BG, count_B1) + epsilon) if by_std else deviation_BG


def leave_one_out(
  rewards_BG: Array, valid_BG: Array | None = None, *, by_std: bool = False
) -> jax.Array:
  """Rewards relative to the mean of the other rollouts of their group.

      A_i = r_i - mean of r_j, j != i  =  n / (n - 1) * (r_i - mean r)

  Arguments and result are those of `grpo`. The mean of the others does not depend on r_i, so that
  the gradient has no bias.

  Source: RLOO (arXiv:2402.14740).
  """
  deviation_BG, count_B1 = _deviations(rewards_BG, valid_BG)
  advantage_BG = deviation_BG * (count_B1 / jnp.maximum(count_B1 - 1.0, 1.0))
  return advantage_BG / (_std(deviation_BG, count_B1) + STD_EPSILON) if by_std else advantage_BG


def gdpo(
  terms_BG: Mapping[str, Array],
  weights: Mapping[str, float],
  valid_BG: Array | None = None,
  *,
  epsilon: float = STD_EPSILON,
) -> jax.Array:
  """Advantages of several components, each divided by its own deviation before the sum.

      A_c = (r_c - mean r_c) / (std r_c + epsilon)          within the group
      A   = sum_c w_c A_c,   then A / (std A + epsilon) over the batch, whose mean is 0

  A rare component is not lost beside a frequent one. Groups whose components are all equal have
  advantage exactly 0.

  Args:
    terms_BG: name of a component -> float32 [B, G].
    weights: name -> w_c.
    valid_BG: as in `grpo`.

  Returns:
    float32 [B, G]; 0 where not valid.

  Source: GDPO (arXiv:2601.05242).
  """
  parts = [
    weights[name] * grpo(term_BG, valid_BG, epsilon=epsilon) for name, term_BG in terms_BG.items()
  ]
  total_BG = jnp.sum(jnp.stack(parts), axis=0)
  valid_BG = jnp.ones(total_BG.shape, bool) if valid_BG is None else jnp.asarray(valid_BG)
  total_BG = jnp.where(valid_BG, total_BG, 0.0)
  count_11 = jnp.sum(valid_BG).astype(jnp.float32).reshape(1, 1)
  std_11 = _std(total_BG.reshape(1, -1), count_11)
  return total_BG / (std_11 + epsilon)


def ap_grpo(
  rewards_BG: Array,
  alpha: float | Array,
  scale_BG: Array | None = None,
  valid_BG: Array | None = None,
  *,
  sign_safe: bool = False,
  by_std: bool = True,
) -> jax.Array:
  """Group advantages, each multiplied by a power of the accuracy of its own answer.

      A' = scale^alpha * A                                       (alpha = 0: GRPO)
      sign_safe:  A' = scale^alpha * A where A > 0, (1 - scale)^alpha * A where A < 0

  The plain form weakens groups in which every answer is wrong, and most negative advantages with
  them: a rollout of accuracy 0 never has a negative advantage. The sign-safe form keeps that
  advantage in full, and weakens the negative advantage of a nearly right answer instead. The
  advantages of a group do not sum to 0 in either form.

  Args:
    rewards_BG: float32, compared within the group.
    alpha: >= 0.
    scale_BG: float32, the accuracy part, limited to [0, 1]; None: `rewards_BG`. A rollout whose
      scale is NaN or infinite is not valid.
    valid_BG, by_std: as in `grpo`.
    sign_safe: which form.

  Returns:
    float32 [B, G]; 0 where not valid.

  Source: Smooth Operator, arXiv:2601.07695 ("in the form r^alpha"; the product is reconstructed,
  the sign-safe form is ours).
  """
  scale_BG = jnp.asarray(rewards_BG if scale_BG is None else scale_BG, jnp.float32)
  valid_BG = _usable(scale_BG, valid_BG)
  advantage_BG = grpo(rewards_BG, valid_BG, by_std=by_std)
  return scale_by_accuracy(advantage_BG, scale_BG, alpha, valid_BG, sign_safe=sign_safe)


def scale_by_accuracy(
  advantage_BG: Array,
  scale_BG: Array,
  alpha: float | Array,
  valid_BG: Array | None = None,
  *,
  sign_safe: bool = False,
) -> jax.Array:
  """The factor of AP-GRPO on advantages of any kind; arguments and source as in `ap_grpo`."""
  scale_BG = jnp.asarray(scale_BG, jnp.float32)
  valid_BG = _usable(scale_BG, valid_BG)
  scale_BG = jnp.where(valid_BG, jnp.clip(scale_BG, 0.0, 1.0), 0.0)
  if sign_safe:
    scale_BG = jnp.where(advantage_BG < 0.0, 1.0 - scale_BG, scale_BG)
  factor_BG = jnp.power(scale_BG, jnp.asarray(alpha, jnp.float32))
  return jnp.where(valid_BG, factor_BG * advantage_BG, 0.0)


def _deviations(rewards_BG: Array, valid_BG: Array | None) -> tuple[jax.Array, jax.Array]:
  """Differences from the mean of each group, 0 where not valid; and the number of valid ones."""
  rewards_BG = jnp.asarray(rewards_BG, jnp.float32)
  valid_BG = _usable(rewards_BG, valid_BG)
  # Relative to the first valid reward: the mean of equal numbers is off by a rounding error, the
  # mean of zeros is not.
  first_B1 = jnp.argmax(valid_BG, axis=-1, keepdims=True)
  difference_BG = rewards_BG - jnp.take_along_axis(rewards_BG, first_B1, axis=-1)
  difference_BG = jnp.where(valid_BG, difference_BG, 0.0)
  count_B1 = jnp.sum(valid_BG, axis=-1, keepdims=True).astype(jnp.float32)
  mean_B1 = jnp.sum(difference_BG, axis=-1, keepdims=True) / jnp.maximum(count_B1, 1.0)
  return jnp.where(valid_BG, difference_BG - mean_B1, 0.0), count_B1


def _std(deviation_BG: jax.Array, count_B1: jax.Array) -> jax.Array:
  """float32 [B, 1], with divisor n - 1."""
  squares_B1 = jnp.sum(jnp.square(deviation_BG), axis=-1, keepdims=True)
  return jnp.sqrt(squares_B1 / jnp.maximum(count_B1 - 1.0, 1.0))


def _usable(x_BG: jax.Array, valid_BG: Array | None) -> jax.Array:
  """bool [B, G]: valid, and a number; false for NaN, whose comparisons are false."""
  number_BG = jnp.abs(x_BG) <= REWARD_LIMIT
  return number_BG if valid_BG is None else number_BG & jnp.asarray(valid_BG)
