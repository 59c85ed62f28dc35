"""Logits -> one token per row and its log-probability; every row has its own parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax.rollout.device_inputs import SamplingArrays
from spatial_jax.types import Array

_BLOCK = 128  # ids per block of a draw: the width of a TPU register
_BELOW_ONE = 1 - 2.0**-24


class TokenMasks(NamedTuple):
  """bool [V]: ids that are never sampled, and ids that end a turn."""

  forbidden_V: Array
  stop_V: Array


def sample_token(
  logits_RV: Array, count_R: Array, sampling: SamplingArrays, forbidden_V: Array, truncate: bool
) -> tuple[jax.Array, jax.Array]:
  """Samples one token per row.

  The softmax is not computed over the vocabulary: a draw does not need the sum of the weights, and
  the log-probability of one token needs only the logarithm of the sum.

  Args:
    logits_RV: of the next token.
    count_R: int32, folded into the key of each row, so that a draw depends on its position alone.
    sampling: keys and parameters.
    forbidden_V: bool, ids that are never sampled.
    truncate: static; apply top_k, top_p and min_p, which costs a sort per token.

  Returns:
    Tokens int32 [R], and their log-probabilities before truncation, float32 [R].
  """
  score_RV = scores(logits_RV, sampling.temperature_R, forbidden_V)
  best_R1 = jnp.max(score_RV, axis=-1, keepdims=True)
  weight_RV = jnp.exp(score_RV - best_R1)  # 1 for the most likely token
  total_R1 = jnp.sum(weight_RV, axis=-1, keepdims=True)
  keys_R = jax.vmap(jax.random.fold_in)(sampling.key_R, count_R)
  uniform_R = jax.vmap(jax.random.uniform)(keys_R)
  if truncate:
    weight_RV = truncated(weight_RV, sampling.top_k_R, sampling.top_p_R, sampling.min_p_R)
  # Greedy rows draw from the most likely tokens with uniform number 0: one search serves both.
  greedy_R1 = jnp.asarray(sampling.greedy_R)[:, None]
  weight_RV = jnp.where(greedy_R1 & (score_RV < best_R1), 0.0, weight_RV)
  token_R = draw_token(weight_RV, jnp.where(sampling.greedy_R, 0.0, uniform_R))
  chosen_R1 = jnp.take_along_axis(score_RV, token_R[:, None], axis=-1)
  return token_R, (chosen_R1 - best_R1 - jnp.log(total_R1))[:, 0]


def scores(logits_RV: Array, temperature_R: Array, forbidden_V: Array) -> jax.Array:
  """Returns float32 [R, V]; its softmax is the policy's distribution at the temperature."""
  allowed_RV = jnp.where(forbidden_V[None, :], -jnp.inf, logits_RV.astype(jnp.float32))
  return allowed_RV / temperature_R[:, None]


def truncated(p_RV: Array, top_k_R: Array, top_p_R: Array, min_p_R: Array) -> jax.Array:
  """Sets probabilities to 0 that a row's limits leave out; the rest is not renormalised.

  First the `top_k` most likely tokens are kept; of these the fewest with at least `top_p` of their
  mass; of these the ones with at least `min_p` times the largest probability. Tokens that are as
  likely as the last one kept are kept too.

  Args:
    p_RV: float32 >= 0, need not sum to 1.
    top_k_R, top_p_R, min_p_R: as in `SamplingArrays`.

  Returns:
    float32 [R, V].

  Source: order of transformers' generate(); nucleus, arXiv:1904.09751; min-p, arXiv:2407.01082.
  """
  vocabulary = p_RV.shape[-1]
  sorted_RV = jnp.flip(jnp.sort(p_RV, axis=-1), axis=-1)
  count_R = jnp.where(top_k_R > 0, jnp.minimum(top_k_R, vocabulary), vocabulary)
  sorted_RV = jnp.where(jnp.arange(vocabulary)[None] < count_R[:, None], sorted_RV, 0.0)
  cumulative_RV = jnp.cumsum(sorted_RV, axis=-1)
  enough_R = jnp.where(top_p_R < 1.0, top_p_R * cumulative_RV[:, -1], jnp.inf)
  kept_RV = (sorted_RV > 0.0) & (cumulative_RV - sorted_RV < enough_R[:, None])
  smallest_R = jnp.min(jnp.where(kept_RV, sorted_RV, jnp.inf), axis=-1)
  smallest_R = jnp.maximum(smallest_R, min_p_R * sorted_RV[:, 0])
  return jnp.where(p_RV >= smallest_R[:, None], p_RV, 0.0)


def draw_token(p_RV: Array, uniform_R: Array) -> jax.Array:
  """Draws by inverse CDF with one uniform number per row: first a block of ids, then an id in it.

      blocks   | 0.1 | 0.5 | 0.4 |     uniform 0.2: block 1, at (0.2 - 0.1) / 0.5 = 0.2 of it
      ids            | 0.2 | 0.3 |     0.2 of the mass 0.5 is 0.1: the first id

  The sum over the whole vocabulary is not cumulated, which cost nearly as much as the softmax.

  Args:
    p_RV: float32 >= 0, need not sum to 1.
    uniform_R: float32 in [0, 1).

  Returns:
    int32 [R] token ids; never one of probability 0.
  """
  rows, vocabulary = p_RV.shape
  p_RNV = jnp.pad(jnp.asarray(p_RV), ((0, 0), (0, -vocabulary % _BLOCK)))
  p_RNV = p_RNV.reshape(rows, -1, _BLOCK)
  block_R, within_R = _invert(jnp.sum(p_RNV, axis=-1), uniform_R)
  p_RV = jnp.take_along_axis(p_RNV, block_R[:, None, None], axis=1)[:, 0]
  return block_R * _BLOCK + _invert(p_RV, within_R)[0]


def _invert(p_RN: jax.Array, uniform_R: Array) -> tuple[jax.Array, jax.Array]:
  """The index whose part of the cumulated sum contains a number, and where in that part, [0, 1)."""
  # A parallel sum need not be monotone in its last bits. Entries of probability 0 are left out, and
  # the largest of the others is above uniform times itself.
  cdf_RN = jnp.where(p_RN > 0.0, jnp.cumsum(p_RN, axis=-1), 0.0)
  target_R1 = jnp.asarray(uniform_R)[:, None] * jnp.max(cdf_RN, axis=-1, keepdims=True)
  index_R = jnp.argmax(cdf_RN > target_R1, axis=-1).astype(jnp.int32)

  def at_index(x_RN: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_RN, index_R[:, None], axis=-1)

  part_R1 = at_index(p_RN)
  within_R1 = (target_R1 - (at_index(cdf_RN) - part_R1)) / part_R1
  return index_R, jnp.clip(within_R1[:, 0], 0.0, _BELOW_ONE)
