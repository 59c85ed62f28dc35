"""Losses on log-probabilities of tokens: pure functions, additive over microbatches.

A loss takes log-probabilities [R, T] of some rows, what it needs of these rows, and last the mask
and the weight of their tokens. Weights are those of the whole batch, so that the losses, metrics
and gradients of microbatches add up to those of the batch.

    loss = sum_r token_weight_r * sum_t trained_rt * loss_rt

The policy loss is a sum of three terms:

    loss_rt = importance_rt * surrogate_rt  +  beta * kl_rt  -  entropy weight * entropy_rt
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from spatial_jax.config import FieldError, check_choice, check_field, check_number, check_whole
from spatial_jax.types import Array

Metrics = dict[str, jax.Array]
Normalise = Literal["token", "sequence", "constant"]
Surrogate = Literal["clip", "gspo", "gspo_token", "cispo", "sapo"]
KlEstimate = Literal["k1", "k2", "k3"]
Importance = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# exp(20) is far outside every clip range and far inside float32.
LOG_RATIO_LIMIT = 20.0


@dataclasses.dataclass(frozen=True)
class KlConfig:
  """The KL term between the policy and a reference."""

  weight: float  # beta; 0: no KL term and no reference policy
  final_weight: float  # reached linearly after `steps` steps
  steps: int  # 0: beta is constant
  estimate: KlEstimate  # see `kl_estimate`
  # "reward": beta times the sum over the tokens of a rollout is subtracted from its reward.
  place: Literal["loss", "reward"]
  # "start": the policy that training starts from (with adapters: the policy without them).
  # "average": the moving average of the trained parameters, see `OptimizerConfig.ema_decay`.
  reference: Literal["start", "average"]

  def __post_init__(self):
    check_choice(self, "estimate", "place", "reference")
    check_number(self, "weight", "final_weight", at_least=0)
    check_whole(self, "steps", at_least=0)
    if self.steps and self.final_weight and not self.weight:
      raise FieldError(
        f"weight is 0 and final_weight is {self.final_weight}; give weight a small value, so that "
        "there is a reference from the first step"
      )


@dataclasses.dataclass(frozen=True)
class ImportanceConfig:
  """Weights for the difference between sampler and trainer; see `importance_weights`."""

  kind: Importance
  cap: float  # largest weight
  floor: float  # smallest weight that a mask keeps

  def __post_init__(self):
    check_choice(self, "kind")
    check_number(self, "floor", at_least=0)
    check_field(self, "cap", self.cap > self.floor, f"be above floor, {self.floor}")


@dataclasses.dataclass(frozen=True)
class EntropyConfig:
  """A bonus for the entropy of the policy."""

  weight: float  # 0: none, and the entropy is not computed
  target: float  # nats; a token with a higher entropy gets no bonus

  def __post_init__(self):
    check_number(self, "weight", "target", at_least=0)


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The policy loss."""

  kind: Surrogate  # see `surrogate`
  # clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
  clip_low: float
  clip_high: float
  # Of "clip", for A < 0: the loss of a token is at most dual_clip * |A|. Above 1; 0: no limit.
  dual_clip: float
  # sapo_positive, sapo_negative: of "sapo", temperatures for A > 0 and for A <= 0.
  sapo_positive: float
  sapo_negative: float
  normalise: Normalise  # see `token_weights`
  length_constant: int  # of normalise "constant", tokens; 0 with the others
  kl: KlConfig
  importance: ImportanceConfig
  entropy: EntropyConfig

  def __post_init__(self):
    check_choice(self, "kind", "normalise")
    check_number(self, "clip_low", at_least=0, at_most=1)
    check_number(self, "clip_high", "dual_clip", at_least=0)
    check_number(self, "sapo_positive", "sapo_negative", above=0)
    valid = self.clip_low < 1 or self.kind == "cispo"
    check_field(self, "clip_low", valid, "be below 1; 1 is no limit, which only kind cispo has")
    valid = self.dual_clip == 0 or (self.dual_clip > 1 and self.kind == "clip")
    check_field(self, "dual_clip", valid, "be above 1 with kind clip, or 0 for no limit")
    check_whole(self, "length_constant", at_least=int(self.normalise == "constant"))
    valid = self.kind != "gspo" or self.normalise == "sequence"
    check_field(self, "normalise", valid, "be sequence with kind gspo: its rows have one ratio")


def kl_weight(cfg: KlConfig, step: Array) -> jax.Array:
  """Returns beta of a step, int32 [] from 0."""
  progress = jnp.minimum(jnp.asarray(step, jnp.float32) / max(cfg.steps, 1), 1.0)
  change = (cfg.final_weight - cfg.weight) if cfg.steps else 0.0
  return jnp.float32(cfg.weight) + jnp.float32(change) * progress


