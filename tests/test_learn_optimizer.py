"""Learning rates, weight decay, frozen parameters, and one step of AdamW by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tiny.dense_loss import init_heads
from spatial_jax import sharding
from spatial_jax.config import ConfigError
from spatial_jax.learn.optimizer import (
  OptimizerConfig,
  check_steps,
  decayed,
  learning_rate,
  make_optimizer,
  moving_average,
)
from spatial_jax.policy.qwen_vl import make_policy
from tests.policy_fixtures import hashed_params, small_config

CFG = OptimizerConfig(
  kind="adamw",
  learning_rate=0.1,
  rates=(),
  schedule="constant",
  warmup_steps=4,
  total_steps=20,
  decay_steps=5,
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  mu_dtype="float32",
  gradient_dtype="float32",
  weight_decay=0.1,
  max_grad_norm=1.0,
  scale_by_param_rms=False,
  frozen=(),
  ema_decay=0.0,
)


def rates(steps=30, **changed):
  schedule = learning_rate(dataclasses.replace(CFG, **changed))
  return np.array([schedule(step) for step in range(steps)], np.float32)


def test_the_learning_rate_warms_up_stays_constant_and_decays():
  found = rates()
  np.testing.assert_allclose(found[:5], [0, 0.025, 0.05, 0.075, 0.1], atol=1e-7)
  np.testing.assert_allclose(found[5:16], 0.1, atol=1e-7)
  np.testing.assert_allclose(found[15:20], [0.1, 0.08, 0.06, 0.04, 0.02], atol=1e-6)
  np.testing.assert_allclose(found[20:], 0, atol=1e-7)


def test_without_decay_the_learning_rate_stays_constant():
  np.testing.assert_allclose(rates(decay_steps=0)[4:], 0.1, atol=1e-7)
  np.testing.assert_allclose(rates(decay_steps=0, warmup_steps=0), 0.1, atol=1e-7)


def test_cosine_ends_at_zero():
  found = rates(schedule="cosine", decay_steps=0)
  expected = 0.05 * (1 + np.cos(np.pi * np.arange(17) / 16))
  np.testing.assert_allclose(found[4:21], expected, atol=1e-6)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10), st.integers(0, 10), st.integers(20, 40))
def test_a_longer_run_has_the_same_learning_rates_up_to_the_decay(warmup, decay, total):
  """So that a run that is resumed with more steps equals a longer run."""
  short, long = (
    rates(50, warmup_steps=warmup, decay_steps=decay, total_steps=total + more) for more in (0, 9)
  )
  np.testing.assert_array_equal(short[: total - decay], long[: total - decay])


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"schedule": "cosine"}, r"decay_steps is 5 and must be 0 with schedule cosine"),
    ({"decay_steps": 17}, r"warmup_steps is 4 and decay_steps is 17; .* at most total_steps, 20"),
    ({"warmup_steps": 21, "decay_steps": 0}, r"warmup_steps is 21 .* at most total_steps, 20"),
    ({"learning_rate": np.nan}, r"learning_rate is nan and must be at least 0 and at most 1"),
    ({"learning_rate": -1e-4}, r"learning_rate is -0.0001 and must"),
    ({"learning_rate": np.inf}, r"learning_rate is inf and must"),
    ({"schedule": "linear"}, r"schedule is 'linear' and must be one of constant, cosine"),
    ({"warmup_steps": -1}, r"warmup_steps is -1 and must be a whole number"),
    ({"total_steps": -1}, r"total_steps is -1 and must"),
    ({"decay_steps": 2.5}, r"decay_steps is 2.5 and must be a whole number"),
    ({"b1": 1.0}, r"b1 is 1.0 and must be at least 0 and at most 0.999999"),
    ({"b2": -0.1}, r"b2 is -0.1 and must"),
    ({"eps": 0.0}, r"eps is 0.0 and must be above 0 and finite"),
    ({"weight_decay": -0.1}, r"weight_decay is -0.1 and must"),
    ({"max_grad_norm": 0.0}, r"max_grad_norm is 0.0 and must"),
    ({"max_grad_norm": np.nan}, r"max_grad_norm is nan and must"),
    ({"mu_dtype": "float16"}, r"mu_dtype is 'float16' and must be one of float32, bfloat16"),
    ({"gradient_dtype": None}, r"gradient_dtype is None and must be one of float32, bfloat16"),
    ({"scale_by_param_rms": 1}, r"scale_by_param_rms is 1 and must be True or False"),
    ({"frozen": "^vision/"}, r"frozen is '\^vision/' and must be a tuple"),
    ({"frozen": ("(",)}, r"frozen is \('\(',\) and must be a tuple of regular"),
  ],
)
def test_a_config_value_out_of_range_is_refused(changed, message):
  with pytest.raises(ConfigError, match="^" + message):
    dataclasses.replace(CFG, **changed)


def test_a_run_may_not_go_on_after_its_learning_rate_is_zero():
  check_steps(CFG, CFG.total_steps)
  check_steps(dataclasses.replace(CFG, decay_steps=0), 99)
  for ends in ({"decay_steps": 1}, {"decay_steps": 0, "schedule": "cosine"}):
    with pytest.raises(ConfigError, match=r"loop\.steps is 21 .*total_steps, 20; raise both"):
      check_steps(dataclasses.replace(CFG, **ends), 21)


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_decay(tied):
  params = {"policy": hashed_params(small_config(tied), 1), "heads": init_heads(8)}
  mask = {
    jax.tree_util.keystr(path, simple=True, separator="/"): decays
    for path, decays in jax.tree_util.tree_leaves_with_path(decayed(params))
  }
  assert {name.rsplit("/", 1)[1] for name, decays in mask.items() if decays} == {"kernel"}
  left = {name.rsplit("/", 1)[1] for name, decays in mask.items() if not decays}
  assert left == {"bias", "scale", "embedding"}


def test_one_step_by_hand():
  """clip, then m / (sqrt(v) + eps) + decay * w, times the learning rate."""
  params = {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.full(2, 0.5)}
  grads = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 4.0)}
  cfg = dataclasses.replace(CFG, warmup_steps=0, eps=1e-3)
  optimizer = make_optimizer(cfg)
  updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  norm = np.sqrt(4 * 9 + 2 * 16)
  for name, decay in (("kernel", 0.1), ("bias", 0.0)):
    g = np.asarray(grads[name]) / norm
    m, v = g * 0.1 / (1 - 0.9), g**2 * 0.05 / (1 - 0.95)
    expected = -0.1 * (m / (np.sqrt(v) + 1e-3) + decay * 0.5)
    np.testing.assert_allclose(updates[name], expected, rtol=1e-5)


def test_scale_by_param_rms_makes_steps_proportional_to_the_parameter():
  """The first step of Adam is the learning rate, times the root mean square of the parameter."""
  params = {"small": {"bias": jnp.full(3, -0.02)}, "large": {"scale": jnp.array([0.0, 3.0, -3.0])}}
  grads = jax.tree.map(jnp.ones_like, params)
  cfg = dataclasses.replace(CFG, warmup_steps=0, scale_by_param_rms=True)
  optimizer = make_optimizer(cfg)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(updates["small"]["bias"], -0.1 * 0.02, rtol=1e-5)
  np.testing.assert_allclose(updates["large"]["scale"], -0.1 * np.sqrt(6.0), rtol=1e-5)


def test_a_pattern_that_matches_no_parameter_is_refused():
  optimizer = make_optimizer(dataclasses.replace(CFG, frozen=("bias", "^visoin/")))
  with pytest.raises(ConfigError, match=r"optimizer\.frozen: '\^visoin/' matches no parameter"):
    optimizer.init({"rest": {"bias": jnp.ones(2)}})


def test_frozen_parameters_do_not_change_and_have_no_moments():
  """The others change as if they were alone: the global norm is theirs, too."""
  params = {
    "vision": {"kernel": jnp.full((2, 2), 0.5)},
    "decoder": {"kernel": jnp.full((2, 2), 0.5)},
  }
  grads = jax.tree.map(lambda x: 6.0 * x, params)
  optimizer = make_optimizer(dataclasses.replace(CFG, warmup_steps=0, frozen=("^vision/",)))
  state = optimizer.init(params)
  updates, _ = optimizer.update(grads, state, params)
  assert (updates["vision"]["kernel"] == 0).all()
  alone = make_optimizer(dataclasses.replace(CFG, warmup_steps=0))
  rest = {"decoder": params["decoder"]}
  expected, _ = alone.update({"decoder": grads["decoder"]}, alone.init(rest), rest)
  np.testing.assert_array_equal(updates["decoder"]["kernel"], expected["decoder"]["kernel"])
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
  assert any("decoder" in path for path in paths)
  assert not any("vision" in path for path in paths)


# --- storage -------------------------------------------------------------------------------------

BF16_STEP = 2**-8  # largest relative error of rounding to bfloat16


def three_steps(**changed):
  """The updates and the state after three steps with random gradients."""
  cfg = dataclasses.replace(CFG, warmup_steps=0, max_grad_norm=1e9, **changed)
  optimizer, random = make_optimizer(cfg), np.random.default_rng(0)
  params = {"kernel": jnp.asarray(random.normal(size=(8, 16)), jnp.float32)}
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for _ in range(3):
    grads = {"kernel": jnp.asarray(random.normal(size=(8, 16)), cfg.gradient_dtype)}
    updates, state = update(grads, state, params)
  (adam,) = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))[:1]
  return updates["kernel"], adam


def test_a_bfloat16_first_moment_is_the_float32_one_rounded_after_each_step():
  exact, expected = three_steps()
  rounded, found = three_steps(mu_dtype="bfloat16")
  assert found.mu["kernel"].dtype == jnp.bfloat16
  assert found.nu["kernel"].dtype == jnp.float32, "the second moment would not fall"
  np.testing.assert_array_equal(found.nu["kernel"], expected.nu["kernel"])
  moment = np.asarray(expected.mu["kernel"])
  close = functools.partial(np.testing.assert_allclose, rtol=0)
  error = 2 * BF16_STEP * np.abs(moment).max()  # of the moment before, and of the last rounding
  close(found.mu["kernel"].astype(jnp.float32), moment, atol=error)
  assert rounded.dtype == jnp.float32
  close(rounded, exact, atol=2 * BF16_STEP * np.abs(exact).max())
  assert (rounded != exact).any()


def test_the_arithmetic_on_a_bfloat16_moment_is_float32():
  """One step from a moment that bfloat16 holds exactly: rounded once, when it is stored."""
  cfg = dataclasses.replace(CFG, warmup_steps=0, mu_dtype="bfloat16")
  inner = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
  params = {"w": jnp.ones(64)}
  grads = {"w": jnp.asarray(np.random.default_rng(1).normal(size=64), jnp.float32)}
  optimizer = make_optimizer(dataclasses.replace(cfg, max_grad_norm=1e9))
  state = optimizer.init(params)
  for _ in range(2):
    before = optax.tree.get(state, "mu")["w"].astype(jnp.float32)
    _, state = optimizer.update(grads, state, params)
  moment = (0.9 * before + np.float32(1 - cfg.b1) * grads["w"]).astype(jnp.bfloat16)
  found = optax.tree.get(state, "mu")["w"]
  differs = np.asarray(found != moment).mean()
  assert differs < 0.05, "float32 sums in another order may round to a neighbour"
  assert inner.init(params).mu["w"].dtype == jnp.float32


def test_bfloat16_gradients_are_read_in_float32():
  """The step is that of the same values in float32."""
  cfg = dataclasses.replace(CFG, warmup_steps=0, gradient_dtype="bfloat16")
  optimizer, params = make_optimizer(cfg), {"kernel": jnp.ones((4, 4))}
  grads = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.bfloat16)
  state = optimizer.init(params)
  found, after = optimizer.update({"kernel": grads}, state, params)
  expected, state = optimizer.update({"kernel": grads.astype(jnp.float32)}, state, params)
  jax.tree.map(np.testing.assert_array_equal, (found, after), (expected, state))
  assert {x.dtype for x in jax.tree.leaves(after)} == {np.dtype("float32"), np.dtype("int32")}


def test_the_update_of_a_frozen_bfloat16_parameter_is_zero_in_its_dtype():
  optimizer = make_optimizer(dataclasses.replace(CFG, warmup_steps=0, frozen=("base",)))
  params = {"base": jnp.ones(3, jnp.bfloat16), "kernel": jnp.ones(3)}
  state = optimizer.init(params)
  updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
  assert updates["base"].dtype == jnp.bfloat16
  assert (updates["base"] == 0).all()


# --- Adafactor, rates by path, moving average ----------------------------------------------------


def two_leaves():
  return {"decoder": {"w": jnp.ones((4, 6))}, "vision": {"w": jnp.full((4, 6), 2.0)}}


def steps(cfg, count=3, grads=None):
  """Parameters after each of some steps with constant gradients, and the last state."""
  optimizer, params = make_optimizer(cfg), two_leaves()
  state = optimizer.init(params)
  grads = jax.tree.map(jnp.ones_like, params) if grads is None else grads
  found = []
  for _ in range(count):
    updates, state = jax.jit(optimizer.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
    found.append(params)
  return found, state


PLAIN = dataclasses.replace(
  CFG, learning_rate=0.01, warmup_steps=0, decay_steps=0, weight_decay=0.0, max_grad_norm=100.0
)


def test_a_rate_by_path_scales_the_step_of_its_parameters_alone():
  full, _ = steps(PLAIN)
  tenth, _ = steps(dataclasses.replace(PLAIN, rates=("^vision/=0.1",)))
  np.testing.assert_array_equal(full[-1]["decoder"]["w"], tenth[-1]["decoder"]["w"])
  moved = [2.0 - np.asarray(x[-1]["vision"]["w"]) for x in (full, tenth)]
  np.testing.assert_allclose(moved[1], 0.1 * moved[0], rtol=1e-4)


@pytest.mark.parametrize("rate", ["^vision/", "^vision/=-1", "(=1", "=", "x=nan"])
def test_rates_that_are_not_regex_and_factor_are_refused(rate):
  with pytest.raises(ConfigError, match="rates"):
    dataclasses.replace(PLAIN, rates=(rate,))


def test_a_rate_that_matches_nothing_is_refused():
  with pytest.raises(ConfigError, match="matches no trained parameter"):
    steps(dataclasses.replace(PLAIN, rates=("^audio/=0.1",)))


def test_the_moving_average_follows_the_parameters():
  found, state = steps(dataclasses.replace(PLAIN, ema_decay=0.9))
  expected = two_leaves()
  for params in found:
    expected = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, expected, params)
  average = moving_average(state, found[-1], ())
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), average, expected)


def test_the_moving_average_of_frozen_parameters_is_the_parameters():
  cfg = dataclasses.replace(PLAIN, ema_decay=0.9, frozen=("^vision/",))
  found, state = steps(cfg)
  average = moving_average(state, found[-1], cfg.frozen)
  np.testing.assert_array_equal(average["vision"]["w"], two_leaves()["vision"]["w"])
  assert not np.allclose(average["decoder"]["w"], found[-1]["decoder"]["w"])


def test_adafactor_stores_row_and_column_means_and_no_first_moment():
  params = {"decoder": {"w": jnp.ones((256, 384))}}
  sizes = []
  for kind in ("adafactor", "adamw"):
    optimizer = make_optimizer(dataclasses.replace(PLAIN, kind=kind))
    sizes.append(sum(x.size for x in jax.tree.leaves(optimizer.init(params))))
  assert sizes[0] < 1000
  assert sizes[1] > 2 * 256 * 384
  found, _ = steps(dataclasses.replace(PLAIN, kind="adafactor"))
  moved = 1.0 - np.asarray(found[0]["decoder"]["w"])
  np.testing.assert_allclose(moved, 0.01, rtol=1e-3)  # a first step of one learning rate


def test_adafactor_has_shardings_for_its_state():
  policy = make_policy(small_config(True), jnp.dtype("float32"))
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 2, 1), jax.devices()[:2])
  optimizer = make_optimizer(dataclasses.replace(PLAIN, kind="adafactor", ema_decay=0.9))
  state = jax.eval_shape(optimizer.init, policy.abstract_params())
  shardings = sharding.param_shardings(state, mesh)
  assert len(jax.tree.leaves(shardings)) == len(jax.tree.leaves(state))
