"""The update: microbatches equal the big batch, what must not train does not, nor does bad news."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spatial_jax.data.vision_packing import plan_vision
from spatial_jax.learn.gradient import Microbatches, score_batch
from spatial_jax.learn.losses import LossConfig, effective_share, policy_loss, row_weights, sft_loss
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.learn.train_batch import to_train_batch
from spatial_jax.learn.update import policy_update, sft_update
from spatial_jax.rollout.demonstration import demonstration_trajectory
from spatial_jax.synthetic.oracle import DemonstrationConfig, demonstrate
from spatial_jax.types import PrefixBatch, TrainBatch, TrainState, Trajectory
from tests import rollout_fixtures as fixtures
from tests.test_learn_optimizer import CFG

LOSS = LossConfig(clip_low=0.2, clip_high=0.3, kl_weight=0.0, normalise="token")
SIZES = ((24, 24), (16, 40))
MICRO = Microbatches(1, (256,))
SGD = optax.sgd(1.0)  # the parameters then move by the gradient itself


@functools.cache
def lab():
  return fixtures.random_policy()


@functools.cache
def told() -> list[list[Trajectory]]:
  """Two groups of two, drawn or not: one prompt of one picture, two questions on two pictures."""
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
  """`told`, as if sampled a little off-policy."""
  shapes = dataclasses.replace(fixtures.shapes(), tokens=length)
  batch, _ = to_train_batch(told(), ADVANTAGE_BG, shapes)
  logp_RT = np.asarray(score()(lab()[1], batch))
  noise_RT = 0.2 * np.random.default_rng(1).normal(size=(4, 256))[:, :length]
  old_logp_RT = np.where(batch.trained_RT, logp_RT + noise_RT, 0).astype(np.float32)
  return batch._replace(old_logp_RT=old_logp_RT)


@functools.cache
def score():
  return jax.jit(functools.partial(score_batch, lab()[0], Microbatches(4, (256,))))


def start(optimizer=SGD, params=None) -> TrainState:
  params = lab()[1] if params is None else params
  return TrainState(params, optimizer.init(params), jnp.int32(0))


@functools.cache
def program(micro=MICRO, normalise="token", optimizer=SGD):
  cfg = dataclasses.replace(LOSS, normalise=normalise)
  return jax.jit(functools.partial(policy_update, lab()[0], optimizer, cfg, micro))


def gradient_of(state: TrainState):
  return jax.tree.map(lambda new, old: old - new, state.params, lab()[1])


def assert_close(one, other, tolerance=2e-5):
  """Every leaf, relative to the largest entry of it."""
  leaves = jax.tree_util.tree_leaves_with_path(one)
  for (path, x), y in zip(leaves, jax.tree.leaves(other), strict=True):
    worst = float(jnp.abs(x - y).max() / (jnp.abs(y).max() + 1e-4))
    assert worst < tolerance, f"{jax.tree_util.keystr(path)}: {worst}"


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


# --- gradients -----------------------------------------------------------------------------------


def test_gradient_is_that_of_the_whole_loss():
  """Against one plain differentiation of everything at once, the vision tower included."""
  policy, params = lab()
  batch = batch_of()

  def whole(params):
    logp_RT = score_batch(policy, Microbatches(4, (256,)), params, batch)
    weight_R = row_weights(batch.trained_RT, "sequence")
    return policy_loss(
      logp_RT, batch.old_logp_RT, batch.advantage_R, batch.trained_RT, weight_R, LOSS
    )

  (loss, expected), grads = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
  state, metrics = program(MICRO, "sequence")(start(), batch, None)
  assert_close(gradient_of(state), grads)
  for name, value in (effective_share(expected) | {"loss": loss}).items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
  np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
  tower = jax.tree.leaves(grads["vision"])
  assert all(float(jnp.abs(x).max()) > 1e-6 for x in tower), "the tower learns too"


def test_microbatches_equal_the_big_batch():
  """Cut to what their rows need, too: the short rows' microbatch and that of the long ones."""
  batch = batch_of()
  length_R = np.sort(batch.valid_RT.sum(1))
  lengths = (int(length_R[1]), 256)
  assert lengths[0] < length_R[2]
  one, metrics = program(Microbatches(2, lengths))(start(), batch, None)
  whole, expected = program(Microbatches(4, (256,)))(start(), batch, None)
  assert_close(gradient_of(one), gradient_of(whole))
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_rows_are_never_cut():
  with pytest.raises(ValueError, match=r"microbatches of \(64, 128\) tokens, rows of 256"):
    program(Microbatches(1, (64, 128)))(start(), batch_of(), None)


