"""Drawing tokens: distributions, nucleus, inverse CDF, and the decode loop around them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.policy.cache import KV
from spatial_jax.rollout import device
from spatial_jax.rollout.device import PromptBatch
from spatial_jax.rollout.sampling import SamplingArrays, Vocabulary, draw_token, scores, truncated
from tests import rollout_fixtures as fixtures
from tests.policy_fixtures import pad_rows
from tests.rollout_fixtures import STOP, VOCABULARY

TOKENS = 24
draw = jax.jit(draw_token)


@jax.jit
def kept(p_RV, top_p):
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
def test_never_draws_what_has_no_probability(p_RV, uniform):
  for u in (uniform, 0.0, BELOW_ONE):
    token_R = np.asarray(draw(p_RV, np.full(3, u, np.float32)))
    assert (p_RV[np.arange(3), token_R] > 0).all()


@settings(deadline=None)
@given(distributions(), st.floats(0, BELOW_ONE, width=32))
def test_inverts_the_cdf(p_RV, uniform):
  token_R = np.asarray(draw(p_RV, np.full(3, uniform, np.float32)))
  upper_RV = np.cumsum(p_RV.astype(np.float64), axis=1)
  total_R = upper_RV[:, -1]
  upper_R = upper_RV[np.arange(3), token_R]
  lower_R = upper_R - p_RV[np.arange(3), token_R]
  assert (lower_R <= uniform * total_R + 1e-5).all()
  assert (upper_R >= uniform * total_R - 1e-5).all()


def test_a_sum_that_is_not_monotone_gives_nothing_away():
  """Over a large vocabulary the parallel sum wobbles; that must never choose a token."""
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
  token_R = np.asarray(draw(np.tile(p_V, (20_000, 1)), uniform_R))
  np.testing.assert_allclose(np.bincount(token_R, minlength=5) / 20_000, p_V, atol=0.01)


# --- nucleus -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(distributions(), st.floats(1 / 64, 1.0, width=32))
def test_nucleus_is_the_fewest_that_reach_the_mass(p_RV, top_p):
  kept_RV = np.asarray(kept(p_RV, np.float32(top_p)))
  for p_V, kept_V in zip(p_RV, kept_RV, strict=True):
    inside_V = kept_V > 0
    np.testing.assert_array_equal(kept_V[inside_V], p_V[inside_V])
    assert inside_V[p_V.argmax()]
    assert kept_V.sum() >= top_p - 1e-5
    least = p_V[inside_V].min()
    assert not ((p_V > least) & ~inside_V).any(), "a likelier token was dropped"
    assert p_V[p_V > least].sum() < top_p + 1e-5, "fewer would have done"


def test_nucleus_of_one_keeps_everything():
  p_RV = np.full((1, 8), 0.125, np.float32)
  np.testing.assert_array_equal(kept(p_RV, np.float32(1)), p_RV)


@settings(deadline=None)
@given(
  distributions(),
  st.integers(0, TOKENS + 3),
  st.floats(1 / 64, 1.0, width=32),
  st.floats(0, 0.875, width=32),
)
def test_every_row_is_truncated_by_its_own_limits(p_RV, top_k, top_p, min_p):
  """Beside rows with other limits, a row keeps what transformers' three filters leave in turn."""
  p_RV = np.where(p_RV < 1e-30, np.float32(0), p_RV)  # what XLA takes for 0
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
    """The smallest probability kept; at a border float32 may decide otherwise than float64."""
    mass = np.inf if top_p == 1.0 else top_p * sorted_V.sum() + slack
    inside_V = (before_V < mass) & (sorted_V >= min_p * sorted_V[0] * (1 - slack)) & (sorted_V > 0)
    return sorted_V[inside_V].min(initial=sorted_V[0])

  assert (kept_RV[0][p_RV[0] >= least(-1e-5)] > 0).all()
  assert (kept_RV[0][p_RV[0] < least(1e-5)] == 0).all()


