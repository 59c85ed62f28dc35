"""Log-probabilities and entropies of tokens from hidden states, a few tokens at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax.types import Array

_LEAST_LOGIT = -1e9  # in the place of -inf, which times the probability 0 is NaN


class TokenScores(NamedTuple):
  """What the policy says about each token."""

  logp_RT: jax.Array  # float32, log-probability given the tokens before it
  entropy_RT: jax.Array | None  # float32, nats; None if it was not asked for


def score_logits(
  logits_RTV: jax.Array,
  target_RT: Array,
  temperature_R: Array,
  forbidden_V: Array,
  with_entropy: bool,
) -> TokenScores:
  """Log-probability of each target, and the entropy of its distribution if asked for.

  Args:
    logits_RTV: float32; the other arguments are those of `Policy.logprobs`.
    with_entropy: whether to return the entropy; else None.
  """
  logits_RTV = jnp.where(forbidden_V[None, None], -jnp.inf, logits_RTV)
  logits_RTV = logits_RTV / temperature_R[:, None, None]
  hit_RTV = jnp.arange(logits_RTV.shape[-1])[None, None] == target_RT[..., None]
  chosen_RT = jnp.sum(jnp.where(hit_RTV, logits_RTV, 0.0), axis=-1)
  total_RT = jax.nn.logsumexp(logits_RTV, axis=-1)
  if not with_entropy:
    return TokenScores(chosen_RT - total_RT, None)
  limited_RTV = jnp.maximum(logits_RTV, _LEAST_LOGIT)
  mean_RT = jnp.sum(jax.nn.softmax(logits_RTV) * limited_RTV, axis=-1)
  return TokenScores(chosen_RT - total_RT, total_RT - mean_RT)


def score_targets(
  logits_of: Callable[[Array], jax.Array],
  hidden_RTD: Array,
  target_RT: Array,
  temperature_R: Array,
  forbidden_V: Array,
  chunk: int,
  with_entropy: bool,
) -> TokenScores:
  """`score_logits` of hidden states; logits [R, T, V] never exist at once.

  Args:
    logits_of: hidden [..., D] -> float32 [..., V].
    chunk: tokens per row whose logits exist at once; they are computed again in the backward pass.
  """
  rows, tokens, _ = hidden_RTD.shape
  chunk = min(chunk, tokens)
  padding = -tokens % chunk

  @jax.checkpoint
  def one_chunk(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, TokenScores]:
    hidden, target = inputs
    scores = score_logits(logits_of(hidden), target, temperature_R, forbidden_V, with_entropy)
    return None, scores

  def split(x: Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    return jnp.swapaxes(x.reshape(rows, -1, chunk, *x.shape[2:]), 0, 1)

  def join(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1).reshape(rows, -1)[:, :tokens]

  _, found = jax.lax.scan(one_chunk, None, (split(hidden_RTD), split(target_RT)))
  return jax.tree.map(join, found)
