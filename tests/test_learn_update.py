"""The update: microbatches equal one big batch; padding, faults and NaN change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spatial_jax.config import ConfigError
from spatial_jax.data.vision_packing import plan_vision
from spatial_jax.learn.gradient import NO_OTHERS, Objective, batch_logprobs, gradient
from spatial_jax.learn.losses import effective_share, nll, policy_loss, token_weights
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.learn.train_batch import Microbatches, to_train_batch
from spatial_jax.learn.update import apply_gradient, policy_update
from spatial_jax.rollout.demonstration import demonstration_trajectory
from spatial_jax.synthetic.oracle import DemonstrationConfig, demonstrate
from spatial_jax.types import OtherLogprobs, TokenArrays, TrainBatch, TrainState, Trajectory
from tests import rollout_fixtures as fixtures
from tests.learn_fixtures import loss_config, sft_update
from tests.test_learn_optimizer import CFG

LOSS = loss_config()
SIZES = ((24, 24), (16, 40))
MICRO = Microbatches(1, (256,))
TOWER = ("^vision/",)
SGD = optax.sgd(1.0)  # the update is then the negative gradient


@functools.cache
def policy_and_params():
  return fixtures.random_policy()


@functools.cache
def demonstrations() -> list[list[Trajectory]]:
  """Two groups of two, one with a drawing: the same prompt; two questions about two images."""
  conversation = fixtures.conversation()
  chair = (("a", ((24, 24),), "How far is the chair?"),) * 2
  questions = (*chair, ("bb", SIZES, "How far is the chair?"), ("cc", SIZES, "And where is it?"))
  trajectories = []
  for number, (name, sizes, question) in enumerate(questions):
    task = fixtures.task(name, sizes, question)
    cfg = DemonstrationConfig(number % 2, 2)
    script = demonstrate(task, np.random.default_rng(0), cfg)
    prompt = conversation.prompt(task)
    trajectory = demonstration_trajectory(conversation, prompt, script, fixtures.STYLE)
    trajectories.append(dataclasses.replace(trajectory, temperature=1.0 + 0.3 * number))
  return [trajectories[:2], trajectories[2:]]


ADVANTAGE_BG = np.array([[1.0, -1.0], [0.5, 2.0]])


@functools.cache
def batch_of(length: int = 256) -> TrainBatch:
  """`demonstrations`, as if sampled a little off-policy."""
  shapes = dataclasses.replace(fixtures.shapes(), tokens=length)
  batch, _ = to_train_batch(demonstrations(), ADVANTAGE_BG, shapes)
  logp_RT = np.asarray(score()(policy_and_params()[1], batch))
  noise_RT = 0.2 * np.random.default_rng(1).normal(size=(4, 256))[:, :length]
  old_logp_RT = np.where(batch.rows.trained_RT, logp_RT + noise_RT, 0).astype(np.float32)
  return with_rows(batch, old_logp_RT=old_logp_RT)


def with_rows(batch: TrainBatch, **fields: np.ndarray) -> TrainBatch:
  return batch._replace(rows=batch.rows._replace(**fields))


@functools.cache
def score():
  return jax.jit(functools.partial(batch_logprobs, policy_and_params()[0], Microbatches(4, (256,))))


def start(optimizer=SGD, params=None) -> TrainState:
  params = policy_and_params()[1] if params is None else params
  return TrainState(params, optimizer.init(params), jnp.int32(0))


@functools.cache
def program(micro=MICRO, optimizer=SGD, frozen=()):
  policy = dataclasses.replace(policy_and_params()[0], frozen=frozen)
  return jax.jit(functools.partial(policy_update, policy, optimizer, LOSS, micro))


def flops(update, batch) -> float:
  return update.lower(start(), batch, NO_OTHERS).compile().cost_analysis()["flops"]


def gradient_of(state: TrainState):
  return jax.tree.map(lambda new, old: old - new, state.params, policy_and_params()[1])


def assert_close(one, other, tolerance=1e-4):
  """Every leaf, relative to the largest entry of it.

  float32 has seven digits; a gradient is a sum over a thousand tokens, in an order of XLA.
  """
  leaves = jax.tree_util.tree_leaves_with_path(one)
  for (path, x), y in zip(leaves, jax.tree.leaves(other), strict=True):
    worst = float(jnp.abs(x - y).max() / (jnp.abs(y).max() + 1e-4))
    assert worst < tolerance, f"{jax.tree_util.keystr(path)}: {worst}"


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


# --- gradients -----------------------------------------------------------------------------------


def test_the_gradient_is_the_gradient_of_the_whole_loss():
  """`jax.grad` of all rows at once, vision tower included."""
  policy, params = policy_and_params()
  batch = batch_of()

  def whole(params):
    logp_RT = batch_logprobs(policy, Microbatches(4, (256,)), params, batch)
    rows = batch.rows
    weight_R = token_weights(rows.trained_RT, LOSS.normalise)
    scored = (logp_RT, rows.old_logp_RT, rows.advantage_R, rows.trained_RT, weight_R, LOSS)
    return policy_loss(*scored, mean_weight_R=token_weights(rows.trained_RT, "token"))

  (loss, expected), grads = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
  state, metrics = program()(start(), batch, NO_OTHERS)
  assert_close(gradient_of(state), grads)
  for name, value in (effective_share(expected) | {"loss": loss}).items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
  np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
  tower = jax.tree.leaves(grads["vision"])
  assert all(float(jnp.abs(x).max()) > 1e-6 for x in tower), "the vision tower has a gradient"


def test_microbatches_of_any_size_give_the_same_step():
  """The microbatch of the short rows is truncated, that of the long rows is not.

  The test before compares rows one by one with all rows at once.
  """
  batch = batch_of()
  length_R = np.sort(batch.rows.tokens.valid_RT.sum(1))
  lengths = (int(length_R[1]), 256)
  assert lengths[0] < length_R[2]
  one, metrics = program(Microbatches(2, lengths))(start(), batch, NO_OTHERS)
  whole, expected = program()(start(), batch, NO_OTHERS)
  assert_close(gradient_of(one), gradient_of(whole))
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_rows_longer_than_every_microbatch_are_refused():
  with pytest.raises(ValueError, match=r"lengths is \(64, 128\); the last must be at least 256"):
    program(Microbatches(1, (64, 128)))(start(), batch_of(), NO_OTHERS)


def test_a_shared_prefix_changes_nothing():
  """Compared with every trajectory as one whole row, and with groups of one."""
  params = policy_and_params()[1]
  batch = batch_of()
  shared_B = batch.prefix.valid_RT.sum(1)
  groups = demonstrations()
  first, third = groups[0][0], groups[1][0]
  assert shared_B[0] == first.prompt_length - 1, "the whole prompt"
  images = third.image_start[1] + third.images[1].tokens
  assert images <= shared_B[1] < third.prompt_length - 1, "the images, not the question"
  alone, feature_of = to_train_batch(
    [[row] for group in groups for row in group], ADVANTAGE_BG.reshape(4, 1), fixtures.shapes()
  )
  expected_RT = _whole_logprobs(alone, feature_of, batch)
  logp_RT = np.asarray(score()(params, batch))
  for r, trajectory in enumerate(t for group in groups for t in group):
    np.testing.assert_allclose(
      logp_RT[r][batch.rows.trained_RT[r]],
      expected_RT[r, : len(trajectory.token_ids_T) - 1][trajectory.trained_T[1:]],
      rtol=2e-6,
      atol=2e-5,
    )
  single, _ = program()(start(), with_rows(alone, old_logp_RT=_moved(batch, alone)), NO_OTHERS)
  grouped, _ = program()(start(), batch, NO_OTHERS)
  assert_close(gradient_of(single), gradient_of(grouped))


def _whole_logprobs(alone: TrainBatch, feature_of, batch: TrainBatch) -> np.ndarray:
  """float32 [4, T - 1]: log-probabilities of each trajectory as one row without a prefix."""
  policy, params = policy_and_params()
  rows = [t for group in demonstrations() for t in group]
  shape = (len(rows), max(len(t.token_ids_T) for t in rows))
  tokens = TokenArrays(
    np.zeros(shape, np.int32),
    np.zeros((*shape, 3), np.int32),
    np.zeros(shape, bool),
    np.full(shape, -1, np.int32),
  )
  for r, t in enumerate(rows):
    place = r, slice(len(t.token_ids_T))
    tokens.token_RT[place], tokens.position_RTA[place] = t.token_ids_T, t.position_TA
    tokens.valid_RT[place] = True
    for image, begin in zip(t.images, t.image_start, strict=True):
      tokens.feature_RT[r, begin : begin + image.tokens] = feature_of[image.content_hash]

  def whole(params, tokens: TokenArrays):
    hidden_RTD = policy.hidden(params, tokens, policy.encode(params, alone.vision))
    target_RT, temperature_R = tokens.token_RT[:, 1:], batch.rows.temperature_R
    inputs = (hidden_RTD[:, :-1], target_RT, temperature_R, batch.forbidden_V)
    return policy.logprobs(params, *inputs).logp_RT

  return np.asarray(jax.jit(whole)(params, tokens))


def _moved(batch: TrainBatch, other: TrainBatch) -> np.ndarray:
  """old_logp_RT of `batch` at the same trained tokens of `other`, row by row."""
  old_logp_RT = np.zeros(other.rows.trained_RT.shape, np.float32)
  old_logp_RT[other.rows.trained_RT] = batch.rows.old_logp_RT[batch.rows.trained_RT]
  return old_logp_RT


def test_the_order_of_groups_and_rows_does_not_matter():
  order = np.array([3, 0, 2, 1])
  batch = batch_of()
  turned = batch._replace(
    prefix=jax.tree.map(lambda x: x[::-1], batch.prefix),
    rows=jax.tree.map(lambda x: x[order], batch.rows),
  )
  turned = with_rows(turned, prefix_R=1 - turned.rows.prefix_R)
  one, _ = program()(start(), batch, NO_OTHERS)
  other, _ = program()(start(), turned, NO_OTHERS)
  assert_close(gradient_of(other), gradient_of(one))


def test_rollouts_left_out_are_as_if_they_trained_nothing():
  """Groups then differ in size, down to no rows at all."""
  batch = batch_of()
  for kept_BG in (np.array([[True, False], [False, True]]), np.array([[False] * 2, [True] * 2])):
    kept, _ = to_train_batch(demonstrations(), ADVANTAGE_BG, fixtures.shapes(), kept_BG)
    same = batch._replace(rows=jax.tree.map(lambda x, k=kept_BG: x[k.reshape(-1)], batch.rows))
    kept = with_rows(kept, old_logp_RT=_moved(same, kept))
    untrained = with_rows(batch, trained_RT=batch.rows.trained_RT & kept_BG.reshape(-1, 1))
    one, _ = program()(start(), kept, NO_OTHERS)
    other, _ = program()(start(), untrained, NO_OTHERS)
    assert_close(gradient_of(one), gradient_of(other))


def test_a_row_of_weight_zero_is_as_if_it_trained_nothing():
  """And a row of weight 2 counts twice as much as the others."""
  batch = batch_of()
  first = np.arange(4) == 0
  untrained = with_rows(batch, trained_RT=batch.rows.trained_RT & ~first[:, None])
  none, double = (with_rows(batch, weight_R=1 + x * first.astype(np.float32)) for x in (-1, 1))
  one, _ = program()(start(), none, NO_OTHERS)
  other, _ = program()(start(), untrained, NO_OTHERS)
  assert_close(gradient_of(one), gradient_of(other))
  twice, whole = (gradient_of(program()(start(), x, NO_OTHERS)[0]) for x in (double, batch))
  # Weights sum to 1: of five parts, the first row has two.
  expected = jax.tree.map(lambda all_, rest: (8 * all_ - 3 * rest) / 5, whole, gradient_of(other))
  assert_close(twice, expected, 2e-4)


@pytest.mark.slow
def test_padding_changes_nothing():
  longest = int(batch_of().rows.tokens.valid_RT.sum(1).max())
  assert longest < 224
  one, _ = program(Microbatches(1, (224,)))(start(), batch_of(224), NO_OTHERS)
  other, _ = program()(start(), batch_of(256), NO_OTHERS)
  assert_close(gradient_of(one), gradient_of(other))


def test_a_fault_changes_nothing_for_the_other_rows():
  """Whatever its tokens and its advantage are."""
  batch = batch_of()
  fault = np.arange(4) == 1
  untrained = with_rows(batch, trained_RT=batch.rows.trained_RT & ~fault[:, None])
  rows = untrained.rows
  other_tokens = rows.tokens._replace(
    token_RT=np.where(fault[:, None], 7, rows.tokens.token_RT).astype(np.int32)
  )
  changed = with_rows(
    untrained,
    advantage_R=np.where(fault, 1e9, rows.advantage_R).astype(np.float32),
    tokens=other_tokens,
  )
  one, _ = program()(start(), untrained, NO_OTHERS)
  other, _ = program()(start(), changed, NO_OTHERS)
  assert_same(gradient_of(one), gradient_of(other))
  whole, _ = program()(start(), batch, NO_OTHERS)
  assert float(optax.tree.norm(gradient_of(whole))) != float(optax.tree.norm(gradient_of(one)))


# --- the step ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adam():
  return make_optimizer(dataclasses.replace(CFG, learning_rate=0.01, warmup_steps=0))


@pytest.mark.slow(always=True)
def test_a_step_changes_every_parameter_and_is_counted(adam):
  state, metrics = program(MICRO, adam)(start(adam), batch_of(), NO_OTHERS)
  assert int(state.step) == 1
  assert metrics["skipped_updates"] == 0
  assert metrics["update_norm"] > 0
  changed = jax.tree.map(lambda x, y: bool((x != y).any()), state.params, policy_and_params()[1])
  assert all(jax.tree.leaves(changed))
  np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(state.params), rtol=1e-5)


def test_a_frozen_vision_tower_has_no_gradient():
  update = program(frozen=TOWER)
  state, _ = update(start(), batch_of(), NO_OTHERS)
  other, _ = program()(start(), batch_of(), NO_OTHERS)
  assert_same(state.params["vision"], policy_and_params()[1]["vision"])
  assert_close(state.params["decoder"], other.params["decoder"])
  assert flops(update, batch_of()) < flops(program(), batch_of()), "its gradient is not computed"


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(adam, bad):
  """However many follow one another, and the next finite one is applied as if they had not been."""
  update = program(MICRO, adam)
  before, _ = update(start(adam), batch_of(), NO_OTHERS)
  broken = with_rows(batch_of(), advantage_R=np.array([1, bad, 1, 1], np.float32))
  after = before
  for count in range(1, 8):
    after, metrics = update(after, broken, NO_OTHERS)
    assert metrics["skipped_updates"] == 1
    assert int(after.step) == 1 + count
  assert_same((after.params, after.opt_state), (before.params, before.opt_state))
  again, metrics = update(after, batch_of(), NO_OTHERS)
  expected, _ = update(before, batch_of(), NO_OTHERS)
  assert_same(again.params, expected.params)
  assert metrics["skipped_updates"] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_one_bad_entry_of_one_parameter_changes_nothing(bad):
  """1e30 is finite, and its square is not."""
  optimizer = make_optimizer(dataclasses.replace(CFG, warmup_steps=0))
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  state = start(optimizer, params)
  grads = {"kernel": jnp.ones((2, 2)), "bias": jnp.array([1.0, bad])}
  after, metrics = jax.jit(functools.partial(apply_gradient, optimizer))(state, grads, {})
  assert_same((after.params, after.opt_state), (params, state.opt_state))
  assert metrics["skipped_updates"] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(bad):
  """The gradient is finite; the optimizer is not."""
  optimizer = optax.chain(optax.trace(0.9), optax.scale(bad))
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  state = start(optimizer, params)
  after, metrics = jax.jit(functools.partial(apply_gradient, optimizer))(state, params, {})
  assert np.isfinite(metrics["grad_norm"])
  assert_same((after.params, after.opt_state), (params, state.opt_state))
  assert metrics["skipped_updates"] == 1


def test_on_policy_the_ratio_is_one():
  logp_RT = np.asarray(score()(policy_and_params()[1], batch_of()))
  _, metrics = program()(start(), with_rows(batch_of(), old_logp_RT=logp_RT), NO_OTHERS)
  np.testing.assert_allclose(metrics["ratio"], 1, atol=1e-5)
  assert float(metrics["logp_difference"]) < 1e-5
  assert metrics["clip_fraction"] == 0
  np.testing.assert_allclose(metrics["effective_share"], 1, atol=1e-5)


@pytest.mark.slow(always=True)
def test_metrics_are_means_over_tokens_whatever_the_loss_is_divided_by():
  """The loss of "constant" is a ten-thousandth of a mean; a row of weight 0 is not counted."""
  batch = with_rows(batch_of(), weight_R=np.array([1, 1, 0, 1], np.float32))
  cfg = loss_config({"length_constant": 10_000}, normalise="constant")
  update = jax.jit(functools.partial(policy_update, policy_and_params()[0], SGD, cfg, MICRO))
  _, metrics = update(start(), batch, NO_OTHERS)
  counted_RT = batch.rows.trained_RT & (batch.rows.weight_R > 0)[:, None]
  logp_RT = np.asarray(score()(policy_and_params()[1], batch))
  expected = -logp_RT[counted_RT].mean()
  np.testing.assert_allclose(metrics["entropy_estimate"], expected, rtol=1e-5)
  assert 0.5 < float(metrics["ratio"]) < 2
  assert abs(float(metrics["loss"])) < 0.1


@pytest.mark.slow
def test_the_divergence_pulls_towards_the_reference():
  policy, params = policy_and_params()
  cfg = loss_config({"kl.weight": 1.0}, normalise="token")
  still = with_rows(batch_of(), advantage_R=np.zeros(4, np.float32))
  other = jax.tree.map(lambda x: x * 1.01, params)
  update = jax.jit(functools.partial(policy_update, policy, optax.sgd(1e-4), cfg, MICRO))
  _, alone = update(start(), still, OtherLogprobs(score()(params, still), NO_OTHERS))
  assert abs(float(alone["kl_ref_k3"])) < 1e-6
  reference = OtherLogprobs(score()(other, still), None)
  state, first = update(start(), still, reference)
  _, second = update(state, still, reference)
  assert 1e-6 < float(second["kl_ref_k3"]) < float(first["kl_ref_k3"])
  np.testing.assert_allclose(first["loss"], first["kl_ref_k3"], rtol=1e-5)


# --- storage -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_may_be_summed_in_bfloat16():
  """Each of four sums is rounded to 8 bits; float32 is the default and has no rounding."""
  policy, params = policy_and_params()
  batch, micro = batch_of(), Microbatches(1, (256,))
  weight_R = token_weights(batch.rows.trained_RT, LOSS.normalise)

  def loss(scores, microbatch):
    rows = microbatch.rows
    scored = (rows.old_logp_RT, rows.advantage_R, rows.trained_RT, microbatch.token_weight_R)
    return policy_loss(scores.logp_RT, *scored, LOSS)

  def gradient_in(dtype):
    of = dataclasses.replace(policy, gradient_dtype=jnp.dtype(dtype))
    inputs = (batch, weight_R, NO_OTHERS, Objective(loss, is_sum_of_tokens=True), micro)
    return jax.jit(lambda params: gradient(of, params, *inputs)[2])(params)

  exact, rounded = gradient_in(jnp.float32), gradient_in(jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(rounded)} == {jnp.dtype(jnp.bfloat16)}
  assert_close(optax.tree.cast(rounded, jnp.float32), exact, 5 * 2**-8)


@pytest.mark.slow
def test_moments_and_gradients_in_bfloat16_change_a_step_little(adam):
  low = dataclasses.replace(CFG, learning_rate=0.01, warmup_steps=0)
  low = make_optimizer(dataclasses.replace(low, mu_dtype="bfloat16", gradient_dtype="bfloat16"))
  policy = dataclasses.replace(policy_and_params()[0], gradient_dtype=jnp.dtype(jnp.bfloat16))
  update = jax.jit(functools.partial(policy_update, policy, low, LOSS, MICRO))
  state, metrics = update(start(low), batch_of(), NO_OTHERS)
  exact, expected = program(MICRO, adam)(start(adam), batch_of(), NO_OTHERS)
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=0.02, atol=1e-6, err_msg=name)
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
  sizes = [sum(x.nbytes for x in jax.tree.leaves(s.opt_state)) for s in (state, exact)]
  assert sizes[0] == pytest.approx(0.75 * sizes[1], rel=1e-3), "half of one of two moments"


# --- likelihood ----------------------------------------------------------------------------------


def test_sft_is_the_mean_over_tokens():
  policy, params = policy_and_params()
  batch = batch_of()
  _, metrics = jax.jit(functools.partial(sft_update, policy, SGD, MICRO))(start(), batch)
  logp_RT, trained_RT = score()(params, batch), batch.rows.trained_RT
  expected = -np.asarray(logp_RT)[trained_RT].mean()
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
  weight_R = token_weights(trained_RT, "token")
  np.testing.assert_allclose(nll(logp_RT, trained_RT, weight_R), expected, rtol=1e-5)


def test_the_score_of_untrained_tokens_is_zero():
  logp_RT, trained_RT = (
    np.asarray(score()(policy_and_params()[1], batch_of())),
    batch_of().rows.trained_RT,
  )
  assert (logp_RT[~trained_RT] == 0).all()
  assert (logp_RT[trained_RT] < 0).any()
  assert np.isfinite(logp_RT).all()


def test_scores_are_in_the_order_of_the_batch():
  """For every number of rows per microbatch and every length."""
  policy, params = policy_and_params()
  batch = batch_of()
  shortest = int(batch.rows.tokens.valid_RT.sum(1).min())
  for micro in (Microbatches(1, (shortest, 256)), Microbatches(3, (256,))):
    logp_RT = jax.jit(functools.partial(batch_logprobs, policy, micro))(params, batch)
    np.testing.assert_allclose(logp_RT, score()(params, batch), rtol=1e-5, atol=1e-5)


def test_features_of_a_frozen_tower_replace_its_images():
  """The gradient is the same, and the tower is not run."""
  policy, params = policy_and_params()
  cfg, update = fixtures.shapes(), program(frozen=TOWER)
  images = {i.content_hash: i for group in demonstrations() for t in group for i in t.images}
  alone = [plan_vision([image], cfg.window_blocks, cfg.vision) for image in images.values()]
  encode = jax.jit(policy.encode)
  image_features = {
    name: np.asarray(encode(params, vision))[plan[0]]
    for name, (vision, plan) in zip(images, alone, strict=True)
  }
  encoded, _ = to_train_batch(demonstrations(), ADVANTAGE_BG, cfg, None, image_features)
  encoded = with_rows(encoded, old_logp_RT=batch_of().rows.old_logp_RT)
  expected, _ = update(start(), batch_of(), NO_OTHERS)
  found, _ = update(start(), encoded, NO_OTHERS)
  assert_close(found.params, expected.params)
  assert flops(update, encoded) < flops(update, batch_of())


# --- config --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("rows", "lengths", "key"),
  [
    (0, (256,), "rows"),
    (2.0, (256,), "rows"),
    (True, (256,), "rows"),
    (1, (), "lengths"),
    (1, (64, 32), "lengths"),
    (1, (64, 64), "lengths"),
    (1, (0, 64), "lengths"),
    (1, [64], "lengths"),
  ],
)
def test_microbatches_of_wrong_sizes_are_refused(rows, lengths, key):
  with pytest.raises(ConfigError, match=rf"^{key} is .* and must be"):
    Microbatches(rows, lengths)
