"""The device side of rollouts: pure functions from state to state, jitted in `programs`.

empty ──► admit ──► begin ─────► decode_steps_loop ──┐    prompts in slots, their rollouts in rows
            ▲         ▲ a free row ▲     │      │
            │         └────────────┼─────┤      │
            └─ a free slot         │     │      │
                                observe  ◄──────┘    drawn pictures behind the rows that drew
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax.policy import cache as cache_lib
from spatial_jax.policy.cache import Cache
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout.sampling import SamplingArrays, Vocabulary, sample_token
from spatial_jax.types import Array, Params


class Start(NamedTuple):
  """Hidden state behind each prompt, and the rotary position of what follows, int32."""

  hidden_BD: Array
  position_B: Array


class SampleState(NamedTuple):
  """What decoding carries from program to program.

  Attributes:
    cache: keys and values of prompts (shared by the rollouts of a slot) and of each row.
    start: where the rollouts of each slot begin; None for a few rows by themselves.
    hidden_RD: hidden state that the next token is sampled from.
    position_R: int32, rotary position of that token.
    count_R: int32, tokens sampled so far in the episode; the sampling key of a token folds it in.
    active_R: bool, rows that sample.
    sampling: how they do.
  """

  cache: Cache
  start: Start | None
  hidden_RD: Array
  position_R: Array
  count_R: Array
  active_R: Array
  sampling: SamplingArrays


class PromptBatch(NamedTuple):
  """Prompts as padded rows, int32, each for one slot (out of range: padding).

  A padding prompt has one valid token. Features are rows of the pool, -1 for text.
  """

  slot_B: Array
  token_BT: Array
  position_BTA: Array
  valid_BT: Array
  feature_BT: Array
  next_position_B: Array


class ObservationBatch(NamedTuple):
  """Observations as padded rows, each for one cache row `row_R` (out of range: padding).

  `start_R`, `count_R`: own tokens before it, and those of them that were sampled; `limit_R`: at
  how many sampled tokens in all its next turn ends. The other fields are as in PromptBatch.
  """

  row_R: Array
  start_R: Array
  count_R: Array
  limit_R: Array
  token_RT: Array
  position_RTA: Array
  valid_RT: Array
  feature_RT: Array
  next_position_R: Array


def empty(
  policy: Policy,
  slots: int,
  group: int,
  rows: int,
  prefix_size: int,
  suffix_block_sizes: Sequence[int],
) -> SampleState:
  """A state in which nobody samples.

  Args:
    policy: the pure functions.
    slots, group, rows: B, G, and R <= B*G.
    prefix_size: room in tokens for a prompt.
    suffix_block_sizes: for what follows it, in blocks.
  """
  zero_R, one_R = jnp.zeros(rows, jnp.int32), jnp.ones(rows, jnp.float32)
  no_R, width = jnp.zeros(rows, bool), policy.cfg.decoder.width
  sampling = SamplingArrays(
    key_R2=jnp.zeros((rows, 2), jnp.uint32),
    temperature_R=one_R,
    greedy_R=no_R,
    top_k_R=zero_R,
    top_p_R=one_R,
    min_p_R=jnp.zeros(rows, jnp.float32),
    limit_R=zero_R,
  )
  return SampleState(
    cache=policy.init_cache(slots, group, rows, prefix_size, suffix_block_sizes),
    start=Start(jnp.zeros((slots, width), policy.compute_dtype), jnp.zeros(slots, jnp.int32)),
    hidden_RD=jnp.zeros((rows, width), policy.compute_dtype),
    position_R=zero_R,
    count_R=zero_R,
    active_R=no_R,
    sampling=sampling,
  )


def prefill(
  policy: Policy,
  params: Params,
  state: SampleState,
  feature_buffer_MYD: Array,
  prompts: PromptBatch,
) -> SampleState:
  """Prefills prompts, each once for all its rollouts, in place of those that were in their slots.

  Args:
    policy, params: the pure functions; unstacked or stacked.
    state: with at least as much room for a prompt as these are long.
    feature_buffer_MYD: features of the prompts' images.
    prompts: distinct slots.
  """
  hidden_BTD, prefix = policy.prefill(
    params,
    prompts.token_BT,
    prompts.position_BTA,
    prompts.valid_BT,
    feature_buffer_MYD,
    prompts.feature_BT,
  )
  assert state.start is not None
  new = Start(last_valid(hidden_BTD, prompts.valid_BT), prompts.next_position_B)
  return state._replace(
    cache=cache_lib.put_prefix(state.cache, prefix, jnp.asarray(prompts.slot_B)),
    start=jax.tree.map(
      lambda old, new: jnp.asarray(old).at[prompts.slot_B].set(new, mode="drop"), state.start, new
    ),
  )


def start_rows(
  state: SampleState, begins_R: Array, rollout_R: Array, row_BG: Array, sampling: SamplingArrays
) -> SampleState:
  """Lets rollouts sample from the end of their prompts on; the other rows stay as they are.

  Args:
    state: with their prompts.
    begins_R: bool, rows that a rollout takes.
    rollout_R, row_BG: who has which row then, as in `cache.Seats`.
    sampling: of the rows that begin.
  """
  assignment = state.cache.assignment
  if assignment is not None:
    assignment = cache_lib.RowAssignment(jnp.asarray(rollout_R), jnp.asarray(row_BG))
  cache = state.cache._replace(assignment=assignment)
  assert state.start is not None
  hidden_RD, position_R = (jnp.asarray(x)[cache.prompt_R] for x in state.start)

  def put(new: Array | int, old: Array) -> jax.Array:
    old = jnp.asarray(old)
    where = jnp.asarray(begins_R).reshape(-1, *[1] * (old.ndim - 1))
    return jnp.where(where, new, old)

  return SampleState(
    cache=cache._replace(length_R=put(0, cache.length_R)),
    start=state.start,
    hidden_RD=put(hidden_RD, state.hidden_RD),
    position_R=put(position_R, state.position_R),
    count_R=put(0, state.count_R),
    active_R=jnp.asarray(state.active_R) | begins_R,
    sampling=jax.tree.map(put, sampling, state.sampling),
  )


def append(
  policy: Policy,
  params: Params,
  state: SampleState,
  feature_buffer_MYD: Array,
  rows: ObservationBatch,
) -> SampleState:
  """Reads observations behind some rows and lets them sample on; the others stay as they are."""

  def put(old: Array, new: Array | bool) -> jax.Array:
    return jnp.asarray(old).at[rows.row_R].set(new, mode="drop")

  # What a row sampled behind a stop string lies in the cache, and is written over.
  cache = state.cache._replace(length_R=put(state.cache.length_R, rows.start_R))
  hidden_RTD, cache = policy.append(
    params,
    cache,
    rows.row_R,
    rows.token_RT,
    rows.position_RTA,
    rows.valid_RT,
    feature_buffer_MYD,
    rows.feature_RT,
  )
  limit_R = put(state.sampling.limit_R, rows.limit_R)
  return SampleState(
    cache=cache,
    start=state.start,
    hidden_RD=put(state.hidden_RD, last_valid(hidden_RTD, rows.valid_RT)),
    position_R=put(state.position_R, rows.next_position_R),
    count_R=put(state.count_R, rows.count_R),
    active_R=put(state.active_R, True),
    sampling=state.sampling._replace(limit_R=limit_R),
  )


def decode_steps_loop(
  policy: Policy,
  params: Params,
  state: SampleState,
  words: Vocabulary,
  *,
  steps: int,
  truncate: bool,
) -> tuple[SampleState, jax.Array, jax.Array]:
  """Samples up to `steps` tokens per row; stops early when no row is active.

  Args:
    policy, params: the pure functions and their unstacked parameters.
    state: carried state; its buffers are donated by the program that jits this.
    words: a token that ends a turn is sampled, recorded and cached like any other.
    steps: most tokens of this chunk.
    truncate: static, as in `sample_token`.

  Returns:
    The state, tokens int32 [R, steps] (-1: nothing sampled), and float32 log-probabilities.
  """

  def body(carry):
    index, state, token_RT, logp_RT = carry
    logits_RV = policy.logits(params, state.hidden_RD)
    token_R, logp_R = sample_token(
      logits_RV, state.count_R, state.sampling, words.forbidden_V, truncate
    )
    token_RT = token_RT.at[:, index].set(jnp.where(state.active_R, token_R, -1))
    logp_RT = logp_RT.at[:, index].set(jnp.where(state.active_R, logp_R, 0.0))
    position_RA = jnp.repeat(state.position_R[:, None], 3, axis=1)
    hidden_RD, cache = policy.decode(params, state.cache, token_R, position_RA, state.active_R)
    one_R = state.active_R.astype(jnp.int32)
    count_R = state.count_R + one_R
    stopped_R = jnp.take(words.stop_V, token_R, mode="clip")
    state = state._replace(
      cache=cache,
      hidden_RD=jnp.where(state.active_R[:, None], hidden_RD, state.hidden_RD),
      position_R=state.position_R + one_R,
      count_R=count_R,
      active_R=state.active_R & ~stopped_R & (count_R < state.sampling.limit_R),
    )
    return index + 1, state, token_RT, logp_RT

  def unfinished(carry):
    return (carry[0] < steps) & jnp.any(carry[1].active_R)

  shape = (state.active_R.size, steps)
  blank = (jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
  return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, *blank))[1:]


# --- a few rows by themselves --------------------------------------------------------------------


def gather_rows(state: SampleState, row_R: Array, steps: int) -> SampleState:
  """Some rows of a state as a state of their own, with copies of what they wrote.

  Args:
    state: of R rows.
    row_R: int32, which rows; one >= R is padding, which samples nothing.
    steps: most tokens that they will sample; blocks of the cache behind them stay empty.
  """
  index_R, count = jnp.asarray(row_R), state.active_R.shape[0]

  def rows(x: Array) -> jax.Array:
    return jnp.take(jnp.asarray(x), index_R, axis=0, mode="clip")

  assignment = state.cache.assignment_of(index_R)
  cache = Cache(state.cache.prefix, (), rows(state.cache.length_R), assignment)
  few = jax.tree.map(rows, state._replace(cache=None, start=None))
  few = few._replace(cache=cache, active_R=few.active_R & (index_R < count))
  end = steps + jnp.max(jnp.where(few.active_R, cache.length_R, 0))
  layers = tuple(cache_lib.front(suffix, index_R, end) for suffix in state.cache.layers)
  return few._replace(cache=cache._replace(layers=layers))


def scatter_rows(state: SampleState, few: SampleState, row_R: Array, steps: int) -> SampleState:
  """`state` with what the rows that `gather_rows` took out have done since; arguments as there."""

  def put(old: Array, new: Array) -> jax.Array:
    return jnp.asarray(old).at[row_R].set(new, mode="drop")

  row_R = jnp.asarray(row_R)
  start_R = jnp.take(state.cache.length_R, row_R, mode="clip")
  fresh_RT = jnp.arange(steps)[None] < (few.cache.length_R - start_R)[:, None]
  layers = tuple(
    cache_lib.write(old, cache_lib.read(new, start_R, steps), row_R, start_R, fresh_RT)
    for old, new in zip(state.cache.layers, few.cache.layers, strict=True)
  )
  length_R = put(state.cache.length_R, few.cache.length_R)
  cache = state.cache._replace(layers=layers, length_R=length_R)
  rest = jax.tree.map(put, state._replace(cache=None, start=None), few._replace(cache=None))
  return rest._replace(cache=cache, start=state.start)


def last_valid(x_RTD: Array, valid_RT: Array) -> jax.Array:
  """[R, D] of each row's last valid token; rows are left-aligned."""
  last_R = jnp.maximum(jnp.sum(jnp.asarray(valid_RT), axis=1, dtype=jnp.int32) - 1, 0)
  return jnp.take_along_axis(x_RTD, last_R[:, None, None], axis=1)[:, 0]