# --- the recorded distribution -------------------------------------------------------------------


def test_logprobs_mask_then_temperature():
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
    key_R2=np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), rows))),
    temperature_R=each(temperature, np.float32),
    greedy_R=each(greedy, bool),
    top_k_R=each(0, np.int32),
    top_p_R=each(top_p, np.float32),
    min_p_R=each(0, np.float32),
    limit_R=each(limit, np.int32),
  )


# --- the loop ------------------------------------------------------------------------------------


@functools.cache
def lab():
  """Policy, its decode parameters, a jitted admission and a jitted chunk."""
  policy, params = fixtures.random_policy()
  admit = jax.jit(functools.partial(device.prefill, policy))
  begins = jax.jit(device.start_rows)
  chunk = jax.jit(
    functools.partial(device.decode_steps_loop, policy),
    static_argnames=("steps", "truncate"),
  )
  return policy, fixtures.decode_params(policy, params), (admit, begins), chunk


def begin(active=(True, True), slots=(0, 1), state=None, suffix_block_sizes=(32,), rows=4):
  """Two prompts in slots of two rows."""
  policy, params, (admit, begins), _ = lab()
  conversation = fixtures.conversation()
  prompts = [
    conversation.prompt(fixtures.task("one")),
    conversation.prompt(fixtures.task("other", question="Far?")),
  ]
  length = 64
  batch = PromptBatch(
    slot_B=np.asarray(slots, np.int32),
    token_BT=pad_rows([p.token_ids_T for p in prompts], length),
    position_BTA=pad_rows([p.position_TA for p in prompts], length),
    valid_BT=pad_rows([np.ones(len(p.token_ids_T), bool) for p in prompts], length),
    feature_BT=np.full((2, length), -1, np.int32),
    next_position_B=np.array([p.next_position for p in prompts], np.int32),
  )
  feature_buffer_MYD = np.zeros((1, 1, policy.cfg.decoder.width), np.float32)
  state = state or device.empty(policy, 2, 2, rows, length, suffix_block_sizes)
  state = admit(params, state, feature_buffer_MYD, batch)
  begins_BG = np.zeros((2, 2), bool)
  for slot, here in zip(slots, active, strict=True):
    if slot < 2:
      begins_BG[slot] = here
  nobody_R, nobody_BG = np.zeros(rows, np.int32), np.zeros((2, 2), np.int32)
  return begins(state, begins_BG.reshape(-1)[:rows], nobody_R, nobody_BG, make_sampling(rows))


def chunk(state, steps, truncate=False, forbidden_V=None, **sampling):
  if forbidden_V is None:
    forbidden_V = np.zeros(VOCABULARY, bool)
  words = Vocabulary(forbidden_V, np.arange(VOCABULARY) == STOP)
  if sampling.pop("new", True):
    state = state._replace(sampling=make_sampling(state.active_R.shape[0], **sampling))
  static = {"steps": steps, "truncate": truncate}
  return lab()[3](lab()[1], state, words, **static)


def test_a_slot_that_was_used_is_as_good_as_new():
  """Whoever was in it before, and wherever a prompt stands, its rows say the same."""
  _, fresh_RT, fresh_logp_RT = chunk(begin(), 6, temperature=1.5)
  used, *_ = chunk(begin(), 9, temperature=2.0)
  again = begin(slots=(1, 0), state=used)
  np.testing.assert_array_equal(again.count_R, 0)
  np.testing.assert_array_equal(again.cache.length_R, 0)
  sampling = make_sampling(4, temperature=1.5)
  sampling = sampling._replace(key_R2=sampling.key_R2[np.array([2, 3, 0, 1])])
  _, token_RT, logp_RT = chunk(again._replace(sampling=sampling), 6, new=False)
  np.testing.assert_array_equal(np.asarray(token_RT)[[2, 3, 0, 1]], fresh_RT)
  np.testing.assert_allclose(np.asarray(logp_RT)[[2, 3, 0, 1]], fresh_logp_RT, atol=1e-5)


