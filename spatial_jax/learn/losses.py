"""Losses on log-probabilities of tokens: pure, and additive over microbatches.

Every sum is weighted by `weight_R`, made once for the whole batch by `row_weights`. The weights of
all trained tokens sum to 1, so losses, metrics and gradients of microbatches add up to the batch's.

    loss = sum_r weight_r * sum_t trained_rt * loss_rt
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from spatial_jax.types import Array

Metrics = dict[str, jax.Array]

# exp(20) is far outside every clip range and far inside float32.
LOG_RATIO_LIMIT = 20.0


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["clip_low", "clip_high", "kl_weight"],
  meta_fields=["normalise"],
)
@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The policy loss; a pytree whose `normalise` is static.

  Attributes:
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
    kl_weight: beta of the divergence from the reference policy; read where there is one.
    normalise: see `row_weights`.
  """

  clip_low: float | Array
  clip_high: float | Array
  kl_weight: float | Array
  normalise: Literal["token", "sequence"]


def row_weights(trained_RT: Array, normalise: Literal["token", "sequence"]) -> jax.Array:
  """What one trained token of each row counts, over a whole batch.

      "token"      1 / trained tokens of the batch: long rollouts count more
      "sequence"   1 / (rows * trained tokens of the row): every rollout counts the same

  A row without trained tokens (a fault, padding) weighs 0 and is not counted.

  Args:
    trained_RT: bool, of the whole batch, never of a microbatch.
    normalise: see above.

  Returns:
    float32 [R].

  Source: "sequence" is GRPO (arXiv:2402.03300) and ViLaSR (arXiv:2506.09965, Eq. 7); "token" is
  DAPO (arXiv:2503.14476).
  """
  tokens_R = jnp.sum(jnp.asarray(trained_RT), axis=1).astype(jnp.float32)
  counted_R = (tokens_R > 0.0).astype(jnp.float32)
  if normalise == "token":
    return counted_R / jnp.maximum(jnp.sum(tokens_R), 1.0)
  rows = jnp.maximum(jnp.sum(counted_R), 1.0)
  return counted_R / (rows * jnp.maximum(tokens_R, 1.0))


def policy_loss(
  logp_RT: Array,
  old_logp_RT: Array,
  advantage_R: Array,
  trained_RT: Array,
  weight_R: Array,
  cfg: LossConfig,
  ref_logp_RT: Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """Clipped policy-gradient loss, with an optional divergence from a reference policy.

      ratio = exp(logp - old_logp)
      loss  = -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) + beta * k3(ref)
      k3    = exp(ref_logp - logp) - (ref_logp - logp) - 1

  Args:
    logp_RT: float32, of the current policy, with a gradient. Anything where not trained.
    old_logp_RT: float32, as the sampler recorded it.
    advantage_R: float32.
    trained_RT: bool.
    weight_R: float32, from `row_weights` of the whole batch.
    cfg: clip range and beta.
    ref_logp_RT: float32, of the reference policy; None: no divergence.

  Returns:
    The loss, and means over trained tokens, as this microbatch's part of the batch's: ratio, its
    square, clipped share, divergence of the policy from the sampler (k1, k3), their absolute
    difference, -logp as an estimate of the entropy, k3 from a reference.

  Source: GRPO (arXiv:2402.03300), clip-higher of DAPO (arXiv:2503.14476).
  """
  mean = functools.partial(_weighted_sum, trained_RT=trained_RT, weight_R=weight_R)
  log_ratio_RT = _log_ratio(logp_RT, old_logp_RT, trained_RT)
  ratio_RT = jnp.exp(log_ratio_RT)
  free_RT = ratio_RT * advantage_R[:, None]
  bound_RT = jnp.clip(ratio_RT, 1.0 - cfg.clip_low, 1.0 + cfg.clip_high) * advantage_R[:, None]
  loss = -mean(jnp.minimum(free_RT, bound_RT))
  metrics = {
    "ratio": mean(ratio_RT),
    "ratio_square": mean(jnp.square(ratio_RT)),
    "clip_fraction": mean((bound_RT < free_RT).astype(jnp.float32)),
    "kl_old_k1": mean(-log_ratio_RT),
    "kl_old_k3": mean(_k3(log_ratio_RT)),
    "logp_difference": mean(jnp.abs(log_ratio_RT)),
    "entropy_estimate": -mean(logp_RT),
  }
  if ref_logp_RT is not None:
    metrics["kl_ref_k3"] = mean(_k3(_log_ratio(ref_logp_RT, logp_RT, trained_RT)))
    loss += cfg.kl_weight * metrics["kl_ref_k3"]
  return loss, jax.lax.stop_gradient(metrics)


def effective_share(metrics: Metrics) -> Metrics:
  """The metrics of a whole batch, its mean square of ratios as the share of tokens that count.

      effective_share = mean(ratio)^2 / mean(ratio^2)      1: sampler and trainer are one

  Source: Kong, "A note on importance sampling using standardized weights" (1992).
  """
  rest = {name: value for name, value in metrics.items() if name != "ratio_square"}
  share = jnp.square(metrics["ratio"]) / jnp.maximum(metrics["ratio_square"], 1e-30)
  return rest | {"effective_share": share}


def sft_loss(logp_RT: Array, trained_RT: Array, weight_R: Array) -> jax.Array:
  """Negative log-likelihood of the trained tokens.

  Args:
    logp_RT: float32, of the current policy, with a gradient. Anything where not trained.
    trained_RT: bool.
    weight_R: float32, from `row_weights` of the whole batch.

  Returns:
    The loss, this microbatch's part of the batch's mean.

  Source: ViLaSR (arXiv:2506.09965, Eq. 4) is the form with "sequence" weights.
  """
  return -_weighted_sum(logp_RT, trained_RT, weight_R)


def _weighted_sum(x_RT: Array, trained_RT: Array, weight_R: Array) -> jax.Array:
  """sum_r weight_r sum_t trained_rt x_rt; where, not product: x may be -inf where not trained."""
  return jnp.sum(weight_R * jnp.sum(jnp.where(trained_RT, x_RT, 0.0), axis=1))


def _k3(log_ratio_RT: jax.Array) -> jax.Array:
  """ratio - 1 - log ratio >= 0, whose mean over samples of q is KL(q || p) for ratio = p / q.

  Source: Schulman, "Approximating KL divergence" (2020), as are k1 and the names.
  """
  return jnp.expm1(log_ratio_RT) - log_ratio_RT


def _log_ratio(logp_RT: Array, base_logp_RT: Array, trained_RT: Array) -> jax.Array:
  """logp - base where trained, else 0; limited so that its exponential stays finite."""
  difference_RT = jnp.where(trained_RT, logp_RT - base_logp_RT, 0.0)
  return jnp.clip(difference_RT, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
