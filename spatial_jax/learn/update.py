"""One optimizer step, pure: TrainState x TrainBatch -> TrainState and metrics."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from spatial_jax.learn.gradient import Microbatch, gradient
from spatial_jax.learn.losses import (
  LossConfig,
  Metrics,
  effective_share,
  nll,
  ppo_clip,
  token_weights,
)
from spatial_jax.learn.train_batch import Microbatches
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
  """One step of GRPO or AP-GRPO; they differ in the advantages alone.

  Args:
    state: the program that jits this donates it.
    ref_logp_RT: float32, log-probabilities under the reference policy; None without one.

  Returns:
    The next state, and scalar metrics.
  """

  def loss(logp_RT: jax.Array, microbatch: Microbatch) -> tuple[jax.Array, Metrics]:
    rows = microbatch.rows
    return ppo_clip(
      logp_RT,
      rows.old_logp_RT,
      rows.advantage_R,
      rows.trained_RT,
      microbatch.token_weight_R,
      cfg,
      microbatch.ref_logp_RT,
    )

  weight_R = token_weights(batch.rows.trained_RT, cfg.normalise, batch.rows.weight_R)
  value, metrics, grads = gradient(policy, state.params, batch, weight_R, ref_logp_RT, loss, micro)
  return apply_gradient(optimizer, state, grads, {"loss": value, **effective_share(metrics)})


def sft_update(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  micro: Microbatches,
  state: TrainState,
  batch: TrainBatch,
) -> tuple[TrainState, Metrics]:
  """One step of maximum likelihood on the trained tokens; arguments as in `policy_update`."""

  def loss(logp_RT: jax.Array, microbatch: Microbatch) -> tuple[jax.Array, Metrics]:
    return nll(logp_RT, microbatch.rows.trained_RT, microbatch.token_weight_R), {}

  weight_R = token_weights(batch.rows.trained_RT, "token", batch.rows.weight_R)
  value, metrics, grads = gradient(policy, state.params, batch, weight_R, None, loss, micro)
  return apply_gradient(optimizer, state, grads, {"loss": value, **metrics})


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