def test_rollouts_say_the_same_in_whichever_row():
  """Three rows for the four rollouts of two prompts: who has which does not show."""
  begins, full = lab()[2][1], begin()
  _, whole_RT, whole_logp_RT = chunk(full, 8, new=False)
  few = begin(rows=3, active=(False, False))
  for rollout_R in ([2, 0, 3], [3, 1, 0], [1, 2, 0]):
    row_BG = np.zeros(4, np.int32)
    row_BG[rollout_R] = np.arange(3)
    sampling = jax.tree.map(lambda x, at=rollout_R: np.asarray(x)[at], full.sampling)
    taken = (np.ones(3, bool), np.array(rollout_R, np.int32), row_BG.reshape(2, 2), sampling)
    few, token_RT, logp_RT = chunk(begins(few, *taken), 8, new=False)
    np.testing.assert_array_equal(token_RT, np.asarray(whole_RT)[rollout_R])
    np.testing.assert_allclose(logp_RT, np.asarray(whole_logp_RT)[rollout_R], atol=1e-5)


def test_a_chunk_ends_with_its_last_row(monkeypatch):
  """Steps that nobody needs are not computed."""
  steps, original = [], device.sample_token

  def counted(*arguments):
    jax.debug.callback(lambda: steps.append(1))
    return original(*arguments)

  monkeypatch.setattr(device, "sample_token", counted)
  policy, params, *_ = lab()
  state = begin()._replace(sampling=make_sampling(4, limit=3))
  words = Vocabulary(np.arange(VOCABULARY) == STOP, np.arange(VOCABULARY) == STOP)
  whole = jax.jit(functools.partial(device.decode_steps_loop, policy, steps=12, truncate=False))
  _, token_RT, _ = whole(params, state, words)
  jax.effects_barrier()
  assert (np.asarray(token_RT) >= 0).sum(axis=1).tolist() == [3] * 4
  assert len(steps) == 3


def test_what_no_row_has_reached_is_not_read():
  """A mask would not do: nothing times NaN is NaN."""
  forbidden_V = np.arange(VOCABULARY) == STOP
  _, expected_RT, expected_logp_RT = chunk(
    begin(suffix_block_sizes=(10, 22)), 6, forbidden_V=forbidden_V
  )
  state = begin(suffix_block_sizes=(10, 22))
  layers = tuple(
    (own[0], KV(*(jnp.full_like(part, jnp.nan) for part in own[1]))) for own in state.cache.layers
  )
  state = state._replace(cache=state.cache._replace(layers=layers))
  _, token_RT, logp_RT = chunk(state, 6, forbidden_V=forbidden_V)
  np.testing.assert_array_equal(token_RT, expected_RT)
  np.testing.assert_array_equal(logp_RT, expected_logp_RT)


def test_a_row_that_goes_on_does_not_see_who_begins_beside_it():
  begins, full = lab()[2][1], begin()
  _, whole_RT, _ = chunk(full, 8, forbidden_V=np.arange(VOCABULARY) == STOP, new=False)
  state, nobody = begin(rows=2, active=(False, False)), np.zeros((2, 2), np.int32)

  def take(state, begins_R, rollout_R):
    row_BG = nobody.reshape(-1).copy()
    row_BG[rollout_R] = np.arange(2)
    sampling = jax.tree.map(lambda x: np.asarray(x)[rollout_R], full.sampling)
    rollout_R = np.array(rollout_R, np.int32)
    state = begins(state, np.array(begins_R), rollout_R, row_BG.reshape(2, 2), sampling)
    return chunk(state, 4, forbidden_V=np.arange(VOCABULARY) == STOP, new=False)

  state, first_RT, _ = take(state, [True, True], [1, 3])
  state, then_RT, _ = take(state, [False, True], [1, 0])
  np.testing.assert_array_equal(np.concatenate([first_RT[0], then_RT[0]]), whole_RT[1])
  np.testing.assert_array_equal(first_RT[1], np.asarray(whole_RT)[3, :4])
  np.testing.assert_array_equal(then_RT[1], np.asarray(whole_RT)[0, :4])


