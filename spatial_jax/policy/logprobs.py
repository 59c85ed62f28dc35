"""Log-probabilities and entropies of tokens from hidden states, a few tokens at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from spatial_jax.types import Array

_LEAST_LOGIT = -1e9  # in the place of -inf, which times the probability 0 is NaN


def score_targets(
  logits_of: Callable[[Array], jax.Array],
  hidden_RTD: Array,
  target_RT: Array,
  temperature_R: Array,
  forbidden_V: Array,
  chunk: int,
  with_entropy: bool,
) -> tuple[jax.Array, jax.Array | None]:
  """Log-probability of each target, and the entropy of its distribution if asked for.

  Args:
    logits_of: hidden [..., D] -> float32 [..., V].
    chunk: tokens per row whose logits exist at once; they are computed again in the backward pass.
    with_entropy: whether to return the entropy, nats; else None.

  Returns:
    float32 [R, T] each; the other arguments are those of `Policy.logprobs`.
  """
  rows, tokens, _ = hidden_RTD.shape
  chunk = min(chunk, tokens)
  padding = -tokens % chunk

  @jax.checkpoint
  def one_chunk(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple]:
    hidden, target = inputs
    logits = jnp.where(forbidden_V[None, None], -jnp.inf, logits_of(hidden))
    logits = logits / temperature_R[:, None, None]
    hit = jnp.arange(logits.shape[-1])[None, None] == target[..., None]
    chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    if not with_entropy:
      return None, (chosen - total, None)
    mean = jnp.sum(jax.nn.softmax(logits) * jnp.maximum(logits, _LEAST_LOGIT), axis=-1)
    return None, (chosen - total, total - mean)

  def split(x: Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    return jnp.swapaxes(x.reshape(rows, -1, chunk, *x.shape[2:]), 0, 1)

  def join(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1).reshape(rows, -1)[:, :tokens]

  _, found = jax.lax.scan(one_chunk, None, (split(hidden_RTD), split(target_RT)))
  return jax.tree.map(join, found)
