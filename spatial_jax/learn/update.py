"""One optimizer step, pure: TrainState x TrainBatch -> TrainState and metrics."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from spatial_jax.learn.gradient import Microbatch, Objective, gradient
from spatial_jax.learn.losses import (
  LossConfig,
  Metrics,
  effective_share,
  kl_weight,
  policy_loss,
  token_total,
  token_weights,
)
from spatial_jax.learn.train_batch import Microbatches
from spatial_jax.policy.logprobs import TokenScores
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.types import OtherLogprobs, Params, TrainBatch, TrainState


def policy_update(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  cfg: LossConfig,
  micro: Microbatches,
  state: TrainState,
  batch: TrainBatch,
  others: OtherLogprobs,
) -> tuple[TrainState, Metrics]:
  """One update of GRPO, AP-GRPO or another policy loss; advantages come with the batch.

  Args:
    state: the program that jits this donates it.
    others: log-probabilities under the reference, None without a KL term; and, for importance
      weights, by the trainer before the first update on these rollouts, None if this is the first.

  Returns:
    The next state, and scalar metrics: means over the trained tokens, except for the loss.
  """
  beta = kl_weight(cfg.kl, state.step)
  trained_RT, weight_R = batch.rows.trained_RT, batch.rows.weight_R
  token_weight_R = token_weights(trained_RT, cfg.normalise, weight_R, cfg.length_constant)
  tokens = token_total(trained_RT, weight_R)

  def loss(scores: TokenScores, microbatch: Microbatch) -> tuple[jax.Array, Metrics]:
    rows, (ref_RT, trainer_RT) = microbatch.rows, microbatch.others
    old_logp_RT, sampler_logp_RT = rows.old_logp_RT, None
    if cfg.importance.kind != "none":
      current_RT = jax.lax.stop_gradient(scores.logp_RT)
      old_logp_RT = current_RT if trainer_RT is None else trainer_RT
      sampler_logp_RT = rows.old_logp_RT
    return policy_loss(
      scores.logp_RT,
      old_logp_RT,
      rows.advantage_R,
      rows.trained_RT,
      microbatch.token_weight_R,
      cfg,
      beta,
      ref_RT,
      sampler_logp_RT,
      scores.entropy_RT,
      rows.weight_R / tokens,
    )

  objective = Objective(loss, is_sum_of_tokens(cfg), cfg.entropy.weight > 0)
  inputs = (state.params, batch, token_weight_R, others)
  value, metrics, grads = gradient(policy, *inputs, objective, micro)
  metrics = {"loss": value, **effective_share(metrics)}
  return apply_gradient(optimizer, state, grads, metrics)


def is_sum_of_tokens(cfg: LossConfig) -> bool:
  """Whether the loss of a token reads no other token of its row."""
  reads_rows = cfg.kind.startswith("gspo") or cfg.importance.kind.startswith("sequence")
  return not reads_rows


def apply_gradient(
  optimizer: optax.GradientTransformation, state: TrainState, grads: Params, metrics: Metrics
) -> tuple[TrainState, Metrics]:
  """One optimizer step; a gradient or update that is not finite changes nothing and is counted.

  `optax.apply_if_finite` would do the same inside `lax.cond`, which keeps gradients, updates and
  both versions of the moments: compiled for a TPU that takes 1.5 times the trained parameters
  (float32) more memory than the selection below. It also accepts finite gradients whose norm
  overflows.

  Returns:
    The next state, and `metrics` with the norms of gradient, update and parameters, and
    `skipped_updates`: 1 if gradient or update was not finite, else 0.
  """
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  grad_norm, update_norm = _norm(grads), _norm(updates)
  finite = jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
  updated = (optax.apply_updates(state.params, updates), opt_state)
  params, opt_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old), updated, (state.params, state.opt_state)
  )
  metrics = metrics | {
    "grad_norm": grad_norm,
    "update_norm": update_norm,
    "param_norm": _norm(params),
    "skipped_updates": 1.0 - finite.astype(jnp.float32),
  }
  return TrainState(params, opt_state, state.step + 1), metrics


def _norm(tree: Any) -> jax.Array:
  """The global norm, with squares in float32 whatever the dtypes of the leaves."""
  return optax.tree.norm(optax.tree.cast(tree, jnp.float32))
