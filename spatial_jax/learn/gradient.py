"""Loss and gradient of a TrainBatch: shared parts once, rows in microbatches.

The vision tower runs once over all images of the batch, unless it is frozen and the batch holds
their features. The decoder runs once over the prefix of each group. The rows then go through the
decoder in microbatches, the shortest rows first, each microbatch truncated to its longest row. The
cotangents of the shared parts are summed over the rows in float32, and each shared part is
differentiated once:

    features = encode(params)
    prefix = prefill(params, features)         for each microbatch:
                                                 d loss / d (params, prefix, features)
    d loss / d params = sum over microbatches + pullbacks of prefill and encode of the sums
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spatial_jax import sharding
from spatial_jax.learn.losses import Metrics
from spatial_jax.learn.token_loss import Head, Targets, masked, sum_of_token_losses
from spatial_jax.learn.train_batch import Microbatches
from spatial_jax.policy import param_tree
from spatial_jax.policy.cache import Prefix
from spatial_jax.policy.logprobs import TokenScores
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.types import (
  Array,
  FeatureBatch,
  OtherLogprobs,
  Params,
  TrainBatch,
  TrainRows,
  VisionBatch,
)


class Microbatch(NamedTuple):
  """Some rows of a batch."""

  rows: TrainRows  # of the batch
  token_weight_R: Array  # float32, from `token_weights` of the whole batch
  others: OtherLogprobs


# (scores, microbatch) -> its part of the loss and of the metrics
MicrobatchLoss = Callable[[TokenScores, Microbatch], tuple[jax.Array, Metrics]]


class Objective(NamedTuple):
  """What a policy is trained for: a loss whose parts add up over microbatches.

  Attributes:
    loss: reads the scores of trained tokens; those of other tokens are 0.
    is_sum_of_tokens: loss and metrics are sums over tokens, and the part of a token reads no other
      token of its row. Logits are then computed once, see `token_loss`.
    with_entropy: the loss reads the entropy.
  """

  loss: MicrobatchLoss
  is_sum_of_tokens: bool
  with_entropy: bool = False


NO_OTHERS = OtherLogprobs(None, None)


def score_tokens(
  policy: Policy,
  params: Params,
  prefix: Prefix,
  features_MYD: Array,
  rows: TrainRows,
  forbidden_V: Array,
  with_entropy: bool = False,
) -> TokenScores:
  """Log-probability, and entropy if asked for, of each trained token; 0 where not trained."""
  hidden_RTD = policy.hidden_with_prefix(params, prefix, rows.tokens, features_MYD)
  target_RT = rows.tokens.token_RT[:, 1:]
  inputs = (hidden_RTD[:, :-1], target_RT, rows.temperature_R, forbidden_V)
  scores = masked(policy.logprobs(params, *inputs, with_entropy), rows.trained_RT[:, 1:])
  return jax.tree.map(lambda x_RT: jnp.pad(x_RT, ((0, 0), (1, 0))), scores)


def batch_logprobs(
  policy: Policy, micro: Microbatches, params: Params, batch: TrainBatch
) -> jax.Array:
  """float32 [R, T]: log-probabilities of a batch under any parameters (reference, old policy)."""
  features_MYD = features_of(policy, params, batch.vision)
  _, prefix = policy.prefill(params, batch.prefix, features_MYD)
  order = make_order(policy, batch, micro)
  size = batch.rows.tokens.token_RT.shape[1]

  def score(rows: TrainRows) -> jax.Array:
    row_prefix = order.prefix_of(rows, prefix)
    scored = (params, row_prefix, features_MYD, rows, batch.forbidden_V)
    logp_RT = score_tokens(policy, *scored).logp_RT
    return jnp.pad(logp_RT, ((0, 0), (0, size - logp_RT.shape[1])))

  return order.join(jax.lax.map(truncated(score, micro.lengths), order.split(batch.rows)))


@dataclasses.dataclass(frozen=True, eq=False)
class MicrobatchOrder:
  """The order in which rows go through the decoder.

  Rows stay on their device: every microbatch has the same number of rows of each device, the
  shortest first, and each row reads the prefix of a prompt of its own device.
  """

  row_NL: jax.Array  # int32, the L rows of each of N devices by their length (local letters)
  size: int  # rows of one device in one microbatch: gcd of `micro.rows` and L

  def split(self, tree: Any) -> Any:
    """Arrays [R, ...] -> [microbatches, N * size, ...]."""
    devices, length = self.row_NL.shape

    def split_one(x_R: Array) -> jax.Array:
      x_NL = jnp.asarray(x_R).reshape(devices, length, *x_R.shape[1:])
      x_NL = jax.vmap(lambda x_L, row_L: x_L[row_L])(x_NL, self.row_NL)
      parts = x_NL.reshape(devices, -1, self.size, *x_R.shape[1:])
      return jnp.moveaxis(parts, 1, 0).reshape(-1, devices * self.size, *x_R.shape[1:])

    return jax.tree.map(split_one, tree)

  def join(self, parts: jax.Array) -> jax.Array:
    """The inverse of `split`, for one array."""
    devices, length = self.row_NL.shape
    x = parts.reshape(-1, devices, self.size, *parts.shape[2:])
    x_NL = jnp.moveaxis(x, 0, 1).reshape(devices, length, *parts.shape[2:])
    place_NL = jnp.argsort(self.row_NL, axis=1)
    x_NL = jax.vmap(lambda x_L, place_L: x_L[place_L])(x_NL, place_NL)
    return x_NL.reshape(-1, *parts.shape[2:])

  def prefix_of(self, rows: TrainRows, prefix: Any) -> Any:
    """The prefix of each row: arrays [B, ...] -> [R, ...]."""
    devices = self.row_NL.shape[0]

    def gather(x_B: jax.Array) -> jax.Array:
      x_NB = x_B.reshape(devices, -1, *x_B.shape[1:])
      prefix_NM = rows.prefix_R.reshape(devices, -1) % x_NB.shape[1]
      return jax.vmap(lambda x, prefix_M: x[prefix_M])(x_NB, prefix_NM).reshape(-1, *x_B.shape[1:])

    return jax.tree.map(gather, prefix)

  def sum_by_prefix(self, rows: TrainRows, of_rows: Any, prefix: Any) -> Any:
    """Float32 sums over the rows of each prefix, [R, ...] -> [B, ...]: transpose of `prefix_of`."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), prefix)
    transpose = jax.linear_transpose(functools.partial(self.prefix_of, rows), shapes)
    return transpose(jax.tree.map(lambda x: x.astype(jnp.float32), of_rows))[0]


