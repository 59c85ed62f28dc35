"""One optimizer step, pure: TrainState x TrainBatch -> TrainState and metrics.

What rows have in common runs once: the vision tower over all images of the batch, the decoder
over the prefix of each group. Rows go through the decoder behind it in microbatches; cotangents
are summed over them, and each common part is differentiated once:

    features = encode(params)
    prefix = prefill(params, features)         for each microbatch:
                                                 d loss / d (params, prefix, features)
    d loss / d params = sum of the rows' parts + prefill's and encode's pullbacks of the sums
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spatial_jax.learn.loss import LossConfig, Metrics, policy_loss, row_weights, sft_loss
from spatial_jax.policy.cache import KV, Prefix
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.types import Array, Params, TrainBatch, TrainState


class Rows(NamedTuple):
  """What one microbatch of rows is made of; fields as in TrainBatch."""

  token_RT: Array
  position_RTA: Array
  valid_RT: Array
  trained_RT: Array
  old_logp_RT: Array
  ref_logp_RT: Array
  advantage_R: Array
  feature_RT: Array
  temperature_R: Array
  weight_R: Array


@dataclasses.dataclass(frozen=True)
class Microbatches:
  """How rows go through the decoder; static.

  Attributes:
    group: rows of each group in one microbatch, divides G. A group's short rows go together.
    lengths: tokens, ascending; a microbatch is cut to the first that holds its longest row, so
      that one long response does not make all rows long. The last holds every row. Each is one
      more compiled form of the decoder in the same program.
  """

  group: int
  lengths: tuple[int, ...]


RowLoss = Callable[[jax.Array, Rows], tuple[jax.Array, Metrics]]


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

  rows = split_rows(batch, row_weights(batch.trained_RT, cfg.normalise), reference, micro.group)
  loss, metrics, grads = gradient(policy, state.params, batch, rows, loss_of_rows, micro.lengths)
  return apply_gradient(optimizer, state, grads, {"loss": loss, **metrics})


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

  rows = split_rows(batch, row_weights(batch.trained_RT, "token"), None, micro.group)
  loss, metrics, grads = gradient(policy, state.params, batch, rows, loss_of_rows, micro.lengths)
  return apply_gradient(optimizer, state, grads, {"loss": loss, **metrics})


def token_logprobs(
  policy: Policy,
  params: Params,
  prefix: Prefix,
  features_MD: Array,
  rows: Rows | TrainBatch,
  forbidden_V: Array,
) -> jax.Array:
  """float32 [R, T]: log-probability of each own token given those before it; 0 for the first."""
  hidden_RTD = policy.hidden_behind(
    params, prefix, rows.token_RT, rows.position_RTA, rows.valid_RT, features_MD, rows.feature_RT
  )
  logp_RT = policy.logprobs(
    params, hidden_RTD[:, :-1], rows.token_RT[:, 1:], rows.temperature_R, forbidden_V
  )
  # A token that could not be sampled has -inf; nothing untrained may carry it into a gradient.
  logp_RT = jnp.where(rows.trained_RT[:, 1:], logp_RT, 0.0)
  return jnp.pad(logp_RT, ((0, 0), (1, 0)))


def score_batch(policy: Policy, params: Params, batch: TrainBatch) -> jax.Array:
  """float32 [R, T] log-probabilities of a batch under any parameters (reference, old policy)."""
  features_MD = policy.encode(params, batch.vision)
  prefix = _prefill(policy, batch, params, features_MD)
  return token_logprobs(policy, params, prefix, features_MD, batch, batch.forbidden_V)


def split_rows(
  batch: TrainBatch, weight_R: Array, ref_logp_RT: Array | None, micro_group: int
) -> Rows:
  """Fields [B * G, ...] -> [microbatches, B * micro_group, ...], the shortest rows first.

  Every microbatch has rows of every group, so that a sharded row axis stays sharded.
  """
  prompts = batch.prefix.token_BT.shape[0]
  rows = Rows(
    token_RT=batch.token_RT,
    position_RTA=batch.position_RTA,
    valid_RT=batch.valid_RT,
    trained_RT=batch.trained_RT,
    old_logp_RT=batch.old_logp_RT,
    ref_logp_RT=batch.old_logp_RT if ref_logp_RT is None else ref_logp_RT,
    advantage_R=batch.advantage_R,
    feature_RT=batch.feature_RT,
    temperature_R=batch.temperature_R,
    weight_R=weight_R,
  )

  length_BG = jnp.sum(jnp.asarray(batch.valid_RT), axis=1).reshape(prompts, -1)
  order_BG = jnp.argsort(length_BG, axis=1)

  def split(x_R: Array) -> jax.Array:
    x_BG = jnp.asarray(x_R).reshape(prompts, -1, *x_R.shape[1:])
    x_BG = jax.vmap(lambda x_G, order_G: x_G[order_G])(x_BG, order_BG)
    parts = jnp.moveaxis(x_BG.reshape(prompts, -1, micro_group, *x_R.shape[1:]), 1, 0)
    return parts.reshape(parts.shape[0], -1, *x_R.shape[1:])

  return jax.tree.map(split, rows)


def gradient(
  policy: Policy,
  params: Params,
  batch: TrainBatch,
  rows: Rows,
  loss_of_rows: RowLoss,
  lengths: tuple[int, ...],
) -> tuple[jax.Array, Metrics, Params]:
  """Loss, metrics and gradient of a whole batch, microbatch by microbatch.

  Args:
    params: differentiated.
    batch: its images, prefixes and forbidden ids.
    rows: from `split_rows`.
    loss_of_rows: (logp_RT, rows) -> (this microbatch's part of the loss, of the metrics).
    lengths: as in `Microbatches`.
  """
  features_MD, pull_encode = jax.vjp(lambda p: policy.encode(p, batch.vision), params)
  prefix, pull_prefill = jax.vjp(functools.partial(_prefill, policy, batch), params, features_MD)

  def loss(
    params: Params, layers: tuple[KV, ...], features_MD: jax.Array, rows: Rows
  ) -> tuple[jax.Array, Metrics]:
    behind = prefix._replace(layers=layers)
    logp_RT = token_logprobs(policy, params, behind, features_MD, rows, batch.forbidden_V)
    return loss_of_rows(logp_RT, rows)

  def gradient_of(rows: Rows) -> Any:
    differentiate = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    return differentiate(params, prefix.layers, features_MD, rows)

  one = _cut_to_need(gradient_of, lengths)

  def add(total, rows: Rows):
    return jax.tree.map(jnp.add, total, one(rows)), None

  first = jax.tree.map(lambda x: x[0], rows)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
  ((loss_sum, metrics), (grads, layers_grad, features_grad)), _ = jax.lax.scan(add, zero, rows)
  # Integers have no cotangent.
  lengths_grad: Any = np.zeros(prefix.length_B.shape, jax.dtypes.float0)
  prefill_grads, more_features_grad = pull_prefill(Prefix(layers_grad, lengths_grad))
  (encode_grads,) = pull_encode(features_grad + more_features_grad)
  grads = jax.tree.map(lambda *parts: sum(parts), grads, prefill_grads, encode_grads)
  return loss_sum, metrics, grads


def _cut_to_need(one: Callable[[Rows], Any], lengths: tuple[int, ...]) -> Callable[[Rows], Any]:
  """`one` on rows cut to the first length that holds them; refuses, at trace, to cut any short."""

  def of_length(length: int, rows: Rows) -> Any:
    return one(jax.tree.map(lambda x: x[:, :length] if x.ndim > 1 else x, rows))

  def cut(rows: Rows) -> Any:
    if lengths[-1] < rows.token_RT.shape[1]:
      raise ValueError(f"microbatches of {lengths} tokens, rows of {rows.token_RT.shape[1]}")
    longest = jnp.max(jnp.sum(rows.valid_RT, axis=1))
    which = jnp.searchsorted(jnp.asarray(lengths), longest)
    return jax.lax.switch(which, [functools.partial(of_length, n) for n in lengths], rows)

  return cut


def _prefill(policy: Policy, batch: TrainBatch, params: Params, features_MD: Array) -> Prefix:
  """What the rows of each group have in common, as keys and values."""
  prefix = batch.prefix
  return policy.prefill(
    params,
    prefix.token_BT,
    prefix.position_BTA,
    prefix.valid_BT,
    features_MD,
    prefix.feature_BT,
  )[1]


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
