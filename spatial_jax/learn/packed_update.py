"""SFT and DPO on packed rows: log-probabilities and weighted gradients of whole sequences.

Both losses have the gradient of a weighted log-likelihood:

    SFT    loss = -sum_t weight_t logp_t
    DPO    c_n = d loss / d logp_n of each sequence n,   gradient = sum_t c_(n of t) d logp_t
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spatial_jax import sharding
from spatial_jax.learn.dpo import DpoLossConfig, dpo_loss
from spatial_jax.learn.gradient import MicrobatchOrder, features_of, sum_over
from spatial_jax.learn.losses import Metrics
from spatial_jax.learn.token_loss import Head, Targets, sum_of_token_losses
from spatial_jax.learn.train_batch import Microbatches
from spatial_jax.learn.update import apply_gradient
from spatial_jax.policy import param_tree
from spatial_jax.policy.logprobs import TokenScores
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.types import Array, PackedBatch, PackedRows, Params, TrainState


def packed_logprobs(
  policy: Policy, micro: Microbatches, params: Params, batch: PackedBatch
) -> jax.Array:
  """float32 [R, T]: log-probability of each trained token of packed rows, 0 elsewhere."""
  features_MYD = features_of(policy, params, batch.vision)
  order = _order(policy, batch, micro)
  score = functools.partial(_score, policy, params, features_MYD, batch.forbidden_V)
  return order.join(jax.lax.map(score, order.split(batch.rows)))


def packed_sft_update(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  micro: Microbatches,
  state: TrainState,
  batch: PackedBatch,
) -> tuple[TrainState, Metrics]:
  """One step of maximum likelihood; the weights come with the batch. The state is donated.

  Source: ViLaSR (arXiv:2506.09965, Eq. 4 and 6).
  """
  logp, grads = weighted_gradient(policy, micro, state.params, batch, -batch.rows.weight_RT)
  trained = jnp.sum(batch.rows.trained_RT).astype(jnp.float32)
  return apply_gradient(optimizer, state, grads, {"loss": logp, "trained_tokens": trained})


def packed_dpo_update(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  micro: Microbatches,
  cfg: DpoLossConfig,
  state: TrainState,
  batch: PackedBatch,
  ref_logp_N: Array,
) -> tuple[TrainState, Metrics]:
  """One step of DPO on pairs: sequence 2 i is preferred to sequence 2 i + 1.

  Args:
    state: donated.
    ref_logp_N: float32, sums over the tokens of each sequence under the reference.
  """
  rows = batch.rows
  logp_RT = packed_logprobs(policy, micro, state.params, batch)
  count = ref_logp_N.shape[0]
  logp_N, tokens_N = (by_sequence(x_RT, rows, count) for x_RT in (logp_RT, rows.trained_RT))
  value, metrics, coefficient_N = dpo_loss(logp_N, jnp.asarray(ref_logp_N), tokens_N, cfg)
  coefficient_RT = jnp.where(rows.trained_RT, coefficient_N[rows.sequence_RT], 0.0)
  _, grads = weighted_gradient(policy, micro, state.params, batch, coefficient_RT)
  return apply_gradient(optimizer, state, grads, {"loss": value, **metrics})


def by_sequence(x_RT: Array, rows: PackedRows, count: int) -> jax.Array:
  """float32 [N]: sums over the trained tokens of each of `count` sequences."""
  x_RT = jnp.where(rows.trained_RT, jnp.asarray(x_RT, jnp.float32), 0.0)
  flat = x_RT.reshape(-1), jnp.asarray(rows.sequence_RT).reshape(-1)
  return jax.ops.segment_sum(*flat, num_segments=count)


def weighted_gradient(
  policy: Policy,
  micro: Microbatches,
  params: Params,
  batch: PackedBatch,
  coefficient_RT: Array,
) -> tuple[jax.Array, Params]:
  """The sum over tokens of coefficient * logp, and its gradient, one microbatch after another.

  Returns:
    float32 [], and the gradient of all parameters: 0 for frozen ones.
  """
  order = _order(policy, batch, micro)
  frozen, trained = param_tree.partition(params, policy.frozen)
  whole = functools.partial(param_tree.merge, frozen)

  def features(trained: Params) -> jax.Array:
    return features_of(policy, whole(trained), batch.vision).astype(jnp.float32)

  def weighted(scores: TokenScores, coefficient_RT: Array) -> tuple[jax.Array, Metrics]:
    return jnp.sum(coefficient_RT * scores.logp_RT), {}

  def value(trained: Params, features_MYD: jax.Array, part: tuple[PackedRows, Array]) -> jax.Array:
    rows, coefficient_RT = part
    hidden_RTD = policy.hidden(whole(trained), rows.tokens, features_MYD)
    ones_R = jnp.ones(rows.trained_RT.shape[0])
    targets = Targets(rows.tokens.token_RT, rows.trained_RT, ones_R, batch.forbidden_V)
    head = Head(policy, frozen, trained)
    return sum_of_token_losses(head, hidden_RTD, targets, coefficient_RT, weighted)[0]

  def of_part(part: tuple[PackedRows, Array]) -> Any:
    found, grads = jax.value_and_grad(value, argnums=(0, 1))(trained, features_MYD, part)
    return found, grads[0], grads[1]

  features_MYD, pull = jax.vjp(features, trained)
  parts = order.split((batch.rows, jnp.asarray(coefficient_RT)))
  total, grads, features_grad = sum_over(of_part, parts, policy.gradient_dtype)
  grads = jax.tree.map(lambda x, y: x + y.astype(x.dtype), grads, pull(features_grad)[0])
  return total, param_tree.merge(jax.tree.map(jnp.zeros_like, frozen), grads)


def _score(
  policy: Policy, params: Params, features_MYD: Array, forbidden_V: Array, rows: PackedRows
) -> jax.Array:
  """float32 [R, T]: log-probability of each trained token of some rows, 0 elsewhere."""
  hidden_RTD = policy.hidden(params, rows.tokens, features_MYD)
  target_RT, ones_R = rows.tokens.token_RT[:, 1:], jnp.ones(rows.trained_RT.shape[0])
  inputs = (hidden_RTD[:, :-1], target_RT, ones_R, forbidden_V)
  logp_RT = policy.logprobs(params, *inputs).logp_RT
  return jnp.pad(jnp.where(rows.trained_RT[:, 1:], logp_RT, 0.0), ((0, 0), (1, 0)))


def _order(policy: Policy, batch: PackedBatch, micro: Microbatches) -> MicrobatchOrder:
  """Rows in their order; each device takes the same number into a microbatch."""
  devices = 1 if policy.mesh is None else sharding.row_devices(policy.mesh)
  row_NL = jnp.arange(batch.rows.trained_RT.shape[0]).reshape(devices, -1) % (
    batch.rows.trained_RT.shape[0] // devices
  )
  return MicrobatchOrder(row_NL, math.gcd(micro.rows, row_NL.shape[1]))
