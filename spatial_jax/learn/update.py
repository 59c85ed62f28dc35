"""One optimizer step, pure: TrainState x TrainBatch -> TrainState and metrics."""

import jax
import jax.numpy as jnp
import optax

from spatial_jax.learn.gradient import Microbatches, Rows, gradient
from spatial_jax.learn.losses import (
  LossConfig,
  Metrics,
  effective_share,
  policy_loss,
  row_weights,
  sft_loss,
)
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.types import Array, Params, TrainBatch, TrainState


def policy_update(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  cfg: LossConfig,
  micro: Microbatches,
  state: TrainState,
  batch: TrainBatch,
  ref_logp_RT: Array | None,
) -> tuple[TrainState, Metrics]:
  """One GRPO / AP-GRPO step.

  Args:
    policy, optimizer: static.
    cfg: clip range and beta.
    micro: static.
    state: donated by the program that jits this.
    batch: advantages already in it.
    ref_logp_RT: log-probabilities of the reference policy, None without one.

  Returns:
    The next state and scalar metrics.
  """
  reference = None if ref_logp_RT is None else jnp.asarray(ref_logp_RT)

  def loss_of_rows(logp_RT: jax.Array, rows: Rows) -> tuple[jax.Array, Metrics]:
    return policy_loss(
      logp_RT,
      rows.old_logp_RT,
      rows.advantage_R,
      rows.trained_RT,
      rows.weight_R,
      cfg,
      None if reference is None else rows.ref_logp_RT,
    )

  weight_R = row_weights(batch.trained_RT, cfg.normalise)
  loss, metrics, grads = gradient(
    policy, state.params, batch, weight_R, reference, loss_of_rows, micro
  )
  metrics = {"loss": loss, **effective_share(metrics)}
  return apply_gradient(optimizer, state, grads, metrics)


def sft_update(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  micro: Microbatches,
  state: TrainState,
  batch: TrainBatch,
) -> tuple[TrainState, Metrics]:
  """One step of maximum likelihood on the trained tokens, every token counting the same."""

  def loss_of_rows(logp_RT: jax.Array, rows: Rows) -> tuple[jax.Array, Metrics]:
    return sft_loss(logp_RT, rows.trained_RT, rows.weight_R), {}

  weight_R = row_weights(batch.trained_RT, "token")
  loss, metrics, grads = gradient(policy, state.params, batch, weight_R, None, loss_of_rows, micro)
  return apply_gradient(optimizer, state, grads, {"loss": loss, **metrics})


def apply_gradient(
  optimizer: optax.GradientTransformation, state: TrainState, grads: Params, metrics: Metrics
) -> tuple[TrainState, Metrics]:
  """One optimizer step; a gradient that is not finite moves nothing and is counted."""
  grad_norm = optax.tree.norm(grads)
  finite = jnp.isfinite(grad_norm)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  moved = (optax.apply_updates(state.params, updates), opt_state)
  params, opt_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old), moved, (state.params, state.opt_state)
  )
  metrics = metrics | {
    "grad_norm": grad_norm,
    "update_norm": optax.tree.norm(updates),
    "param_norm": optax.tree.norm(params),
    "skipped_updates": 1.0 - finite.astype(jnp.float32),
  }
  return TrainState(params, opt_state, state.step + 1), metrics
