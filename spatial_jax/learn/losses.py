"""Losses on log-probabilities of tokens: one pure function per loss, additive over microbatches.

A loss takes log-probabilities [R, T] of some rows, what it needs of these rows, and last the mask
and the weight of their tokens. The weights of all trained tokens of a batch sum to 1, so that the
losses, metrics and gradients of microbatches add up to those of the batch.

    loss = sum_r token_weight_r * sum_t trained_rt * loss_rt
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from spatial_jax.checks import is_finite
from spatial_jax.config import check_field
from spatial_jax.types import Array

Metrics = dict[str, jax.Array]
Normalise = Literal["token", "sequence"]

# exp(20) is far outside every clip range and far inside float32.
LOG_RATIO_LIMIT = 20.0


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["clip_low", "clip_high", "kl_weight"],
  meta_fields=["normalise"],
)
@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The policy loss; a pytree whose `normalise` is static."""

  # clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
  clip_low: float | Array
  clip_high: float | Array
  # beta, weight of the KL term (k3 estimate); 0: no KL term and no reference policy.
  kl_weight: float | Array
  normalise: Normalise  # see `token_weights`

  def __post_init__(self):
    for name in ("clip_low", "clip_high", "kl_weight"):
      value = vars(self)[name]
      if isinstance(value, int | float):  # else an array, or what JAX puts into a pytree
        valid = is_finite(value) and value >= 0
        check_field(self, name, valid, "be a finite number, at least 0")
    if isinstance(self.clip_low, int | float):
      check_field(self, "clip_low", self.clip_low < 1, "be below 1")
    valid = self.normalise in ("token", "sequence")
    check_field(self, "normalise", valid, "be token or sequence")


def token_weights(
  trained_RT: Array, normalise: Normalise, weight_R: Array | None = None
) -> jax.Array:
  """The weight of one trained token of each row, such that all weights of the batch sum to 1.

      "token"      weight_r / sum over trained tokens of weight_r: long rows have more influence
      "sequence"   weight_r / (sum_r weight_r * trained tokens of the row): every row has the same

  A row without trained tokens (a fault, padding) has weight 0 and is not counted.

  Args:
    trained_RT: bool, of the whole batch, never of a microbatch.
    normalise: see above.
    weight_R: float32 >= 0, how much each row counts; None: 1.

  Returns:
    float32 [R].

  Source: "sequence" is GRPO (arXiv:2402.03300) and ViLaSR (arXiv:2506.09965, Eq. 7); "token" is
  DAPO (arXiv:2503.14476).
  """
  tokens_R = jnp.sum(jnp.asarray(trained_RT), axis=1).astype(jnp.float32)
  weight_R = jnp.ones(tokens_R.shape) if weight_R is None else jnp.asarray(weight_R)
  weight_R = jnp.where(tokens_R > 0.0, weight_R, 0.0)
  if normalise == "token":
    total = jnp.sum(weight_R * tokens_R)
    return weight_R / jnp.where(total > 0.0, total, 1.0)
  total = jnp.sum(weight_R)
  return weight_R / (jnp.where(total > 0.0, total, 1.0) * jnp.maximum(tokens_R, 1.0))


