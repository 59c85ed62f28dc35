"""Direct preference optimisation: the loss of pairs, and its derivative for each sequence."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from spatial_jax.config import check_choice, check_number
from spatial_jax.learn.losses import Metrics


@dataclasses.dataclass(frozen=True)
class DpoLossConfig:
  """The loss of pairs; see `pair_loss`."""

  kind: Literal["sigmoid", "ipo"]
  beta: float  # > 0; for "ipo" the regularisation tau
  label_smoothing: float  # of "sigmoid": share of pairs whose order is wrong, in [0, 0.5)

  def __post_init__(self):
    check_choice(self, "kind")
    check_number(self, "beta", above=0)
    check_number(self, "label_smoothing", at_least=0, below=0.5)


def pair_loss(margin: jax.Array, cfg: DpoLossConfig) -> jax.Array:
  """The loss of one pair.

      margin   h = (logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)
      sigmoid  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)      e: label smoothing
      ipo      (h - 1 / (2 beta))^2,  with log-probabilities per token

  Source: DPO (arXiv:2305.18290), label smoothing of cDPO, IPO (arXiv:2310.12036).
  """
  if cfg.kind == "ipo":
    return jnp.square(margin - 1.0 / (2.0 * cfg.beta))
  scaled, smoothing = cfg.beta * margin, cfg.label_smoothing
  return -(1.0 - smoothing) * jax.nn.log_sigmoid(scaled) - smoothing * jax.nn.log_sigmoid(-scaled)


def dpo_loss(
  logp_N: jax.Array, ref_logp_N: jax.Array, tokens_N: jax.Array, cfg: DpoLossConfig
) -> tuple[jax.Array, Metrics, jax.Array]:
  """The mean loss of pairs, metrics, and the derivative of the loss by each `logp_N`.

  Args:
    logp_N: float32, log-probability of each sequence, a sum over its tokens: sequence 2 i is
      preferred to sequence 2 i + 1.
    ref_logp_N: float32, the same under the reference.
    tokens_N: float32, number of the tokens; a pair without tokens (padding) is left out.
  """
  valid = (tokens_N[0::2] > 0.0) & (tokens_N[1::2] > 0.0)
  count = jnp.maximum(jnp.sum(valid), 1).astype(logp_N.dtype)

  def loss(logp_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    gain_N = logp_N - ref_logp_N
    if cfg.kind == "ipo":
      gain_N = gain_N / jnp.maximum(tokens_N, 1.0)
    margin = gain_N[0::2] - gain_N[1::2]
    return jnp.sum(jnp.where(valid, pair_loss(margin, cfg), 0.0)) / count, gain_N

  (value, gain_N), coefficient_N = jax.value_and_grad(loss, has_aux=True)(logp_N)

  def mean(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(valid, x, 0.0)) / count

  margin = gain_N[0::2] - gain_N[1::2]
  metrics = {
    "pairs_right": mean((margin > 0.0).astype(logp_N.dtype)),
    "margin": mean(cfg.beta * margin),
    "reward_chosen": mean(cfg.beta * gain_N[0::2]),
    "reward_rejected": mean(cfg.beta * gain_N[1::2]),
  }
  return value, metrics, coefficient_N
