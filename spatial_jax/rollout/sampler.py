"""The device side of a rollout: pure functions from state to state, jitted in `programs`.

start    prompts -> prefix cache, one hidden state per row (a group shares its prompt)
sample   hidden state -> token -> hidden state, a chunk of tokens for all rows at once
observe  drawn pictures behind the rows that drew
narrow   the few rows that still sample, by themselves; widen puts them back
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax.policy import cache as cache_lib
from spatial_jax.policy.cache import KV, Cache, Prefix, admit
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.types import Array, Params


class SampleState(NamedTuple):
  """What decoding carries from chunk to chunk.

  Attributes:
    cache: keys and values of prompts (shared by the rows of a group) and of each row.
    hidden_RD: hidden state that the next token is sampled from.
    position_R: int32, rotary position of that token.
    count_R: int32, tokens sampled so far in the episode; the sampling key of a token folds it in.
    active_R: bool, rows that still sample.
  """

  cache: Cache
  hidden_RD: Array
  position_R: Array
  count_R: Array
  active_R: Array


class Sampling(NamedTuple):
  """Numbers of sampling that may vary per call: arrays, so that none of them recompiles.

  Attributes:
    key_R: typed PRNG keys, one per row.
    temperature: float32 > 0.
    top_p: float32 in (0, 1]; 1 keeps the whole distribution.
    limit_R: int32, most tokens of an episode (as `count_R` counts them).
    forbidden_V: bool, true where a token must not be sampled.
  """

  key_R: Array
  temperature: Array
  top_p: Array
  limit_R: Array
  forbidden_V: Array


class PromptBatch(NamedTuple):
  """Prompts as padded rows, int32 ids and features; a padding prompt has one valid token."""

  token_BT: Array
  position_BTA: Array
  valid_BT: Array
  feature_BT: Array
  next_position_B: Array


class ObservationBatch(NamedTuple):
  """Observations as padded rows, each for one cache row `slot_R` (out of range: padding)."""

  slot_R: Array
  token_RT: Array
  position_RTA: Array
  valid_RT: Array
  feature_RT: Array
  next_position_R: Array


def start(
  policy: Policy,
  params: Params,
  features_MYD: Array,
  prompts: PromptBatch,
  active_B: Array,
  *,
  group: int,
  own_size: int,
) -> SampleState:
  """Prefills B prompts and opens `group` rows behind each.

  Args:
    params: unstacked or stacked.
    features_MYD: of the prompts' images.
    active_B: bool, false for padding prompts.
    group, own_size: static; rows per prompt, and cache slots for what follows the prompt.
  """
  hidden_BTD, prefix = policy.prefill(
    params,
    prompts.token_BT,
    prompts.position_BTA,
    prompts.valid_BT,
    features_MYD,
    prompts.feature_BT,
  )
  count, size = prompts.token_BT.shape
  cache = policy.init_cache(count, group, size, own_size)
  cache = admit(cache, prefix, jnp.arange(count))
  return SampleState(
    cache=cache,
    hidden_RD=jnp.repeat(last_valid(hidden_BTD, prompts.valid_BT), group, axis=0),
    position_R=jnp.repeat(prompts.next_position_B, group),
    count_R=jnp.zeros(count * group, jnp.int32),
    active_R=jnp.repeat(active_B, group),
  )


def observe(
  policy: Policy,
  params: Params,
  state: SampleState,
  features_MYD: Array,
  rows: ObservationBatch,
) -> SampleState:
  """Reads observations behind some rows and lets exactly these sample on."""
  hidden_RTD, cache = policy.append(
    params,
    state.cache,
    rows.slot_R,
    rows.token_RT,
    rows.position_RTA,
    rows.valid_RT,
    features_MYD,
    rows.feature_RT,
  )
  last_RD = last_valid(hidden_RTD, rows.valid_RT)
  hidden_RD, position_R = jnp.asarray(state.hidden_RD), jnp.asarray(state.position_R)
  return SampleState(
    cache=cache,
    hidden_RD=hidden_RD.at[rows.slot_R].set(last_RD, mode="drop"),
    position_R=position_R.at[rows.slot_R].set(rows.next_position_R, mode="drop"),
    count_R=state.count_R,
    active_R=jnp.zeros_like(state.active_R).at[rows.slot_R].set(True, mode="drop"),
  )


def narrow(state: SampleState, slot_R: Array) -> SampleState:
  """Some rows of a state as a state of their own, each with its own copy of its prefix.

  Args:
    state: of R rows.
    slot_R: int32, which rows; one >= R is padding, which samples nothing.
  """
  prefix, count = state.cache.prefix, state.active_R.shape[0]
  index_R = jnp.asarray(slot_R)
  prompt_R = index_R // (count // prefix.length_B.shape[0])

  def rows(x: Array) -> jax.Array:
    return jnp.take(jnp.asarray(x), index_R, axis=0, mode="clip")

  cache = Cache(
    Prefix(
      tuple(cache_lib.rows(layer, prompt_R) for layer in prefix.layers),
      jnp.take(prefix.length_B, prompt_R, mode="clip"),
    ),
    tuple(cache_lib.rows(layer, index_R) for layer in state.cache.layers),
    rows(state.cache.length_R),
  )
  return SampleState(
    cache=cache,
    hidden_RD=rows(state.hidden_RD),
    position_R=rows(state.position_R),
    count_R=rows(state.count_R),
    active_R=rows(state.active_R) & (index_R < count),
  )


def widen(state: SampleState, few: SampleState, slot_R: Array) -> SampleState:
  """`state` with the rows that `narrow` took out put back; arguments as there."""

  def put(old: Array, new: Array) -> jax.Array:
    return jnp.asarray(old).at[slot_R].set(new, mode="drop")

  layers = zip(state.cache.layers, few.cache.layers, strict=True)
  return SampleState(
    cache=Cache(
      state.cache.prefix,
      tuple(KV(*map(put, old, new)) for old, new in layers),
      put(state.cache.length_R, few.cache.length_R),
    ),
    hidden_RD=put(state.hidden_RD, few.hidden_RD),
    position_R=put(state.position_R, few.position_R),
    count_R=put(state.count_R, few.count_R),
    active_R=put(state.active_R, few.active_R),
  )


def last_valid(x_RTD: Array, valid_RT: Array) -> jax.Array:
  """[R, D] of each row's last valid token; rows are left-aligned."""
  last_R = jnp.maximum(jnp.sum(jnp.asarray(valid_RT), axis=1, dtype=jnp.int32) - 1, 0)
  return jnp.take_along_axis(x_RTD, last_R[:, None, None], axis=1)[:, 0]


