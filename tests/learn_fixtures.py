"""Losses for tests: configs with single values changed, and likelihood on shared prefixes."""

from typing import Any

from configs import losses
from spatial_jax.config import build
from spatial_jax.learn.gradient import NO_OTHERS, Objective, gradient
from spatial_jax.learn.losses import LossConfig, nll, token_weights
from spatial_jax.learn.update import apply_gradient


def loss_config(changes: dict[str, Any] | None = None, **more: Any) -> LossConfig:
  """GRPO's loss; `changes` have dotted keys ("kl.weight")."""
  cfg = losses.grpo()
  cfg.update_from_flattened_dict((changes or {}) | more)
  return build(LossConfig, cfg.to_dict())


def sft_update(policy, optimizer, micro, state, batch):
  """Maximum likelihood on the rows of a TrainBatch, a reference for packed rows."""

  def loss(scores, microbatch):
    return nll(scores.logp_RT, microbatch.rows.trained_RT, microbatch.token_weight_R), {}

  weight_R = token_weights(batch.rows.trained_RT, "token", batch.rows.weight_R)
  objective = Objective(loss, is_sum_of_tokens=False)
  value, _, grads = gradient(policy, state.params, batch, weight_R, NO_OTHERS, objective, micro)
  return apply_gradient(optimizer, state, grads, {"loss": value})