def token_weights(
  trained_RT: Array,
  normalise: Normalise,
  weight_R: Array | None = None,
  length_constant: int = 0,
) -> jax.Array:
  """The weight of one trained token of each row.

      "token"      weight_r / sum over trained tokens of weight_r: long rows have more influence
      "sequence"   weight_r / (sum_r weight_r * trained tokens of the row): every row has the same
      "constant"   weight_r / (sum_r weight_r * length_constant): every token has the same in every
                   batch

  In the first two the weights of the batch sum to 1. A row without trained tokens (a fault,
  padding) has weight 0 and is not counted.

  Args:
    trained_RT: bool, of the whole batch, never of a microbatch.
    normalise: see above.
    weight_R: float32 >= 0, how much each row counts; None: 1.
    length_constant: tokens, of "constant".

  Returns:
    float32 [R].

  Source: "sequence" is GRPO (arXiv:2402.03300) and ViLaSR (arXiv:2506.09965, Eq. 7); "token" is
  DAPO (arXiv:2503.14476); "constant" is Dr. GRPO (arXiv:2503.20783).
  """
  tokens_R = jnp.sum(jnp.asarray(trained_RT), axis=1).astype(jnp.float32)
  weight_R = jnp.ones(tokens_R.shape) if weight_R is None else jnp.asarray(weight_R)
  weight_R = jnp.where(tokens_R > 0.0, weight_R, 0.0)
  if normalise == "token":
    return weight_R / token_total(trained_RT, weight_R)
  total = jnp.sum(weight_R)
  rows = weight_R / jnp.where(total > 0.0, total, 1.0)
  if normalise == "constant":
    return rows / max(length_constant, 1)
  return rows / jnp.maximum(tokens_R, 1.0)


def token_total(trained_RT: Array, weight_R: Array) -> jax.Array:
  """The number of trained tokens of a batch, each times the weight of its row; 1 if that is 0."""
  tokens_R = jnp.sum(jnp.asarray(trained_RT), axis=1).astype(jnp.float32)
  total = jnp.sum(weight_R * tokens_R)
  return jnp.where(total > 0.0, total, 1.0)