def make_order(policy: Policy, batch: TrainBatch, micro: Microbatches) -> MicrobatchOrder:
  """The rows of each device, the shortest first."""
  devices = 1 if policy.mesh is None else sharding.row_devices(policy.mesh)
  length_NL = jnp.sum(jnp.asarray(batch.rows.tokens.valid_RT), axis=1).reshape(devices, -1)
  row_NL = jnp.argsort(length_NL, axis=1)
  return MicrobatchOrder(row_NL, math.gcd(micro.rows, row_NL.shape[1]))


def gradient(
  policy: Policy,
  params: Params,
  batch: TrainBatch,
  token_weight_R: Array,
  others: OtherLogprobs,
  objective: Objective,
  micro: Microbatches,
) -> tuple[jax.Array, Metrics, Params]:
  """Loss, metrics and gradient of a whole batch, one microbatch after another.

  Args:
    policy: parameters whose paths match `policy.frozen` are not differentiated.
    token_weight_R: float32, from `token_weights`.
    others: of other policies, for the loss.

  Returns:
    The loss, the metrics, and the gradient of all parameters: in `policy.gradient_dtype`, 0 for
    frozen ones.
  """
  order = make_order(policy, batch, micro)
  frozen, trained = param_tree.partition(params, policy.frozen)
  whole = functools.partial(param_tree.merge, frozen)

  loss = functools.partial(_microbatch_loss, policy, frozen, batch.forbidden_V, objective)
  (features_MYD, prefix), pull = jax.vjp(lambda p: _shared(policy, whole(p), batch), trained)
  differentiate = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True, allow_int=True)

  def gradient_of(microbatch: Microbatch) -> Any:
    arguments = (trained, order.prefix_of(microbatch.rows, prefix), features_MYD)
    value, (grads, of_rows, features_grad) = differentiate(*arguments, microbatch)
    layers_grad = order.sum_by_prefix(microbatch.rows, of_rows.layers, prefix.layers)
    return value, grads, layers_grad, features_grad

  microbatches = order.split(Microbatch(batch.rows, token_weight_R, others))
  function = truncated(gradient_of, micro.lengths, lambda m: m.rows)
  total = sum_over(function, microbatches, policy.gradient_dtype)
  (loss_sum, metrics), grads, layers_grad, features_grad = total
  (shared_grads,) = pull((features_grad, _cotangent(prefix, layers_grad)))
  grads = jax.tree.map(_add, grads, shared_grads)
  # XLA folds these zeros: frozen parameters take no memory for a gradient.
  return loss_sum, metrics, param_tree.merge(jax.tree.map(jnp.zeros_like, frozen), grads)