def ppo_clip(
  logp_RT: Array,
  old_logp_RT: Array,
  advantage_R: Array,
  trained_RT: Array,
  token_weight_R: Array,
  cfg: LossConfig,
  ref_logp_RT: Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """The clipped policy-gradient loss of PPO and GRPO, with an optional KL term.

      ratio = exp(logp - old_logp)
      loss  = -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) + beta * k3(ref)
      k3    = exp(ref_logp - logp) - (ref_logp - logp) - 1

  With one update per batch of rollouts, the ratio differs from 1 only by rounding.

  Args:
    logp_RT: float32, of the current policy, with a gradient. Any value where not trained.
    old_logp_RT: float32, recorded by the sampler: at the temperature of sampling, forbidden ids at
      -inf, before top-k, top-p and min-p. The other two are computed in the same way.
    token_weight_R: float32, from `token_weights` of the whole batch.
    ref_logp_RT: float32, of the reference policy; None: no KL term.

  Returns:
    What these rows add to the loss, and to each metric, a mean over trained tokens: ratio, its
    square, clipped fraction, KL divergence from the sampler (k1, k3), absolute difference from the
    sampler, -logp as an estimate of the entropy, k3 of the reference.

  Source: GRPO (arXiv:2402.03300), clip-higher of DAPO (arXiv:2503.14476).
  """
  mean = functools.partial(_weighted_sum, trained_RT=trained_RT, token_weight_R=token_weight_R)
  log_ratio_RT = _log_ratio(logp_RT, old_logp_RT, trained_RT)
  ratio_RT = jnp.exp(log_ratio_RT)
  unclipped_RT = ratio_RT * advantage_R[:, None]
  clipped_RT = jnp.clip(ratio_RT, 1.0 - cfg.clip_low, 1.0 + cfg.clip_high) * advantage_R[:, None]
  loss = -mean(jnp.minimum(unclipped_RT, clipped_RT))
  metrics = {
    "ratio": mean(ratio_RT),
    "ratio_square": mean(jnp.square(ratio_RT)),
    "clip_fraction": mean((clipped_RT < unclipped_RT).astype(jnp.float32)),
    "kl_old_k1": mean(-log_ratio_RT),
    "kl_old_k3": mean(_k3(log_ratio_RT)),
    "logp_difference": mean(jnp.abs(log_ratio_RT)),
    "entropy_estimate": -mean(logp_RT),
  }
  if ref_logp_RT is not None:
    metrics["kl_ref_k3"] = mean(_k3(_log_ratio(ref_logp_RT, logp_RT, trained_RT)))
    loss += cfg.kl_weight * metrics["kl_ref_k3"]
  return loss, jax.lax.stop_gradient(metrics)


def nll(logp_RT: Array, trained_RT: Array, token_weight_R: Array) -> jax.Array:
  """The negative log-likelihood of the trained tokens.

  Args:
    logp_RT: float32, of the current policy, with a gradient. Any value where not trained.
    trained_RT: bool.
    token_weight_R: float32, from `token_weights` of the whole batch.

  Returns:
    The part of these rows of the loss.

  Source: ViLaSR (arXiv:2506.09965, Eq. 4) is the form with "sequence" weights.
  """
  return -_weighted_sum(logp_RT, trained_RT, token_weight_R)


def effective_share(metrics: Metrics) -> Metrics:
  """Replaces `ratio_square` in the metrics of a whole batch by the effective share of its tokens.

      effective_share = mean(ratio)^2 / mean(ratio^2)      1: sampler and trainer agree

  Source: Kong, "A note on importance sampling using standardized weights" (1992).
  """
  rest = {name: value for name, value in metrics.items() if name != "ratio_square"}
  share = jnp.square(metrics["ratio"]) / jnp.maximum(metrics["ratio_square"], 1e-30)
  return rest | {"effective_share": share}


def _weighted_sum(x_RT: Array, trained_RT: Array, token_weight_R: Array) -> jax.Array:
  """sum_r weight_r sum_t trained_rt x_rt; where, not product: x may be -inf where not trained."""
  return jnp.sum(token_weight_R * jnp.sum(jnp.where(trained_RT, x_RT, 0.0), axis=1))


def _k3(log_ratio_RT: jax.Array) -> jax.Array:
  """ratio - 1 - log ratio >= 0, whose mean over samples of q is KL(q || p) for ratio = p / q.

  Source: Schulman, "Approximating KL divergence" (2020), also of the names k1 and k3.
  """
  return jnp.expm1(log_ratio_RT) - log_ratio_RT


def _log_ratio(logp_RT: Array, base_logp_RT: Array, trained_RT: Array) -> jax.Array:
  """logp - base where trained, else 0; limited so that its exponential stays finite."""
  difference_RT = jnp.where(trained_RT, logp_RT - base_logp_RT, 0.0)
  return jnp.clip(difference_RT, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