def token_logprobs(logits_RV: Array, sampling: Sampling) -> jax.Array:
  """The policy's distribution: forbidden ids out, divided by temperature, before any truncation."""
  allowed_RV = jnp.where(sampling.forbidden_V[None, :], -jnp.inf, logits_RV.astype(jnp.float32))
  return jax.nn.log_softmax(allowed_RV / sampling.temperature, axis=-1)


def nucleus(p_RV: Array, top_p: Array) -> jax.Array:
  """Keeps the fewest most likely tokens whose mass reaches `top_p`; the rest become 0.

  Args:
    p_RV: float32 >= 0, of sum 1.
    top_p: float32 scalar in (0, 1].

  Returns:
    float32 [R, V], not renormalised; tokens as likely as the last one kept are kept with it.
  """
  sorted_RV = jnp.flip(jnp.sort(p_RV, axis=-1), axis=-1)
  before_RV = jnp.cumsum(sorted_RV, axis=-1) - sorted_RV
  smallest_R = jnp.min(jnp.where(before_RV < top_p, sorted_RV, jnp.inf), axis=-1)
  return jnp.where(p_RV >= smallest_R[:, None], p_RV, 0.0)


def draw_token(p_RV: Array, uniform_R: Array) -> jax.Array:
  """Inverse CDF with one uniform number per row: a third of the cost of Gumbel noise per entry.

  Args:
    p_RV: float32 >= 0, need not sum to 1.
    uniform_R: float32 in [0, 1).

  Returns:
    int32 [R] token ids; never one of probability 0.
  """
  # A parallel sum need not be monotone in its last bits: where p is 0 it counts for nothing, and
  # the largest of what is left stands above uniform times itself.
  cdf_RV = jnp.where(p_RV > 0.0, jnp.cumsum(p_RV, axis=-1), 0.0)
  total_R1 = jnp.max(cdf_RV, axis=-1, keepdims=True)
  return jnp.argmax(cdf_RV > uniform_R[:, None] * total_R1, axis=-1).astype(jnp.int32)