def test_a_common_prefix_changes_nothing():
  """Against every trajectory as one whole row, and against groups of one: no prefix is shared."""
  policy, params = lab()
  batch = batch_of()
  shared_B = batch.prefix.valid_BT.sum(1)
  assert shared_B[0] == told()[0][0].prompt_length - 1, "the whole prompt"
  pictures = told()[1][0].image_start[1] + told()[1][0].images[1].tokens
  assert pictures <= shared_B[1] < told()[1][0].prompt_length - 1, "the pictures, not the question"
  alone, feature_of = to_train_batch(
    [[row] for group in told() for row in group], ADVANTAGE_BG.reshape(4, 1), fixtures.shapes()
  )
  features_MYD = policy.encode(params, alone.vision)
  logp_RT = np.asarray(score()(params, batch))
  for r, trajectory in enumerate(t for group in told() for t in group):
    feature_T = np.full(len(trajectory.token_ids_T), -1, np.int32)
    for image, begin in zip(trajectory.images, trajectory.image_start, strict=True):
      feature_T[begin : begin + image.tokens] = feature_of[image.content_hash]
    ids_RT = trajectory.token_ids_T[None]
    hidden_RTD = policy.hidden(
      params,
      ids_RT,
      trajectory.position_TA[None],
      np.ones(ids_RT.shape, bool),
      features_MYD,
      feature_T[None],
    )
    temperature_R = batch.temperature_R[r : r + 1]
    expected_T = policy.logprobs(
      params, hidden_RTD[:, :-1], ids_RT[:, 1:], temperature_R, batch.forbidden_V
    )[0]
    np.testing.assert_allclose(
      logp_RT[r][batch.trained_RT[r]],
      np.asarray(expected_T)[trajectory.trained_T[1:]],
      atol=2e-5,
    )
  single, _ = program()(start(), alone._replace(old_logp_RT=_moved(batch, alone)), None)
  grouped, _ = program()(start(), batch, None)
  assert_close(gradient_of(single), gradient_of(grouped))


def _moved(batch: TrainBatch, other: TrainBatch) -> np.ndarray:
  """`batch.old_logp_RT` where `other` has the same trained tokens, row by row."""
  old_logp_RT = np.zeros(other.trained_RT.shape, np.float32)
  old_logp_RT[other.trained_RT] = batch.old_logp_RT[batch.trained_RT]
  return old_logp_RT


def test_groups_and_their_rows_may_stand_anywhere():
  order = np.array([3, 0, 2, 1])
  batch = batch_of()
  turned = TrainBatch(*(x[order] if n.count("_R") else x for n, x in batch._asdict().items()))
  turned = turned._replace(
    prefix=PrefixBatch(*(x[::-1] for x in batch.prefix)), prompt_R=1 - turned.prompt_R
  )
  one, _ = program()(start(), batch, None)
  other, _ = program()(start(), turned, None)
  assert_close(gradient_of(other), gradient_of(one))


