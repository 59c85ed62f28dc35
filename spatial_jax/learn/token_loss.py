"""Losses that are sums over tokens: value and gradient in one pass over the logits.

In general a loss is differentiated after all log-probabilities are known, and the logits of each
chunk of tokens are computed again. A sum of losses of single tokens needs no second pass: the loss
of a chunk is differentiated while the logits of the chunk exist.

    for each chunk of tokens:
      logits = head(hidden)
      loss += f(logits),   gradient of head += d f / d head,   gradient of hidden = d f / d hidden

Source: the fused linear cross entropy of Liger Kernel (arXiv:2410.10989).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax.learn.losses import Metrics
from spatial_jax.policy import param_tree
from spatial_jax.policy.logprobs import TokenScores, score_logits
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.types import Array, Params


class Head(NamedTuple):
  """A policy and its parameters, of which only the table of `Policy.logits` is read."""

  policy: Policy
  frozen: Params  # without a gradient
  trained: Params


class Targets(NamedTuple):
  """Whole rows of tokens, each the target of the token before it."""

  token_RT: Array  # int32
  trained_RT: Array  # bool, the tokens that the loss reads
  temperature_R: Array  # float32 > 0
  forbidden_V: Array  # bool, tokens that cannot be sampled


# (scores, others) of some tokens of each row -> their part of the loss and of the metrics
TokenLoss = Callable[[TokenScores, Any], tuple[jax.Array, Metrics]]


def masked(scores: TokenScores, trained_RT: Array) -> TokenScores:
  """0 where not trained: a forbidden token has -inf, which must not reach a gradient."""
  return jax.tree.map(lambda x_RT: jnp.where(trained_RT, x_RT, 0.0), scores)


def sum_of_token_losses(
  head: Head,
  hidden_RTD: jax.Array,
  targets: Targets,
  others: Any,
  loss: TokenLoss,
  with_entropy: bool = False,
) -> tuple[jax.Array, Metrics]:
  """The sum over the tokens of some rows of a loss, and of its metrics, which have no gradient.

  Args:
    hidden_RTD: of the tokens of `targets`.
    others: what `loss` reads: arrays [R], and arrays [R, T, ...], which it gets in chunks.
    loss: adds nothing for a token that is not trained; its scores are 0.
  """
  policy, (*rows, forbidden_V) = head.policy, targets
  head_params, _ = param_tree.partition(head.trained, (f"^{policy.head_path}$",))

  def chunk_loss(params: Params, hidden: Array, chunk: Any) -> tuple[jax.Array, Metrics]:
    (token, trained, temperature_R), others = chunk
    logits = policy.logits(param_tree.merge(head.frozen, params), hidden)
    scores = score_logits(logits, token, temperature_R, forbidden_V, with_entropy)
    return loss(masked(scores, trained), others)

  following = _map_tokens(lambda x: x[:, 1:], (rows, others))
  return sum_over_chunks(
    chunk_loss, head_params, hidden_RTD[:, :-1], following, policy.logprob_chunk
  )


def sum_over_chunks(
  chunk_loss: Callable[[Params, Array, Any], tuple[jax.Array, Metrics]],
  params: Params,
  hidden_RTD: jax.Array,
  others: Any,
  chunk: int,
) -> tuple[jax.Array, Metrics]:
  """The sum of the losses and metrics of all chunks of tokens; the metrics have no gradient.

  Args:
    chunk_loss: (params, hidden_RCD, others) -> loss and metrics. Padding must add nothing: there
      `others` is 0 or False.
    params: differentiated.
    others: arrays [R], and arrays [R, T, ...], which are given in chunks. Not differentiated.
    chunk: tokens per row.
  """
  tokens = hidden_RTD.shape[1]
  chunk = min(chunk, tokens)
  starts = jnp.arange(0, tokens, chunk)
  differentiate = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)

  def one_chunk(params: Params, rows: Any, start: Array) -> tuple[Any, jax.Array]:
    part = _map_tokens(lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1), rows)
    found, (of_params, of_hidden) = differentiate(params, *part)
    return (found, of_params), of_hidden

  def forward(params: Params, hidden_RTD: jax.Array, others: Any) -> tuple[Any, Any]:
    rows = _map_tokens(functools.partial(_pad, count=-tokens % chunk), (hidden_RTD, others))

    def add(total: Any, start: Array) -> tuple[Any, jax.Array]:
      found, of_hidden = one_chunk(params, rows, start)
      return jax.tree.map(jnp.add, total, found), of_hidden

    shapes, _ = jax.eval_shape(one_chunk, params, rows, starts[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (found, of_params), of_chunks = jax.lax.scan(add, zeros, starts)
    of_hidden = jnp.swapaxes(of_chunks, 0, 1).reshape(rows[0].shape)[:, :tokens]
    return found, (of_params, of_hidden)

  @jax.custom_vjp
  def total(params: Params, hidden_RTD: jax.Array, others: Any) -> tuple[jax.Array, Metrics]:
    return forward(params, hidden_RTD, others)[0]

  def backward(grads: Any, cotangent: tuple[jax.Array, Metrics]) -> tuple[Any, Any, None]:
    scaled = jax.tree.map(lambda grad: grad * cotangent[0].astype(grad.dtype), grads)
    return (*scaled, None)

  total.defvjp(forward, backward)
  return total(params, hidden_RTD, others)


def _map_tokens(function: Callable[[Array], Array], tree: Any) -> Any:
  """`function` of the arrays [R, T, ...]; arrays [R] stay."""
  return jax.tree.map(lambda x: function(x) if x.ndim > 1 else x, tree)


def _pad(x: Array, count: int) -> jax.Array:
  """`count` zeros at the end of each row."""
  return jnp.pad(x, ((0, 0), (0, count)) + ((0, 0),) * (x.ndim - 2))
