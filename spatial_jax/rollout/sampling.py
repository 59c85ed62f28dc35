"""Logits -> one token per row and its log-probability; every number may differ from row to row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax.types import Array

_BLOCK = 128  # ids that a draw looks at together: the width of a TPU's registers
_BELOW_ONE = 1 - 2.0**-24


class SamplingArrays(NamedTuple):
  """How each row samples: arrays, so that none of it recompiles.

  Attributes:
    key_R2: uint32, data of PRNG keys.
    temperature_R: float32 > 0, of the distribution; log-probabilities are those at it.
    greedy_R: bool, takes the most likely token instead of drawing one.
    top_k_R: int32, how many of the most likely tokens may be drawn; 0: all.
    top_p_R: float32 in (0, 1], the mass that they hold at least; 1: all of it.
    min_p_R: float32 in [0, 1), of the most likely token's probability; 0: any.
    limit_R: int32, how many sampled tokens of the rollout, `count_R`, end its turn.
  """

  key_R2: Array
  temperature_R: Array
  greedy_R: Array
  top_k_R: Array
  top_p_R: Array
  min_p_R: Array
  limit_R: Array


class Vocabulary(NamedTuple):
  """Ids of one policy, bool [V]: those that are never sampled, and those that end a turn."""

  forbidden_V: Array
  stop_V: Array


def sample_token(
  logits_RV: Array, count_R: Array, sampling: SamplingArrays, forbidden_V: Array, truncate: bool
) -> tuple[jax.Array, jax.Array]:
  """One token per row and its log-probability, before truncation; int32 and float32 [R].

  Nothing that is as large as the vocabulary is normalised: a draw need not know the sum, and one
  token's log-probability takes its logarithm alone.

  Args:
    logits_RV: of the next token.
    count_R: int32, folded into each row's key, so that a token's draw depends on its place alone.
    sampling: keys and numbers.
    forbidden_V: bool.
    truncate: static; apply top_k, top_p and min_p (costs a sort per token).
  """
  score_RV = scores(logits_RV, sampling.temperature_R, forbidden_V)
  best_R1 = jnp.max(score_RV, axis=-1, keepdims=True)
  weight_RV = jnp.exp(score_RV - best_R1)  # 1 of the likeliest
  total_R1 = jnp.sum(weight_RV, axis=-1, keepdims=True)
  key_R = jax.random.wrap_key_data(jnp.asarray(sampling.key_R2))
  keys_R = jax.vmap(jax.random.fold_in)(key_R, count_R)
  uniform_R = jax.vmap(jax.random.uniform)(keys_R)
  if truncate:
    weight_RV = truncated(weight_RV, sampling.top_k_R, sampling.top_p_R, sampling.min_p_R)
  # Greedy takes the first of what is likeliest, so that one search serves both ways.
  greedy_R1 = jnp.asarray(sampling.greedy_R)[:, None]
  weight_RV = jnp.where(greedy_R1 & (score_RV < best_R1), 0.0, weight_RV)
  token_R = draw_token(weight_RV, jnp.where(sampling.greedy_R, 0.0, uniform_R))
  chosen_R1 = jnp.take_along_axis(score_RV, token_R[:, None], axis=-1)
  return token_R, (chosen_R1 - best_R1 - jnp.log(total_R1))[:, 0]


def scores(logits_RV: Array, temperature_R: Array, forbidden_V: Array) -> jax.Array:
  """float32 [R, V] whose softmax is the policy's distribution: no forbidden ids, tempered."""
  allowed_RV = jnp.where(forbidden_V[None, :], -jnp.inf, logits_RV.astype(jnp.float32))
  return allowed_RV / temperature_R[:, None]


def truncated(p_RV: Array, top_k_R: Array, top_p_R: Array, min_p_R: Array) -> jax.Array:
  """Probabilities, 0 where a row's limits leave a token out; not renormalised.

  First the `top_k` most likely; of their mass, the fewest that hold `top_p` of it; of them, those
  with at least `min_p` times the largest probability. Tokens as likely as the last one kept are
  kept with it.

  Args:
    p_RV: float32 >= 0, need not sum to 1.
    top_k_R, top_p_R, min_p_R: as in `Sampling`.

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
  """Inverse CDF with one uniform number per row: first which block of ids, then which of them.

      blocks   | 0.1 | 0.5 | 0.4 |          uniform 0.2: in block 1, at (0.2 - 0.1) / 0.5 of it
      its ids        | 0.2 | 0.3 |          at 0.2 of 0.5: the first

  Sums over the whole vocabulary are never cumulated: that alone cost nearly as much as the softmax.

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
  """Whose part of the cumulated sum a number falls into, and where in it, in [0, 1)."""
  # A parallel sum need not be monotone in its last bits: where p is 0 it counts for nothing, and
  # the largest of what is left stands above uniform times itself.
  cdf_RN = jnp.where(p_RN > 0.0, jnp.cumsum(p_RN, axis=-1), 0.0)
  target_R1 = jnp.asarray(uniform_R)[:, None] * jnp.max(cdf_RN, axis=-1, keepdims=True)
  index_R = jnp.argmax(cdf_RN > target_R1, axis=-1).astype(jnp.int32)

  def of_it(x_RN: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_RN, index_R[:, None], axis=-1)

  part_R1 = of_it(p_RN)
  within_R1 = (target_R1 - (of_it(cdf_RN) - part_R1)) / part_R1
  return index_R, jnp.clip(within_R1[:, 0], 0.0, _BELOW_ONE)
