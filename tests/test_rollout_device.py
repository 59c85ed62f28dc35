"""Sampling of tokens: distributions, nucleus, inverse CDF, and the decode loop around them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.policy.cache import KV
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout import device
from spatial_jax.rollout.device_inputs import PromptBatch, SamplingArrays
from spatial_jax.rollout.sampling import TokenMasks, draw_token, scores, truncated
from spatial_jax.types import Params, TokenArrays
from tests import rollout_fixtures as fixtures
from tests.policy_fixtures import pad_rows
from tests.rollout_fixtures import STOP, VOCABULARY

TOKENS = 24
jit_draw_token = jax.jit(draw_token)


@jax.jit
def nucleus(p_RV, top_p):
  """The nucleus of each row."""
  zero_R = jnp.zeros(len(p_RV))
  return truncated(p_RV, zero_R.astype(jnp.int32), jnp.full(len(p_RV), top_p), zero_R)


@st.composite
def distributions(draw):
  """float32 [3, 24] of sum 1, some entries exactly 0, some much larger than others."""
  seed = draw(st.integers(0, 2**32 - 1))
  generator = np.random.default_rng(seed)
  spread = draw(st.sampled_from((0.0, 1.0, 10.0, 60.0)))
  weight_RV = np.exp(spread * generator.normal(size=(3, TOKENS)))
  weight_RV *= generator.random((3, TOKENS)) < draw(st.sampled_from((0.1, 0.5, 1.0)))
  weight_RV[:, generator.integers(TOKENS)] += 1e-3 * weight_RV.max() + 1e-30
  return (weight_RV / weight_RV.sum(1, keepdims=True)).astype(np.float32)


# --- drawing a token -----------------------------------------------------------------------------

BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


@settings(deadline=None)
@given(distributions(), st.floats(0, BELOW_ONE, width=32))
def test_tokens_of_probability_0_are_never_drawn(p_RV, uniform):
  for u in (uniform, 0.0, BELOW_ONE):
    token_R = np.asarray(jit_draw_token(p_RV, np.full(3, u, np.float32)))
    assert (p_RV[np.arange(3), token_R] > 0).all()


@settings(deadline=None)
@given(distributions(), st.floats(0, BELOW_ONE, width=32))
def test_draw_is_the_inverse_cdf(p_RV, uniform):
  token_R = np.asarray(jit_draw_token(p_RV, np.full(3, uniform, np.float32)))
  upper_RV = np.cumsum(p_RV.astype(np.float64), axis=1)
  total_R = upper_RV[:, -1]
  upper_R = upper_RV[np.arange(3), token_R]
  lower_R = upper_R - p_RV[np.arange(3), token_R]
  assert (lower_R <= uniform * total_R + 1e-5).all()
  assert (upper_R >= uniform * total_R - 1e-5).all()


def test_rounding_of_the_parallel_sum_never_chooses_a_token():
  """Over a large vocabulary the parallel sum is not monotone in its last bits."""
  generator = np.random.default_rng(0)
  p_V = generator.dirichlet(np.full(50_000, 0.01)).astype(np.float32)
  p_V[generator.random(len(p_V)) < 0.9] = 0.0
  p_V[-400:] = 0.0
  cdf_V = np.asarray(jnp.cumsum(p_V))
  edges_U = np.unique(np.concatenate([cdf_V[-500:], cdf_V[::499], [cdf_V[-1]]])) / cdf_V[-1]
  edges_U = np.clip(edges_U, 0, BELOW_ONE).astype(np.float32)
  token_U = np.asarray(jax.jit(jax.vmap(draw_token, (None, 0)))(p_V[None], edges_U[:, None]))
  assert (p_V[token_U] > 0).all()


def test_frequencies_are_probabilities():
  p_V = np.array([0.5, 0.0, 0.3, 0.2, 0.0], np.float32)
  uniform_R = np.asarray(jax.random.uniform(jax.random.key(0), (20_000,)))
  token_R = np.asarray(jit_draw_token(np.tile(p_V, (20_000, 1)), uniform_R))
  np.testing.assert_allclose(np.bincount(token_R, minlength=5) / 20_000, p_V, atol=0.01)


# --- nucleus -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(distributions(), st.floats(1 / 64, 1.0, width=32))
def test_nucleus_is_the_smallest_set_with_the_mass(p_RV, top_p):
  kept_RV = np.asarray(nucleus(p_RV, np.float32(top_p)))
  for p_V, kept_V in zip(p_RV, kept_RV, strict=True):
    inside_V = kept_V > 0
    np.testing.assert_array_equal(kept_V[inside_V], p_V[inside_V])
    assert inside_V[p_V.argmax()]
    assert kept_V.sum() >= top_p - 1e-5
    least = p_V[inside_V].min()
    assert not ((p_V > least) & ~inside_V).any(), "a more likely token was dropped"
    assert p_V[p_V > least].sum() < top_p + 1e-5, "a smaller set has the mass"


def test_nucleus_of_one_keeps_everything():
  p_RV = np.full((1, 8), 0.125, np.float32)
  np.testing.assert_array_equal(nucleus(p_RV, np.float32(1)), p_RV)


@settings(deadline=None)
@given(
  distributions(),
  st.integers(0, TOKENS + 3),
  st.floats(1 / 64, 1.0, width=32),
  st.floats(0, 0.875, width=32),
)
def test_every_row_is_truncated_by_its_own_limits(p_RV, top_k, top_p, min_p):
  """A row keeps what the three filters of transformers keep in turn, whatever the other rows do."""
  p_RV = np.where(p_RV < 1e-30, np.float32(0), p_RV)  # XLA flushes them to 0
  limits = np.array([top_k, 0, 1], np.int32), np.array([top_p, 1, 1]), np.array([min_p, 0, 0])
  kept_RV = np.asarray(truncated(p_RV, limits[0], *(x.astype(np.float32) for x in limits[1:])))
  np.testing.assert_array_equal(kept_RV[1], p_RV[1])
  assert (kept_RV[2] > 0).sum() == (p_RV[2] == p_RV[2].max()).sum()
  order = np.argsort(-p_RV[0], kind="stable")
  sorted_V = p_RV[0][order].astype(np.float64)
  if top_k:
    sorted_V[top_k:] = 0
  before_V = np.cumsum(sorted_V) - sorted_V

  def least(slack):
    """The smallest kept probability; float32 and float64 may differ by `slack` at a border."""
    mass = np.inf if top_p == 1.0 else top_p * sorted_V.sum() + slack
    inside_V = (before_V < mass) & (sorted_V >= min_p * sorted_V[0] * (1 - slack)) & (sorted_V > 0)
    return sorted_V[inside_V].min(initial=sorted_V[0])

  assert (kept_RV[0][p_RV[0] >= least(-1e-5)] > 0).all()
  assert (kept_RV[0][p_RV[0] < least(1e-5)] == 0).all()


# --- the recorded distribution -------------------------------------------------------------------


def test_scores_are_masked_then_divided_by_the_temperature():
  logits_RV = np.array([[1.0, 2.0, 3.0, 99.0]] * 2, np.float32)
  forbidden_V = np.array([False, False, False, True])
  logp_RV = np.asarray(
    jax.nn.log_softmax(scores(logits_RV, np.array([2.0, 1.0], np.float32), forbidden_V))
  )
  for logp_V, expected_V in zip(logp_RV, np.exp([[0.5, 1.0, 1.5], [1.0, 2.0, 3.0]]), strict=True):
    np.testing.assert_allclose(np.exp(logp_V[:3]), expected_V / expected_V.sum(), rtol=1e-5)
    assert logp_V[3] == -np.inf


def make_sampling(rows, temperature=1.0, top_p=1.0, limit=100, seed=0, greedy=False):
  def each(value, dtype):
    return np.full(rows, value, dtype)

  return SamplingArrays(
    key_R=jax.random.split(jax.random.key(seed), rows),
    temperature_R=each(temperature, np.float32),
    greedy_R=each(greedy, bool),
    top_k_R=each(0, np.int32),
    top_p_R=each(top_p, np.float32),
    min_p_R=each(0, np.float32),
    limit_R=each(limit, np.int32),
  )


# --- the decode loop -----------------------------------------------------------------------------

NEVER_STOP = np.arange(VOCABULARY) == STOP  # forbidden ids with which no row stops


class Jitted(NamedTuple):
  """The policy, its decode parameters and jitted functions of `device`."""

  policy: Policy
  params: Params
  prefill: Callable
  start_rows: Callable
  decode: Callable


@functools.cache
def jitted() -> Jitted:
  policy, params = fixtures.random_policy()
  decode = functools.partial(device.decode_steps_loop, policy)
  return Jitted(
    policy,
    fixtures.decode_params(policy, params),
    jax.jit(functools.partial(device.prefill, policy)),
    jax.jit(device.start_rows),
    jax.jit(decode, static_argnames=("steps", "truncate")),
  )


def started(active=(True, True), slots=(0, 1), state=None, suffix_block_sizes=(32,), rows=4):
  """A state of two prompts with two rollouts each; those of active slots have started."""
  conversation = fixtures.conversation()
  prompts = [
    conversation.prompt(fixtures.task("one")),
    conversation.prompt(fixtures.task("other", question="Far?")),
  ]
  length = 64
  batch = PromptBatch(
    slot_B=np.asarray(slots, np.int32),
    tokens=TokenArrays(
      token_RT=pad_rows([p.token_ids_T for p in prompts], length),
      position_RTA=pad_rows([p.position_TA for p in prompts], length),
      valid_RT=pad_rows([np.ones(len(p.token_ids_T), bool) for p in prompts], length),
      feature_RT=np.full((2, length), -1, np.int32),
    ),
    next_position_B=np.array([p.next_position for p in prompts], np.int32),
  )
  policy = jitted().policy
  feature_buffer_MYD = np.zeros((1, 1, policy.cfg.decoder.width), np.float32)
  state = state or device.empty_state(policy, 2, 2, rows, length, suffix_block_sizes)
  state = jitted().prefill(jitted().params, state, feature_buffer_MYD, batch)
  starts_BG = np.zeros((2, 2), bool)
  for slot, starts in zip(slots, active, strict=True):
    if slot < 2:
      starts_BG[slot] = starts
  assignment = np.zeros(rows, np.int32), np.zeros((2, 2), np.int32)  # not used by 4 rows
  starts_R = starts_BG.reshape(-1)[:rows]
  return jitted().start_rows(state, starts_R, *assignment, make_sampling(rows))


def decode(state, steps, truncate=False, forbidden_V=None, **sampling):
  """Decodes with sampling arrays from the keywords, or with `new=False` with those of the state."""
  if forbidden_V is None:
    forbidden_V = np.zeros(VOCABULARY, bool)
  masks = TokenMasks(forbidden_V, np.arange(VOCABULARY) == STOP)
  if sampling.pop("new", True):
    state = state._replace(sampling=make_sampling(state.active_R.shape[0], **sampling))
  return jitted().decode(jitted().params, state, masks, steps=steps, truncate=truncate)


def numpy_tree(tree):
  """The tree as NumPy arrays, PRNG keys as their data."""

  def one(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)

  return jax.tree.map(one, tree)


def test_rows_of_a_reused_slot_sample_the_same():
  """Neither earlier prompts in a slot nor the slot of a prompt change its tokens."""
  _, fresh_RT, fresh_logp_RT = decode(started(), 6, temperature=1.5)
  used, *_ = decode(started(), 9, temperature=2.0)
  again = started(slots=(1, 0), state=used)
  np.testing.assert_array_equal(again.count_R, 0)
  np.testing.assert_array_equal(again.cache.length_R, 0)
  sampling = make_sampling(4, temperature=1.5)
  sampling = sampling._replace(key_R=sampling.key_R[np.array([2, 3, 0, 1])])
  _, token_RT, logp_RT = decode(again._replace(sampling=sampling), 6, new=False)
  np.testing.assert_array_equal(np.asarray(token_RT)[[2, 3, 0, 1]], fresh_RT)
  np.testing.assert_allclose(np.asarray(logp_RT)[[2, 3, 0, 1]], fresh_logp_RT, atol=1e-5)


def test_tokens_do_not_depend_on_the_row():
  """Three rows for the four rollouts of two prompts, in several assignments."""
  full = started()
  _, whole_RT, whole_logp_RT = decode(full, 8, new=False)
  state = started(rows=3, active=(False, False))
  for rollout_R in ([2, 0, 3], [3, 1, 0], [1, 2, 0]):
    row_BG = np.zeros(4, np.int32)
    row_BG[rollout_R] = np.arange(3)
    sampling = jax.tree.map(lambda x, at=rollout_R: x[np.array(at)], full.sampling)
    assignment = np.array(rollout_R, np.int32), row_BG.reshape(2, 2)
    state = jitted().start_rows(state, np.ones(3, bool), *assignment, sampling)
    state, token_RT, logp_RT = decode(state, 8, new=False)
    np.testing.assert_array_equal(token_RT, np.asarray(whole_RT)[rollout_R])
    np.testing.assert_allclose(logp_RT, np.asarray(whole_logp_RT)[rollout_R], atol=1e-5)


def test_chunk_ends_with_its_last_active_row(monkeypatch):
  """Steps after the end of all rows are not computed."""
  steps, original = [], device.sample_token

  def counted(*arguments):
    jax.debug.callback(lambda: steps.append(1))
    return original(*arguments)

  monkeypatch.setattr(device, "sample_token", counted)
  policy, params, *_ = jitted()
  state = started()._replace(sampling=make_sampling(4, limit=3))
  masks = TokenMasks(NEVER_STOP, NEVER_STOP)
  whole = jax.jit(functools.partial(device.decode_steps_loop, policy, steps=12, truncate=False))
  _, token_RT, _ = whole(params, state, masks)
  jax.effects_barrier()
  assert (np.asarray(token_RT) >= 0).sum(axis=1).tolist() == [3] * 4
  assert len(steps) == 3


def test_cache_blocks_that_no_row_has_reached_are_not_read():
  """They are filled with NaN, which a mask would not hide: 0 times NaN is NaN."""
  _, expected_RT, expected_logp_RT = decode(
    started(suffix_block_sizes=(10, 22)), 6, forbidden_V=NEVER_STOP
  )
  state = started(suffix_block_sizes=(10, 22))
  layers = tuple(
    (suffix[0], KV(*(jnp.full_like(part, jnp.nan) for part in suffix[1])))
    for suffix in state.cache.layers
  )
  state = state._replace(cache=state.cache._replace(layers=layers))
  _, token_RT, logp_RT = decode(state, 6, forbidden_V=NEVER_STOP)
  np.testing.assert_array_equal(token_RT, expected_RT)
  np.testing.assert_array_equal(logp_RT, expected_logp_RT)


def test_rows_that_start_do_not_change_rows_that_continue():
  full = started()
  _, whole_RT, _ = decode(full, 8, forbidden_V=NEVER_STOP, new=False)
  state = started(rows=2, active=(False, False))

  def start_and_decode(state, starts_R, rollout_R):
    row_BG = np.zeros(4, np.int32)
    row_BG[rollout_R] = np.arange(2)
    sampling = jax.tree.map(lambda x: x[np.array(rollout_R)], full.sampling)
    rollout_R = np.array(rollout_R, np.int32)
    assignment = rollout_R, row_BG.reshape(2, 2)
    state = jitted().start_rows(state, np.array(starts_R), *assignment, sampling)
    return decode(state, 4, forbidden_V=NEVER_STOP, new=False)

  state, first_RT, _ = start_and_decode(state, [True, True], [1, 3])
  state, then_RT, _ = start_and_decode(state, [False, True], [1, 0])
  np.testing.assert_array_equal(np.concatenate([first_RT[0], then_RT[0]]), whole_RT[1])
  np.testing.assert_array_equal(first_RT[1], np.asarray(whole_RT)[3, :4])
  np.testing.assert_array_equal(then_RT[1], np.asarray(whole_RT)[0, :4])


def test_padding_prompts_change_nothing():
  before = started()
  after = started(slots=(2, 3), state=before)
  jax.tree.map(np.testing.assert_array_equal, numpy_tree(after), numpy_tree(before))


def test_rows_end_by_their_limit_or_a_stop_token():
  state = started()
  _, token_RT, logp_RT = decode(state, 12, limit=7, temperature=1.5)
  token_RT, logp_RT = np.asarray(token_RT), np.asarray(logp_RT)
  sampled_RT = token_RT >= 0
  for tokens, sampled in zip(token_RT, sampled_RT, strict=True):
    count = sampled.sum()
    assert sampled[:count].all(), "sampled tokens are consecutive"
    assert count == 7 or (count < 7 and tokens[count - 1] == STOP)
    assert STOP not in tokens[: count - 1]
  assert (logp_RT[~sampled_RT] == 0).all()
  assert len({tuple(tokens) for tokens in token_RT}) == 4


def test_draws_differ_between_rows_and_positions():
  """All tokens are about as likely, so equal draws would give equal tokens."""
  _, token_RT, _ = decode(started(), 12, temperature=1e6, forbidden_V=NEVER_STOP)
  assert all(len(set(tokens)) >= 9 for tokens in np.asarray(token_RT).tolist())
  assert len(set(np.asarray(token_RT).T[0].tolist())) >= 3


def test_chunk_advances_counts_lengths_and_positions():
  before = started()
  after, token_RT, _ = decode(before, 12, limit=7, temperature=1.5)
  count_R = (np.asarray(token_RT) >= 0).sum(1)
  np.testing.assert_array_equal(after.count_R, count_R)
  np.testing.assert_array_equal(after.cache.length_R, count_R)  # the stop token is cached too
  np.testing.assert_array_equal(after.position_R, np.asarray(before.position_R) + count_R)
  assert not np.asarray(after.active_R).any()


def test_inactive_rows_do_not_change():
  before = started(active=(True, False))
  after, token_RT, _ = decode(before, 5)
  assert (np.asarray(token_RT)[2:] == -1).all()
  np.testing.assert_array_equal(after.count_R[2:], 0)
  np.testing.assert_array_equal(after.cache.length_R[2:], 0)
  np.testing.assert_array_equal(after.hidden_RD[2:], before.hidden_RD[2:])
  np.testing.assert_array_equal(after.position_R[2:], before.position_R[2:])


def test_two_chunks_equal_one():
  _, whole_RT, whole_logp_RT = decode(started(), 6, temperature=1.5)
  state, first_RT, _ = decode(started(), 2, temperature=1.5)
  _, rest_RT, rest_logp_RT = decode(state, 4, temperature=1.5)
  np.testing.assert_array_equal(np.concatenate([first_RT, rest_RT], axis=1), whole_RT)
  np.testing.assert_allclose(rest_logp_RT, whole_logp_RT[:, 2:], atol=1e-6)


def joined(state):
  """The state with the suffix cache in one block."""
  layers = tuple(
    KV(*(jnp.concatenate(parts, axis=2) for parts in zip(*suffix, strict=True)))
    for suffix in state.cache.layers
  )
  return state._replace(cache=state.cache._replace(layers=layers))


@pytest.mark.parametrize("sizes", [(1, 31), (31, 1), (7, 9, 11, 5)])
def test_block_sizes_change_no_token(sizes):
  """No row stops, so the last chunk fills the cache."""
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  plain, blocks = started(), started(suffix_block_sizes=sizes)
  for steps in (16, 16):
    plain, whole_RT, whole_logp_RT = decode(plain, steps, forbidden_V=NEVER_STOP)
    blocks, token_RT, logp_RT = decode(blocks, steps, forbidden_V=NEVER_STOP)
    np.testing.assert_array_equal(token_RT, whole_RT)
    close(logp_RT, whole_logp_RT)
  jax.tree.map(close, numpy_tree(joined(blocks)), numpy_tree(joined(plain)))


@pytest.mark.parametrize(
  "sizes", [(32,), pytest.param((4, 3, 25), marks=pytest.mark.slow(always=True))]
)
def test_gathered_rows_sample_as_among_all_rows(sizes):
  """The other rows do not change."""
  state, *_ = decode(started(suffix_block_sizes=sizes), 4, forbidden_V=NEVER_STOP)
  row_R = np.array([3, 1, 4])  # the last is padding
  gathered = device.gather_rows(state, row_R, 5)
  assert np.asarray(gathered.active_R).tolist() == [True, True, False]
  whole, whole_RT, whole_logp_RT = decode(state, 5, forbidden_V=NEVER_STOP, new=False)
  gathered, token_RT, logp_RT = decode(gathered, 5, forbidden_V=NEVER_STOP, new=False)
  np.testing.assert_array_equal(token_RT[:2], np.asarray(whole_RT)[[3, 1]])
  np.testing.assert_allclose(logp_RT[:2], np.asarray(whole_logp_RT)[[3, 1]], atol=1e-5)
  assert (np.asarray(token_RT[2]) == -1).all()
  back = device.scatter_rows(state, gathered, row_R, 5)

  def assert_scattered(found, decoded, before):
    np.testing.assert_allclose(found[[1, 3]], decoded[[1, 3]], atol=1e-5)
    np.testing.assert_array_equal(found[[0, 2]], before[[0, 2]])

  def row_fields(state):
    return numpy_tree((state.cache.layers, state.cache.length_R, *state[2:]))

  jax.tree.map(assert_scattered, row_fields(back), row_fields(whole), row_fields(state))
  jax.tree.map(np.testing.assert_array_equal, back.cache.prefix, state.cache.prefix)


@pytest.mark.parametrize("greedy", [True, False])
def test_first_token_is_allowed_and_recorded_without_forbidden_ones(greedy):
  policy, params, *_ = jitted()
  state = started()
  logits_RV = np.array(policy.logits(params, state.hidden_RD))
  forbidden_V = np.zeros(VOCABULARY, bool)
  forbidden_V[logits_RV.argmax(1)] = True
  _, token_RT, logp_RT = decode(state, 1, greedy=greedy, temperature=0.5, forbidden_V=forbidden_V)
  logits_RV[:, forbidden_V] = -np.inf
  token_R = np.asarray(token_RT)[:, 0]
  assert not forbidden_V[token_R].any()
  if greedy:
    np.testing.assert_array_equal(token_R, logits_RV.argmax(1))
  expected_RV = jax.nn.log_softmax(logits_RV / np.float32(0.5), axis=1)
  np.testing.assert_allclose(
    np.asarray(logp_RT)[:, 0], np.asarray(expected_RV)[np.arange(4), token_R], atol=1e-5
  )


def test_truncation_limits_the_draw_and_not_the_recorded_log_probability():
  policy, params, *_ = jitted()
  logp_RV = jax.nn.log_softmax(policy.logits(params, started().hidden_RD) / np.float32(3), axis=1)
  inside_RV = np.asarray(nucleus(jnp.exp(logp_RV), np.float32(0.5))) > 0
  for seed in range(10):
    _, token_RT, logp_RT = decode(
      started(), 1, truncate=True, temperature=3.0, top_p=0.5, seed=seed
    )
    token_R = np.asarray(token_RT)[:, 0]
    assert inside_RV[np.arange(4), token_R].all()
    np.testing.assert_allclose(
      np.asarray(logp_RT)[:, 0], np.asarray(logp_RV)[np.arange(4), token_R], atol=1e-5
    )
