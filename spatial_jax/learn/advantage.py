"""Group advantages: GRPO, and AP-GRPO, which keeps the absolute size of the reward."""

import dataclasses

import jax
import jax.numpy as jnp

from spatial_jax.types import Array, Scores

# Added to the standard deviation. Rewards of an all-bad group differ by about 1e-7; a smaller
# epsilon would blow that noise up to advantages of 1.5.
STD_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
  """How rewards become advantages.

  Attributes:
    alpha: exponent of the accuracy factor; 0 is GRPO, 1 is AP-GRPO.
    sign_safe: scales a negative advantage by (1 - accuracy)^alpha instead of accuracy^alpha.
    by_std: divides by the standard deviation of the group, as GRPO does.
  """

  alpha: float
  sign_safe: bool
  by_std: bool


def advantage(scores: Scores, cfg: AdvantageConfig) -> jax.Array:
  """Advantages of one step.

  Format takes part in the reward, and so in the rank, and stays outside the factor.

  Args:
    scores: [B, G].
    cfg: how rewards become advantages.

  Returns:
    float32 [B, G], 0 where not usable.
  """
  return ap_grpo(
    scores.reward_BG,
    cfg.alpha,
    scores.accuracy_BG,
    scores.valid_BG,
    sign_safe=cfg.sign_safe,
    by_std=cfg.by_std,
  )


def grpo(rewards_BG: Array, valid_BG: Array | None = None, *, by_std: bool = True) -> jax.Array:
  """Rewards relative to their group.

      A = (r - mean r) / (std r + 1e-6)           std with divisor n - 1, over the n usable rollouts
      by_std = False:  A = r - mean r

  Division by the deviation makes a group of near-equal rewards count as much as one in which half
  failed; where little is sampled, that is noise.

  Args:
    rewards_BG: float32.
    valid_BG: bool, false for a rollout that is left out; None: all are usable.
    by_std: see above.

  Returns:
    float32 [B, G]; 0 where not usable, and in a group with fewer than two usable rollouts.

  Source: DeepSeekMath (arXiv:2402.03300); n - 1 and 1e-6 as in EasyR1, which ViLaSR
  (arXiv:2506.09965) was trained with; without the deviation: Dr. GRPO (arXiv:2503.20783).
  """
  rewards_BG = jnp.asarray(rewards_BG, jnp.float32)
  valid_BG = jnp.ones(rewards_BG.shape, bool) if valid_BG is None else jnp.asarray(valid_BG)
  count_B1 = jnp.sum(valid_BG, axis=-1, keepdims=True).astype(jnp.float32)
  kept_BG = jnp.where(valid_BG, rewards_BG, 0.0)
  mean_B1 = jnp.sum(kept_BG, axis=-1, keepdims=True) / jnp.maximum(count_B1, 1.0)
  deviation_BG = jnp.where(valid_BG, rewards_BG - mean_B1, 0.0)
  if not by_std:
    return deviation_BG
  squares_B1 = jnp.sum(jnp.square(deviation_BG), axis=-1, keepdims=True)
  std_B1 = jnp.sqrt(squares_B1 / jnp.maximum(count_B1 - 1.0, 1.0))
  return deviation_BG / (std_B1 + STD_EPSILON)


def ap_grpo(
  rewards_BG: Array,
  alpha: float | Array,
  scale_BG: Array | None = None,
  valid_BG: Array | None = None,
  *,
  sign_safe: bool = False,
  by_std: bool = True,
) -> jax.Array:
  """Group advantages scaled by how good the answer is in absolute terms.

      A' = scale^alpha * A                                       (alpha = 0: GRPO)
      sign_safe:  A' = scale^alpha * A where A > 0, (1 - scale)^alpha * A where A < 0

  The plain form damps groups in which everybody is bad, and with them most negative signal: a
  rollout that earned nothing is never counted against. The sign-safe form counts it in full, and
  damps near misses that fell below the mean instead. Neither is of mean zero.

  Args:
    rewards_BG: float32, ranked within the group.
    alpha: >= 0.
    scale_BG: float32 in [0, 1], the accuracy part; None: the rewards, then to lie in [0, 1].
    valid_BG: bool, as in `grpo`.
    sign_safe: see above.
    by_std: as in `grpo`.

  Returns:
    float32 [B, G]; 0 where not usable.

  Source: Smooth Operator, arXiv:2601.07695 ("in the form r^alpha"; the product is reconstructed,
  the sign-safe form is ours).
  """
  advantages_BG = grpo(rewards_BG, valid_BG, by_std=by_std)
  scale_BG = jnp.asarray(rewards_BG if scale_BG is None else scale_BG, jnp.float32)
  used_BG = jnp.ones(scale_BG.shape, bool) if valid_BG is None else jnp.asarray(valid_BG)
  scale_BG = jnp.where(used_BG, scale_BG, 0.0)  # what is not usable need not be a number
  if sign_safe:
    scale_BG = jnp.where(advantages_BG < 0.0, 1.0 - scale_BG, scale_BG)
  return jnp.power(scale_BG, jnp.asarray(alpha, jnp.float32)) * advantages_BG