def test_a_prompt_without_a_slot_changes_nothing():
  before = begin()
  after = begin(slots=(2, 3), state=before)
  jax.tree.map(np.testing.assert_array_equal, after, before)


def test_limit_and_stop():
  state = begin()
  _, token_RT, logp_RT = chunk(state, 12, limit=7, temperature=1.5)
  token_RT, logp_RT = np.asarray(token_RT), np.asarray(logp_RT)
  sampled_RT = token_RT >= 0
  for tokens, sampled in zip(token_RT, sampled_RT, strict=True):
    count = sampled.sum()
    assert sampled[:count].all(), "no gap"
    assert count == 7 or (count < 7 and tokens[count - 1] == STOP)
    assert STOP not in tokens[: count - 1]
  assert (logp_RT[~sampled_RT] == 0).all()
  assert len({tuple(tokens) for tokens in token_RT}) == 4


def test_every_token_has_a_draw_of_its_own():
  """Where all tokens are as likely, neither rows nor places of a row repeat one another."""
  forbidden_V = np.arange(VOCABULARY) == STOP
  _, token_RT, _ = chunk(begin(), 12, temperature=1e6, forbidden_V=forbidden_V)
  assert all(len(set(tokens)) >= 9 for tokens in np.asarray(token_RT).tolist())
  assert len(set(np.asarray(token_RT).T[0].tolist())) >= 3


def test_state_after_a_chunk():
  before = begin()
  after, token_RT, _ = chunk(before, 12, limit=7, temperature=1.5)
  count_R = (np.asarray(token_RT) >= 0).sum(1)
  np.testing.assert_array_equal(after.count_R, count_R)
  np.testing.assert_array_equal(after.cache.length_R, count_R)  # the stop token is cached too
  np.testing.assert_array_equal(after.position_R, np.asarray(before.position_R) + count_R)
  assert not np.asarray(after.active_R).any()


def test_rows_that_are_not_active_stay_as_they_are():
  before = begin(active=(True, False))
  after, token_RT, _ = chunk(before, 5)
  assert (np.asarray(token_RT)[2:] == -1).all()
  np.testing.assert_array_equal(after.count_R[2:], 0)
  np.testing.assert_array_equal(after.cache.length_R[2:], 0)
  np.testing.assert_array_equal(after.hidden_RD[2:], before.hidden_RD[2:])
  np.testing.assert_array_equal(after.position_R[2:], before.position_R[2:])


def test_chunks_do_not_show():
  _, whole_RT, whole_logp_RT = chunk(begin(), 6, temperature=1.5)
  state, first_RT, _ = chunk(begin(), 2, temperature=1.5)
  _, rest_RT, rest_logp_RT = chunk(state, 4, temperature=1.5)
  np.testing.assert_array_equal(np.concatenate([first_RT, rest_RT], axis=1), whole_RT)
  np.testing.assert_allclose(rest_logp_RT, whole_logp_RT[:, 2:], atol=1e-6)


def joined(state):
  """The state with each row's own cache in one block."""
  layers = tuple(
    KV(*(jnp.concatenate(parts, axis=2) for parts in zip(*own, strict=True)))
    for own in state.cache.layers
  )
  return state._replace(cache=state.cache._replace(layers=layers))


@pytest.mark.parametrize("sizes", [(10, 10, 12), (10, 22), (1, 31), (31, 1), (7, 9, 11, 5)])
def test_where_the_cache_is_cut_does_not_show(sizes):
  forbidden_V = np.arange(VOCABULARY) == STOP  # nobody stops: the last chunk fills the cache
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  plain, cut = begin(), begin(suffix_block_sizes=sizes)
  for steps in (10, 10, 12):
    plain, whole_RT, whole_logp_RT = chunk(plain, steps, forbidden_V=forbidden_V)
    cut, token_RT, logp_RT = chunk(cut, steps, forbidden_V=forbidden_V)
    np.testing.assert_array_equal(token_RT, whole_RT)
    close(logp_RT, whole_logp_RT)
  jax.tree.map(close, joined(cut), joined(plain))


