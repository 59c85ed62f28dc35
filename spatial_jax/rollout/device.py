"""What the rollout programs compute: pure functions from state to state, see `programs`.

empty_state ─► prefill ─► start_rows ─► decode_steps_loop ──► the tokens of a chunk
                  ▲           ▲                │
                  │           │ a free row     ├─► a row ended: its row or slot is free
                  └───────────┴────────────────┤
                    a free slot                └─► a row drew: append, then it decodes again
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax import rng
from spatial_jax.policy import cache as cache_lib
from spatial_jax.policy.cache import Cache
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout.device_inputs import ObservationBatch, PromptBatch, SamplingArrays
from spatial_jax.rollout.sampling import TokenMasks, sample_token
from spatial_jax.types import Array, Params


class RolloutStart(NamedTuple):
  """Where the rollouts of each slot begin."""

  hidden_BD: Array  # hidden state of the last token of the prompt
  position_B: Array  # int32, rotary position of the next token


class SampleState(NamedTuple):
  """What the programs pass on: caches and the state of every row."""

  # Keys and values of the prompts, which the rollouts of a slot share, and of each row.
  cache: Cache
  # Where the rollouts of each slot begin; None in a state of gathered rows.
  start: RolloutStart | None
  hidden_RD: Array  # hidden state that the next token is sampled from
  position_R: Array  # int32, rotary position of the next token
  # int32, tokens that the rollout sampled so far; folded into the key of the next token.
  count_R: Array
  active_R: Array  # bool, rows that sample
  sampling: SamplingArrays  # how each row samples


def empty_state(
  policy: Policy,
  slots: int,
  group: int,
  rows: int,
  prefix_size: int,
  suffix_block_sizes: Sequence[int],
) -> SampleState:
  """Returns a state without prompts, in which no row is active.

  Args:
    slots, group, rows: B, G, and R <= B*G.
    prefix_size: tokens that the prefix cache stores per prompt.
    suffix_block_sizes: tokens of each block of the suffix cache.
  """
  zero_R, one_R = jnp.zeros(rows, jnp.int32), jnp.ones(rows, jnp.float32)
  no_R, width = jnp.zeros(rows, bool), policy.cfg.decoder.width
  sampling = SamplingArrays(
    key_R=rng.wrap(jnp.zeros((rows, 2), jnp.uint32)),
    temperature_R=one_R,
    greedy_R=no_R,
    top_k_R=zero_R,
    top_p_R=one_R,
    min_p_R=jnp.zeros(rows, jnp.float32),
    limit_R=zero_R,
  )
  return SampleState(
    cache=policy.init_cache(slots, group, rows, prefix_size, suffix_block_sizes),
    start=RolloutStart(
      jnp.zeros((slots, width), policy.compute_dtype), jnp.zeros(slots, jnp.int32)
    ),
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
  """Prefills prompts into slots, once for all rollouts of a prompt; older prompts are overwritten.

  Args:
    policy, params: pure functions and their parameters, unstacked or stacked.
    state: its prefix cache is at least as long as the prompts.
    prompts: their slots are distinct.
  """
  hidden_BTD, prefix = policy.prefill(params, prompts.tokens, feature_buffer_MYD)
  assert state.start is not None
  new = RolloutStart(last_valid(hidden_BTD, prompts.tokens.valid_RT), prompts.next_position_B)
  return state._replace(
    cache=cache_lib.put_prefix(state.cache, prefix, jnp.asarray(prompts.slot_B)),
    start=jax.tree.map(
      lambda old, new: jnp.asarray(old).at[prompts.slot_B].set(new, mode="drop"), state.start, new
    ),
  )


def start_rows(
  state: SampleState, starts_R: Array, rollout_R: Array, row_BG: Array, sampling: SamplingArrays
) -> SampleState:
  """Starts rollouts in rows, at the end of their prompts; other rows do not change.

  Args:
    state: their prompts are prefilled.
    starts_R: bool, rows in which a rollout starts.
    rollout_R, row_BG: the assignment of all rows afterwards, as in `RowAssignment`.
  """
  assignment = state.cache.assignment
  if assignment is not None:
    assignment = cache_lib.RowAssignment(jnp.asarray(rollout_R), jnp.asarray(row_BG))
  cache = state.cache._replace(assignment=assignment)
  assert state.start is not None
  hidden_RD, position_R = (jnp.asarray(x)[cache.prompt_R] for x in state.start)

  def put(new: Array | int, old: Array) -> jax.Array:
    old = jnp.asarray(old)
    where = jnp.asarray(starts_R).reshape(-1, *[1] * (old.ndim - 1))
    return jnp.where(where, new, old)

  return SampleState(
    cache=cache._replace(length_R=put(0, cache.length_R)),
    start=state.start,
    hidden_RD=put(hidden_RD, state.hidden_RD),
    position_R=put(position_R, state.position_R),
    count_R=put(0, state.count_R),
    active_R=jnp.asarray(state.active_R) | starts_R,
    sampling=jax.tree.map(put, sampling, state.sampling),
  )


def append(
  policy: Policy,
  params: Params,
  state: SampleState,
  feature_buffer_MYD: Array,
  rows: ObservationBatch,
) -> SampleState:
  """Appends observations to rows, which are active afterwards; other rows do not change.

  Args:
    policy, params: pure functions and their parameters, unstacked or stacked.
    state: the rows of the observations are not active.
    rows: distinct rows.
  """

  def put(old: Array, new: Array | bool) -> jax.Array:
    return jnp.asarray(old).at[rows.row_R].set(new, mode="drop")

  # A row may have sampled tokens after a stop string; they are in the cache and are overwritten.
  cache = state.cache._replace(length_R=put(state.cache.length_R, rows.start_R))
  hidden_RTD, cache = policy.append(params, cache, rows.row_R, rows.tokens, feature_buffer_MYD)
  limit_R = put(state.sampling.limit_R, rows.limit_R)
  return SampleState(
    cache=cache,
    start=state.start,
    hidden_RD=put(state.hidden_RD, last_valid(hidden_RTD, rows.tokens.valid_RT)),
    position_R=put(state.position_R, rows.next_position_R),
    count_R=put(state.count_R, rows.count_R),
    active_R=put(state.active_R, True),
    sampling=state.sampling._replace(limit_R=limit_R),
  )


def decode_steps_loop(
  policy: Policy,
  params: Params,
  state: SampleState,
  masks: TokenMasks,
  *,
  steps: int,
  truncate: bool,
) -> tuple[SampleState, jax.Array, jax.Array]:
  """Samples up to `steps` tokens per row; stops early when no row is active.

  Args:
    policy, params: pure functions and their unstacked parameters.
    state: the program that jits this function donates its buffers.
    masks: forbidden ids and stop ids; a stop token is recorded and cached like any other token.
    steps: maximum number of tokens per row.
    truncate: static, as in `sample_token`.

  Returns:
    The state, tokens int32 [R, steps] (-1: not sampled), and log-probabilities float32 [R, steps].
  """

  def body(carry):
    index, state, token_RT, logp_RT = carry
    logits_RV = policy.logits(params, state.hidden_RD)
    token_R, logp_R = sample_token(
      logits_RV, state.count_R, state.sampling, masks.forbidden_V, truncate
    )
    token_RT = token_RT.at[:, index].set(jnp.where(state.active_R, token_R, -1))
    logp_RT = logp_RT.at[:, index].set(jnp.where(state.active_R, logp_R, 0.0))
    position_RA = jnp.repeat(state.position_R[:, None], 3, axis=1)
    hidden_RD, cache = policy.decode(params, state.cache, token_R, position_RA, state.active_R)
    one_R = state.active_R.astype(jnp.int32)
    count_R = state.count_R + one_R
    stopped_R = jnp.take(masks.stop_V, token_R, mode="clip")
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


# --- gathered rows -------------------------------------------------------------------------------


def gather_rows(state: SampleState, row_R: Array, steps: int) -> SampleState:
  """Gathers some rows into a smaller state, with a copy of their suffix cache.

  Args:
    row_R: int32, the rows; an index >= R is padding, which samples nothing.
    steps: maximum number of tokens they will sample; blocks after these are not copied.
  """
  index_R, count = jnp.asarray(row_R), state.active_R.shape[0]

  def rows(x: Array) -> jax.Array:
    return jnp.take(jnp.asarray(x), index_R, axis=0, mode="clip")

  assignment = state.cache.assignment_of(index_R)
  cache = Cache(state.cache.prefix, (), rows(state.cache.length_R), assignment)
  gathered = jax.tree.map(rows, state._replace(cache=None, start=None))
  gathered = gathered._replace(cache=cache, active_R=gathered.active_R & (index_R < count))
  end = steps + jnp.max(jnp.where(gathered.active_R, cache.length_R, 0))
  layers = tuple(cache_lib.take_rows_until(suffix, index_R, end) for suffix in state.cache.layers)
  return gathered._replace(cache=cache._replace(layers=layers))


def scatter_rows(
  state: SampleState, gathered: SampleState, row_R: Array, steps: int
) -> SampleState:
  """Writes the rows that `gather_rows` gathered back into the state; arguments as there."""

  def put(old: Array, new: Array) -> jax.Array:
    return jnp.asarray(old).at[row_R].set(new, mode="drop")

  row_R = jnp.asarray(row_R)
  start_R = jnp.take(state.cache.length_R, row_R, mode="clip")
  new_RT = jnp.arange(steps)[None] < (gathered.cache.length_R - start_R)[:, None]
  layers = tuple(
    cache_lib.write(old, cache_lib.read(new, start_R, steps), row_R, start_R, new_RT)
    for old, new in zip(state.cache.layers, gathered.cache.layers, strict=True)
  )
  length_R = put(state.cache.length_R, gathered.cache.length_R)
  cache = state.cache._replace(layers=layers, length_R=length_R)
  rest = jax.tree.map(put, state._replace(cache=None, start=None), gathered._replace(cache=None))
  return rest._replace(cache=cache, start=state.start)


def last_valid(x_RTD: Array, valid_RT: Array) -> jax.Array:
  """Returns [R, D], the vector of the last valid token of each row; rows are left-aligned."""
  last_R = jnp.maximum(jnp.sum(jnp.asarray(valid_RT), axis=1, dtype=jnp.int32) - 1, 0)
  return jnp.take_along_axis(x_RTD, last_R[:, None, None], axis=1)[:, 0]