def test_rollouts_left_out_are_as_if_they_trained_nothing():
  """A group without rows keeps its prefix, which nothing reads."""
  batch = batch_of()
  for kept_BG in (np.array([[True, False], [True, True]]), np.array([[False] * 2, [True] * 2])):
    kept, _ = to_train_batch(told(), ADVANTAGE_BG, fixtures.shapes(), kept_BG)
    kept = kept._replace(old_logp_RT=batch.old_logp_RT[kept_BG.reshape(-1)])
    silent = batch._replace(trained_RT=batch.trained_RT & kept_BG.reshape(-1, 1))
    one, _ = program(Microbatches(1, (256,)), "sequence")(start(), kept, None)
    other, _ = program(Microbatches(1, (256,)), "sequence")(start(), silent, None)
    assert_close(gradient_of(one), gradient_of(other))


def test_padding_changes_nothing():
  longest = int(batch_of().valid_RT.sum(1).max())
  assert longest < 224
  one, _ = program(Microbatches(1, (224,)))(start(), batch_of(224), None)
  other, _ = program()(start(), batch_of(256), None)
  assert_close(gradient_of(one), gradient_of(other))


def test_a_fault_is_as_if_it_were_not_there():
  """Its row may say and cost anything: the other rows' gradient stays."""
  batch = batch_of()
  trained_RT = batch.trained_RT.copy()
  trained_RT[1] = False
  silent = batch._replace(trained_RT=trained_RT)
  wild = silent._replace(
    advantage_R=np.where(np.arange(4) == 1, 1e9, silent.advantage_R).astype(np.float32),
    token_RT=np.where(np.arange(4)[:, None] == 1, 7, silent.token_RT).astype(np.int32),
  )
  one, _ = program()(start(), silent, None)
  other, _ = program()(start(), wild, None)
  assert_same(gradient_of(one), gradient_of(other))
  whole, _ = program()(start(), batch, None)
  assert float(optax.tree.norm(gradient_of(whole))) != float(optax.tree.norm(gradient_of(one)))


# --- the step ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adam():
  return make_optimizer(dataclasses.replace(CFG, learning_rate=0.01, warmup_steps=0))


def test_step_counts_and_moves(adam):
  state, metrics = program(MICRO, "token", adam)(start(adam), batch_of(), None)
  assert int(state.step) == 1
  assert metrics["skipped_updates"] == 0
  assert metrics["update_norm"] > 0
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), state.params, lab()[1])
  assert all(jax.tree.leaves(moved))
  np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(state.params), rtol=1e-5)


def test_a_frozen_vision_tower_has_no_gradient_and_changes_no_other():
  policy, params = lab()
  held = dataclasses.replace(policy, frozen=("^vision/",))
  update = jax.jit(functools.partial(policy_update, held, SGD, LOSS, MICRO))
  state, _ = update(start(), batch_of(), None)
  other, _ = program()(start(), batch_of(), None)
  assert_same(state.params["vision"], params["vision"])
  assert_close(state.params["decoder"], other.params["decoder"])
  flops = [
    jax.jit(functools.partial(policy_update, p, SGD, LOSS, MICRO))
    .lower(start(), batch_of(), None)
    .compile()
    .cost_analysis()["flops"]
    for p in (held, policy)
  ]
  assert flops[0] < flops[1]  # spared, not computed and thrown away


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_moves_nothing(adam, bad):
  update = program(MICRO, "token", adam)
  before, _ = update(start(adam), batch_of(), None)
  broken = batch_of()._replace(advantage_R=np.array([1, bad, 1, 1], np.float32))
  after, metrics = update(before, broken, None)
  assert_same((after.params, after.opt_state), (before.params, before.opt_state))
  assert int(after.step) == 2
  assert metrics["skipped_updates"] == 1
  again, metrics = update(after, batch_of(), None)
  expected, _ = update(before, batch_of(), None)
  assert_same(again.params, expected.params)
  assert metrics["skipped_updates"] == 0