@pytest.mark.parametrize("sizes", [(32,), (4, 3, 25), (6, 26), (9, 23)])
def test_a_few_rows_by_themselves(sizes):
  """They say what they would have said among all, and the others stay as they are."""
  forbidden_V = np.arange(VOCABULARY) == STOP
  state, *_ = chunk(begin(suffix_block_sizes=sizes), 4, forbidden_V=forbidden_V)
  row_R = np.array([3, 1, 4])  # the last is padding
  few = device.gather_rows(state, row_R, 5)
  assert np.asarray(few.active_R).tolist() == [True, True, False]
  whole, whole_RT, whole_logp_RT = chunk(state, 5, forbidden_V=forbidden_V, new=False)
  few, token_RT, logp_RT = chunk(few, 5, forbidden_V=forbidden_V, new=False)
  np.testing.assert_array_equal(token_RT[:2], np.asarray(whole_RT)[[3, 1]])
  np.testing.assert_allclose(logp_RT[:2], np.asarray(whole_logp_RT)[[3, 1]], atol=1e-5)
  assert (np.asarray(token_RT[2]) == -1).all()
  back = device.scatter_rows(state, few, row_R, 5)

  def assert_mixed(mixed, moved, still):
    mixed, moved, still = (np.asarray(x) for x in (mixed, moved, still))
    np.testing.assert_allclose(mixed[[1, 3]], moved[[1, 3]], atol=1e-5)
    np.testing.assert_array_equal(mixed[[0, 2]], still[[0, 2]])

  def of_rows(state):
    return (state.cache.layers, state.cache.length_R, *state[2:])

  jax.tree.map(assert_mixed, of_rows(back), of_rows(whole), of_rows(state))
  jax.tree.map(np.testing.assert_array_equal, back.cache.prefix, state.cache.prefix)


@pytest.mark.parametrize("greedy", [True, False])
def test_first_token(greedy):
  """Greedy takes the most likely allowed token; the record leaves forbidden ones out."""
  policy, params, _, _ = lab()
  state = begin()
  logits_RV = np.array(policy.logits(params, state.hidden_RD))
  forbidden_V = np.zeros(VOCABULARY, bool)
  forbidden_V[logits_RV.argmax(1)] = True
  _, token_RT, logp_RT = chunk(state, 1, greedy=greedy, temperature=0.5, forbidden_V=forbidden_V)
  logits_RV[:, forbidden_V] = -np.inf
  token_R = np.asarray(token_RT)[:, 0]
  assert not forbidden_V[token_R].any()
  if greedy:
    np.testing.assert_array_equal(token_R, logits_RV.argmax(1))
  expected_RV = jax.nn.log_softmax(logits_RV / np.float32(0.5), axis=1)
  np.testing.assert_allclose(
    np.asarray(logp_RT)[:, 0], np.asarray(expected_RV)[np.arange(4), token_R], atol=1e-5
  )


def test_truncation_limits_what_is_said_and_not_what_is_recorded():
  policy, params, _, _ = lab()
  logp_RV = jax.nn.log_softmax(policy.logits(params, begin().hidden_RD) / np.float32(3), axis=1)
  inside_RV = np.asarray(kept(jnp.exp(logp_RV), np.float32(0.5))) > 0
  for seed in range(10):
    _, token_RT, logp_RT = chunk(begin(), 1, truncate=True, temperature=3.0, top_p=0.5, seed=seed)
    token_R = np.asarray(token_RT)[:, 0]
    assert inside_RV[np.arange(4), token_R].all()
    np.testing.assert_allclose(
      np.asarray(logp_RT)[:, 0], np.asarray(logp_RV)[np.arange(4), token_R], atol=1e-5
    )