def sample_token(
  logits_RV: Array, count_R: Array, sampling: Sampling, greedy: bool, truncate: bool
) -> tuple[jax.Array, jax.Array]:
  """One token per row and its log-probability, before truncation; int32 and float32 [R].

  Args:
    logits_RV: of the next token.
    count_R: int32, folded into each row's key, so that a token's draw depends on its place alone.
    sampling: keys and numbers.
    greedy, truncate: static, as in `decode_chunk`.
  """
  logp_RV = token_logprobs(logits_RV, sampling)
  if greedy:
    token_R = jnp.argmax(logp_RV, axis=-1).astype(jnp.int32)
  else:
    keys_R = jax.vmap(jax.random.fold_in)(sampling.key_R, count_R)
    uniform_R = jax.vmap(jax.random.uniform)(keys_R)
    p_RV = jnp.exp(logp_RV)
    token_R = draw_token(nucleus(p_RV, sampling.top_p) if truncate else p_RV, uniform_R)
  return token_R, jnp.take_along_axis(logp_RV, token_R[:, None], axis=-1)[:, 0]


def decode_chunk(
  policy: Policy,
  params: Params,
  state: SampleState,
  sampling: Sampling,
  *,
  steps: int,
  own_buckets: tuple[int, ...],
  greedy: bool,
  truncate: bool,
  stop_id: int,
) -> tuple[SampleState, jax.Array, jax.Array]:
  """Samples up to `steps` tokens per row; stops early when no row is active.

  Every token reads the whole of each row's own cache, so that a chunk works on the front of it: as
  much as the longest active row will need.

  Args:
    policy, params: the pure functions and their unstacked parameters.
    state: carried state; its buffers are donated by the program that jits this.
    sampling, steps: keys and numbers; most tokens of this chunk.
    own_buckets: ascending sizes of that front; beyond the last it is the whole cache.
    greedy: takes the most likely token; log-probabilities are those at `temperature`.
    truncate: apply `top_p` (costs a sort per token).
    stop_id: ends a row's turn; it is sampled, recorded and cached like any other token.

  Returns:
    The state, tokens int32 [R, steps] (-1: nothing sampled), and float32 log-probabilities.
  """

  decode = functools.partial(_decode, policy, params, sampling, steps, greedy, truncate, stop_id)

  def on_front(state: SampleState, size: int):
    layers = state.cache.layers
    front = jax.tree.map(lambda x: x[:, :, :size], layers)
    state, *said = decode(state._replace(cache=state.cache._replace(layers=front)))
    layers = jax.tree.map(lambda x, new: x.at[:, :, :size].set(new), layers, state.cache.layers)
    return state._replace(cache=state.cache._replace(layers=layers)), *said

  if not own_buckets:
    return decode(state)
  needed = steps + jnp.max(jnp.where(state.active_R, state.cache.length_R, 0))
  forms = [functools.partial(on_front, size=size) for size in own_buckets]
  which = jnp.searchsorted(jnp.asarray(own_buckets), needed)
  return jax.lax.switch(which, [*forms, decode], state)


def _decode(policy, params, sampling, steps, greedy, truncate, stop_id, state):
  """`decode_chunk` on the cache as it is."""

  def body(carry):
    index, state, token_RK, logp_RK = carry
    logits_RV = policy.logits(params, state.hidden_RD)
    token_R, logp_R = sample_token(logits_RV, state.count_R, sampling, greedy, truncate)
    token_RK = token_RK.at[:, index].set(jnp.where(state.active_R, token_R, -1))
    logp_RK = logp_RK.at[:, index].set(jnp.where(state.active_R, logp_R, 0.0))
    position_RA = jnp.repeat(state.position_R[:, None], 3, axis=1)
    hidden_RD, cache = policy.decode(params, state.cache, token_R, position_RA, state.active_R)
    one_R = state.active_R.astype(jnp.int32)
    count_R = state.count_R + one_R
    state = SampleState(
      cache=cache,
      hidden_RD=jnp.where(state.active_R[:, None], hidden_RD, state.hidden_RD),
      position_R=state.position_R + one_R,
      count_R=count_R,
      active_R=state.active_R & (token_R != stop_id) & (count_R < sampling.limit_R),
    )
    return index + 1, state, token_RK, logp_RK

  def unfinished(carry):
    return (carry[0] < steps) & jnp.any(carry[1].active_R)

  shape = (state.active_R.size, steps)
  empty = (jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
  return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, *empty))[1:]
