"""Loss and gradient of a TrainBatch: shared prefixes once, rows in microbatches.

What rows have in common runs once: the vision tower over all images of the batch, the decoder
over the prefix of each group. Rows go through the decoder behind it in microbatches, the shortest
first, each cut to its longest; cotangents are summed over them, and each common part is
differentiated once:

    features = encode(params)
    prefix = prefill(params, features)         for each microbatch:
                                                 d loss / d (params, prefix, features)
    d loss / d params = sum of the rows' parts + prefill's and encode's pullbacks of the sums
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax import sharding
from spatial_jax.learn.losses import (
  Metrics,
)
from spatial_jax.policy import param_tree
from spatial_jax.policy.cache import KV, Prefix
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.types import Array, FeatureBatch, Params, TrainBatch, VisionBatch


class Rows(NamedTuple):
  """What one microbatch of rows is made of; fields as in TrainBatch.

  `prompt_R`: whose prefix each reads, counted over the batch.
  """

  prompt_R: Array
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
    rows: most of each device at once; so many as divide both this and what there is.
    lengths: tokens, ascending; a microbatch is cut to the first that holds its longest row, so
      that one long response does not make all rows long. The last holds every row. Each is one
      more compiled form of the decoder in the same program.
  """

  rows: int
  lengths: tuple[int, ...]


RowLoss = Callable[[jax.Array, Rows], tuple[jax.Array, Metrics]]


def token_logprobs(
  policy: Policy,
  params: Params,
  prefix: Prefix,
  features_MYD: Array,
  rows: Rows | TrainBatch,
  forbidden_V: Array,
) -> jax.Array:
  """float32 [R, T]: log-probability of each own token given those before it; 0 for the first."""
  hidden_RTD = policy.hidden_with_prefix(
    params, prefix, rows.token_RT, rows.position_RTA, rows.valid_RT, features_MYD, rows.feature_RT
  )
  logp_RT = policy.logprobs(
    params, hidden_RTD[:, :-1], rows.token_RT[:, 1:], rows.temperature_R, forbidden_V
  )
  # A token that could not be sampled has -inf; nothing untrained may carry it into a gradient.
  logp_RT = jnp.where(rows.trained_RT[:, 1:], logp_RT, 0.0)
  return jnp.pad(logp_RT, ((0, 0), (1, 0)))


def score_batch(
  policy: Policy, micro: Microbatches, params: Params, batch: TrainBatch
) -> jax.Array:
  """float32 [R, T] log-probabilities of a batch under any parameters (reference, old policy)."""
  features_MYD = _features(policy, params, batch.vision)
  prefix = _prefill(policy, batch, params, features_MYD)
  order = make_order(policy, batch, micro)
  size = batch.token_RT.shape[1]

  def one(rows: Rows) -> jax.Array:
    behind = order.prefix_of(rows, prefix)
    logp_RT = token_logprobs(policy, params, behind, features_MYD, rows, batch.forbidden_V)
    return jnp.pad(logp_RT, ((0, 0), (0, size - logp_RT.shape[1])))

  rows = order.split(rows_of(batch, jnp.ones(batch.token_RT.shape[0]), None))
  return order.join(jax.lax.map(_cut_to_need(one, micro.lengths), rows))