def policy_loss(
  logp_RT: Array,
  old_logp_RT: Array,
  advantage_R: Array,
  trained_RT: Array,
  token_weight_R: Array,
  cfg: LossConfig,
  beta: float | Array = 0.0,
  ref_logp_RT: Array | None = None,
  sampler_logp_RT: Array | None = None,
  entropy_RT: Array | None = None,
  mean_weight_R: Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """The policy-gradient loss of some rows: surrogate, KL term, entropy bonus.

  Args:
    logp_RT: float32, of the current policy, with a gradient. All log-probabilities are at the
      temperature of sampling, with forbidden ids at -inf, before top-k, top-p and min-p.
    old_logp_RT: float32, as recorded by the sampler, or as the trainer computed it.
    token_weight_R: float32, from `token_weights` of the whole batch.
    beta: weight of the KL term, from `kl_weight`.
    ref_logp_RT: float32, of the reference policy; None: no KL term.
    sampler_logp_RT: float32, recorded by the sampler, for `importance_weights`; None: weight 1.
    entropy_RT: float32, entropy of the policy at each token, with a gradient; None: no bonus.
    mean_weight_R: float32, of the metrics: `token_weights` with "token"; None: `token_weight_R`.

  Returns:
    What these rows add to the loss, and to each metric, a mean over trained tokens.
  """
  weights = (token_weight_R, token_weight_R if mean_weight_R is None else mean_weight_R)
  add, mean = (functools.partial(_sum, trained_RT=trained_RT, token_weight_R=w) for w in weights)
  log_ratio_RT = _log_ratio(logp_RT, old_logp_RT, trained_RT)
  loss_RT, clipped_RT = surrogate(log_ratio_RT, logp_RT, advantage_R, trained_RT, cfg)
  sampled_RT = old_logp_RT if sampler_logp_RT is None else sampler_logp_RT
  importance_RT = None
  if sampler_logp_RT is not None:
    importance_RT = importance_weights(old_logp_RT, sampler_logp_RT, trained_RT, cfg.importance)
  loss = add(loss_RT if importance_RT is None else loss_RT * importance_RT)
  metrics = _ratio_metrics(log_ratio_RT, clipped_RT, importance_RT, mean) | {
    "logp_difference": mean(jnp.abs(_log_ratio(logp_RT, sampled_RT, trained_RT))),
    "entropy_estimate": -mean(logp_RT),
  }
  if ref_logp_RT is not None:
    gap_RT = _log_ratio(ref_logp_RT, logp_RT, trained_RT)
    metrics["kl_ref_k1"], metrics["kl_ref_k3"] = mean(-gap_RT), mean(_k3(gap_RT))
    loss += beta * add(_kl(gap_RT, cfg.kl.estimate)) if cfg.kl.place == "loss" else 0.0
  if entropy_RT is not None:
    metrics["entropy"] = mean(entropy_RT)
    loss -= cfg.entropy.weight * add(jnp.minimum(entropy_RT, cfg.entropy.target))
  return loss, jax.lax.stop_gradient(metrics)


def _ratio_metrics(
  log_ratio_RT: jax.Array,
  clipped_RT: jax.Array,
  importance_RT: jax.Array | None,
  mean: Callable[[jax.Array], jax.Array],
) -> Metrics:
  """Ratio, clipped fractions, KL divergence from the old policy, importance weights.

  "sample_weight" and its square are those of `effective_share`.
  """
  ratio_RT, metrics = jnp.exp(log_ratio_RT), {}
  weight_RT = ratio_RT
  if importance_RT is not None:
    metrics["importance"] = mean(importance_RT)
    metrics["importance_masked"] = mean((importance_RT == 0.0).astype(importance_RT.dtype))
    weight_RT = ratio_RT * importance_RT
  return metrics | {
    "ratio": mean(ratio_RT),
    "sample_weight": mean(weight_RT),
    "sample_weight_square": mean(jnp.square(weight_RT)),
    "clip_fraction": mean(clipped_RT),
    "clip_fraction_above": mean(jnp.where(ratio_RT > 1.0, clipped_RT, 0.0)),
    "kl_old_k1": mean(-log_ratio_RT),
    "kl_old_k3": mean(_k3(log_ratio_RT)),
  }


def surrogate(
  log_ratio_RT: jax.Array, logp_RT: Array, advantage_R: Array, trained_RT: Array, cfg: LossConfig
) -> tuple[jax.Array, jax.Array]:
  """The surrogate loss of each token, and 1.0 where its ratio was clipped.

      ratio = exp(logp - old_logp)            s = exp(mean over the tokens of a row of log ratio)

      clip         -min(ratio A, clip(ratio) A); with dual_clip c and A < 0 at most -c A
      gspo         -min(s A, clip(s) A)
      gspo_token   gspo with s_t = stop(s) * exp(logp - stop(logp)): a gradient per token
      cispo        -stop(clip(ratio)) A logp
      sapo         -(4 / tau) sigmoid(tau (ratio - 1)) A,  tau by the sign of A

  Args:
    log_ratio_RT: float32, 0 where not trained.
    logp_RT: float32, of the current policy.

  Source: PPO and GRPO (arXiv:2402.03300), clip-higher of DAPO (arXiv:2503.14476), dual clip
  (arXiv:1912.09729), GSPO (arXiv:2507.18071), CISPO (arXiv:2506.13585), SAPO (arXiv:2511.20347).
  """
  advantage_R1, stop = advantage_R[:, None], jax.lax.stop_gradient
  match cfg.kind:
    case "gspo" | "gspo_token":
      tokens_R1 = jnp.maximum(jnp.sum(trained_RT, axis=1, keepdims=True), 1).astype(
        log_ratio_RT.dtype
      )
      mean_R1 = jnp.sum(log_ratio_RT, axis=1, keepdims=True) / tokens_R1
      if cfg.kind == "gspo":
        ratio_RT = jnp.broadcast_to(jnp.exp(mean_R1), log_ratio_RT.shape)
      else:
        ratio_RT = jnp.exp(stop(mean_R1) + log_ratio_RT - stop(log_ratio_RT))
    case _:
      ratio_RT = jnp.exp(log_ratio_RT)
  clipped_RT = jnp.clip(ratio_RT, 1.0 - cfg.clip_low, 1.0 + cfg.clip_high)
  outside_RT = (ratio_RT != clipped_RT).astype(ratio_RT.dtype)
  if cfg.kind == "cispo":
    where_RT = jnp.where(trained_RT, logp_RT, 0.0)
    return -stop(clipped_RT) * advantage_R1 * where_RT, outside_RT
  if cfg.kind == "sapo":
    tau_R1 = jnp.where(advantage_R1 > 0.0, cfg.sapo_positive, cfg.sapo_negative)
    tau_R1 = tau_R1.astype(ratio_RT.dtype)
    gate_RT = jax.nn.sigmoid(tau_R1 * (ratio_RT - 1.0)) * 4.0 / tau_R1
    return -gate_RT * advantage_R1, outside_RT
  unclipped_RT, limited_RT = ratio_RT * advantage_R1, clipped_RT * advantage_R1
  gain_RT, binds_RT = jnp.minimum(unclipped_RT, limited_RT), limited_RT < unclipped_RT
  if cfg.dual_clip:
    least_R1 = jnp.where(advantage_R1 < 0.0, cfg.dual_clip * advantage_R1, -jnp.inf)
    gain_RT, binds_RT = jnp.maximum(gain_RT, least_R1), binds_RT | (gain_RT < least_R1)
  return -gain_RT, binds_RT.astype(gain_RT.dtype)


def importance_weights(
  old_logp_RT: Array, sampler_logp_RT: Array, trained_RT: Array, cfg: ImportanceConfig
) -> jax.Array:
  """Weights for tokens that the sampler drew with other probabilities than the trainer computes.

      token_*      w_t = exp(old_logp_t - sampler_logp_t)
      sequence_*   w   = exp(sum over the tokens of a row of the same difference)
      *_truncate   min(w, cap)
      *_mask       w where floor <= w <= cap, else 0

  Returns:
    float32 [R, T], without a gradient; 1 where not trained.

  Source: truncated weights of Yao et al., "Your efficient RL framework secretly brings you
  off-policy RL training" (2025); masks of IcePop (2025).
  """
  difference_RT = jnp.where(trained_RT, old_logp_RT - sampler_logp_RT, 0.0)
  if cfg.kind.startswith("sequence"):
    difference_RT = jnp.broadcast_to(
      jnp.sum(difference_RT, axis=1, keepdims=True), difference_RT.shape
    )
  weight_RT = jnp.exp(jnp.clip(difference_RT, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
  if cfg.kind == "none":
    weight_RT = jnp.ones_like(weight_RT)
  elif cfg.kind.endswith("truncate"):
    weight_RT = jnp.minimum(weight_RT, cfg.cap)
  else:
    kept_RT = (weight_RT >= cfg.floor) & (weight_RT <= cfg.cap)
    weight_RT = jnp.where(kept_RT, weight_RT, 0.0)
  return jax.lax.stop_gradient(weight_RT)


def kl_estimate(logp_RT: Array, ref_logp_RT: Array, trained_RT: Array, kind: KlEstimate) -> Array:
  """An estimate of KL(policy || reference) from tokens of the policy; 0 where not trained.

      gap = ref_logp - logp       k1 = -gap       k2 = gap^2 / 2       k3 = exp(gap) - gap - 1

  Source: Schulman, "Approximating KL divergence" (2020).
  """
  return _kl(_log_ratio(ref_logp_RT, logp_RT, trained_RT), kind)


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
  return -_sum(logp_RT, trained_RT, token_weight_R)


def effective_share(metrics: Metrics) -> Metrics:
  """Replaces the sums of weights in the metrics of a whole batch by the effective share of tokens.

      w                ratio, times the importance weight if there is one
      effective_share  (sum w)^2 / (n sum w^2)      1: sampler and trainer agree

  Source: Kish (1965); Kong, "A note on importance sampling using standardized weights" (1992).
  """
  names = ("sample_weight", "sample_weight_square")
  weight, square = (metrics[name] for name in names)
  rest = {name: value for name, value in metrics.items() if name not in names}
  return rest | {"effective_share": jnp.square(weight) / jnp.maximum(square, 1e-30)}


def _sum(x_RT: Array, trained_RT: Array, token_weight_R: Array) -> jax.Array:
  """sum_r weight_r sum_t trained_rt x_rt; where, not product: x may be -inf where not trained."""
  return jnp.sum(token_weight_R * jnp.sum(jnp.where(trained_RT, x_RT, 0.0), axis=1))


def _kl(gap_RT: jax.Array, kind: KlEstimate) -> jax.Array:
  """`kl_estimate` of gap = ref_logp - logp."""
  match kind:
    case "k1":
      return -gap_RT
    case "k2":
      return jnp.square(gap_RT) / 2.0
    case "k3":
      return _k3(gap_RT)


def _k3(log_ratio_RT: jax.Array) -> jax.Array:
  """ratio - 1 - log ratio >= 0, whose mean over samples of q is KL(q || p) for ratio = p / q."""
  return jnp.expm1(log_ratio_RT) - log_ratio_RT


def _log_ratio(logp_RT: Array, base_logp_RT: Array, trained_RT: Array) -> jax.Array:
  """logp - base where trained, else 0; limited so that its exponential stays finite."""
  difference_RT = jnp.where(trained_RT, logp_RT - base_logp_RT, 0.0)
  return jnp.clip(difference_RT, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
