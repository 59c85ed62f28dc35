"""Sums over rows: the cotangents of prefix and image features are summed in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.learn.gradient import NO_OTHERS, Microbatch, Objective, gradient
from spatial_jax.learn.losses import nll, token_weights
from spatial_jax.learn.train_batch import Microbatches
from spatial_jax.policy.cache import KV, Prefix
from spatial_jax.policy.logprobs import TokenScores
from spatial_jax.types import TokenArrays, TrainBatch, TrainRows

ROWS = 512


@dataclasses.dataclass(frozen=True)
class LinearPolicy:
  """Log-probability of row r: c_r * (sum of its prefix's keys + its image feature), in bfloat16."""

  mesh = None
  frozen = ()
  gradient_dtype = jnp.dtype("float32")

  def encode(self, params, vision):
    return params["features"].astype(jnp.bfloat16)

  def prefill(self, params, tokens, features_MYD):
    kv = params["keys"].astype(jnp.bfloat16)
    return None, Prefix((KV(kv, kv),), jnp.ones(len(tokens.token_RT), jnp.int32))

  def hidden_with_prefix(self, params, prefix, tokens, features_MYD):
    coefficient_R = 1 + tokens.token_RT[:, 0].astype(jnp.bfloat16) / 128
    of_prefix_R = jnp.sum(prefix.layers[0].k_RKSC, axis=(1, 2, 3))
    of_image_R = jnp.take(features_MYD[:, 0, 0], tokens.feature_RT[:, 0]).astype(jnp.bfloat16)
    logp_R = coefficient_R * (of_prefix_R + of_image_R)
    return jnp.broadcast_to(logp_R[:, None, None], (*tokens.token_RT.shape, 1))

  def logprobs(self, params, hidden_RTD, target_RT, temperature_R, forbidden_V, with_entropy):
    return TokenScores(hidden_RTD[..., 0].astype(jnp.float32), None)


def batch_of(coefficient_R: np.ndarray) -> TrainBatch:
  """Rows that all read the second of two prefixes and the second of two features."""

  def tokens(rows: int, first: int | np.ndarray) -> TokenArrays:
    return TokenArrays(
      token_RT=np.broadcast_to(np.asarray(first, np.int32).reshape(-1, 1), (rows, 2)),
      position_RTA=np.zeros((rows, 2, 3), np.int32),
      valid_RT=np.ones((rows, 2), bool),
      feature_RT=np.ones((rows, 2), np.int32),
    )

  rows = len(coefficient_R)
  return TrainBatch(
    prefix=tokens(2, 0),
    rows=TrainRows(
      tokens=tokens(rows, coefficient_R),
      trained_RT=np.tile([False, True], (rows, 1)),
      old_logp_RT=np.zeros((rows, 2), np.float32),
      advantage_R=np.zeros(rows, np.float32),
      temperature_R=np.ones(rows, np.float32),
      prefix_R=np.ones(rows, np.int32),
      group_R=np.ones(rows, np.int32),
      weight_R=np.ones(rows, np.float32),
    ),
    forbidden_V=np.zeros(4, bool),
    vision=None,
  )


@pytest.mark.parametrize("rows", [1, 16, ROWS])
def test_sums_over_rows_are_exact_for_every_size_of_microbatch(rows):
  """Every summand and every float32 sum is exact here, so that the gradient is rounded once.

  A bfloat16 sum stops growing at 256 times its summands: half of these rows would be lost.
  """
  coefficient_R = np.random.default_rng(0).integers(0, 128, ROWS)
  batch = batch_of(coefficient_R)
  params = {"features": jnp.ones((2, 1, 1)), "keys": jnp.ones((2, 1, 1, 1))}

  def loss(scores: TokenScores, microbatch: Microbatch):
    return nll(scores.logp_RT, microbatch.rows.trained_RT, microbatch.token_weight_R), {}

  @jax.jit
  def grads_of(params, batch):
    weight_R = token_weights(batch.rows.trained_RT, "token")
    micro = Microbatches(rows, (2,))
    objective = Objective(loss, is_sum_of_tokens=False)
    return gradient(LinearPolicy(), params, batch, weight_R, NO_OTHERS, objective, micro)[2]

  grads = grads_of(params, batch)
  expected = -jnp.mean(1 + coefficient_R / 128).astype(jnp.bfloat16).astype(jnp.float32)
  for name, grad in grads.items():
    np.testing.assert_array_equal(np.ravel(grad), [0, expected], err_msg=name)