def test_on_policy_the_ratio_is_one():
  logp_RT = np.asarray(score()(lab()[1], batch_of()))
  _, metrics = program()(start(), batch_of()._replace(old_logp_RT=logp_RT), None)
  np.testing.assert_allclose(metrics["ratio"], 1, atol=1e-5)
  assert float(metrics["logp_difference"]) < 1e-5
  assert metrics["clip_fraction"] == 0
  np.testing.assert_allclose(metrics["effective_share"], 1, atol=1e-5)


def test_reference():
  """The divergence is that of the reference given, and pulls towards it."""
  policy, params = lab()
  cfg = dataclasses.replace(LOSS, kl_weight=1.0)
  still = batch_of()._replace(advantage_R=np.zeros(4, np.float32))
  other = jax.tree.map(lambda x: x * 1.01, params)
  update = jax.jit(functools.partial(policy_update, policy, optax.sgd(1e-4), cfg, MICRO))
  _, alone = update(start(), still, score()(params, still))
  assert abs(float(alone["kl_ref_k3"])) < 1e-6
  reference_RT = score()(other, still)
  state, first = update(start(), still, reference_RT)
  _, second = update(state, still, reference_RT)
  assert 1e-6 < float(second["kl_ref_k3"]) < float(first["kl_ref_k3"])
  np.testing.assert_allclose(first["loss"], first["kl_ref_k3"], rtol=1e-5)


# --- likelihood ----------------------------------------------------------------------------------


def test_sft_is_the_mean_over_tokens():
  policy, params = lab()
  batch = batch_of()
  _, metrics = jax.jit(functools.partial(sft_update, policy, SGD, MICRO))(start(), batch)
  logp_RT = score()(params, batch)
  expected = -np.asarray(logp_RT)[batch.trained_RT].mean()
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
  weight_R = row_weights(batch.trained_RT, "token")
  np.testing.assert_allclose(sft_loss(logp_RT, batch.trained_RT, weight_R), expected, rtol=1e-5)


def test_score_of_untrained_tokens_is_zero():
  logp_RT = np.asarray(score()(lab()[1], batch_of()))
  assert (logp_RT[~batch_of().trained_RT] == 0).all()
  assert (logp_RT[batch_of().trained_RT] < 0).any()
  assert np.isfinite(logp_RT).all()


def test_score_comes_back_in_the_order_of_the_batch():
  """However few rows go through at once, and cut to whatever length."""
  policy, params = lab()
  batch = batch_of()
  shortest = int(batch.valid_RT.sum(1).min())
  for micro in (Microbatches(1, (shortest, 256)), Microbatches(3, (256,))):
    logp_RT = jax.jit(functools.partial(score_batch, policy, micro))(params, batch)
    np.testing.assert_allclose(logp_RT, score()(params, batch), rtol=1e-5, atol=1e-5)


def test_features_seen_by_a_frozen_tower_are_those_it_would_see():
  """The gradient is the same, and the tower is not run."""
  policy, params = lab()
  held = dataclasses.replace(policy, frozen=("^vision/",))
  cfg = fixtures.shapes()
  images = {image.content_hash: image for group in told() for t in group for image in t.images}
  alone = [plan_vision([image], cfg.window_blocks, cfg.vision) for image in images.values()]
  encode = jax.jit(policy.encode)
  image_features = {
    name: np.asarray(encode(params, vision))[plan[0]]
    for name, (vision, plan) in zip(images, alone, strict=True)
  }
  seen, _ = to_train_batch(told(), ADVANTAGE_BG, cfg, None, image_features)
  seen = seen._replace(old_logp_RT=batch_of().old_logp_RT)
  update = jax.jit(functools.partial(policy_update, held, SGD, LOSS, MICRO))
  expected, _ = update(start(), batch_of(), None)
  found, _ = update(start(), seen, None)
  assert_close(found.params, expected.params)
  flops = [
    update.lower(start(), batch, None).compile().cost_analysis()["flops"]
    for batch in (batch_of(), seen)
  ]
  assert flops[1] < flops[0]