def rows_of(batch: TrainBatch, weight_R: Array, ref_logp_RT: Array | None) -> Rows:
  """All rows of a batch as one, in its order."""
  return Rows(
    prompt_R=batch.prompt_R,
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


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
  """Which row goes through the decoder when.

  A device's rows stay on it: microbatches have equally many of every device, its shortest first,
  and each row reads the prefix of one of its device's own prompts.

  Attributes:
    row_NL: int32, the rows of each of N devices by their length.
    micro: rows of a device in one microbatch; divides L.
  """

  row_NL: jax.Array
  micro: int

  def split(self, rows: Rows) -> Rows:
    """Fields [R, ...] -> [microbatches, N * micro, ...]."""
    devices, length = self.row_NL.shape

    def one(x_R: Array) -> jax.Array:
      x_NL = jnp.asarray(x_R).reshape(devices, length, *x_R.shape[1:])
      x_NL = jax.vmap(lambda x_L, row_L: x_L[row_L])(x_NL, self.row_NL)
      parts = x_NL.reshape(devices, -1, self.micro, *x_R.shape[1:])
      return jnp.moveaxis(parts, 1, 0).reshape(-1, devices * self.micro, *x_R.shape[1:])

    return jax.tree.map(one, rows)

  def join(self, parts: jax.Array) -> jax.Array:
    """The inverse of `split`, for one field."""
    devices, length = self.row_NL.shape
    x = parts.reshape(-1, devices, self.micro, *parts.shape[2:])
    x_NL = jnp.moveaxis(x, 0, 1).reshape(devices, length, *parts.shape[2:])
    place_NL = jnp.argsort(self.row_NL, axis=1)
    x_NL = jax.vmap(lambda x_L, place_L: x_L[place_L])(x_NL, place_NL)
    return x_NL.reshape(-1, *parts.shape[2:])

  def prefix_of(self, rows: Rows, prefix: Prefix) -> Prefix:
    """The prefix of each row of a microbatch, as if each were alone in its group."""
    devices = self.row_NL.shape[0]

    def one(x_B: jax.Array) -> jax.Array:
      x_NB = x_B.reshape(devices, -1, *x_B.shape[1:])
      prompt_NM = rows.prompt_R.reshape(devices, -1) % x_NB.shape[1]
      return jax.vmap(lambda x, prompt: x[prompt])(x_NB, prompt_NM).reshape(-1, *x_B.shape[1:])

    return jax.tree.map(one, prefix)


def make_order(policy: Policy, batch: TrainBatch, micro: Microbatches) -> Order:
  """Each device's rows, the shortest first."""
  devices = 1 if policy.mesh is None else sharding.row_devices(policy.mesh)
  length_NL = jnp.sum(jnp.asarray(batch.valid_RT), axis=1).reshape(devices, -1)
  row_NL = jnp.argsort(length_NL, axis=1)
  return Order(row_NL, math.gcd(micro.rows, row_NL.shape[1]))


def gradient(
  policy: Policy,
  params: Params,
  batch: TrainBatch,
  weight_R: Array,
  ref_logp_RT: Array | None,
  loss_of_rows: RowLoss,
  micro: Microbatches,
) -> tuple[jax.Array, Metrics, Params]:
  """Loss, metrics and gradient of a whole batch, microbatch by microbatch; 0 for what is frozen.

  Args:
    params: differentiated but for what `policy.frozen` matches.
    batch: images, prefixes, rows.
    weight_R: from `row_weights`.
    ref_logp_RT: of the reference policy, None without one.
    loss_of_rows: (logp_RT, rows) -> (this microbatch's part of the loss, of the metrics).
    micro: static.
  """
  order = make_order(policy, batch, micro)
  frozen, moving = param_tree.partition(params, policy.frozen)
  whole = functools.partial(param_tree.merge, frozen)
  features_MYD, pull_encode = jax.vjp(lambda p: _features(policy, whole(p), batch.vision), moving)
  prefix, pull_prefill = jax.vjp(
    lambda p, features_MYD: _prefill(policy, batch, whole(p), features_MYD), moving, features_MYD
  )

  def loss(
    moving: Params, layers: tuple[KV, ...], features_MYD: jax.Array, rows: Rows
  ) -> tuple[jax.Array, Metrics]:
    behind = order.prefix_of(rows, prefix._replace(layers=layers))
    logp_RT = token_logprobs(policy, whole(moving), behind, features_MYD, rows, batch.forbidden_V)
    return loss_of_rows(logp_RT, rows)

  def gradient_of(rows: Rows) -> Any:
    differentiate = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    return differentiate(moving, prefix.layers, features_MYD, rows)

  rows = order.split(rows_of(batch, weight_R, ref_logp_RT))
  total = _summed(_cut_to_need(gradient_of, micro.lengths), rows)
  (loss_sum, metrics), (grads, layers_grad, features_grad) = total
  # Integers have no cotangent.
  lengths_grad: Any = np.zeros(prefix.length_B.shape, jax.dtypes.float0)
  prefill_grads, more_features_grad = pull_prefill(Prefix(layers_grad, lengths_grad))
  (encode_grads,) = pull_encode(features_grad + more_features_grad)
  grads = jax.tree.map(lambda *terms: sum(terms), grads, prefill_grads, encode_grads)
  # Zeros that XLA folds away: what is held takes no room.
  return loss_sum, metrics, param_tree.merge(jax.tree.map(jnp.zeros_like, frozen), grads)


def _summed(one: Callable[[Rows], Any], rows: Rows) -> Any:
  """The sum of `one` over microbatches [microbatches, ...], one after the other."""

  def add(total: Any, rows: Rows) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, one(rows)), None

  first = jax.tree.map(lambda x: x[0], rows)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
  return jax.lax.scan(add, zero, rows)[0]


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


def _features(policy: Policy, params: Params, vision: VisionBatch | FeatureBatch) -> jax.Array:
  """Those of the batch, where the rollouts have seen its images with the same tower."""
  if isinstance(vision, FeatureBatch):
    return jnp.asarray(vision.features_MYD)
  return policy.encode(params, vision)


def _prefill(policy: Policy, batch: TrainBatch, params: Params, features_MYD: Array) -> Prefix:
  """What the rows of each group have in common, as keys and values."""
  prefix = batch.prefix
  return policy.prefill(
    params,
    prefix.token_BT,
    prefix.position_BTA,
    prefix.valid_BT,
    features_MYD,
    prefix.feature_BT,
  )[1]