def _microbatch_loss(
  policy: Policy,
  frozen: Params,
  forbidden_V: Array,
  objective: Objective,
  trained: Params,
  prefix: Prefix,
  features_MYD: jax.Array,
  microbatch: Microbatch,
) -> tuple[jax.Array, Metrics]:
  """The part of a microbatch of the loss and of the metrics; there is one prefix per row."""
  params, rows = param_tree.merge(frozen, trained), microbatch.rows
  loss, with_entropy = objective.loss, objective.with_entropy
  if not objective.is_sum_of_tokens:
    scored = (params, prefix, features_MYD, rows, forbidden_V, with_entropy)
    return loss(score_tokens(policy, *scored), microbatch)
  hidden_RTD = policy.hidden_with_prefix(params, prefix, rows.tokens, features_MYD)
  targets = Targets(rows.tokens.token_RT, rows.trained_RT, rows.temperature_R, forbidden_V)
  head = Head(policy, frozen, trained)
  return sum_of_token_losses(head, hidden_RTD, targets, microbatch, loss, with_entropy)


def _shared(policy: Policy, params: Params, batch: TrainBatch) -> tuple[jax.Array, Prefix]:
  """Features, in float32 so that their cotangents are summed in float32, and prefixes."""
  features_MYD = features_of(policy, params, batch.vision).astype(jnp.float32)
  return features_MYD, policy.prefill(params, batch.prefix, features_MYD)[1]


def _cotangent(prefix: Prefix, layers_grad: Any) -> Prefix:
  """Float32 sums as a cotangent of `prefix`, rounded once; its lengths, integers, have none."""
  layers = jax.tree.map(lambda grad, x: grad.astype(x.dtype), layers_grad, prefix.layers)
  lengths: Any = np.zeros(prefix.length_B.shape, jax.dtypes.float0)
  return Prefix(layers, lengths)


def sum_over(function: Callable[[Any], Any], microbatches: Any, gradient_dtype: jnp.dtype) -> Any:
  """The sum of `function` over microbatches [microbatches, ...], one after another.

  The second of its results, gradients of parameters, is summed in a dtype of its own, the others in
  float32. With bfloat16 each sum is rounded: 64 microbatches lose about 1 % of an entry, less than
  the noise of a gradient of rollouts.
  """

  def add(total: Any, microbatch: Any) -> tuple[Any, None]:
    return jax.tree.map(_add, total, function(microbatch)), None

  first = jax.tree.map(lambda x: x[0], microbatches)
  shapes = jax.eval_shape(function, first)
  value, grads, *rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  zero = (value, optax.tree.cast(grads, gradient_dtype), *rest)
  return jax.lax.scan(add, zero, microbatches)[0]


def _add(total: jax.Array, x: jax.Array) -> jax.Array:
  """The sum in the dtype of `x`, rounded to that of `total`."""
  return (total.astype(x.dtype) + x).astype(total.dtype)


def truncated(
  function: Callable[[Any], Any],
  lengths: tuple[int, ...],
  rows_of: Callable[[Any], TrainRows] = lambda rows: rows,
) -> Callable[[Any], Any]:
  """`function` on rows truncated to the first length that holds the longest.

  Raises:
    ValueError: at trace, if the last length is too short for the rows.
  """

  def of_length(length: int, tree: Any) -> Any:
    return function(jax.tree.map(lambda x: x[:, :length] if x.ndim > 1 else x, tree))

  def truncate(tree: Any) -> Any:
    tokens = rows_of(tree).tokens
    size = tokens.token_RT.shape[1]
    if lengths[-1] < size:
      raise ValueError(
        f"micro.lengths is {lengths}; the last must be at least {size}, the length of the rows"
      )
    longest = jnp.max(jnp.sum(tokens.valid_RT, axis=1))
    index = jnp.searchsorted(jnp.asarray(lengths), longest)
    return jax.lax.switch(index, [functools.partial(of_length, n) for n in lengths], tree)

  return truncate


def features_of(policy: Policy, params: Params, vision: VisionBatch | FeatureBatch) -> jax.Array:
  """Features of the batch: given if a frozen tower encoded the images for the rollouts."""
  if isinstance(vision, FeatureBatch):
    return jnp.asarray(vision.features_MYD)
  return policy.encode(params, vision)
