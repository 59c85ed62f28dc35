"""Adapters: merged parameters give the same outputs; without adapters, the initial policy."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spatial_jax import checkpoint, compiled, sharding
from spatial_jax.checkpoint import Progress
from spatial_jax.config import ConfigError
from spatial_jax.data.vision_packing import plan_vision
from spatial_jax.learn.gradient import NO_OTHERS
from spatial_jax.learn.optimizer import OptimizerConfig, make_optimizer
from spatial_jax.learn.train_batch import Microbatches
from spatial_jax.learn.update import policy_update
from spatial_jax.policy import lora, param_tree
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.stages.load import load_params, load_policy, read_policy, record
from spatial_jax.types import OtherLogprobs, Params, TokenArrays, TrainState
from tests import policy_fixtures, rollout_fixtures
from tests.learn_fixtures import loss_config, sft_update
from tests.test_learn_update import batch_of, policy_and_params
from tests.test_policy import FAMILIES, four_rows, setting

EVERYWHERE = LoraConfig(paths=("/kernel$",), rank=3, alpha=6.0)
QUERIES = LoraConfig(paths=("attn/q/kernel$",), rank=2, alpha=1.0)


def with_adapters(
  policy: Policy, params: Params, cfg: LoraConfig, seed: int = 0
) -> tuple[Policy, Params]:
  """The policy with random adapters, so that every one affects the output."""
  policy = dataclasses.replace(policy, lora=cfg, frozen=lora.frozen_paths(cfg, ()))
  fresh = compiled.init_adapters(policy, jax.random.key(seed), compiled.train_mesh(policy))
  leaves, tree = jax.tree.flatten(fresh)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  noise = [
    0.3 * jax.random.normal(key, x.shape) / np.sqrt(x.shape[-2])
    for key, x in zip(keys, leaves, strict=True)
  ]
  return policy, param_tree.merge(params, jax.tree.unflatten(tree, noise))


def outputs(policy: Policy, params: Params, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Features of images, and hidden states of rows with these images."""
  _, _, images, _, _ = setting(name)
  blocks = policy.cfg.vision.window_blocks
  batch, _ = plan_vision(images, blocks, policy_fixtures.BUCKETS)
  features_MYD = jax.jit(policy.encode)(params, batch)
  rows = four_rows(name)[0]
  hidden = jax.jit(policy.hidden)(params, TokenArrays(*rows), features_MYD)
  return np.asarray(features_MYD), np.asarray(hidden)


@pytest.mark.parametrize(
  "name", [FAMILIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])]
)
def test_merged_adapters_give_the_same_outputs(name):
  plain, params, *_ = setting(name)
  policy, adapted = with_adapters(plain, params, EVERYWHERE)
  apart = outputs(policy, adapted, name)
  together = outputs(policy.without_adapters, lora.merged(adapted, EVERYWHERE), name)
  for one, other, start in zip(apart, together, outputs(plain, params, name), strict=True):
    np.testing.assert_allclose(one, other, atol=2e-4 * other.std())
    assert np.abs(other - start).max() > 0.05 * start.std(), "the adapters change the output"


def test_every_kernel_has_its_adapter():
  plain, params, *_ = setting("qwen3_vl/tied")
  _, adapted = with_adapters(plain, params, EVERYWHERE)
  base, adapters = lora.split(adapted)
  found = {sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(adapters)}
  kernels = [path for path, _ in jax.tree_util.tree_leaves_with_path(base)]
  kernels = [name for name in map(sharding.path_name, kernels) if name.endswith("/kernel")]
  assert found == {f"{kernel}_lora_{side}" for kernel in kernels for side in "ab"}


def test_split_copies_no_array():
  plain, params, *_ = setting()
  _, adapted = with_adapters(plain, params, QUERIES)
  base, adapters = lora.split(adapted)
  assert jax.tree.structure(base) == jax.tree.structure(params)
  pairs = zip(jax.tree.leaves(base), jax.tree.leaves(params), strict=True)
  assert all(one is other for one, other in pairs), "the same arrays"
  assert list(adapters) == ["decoder"]


def test_merged_kernel_is_the_sum_of_kernel_and_product():
  """Computed in NumPy, head by head."""
  plain, params, *_ = setting()
  _, adapted = with_adapters(plain, params, QUERIES)
  found = np.asarray(lora.merged(adapted, QUERIES)["decoder"]["layers"]["attn"]["q"]["kernel"])
  query = jax.tree.map(np.asarray, adapted["decoder"]["layers"]["attn"]["q"])
  channels = found.shape[-1]
  for layer in range(found.shape[0]):
    for head in range(found.shape[2]):
      b = query["kernel_lora_b"][layer][:, head * channels : (head + 1) * channels]
      expected = query["kernel"][layer, :, head] + 0.5 * query["kernel_lora_a"][layer] @ b
      np.testing.assert_allclose(found[layer, :, head], expected, rtol=1e-5, atol=1e-6)


def test_new_adapters_change_nothing():
  plain, params, *_ = setting()
  policy = dataclasses.replace(plain, lora=EVERYWHERE)
  fresh = compiled.init_adapters(policy, jax.random.key(5), compiled.train_mesh(policy))
  for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
    assert bool((leaf == 0).all()) == sharding.path_name(path).endswith("_b"), "B is 0, A is not"
  found = outputs(policy, param_tree.merge(params, fresh), "qwen2_5_vl/tied")
  for one, other in zip(found, outputs(plain, params, "qwen2_5_vl/tied"), strict=True):
    np.testing.assert_array_equal(one, other)


def test_half_precision_stays_close():
  plain, params, *_ = setting()
  policy, adapted = with_adapters(plain, params, EVERYWHERE)
  half = dataclasses.replace(policy, compute_dtype=jnp.dtype("bfloat16"))
  exact = outputs(policy, adapted, "qwen2_5_vl/tied")[1]
  rough = outputs(half, adapted, "qwen2_5_vl/tied")[1].astype(np.float32)
  assert np.abs(rough - exact).mean() < 0.05 * exact.std()


@pytest.mark.parametrize("paths", [("attn/z/kernel",), ("attn_norm",), ("bias",)])
def test_paths_that_match_no_kernel_are_refused(paths):
  policy = make_policy(policy_fixtures.small_config(True), jnp.float32)
  policy = dataclasses.replace(policy, lora=LoraConfig(("/kernel$", *paths), 2, 2.0))
  with pytest.raises(ConfigError, match=r"config\.lora\.paths: .* matches no kernel path"):
    jax.eval_shape(policy.init, jax.random.key(0))


# --- training ----------------------------------------------------------------------------------

LOSS = loss_config({"kl.weight": 0.1}, normalise="token")
MICRO = Microbatches(2, (256,))
ADAM = OptimizerConfig(
  *("adamw", 1e-2, (), "constant", 0, 10, 0, 0.9, 0.95, 1e-8, "float32", "float32"),
  *(0.0, 1.0, False, (lora.BASE,), 0.0),
)


@functools.cache
def trained():
  """Policy, initial parameters, and state and metrics after two steps with adapters."""
  plain, params = policy_and_params()
  policy = dataclasses.replace(plain, lora=QUERIES, frozen=lora.frozen_paths(QUERIES, ()))
  mesh = compiled.train_mesh(policy)
  fresh = compiled.init_adapters(policy, jax.random.key(1), mesh)
  optimizer = make_optimizer(ADAM)
  start = param_tree.merge(jax.tree.map(jnp.copy, params), fresh)
  run = compiled.LearnPrograms(policy, optimizer, LOSS, MICRO)
  state, found = compiled.init_state(policy, optimizer, start, mesh), []
  batch = run.place(batch_of())
  for _ in range(2):
    state, metrics = run.update(
      state, batch, OtherLogprobs(run.logprobs(state.params, batch), None)
    )
    found.append(jax.device_get(metrics))
  return policy, params, state, found


@pytest.mark.slow(always=True)
def test_adapters_are_trained_and_the_base_is_not():
  _, params, state, metrics = trained()
  base, adapters = lora.split(state.params)
  jax.tree.map(np.testing.assert_array_equal, base, params)
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(adapters)), "B too"
  assert all(float(one["update_norm"]) > 0 for one in metrics)


def test_only_adapters_have_moments():
  _, _, state, _ = trained()
  _, adapters = lora.split(state.params)
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  assert sum(leaf.size for leaf in moments) == 2 * sum(x.size for x in jax.tree.leaves(adapters))


def test_the_reference_is_the_policy_without_adapters():
  _, _, _, (first, second) = trained()
  assert abs(float(first["kl_ref_k3"])) < 1e-9, "fresh adapters are the reference"
  assert float(second["kl_ref_k3"]) > 1e-6


@pytest.mark.slow
def test_the_base_has_no_gradients_in_memory():
  policy, params, _, _ = trained()
  state = TrainState(params, (), np.int32(0))
  all_trained = dataclasses.replace(policy.without_adapters, frozen=())

  def scratch(policy: Policy, state: TrainState, frozen: tuple[str, ...]) -> int:
    optimizer = make_optimizer(dataclasses.replace(ADAM, frozen=frozen))
    state = state._replace(opt_state=optimizer.init(state.params))
    update = functools.partial(policy_update, policy, optimizer, LOSS, MICRO)
    lowered = jax.jit(update, donate_argnums=0).lower(state, batch_of(), NO_OTHERS)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  fresh = compiled.init_adapters(policy, jax.random.key(1), compiled.train_mesh(policy))
  adapted = state._replace(params=param_tree.merge(params, fresh))
  small, large = scratch(policy, adapted, (lora.BASE,)), scratch(all_trained, state, ())
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert large - small > 0.9 * size, (large, small, size)


HALF = jnp.dtype(jnp.bfloat16)


def in_half(params: Params) -> Params:
  return jax.tree.map(lambda x: x.astype(HALF), params)


@functools.cache
def trained_from(frozen_dtype: str):
  """As `trained`, from a base that is rounded to bfloat16 and stored in a dtype."""
  plain, params = policy_and_params()
  policy = dataclasses.replace(
    plain,
    lora=QUERIES,
    frozen=lora.frozen_paths(QUERIES, ()),
    frozen_dtype=jnp.dtype(frozen_dtype),
  )
  mesh = compiled.train_mesh(policy)
  fresh = compiled.init_adapters(policy, jax.random.key(1), mesh)
  base = jax.tree.map(lambda x: x.astype(policy.frozen_dtype), in_half(params))
  optimizer = make_optimizer(ADAM)
  state = compiled.init_state(policy, optimizer, param_tree.merge(base, fresh), mesh)
  run = compiled.LearnPrograms(policy, optimizer, LOSS, MICRO)
  batch, found = run.place(batch_of()), []
  for _ in range(2):
    state, metrics = run.update(
      state, batch, OtherLogprobs(run.logprobs(state.params, batch), None)
    )
    found.append(jax.device_get(metrics))
  return policy, state, found


@pytest.mark.slow
def test_a_base_stored_in_bfloat16_trains_like_the_same_values_in_float32():
  """Bit for bit: frozen parameters are read, never written."""
  _, half, metrics = trained_from("bfloat16")
  _, single, expected = trained_from("float32")
  base, adapters = lora.split(half.params)
  assert {x.dtype for x in jax.tree.leaves(base)} == {HALF}
  assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype(jnp.float32)}
  jax.tree.map(np.testing.assert_array_equal, base, in_half(policy_and_params()[1]))
  jax.tree.map(np.testing.assert_array_equal, adapters, lora.split(single.params)[1])
  jax.tree.map(np.testing.assert_array_equal, half.opt_state, single.opt_state)
  for one, other in zip(metrics, expected, strict=True):
    for name, value in other.items():
      np.testing.assert_allclose(one[name], value, rtol=1e-6, err_msg=name)
  sizes = [sum(x.nbytes for x in jax.tree.leaves(lora.split(s.params)[0])) for s in (half, single)]
  assert 2 * sizes[0] == sizes[1]


@pytest.mark.slow
def test_rounding_the_base_changes_the_gradient_little():
  """The gradient of the likelihood; the large logits of random weights turn 0.4 % into 6 %."""
  policy, half, _ = trained_from("bfloat16")
  _, params = policy_and_params()
  adapters = lora.split(half.params)[1]
  update = jax.jit(functools.partial(sft_update, policy, optax.sgd(1.0), MICRO))

  def step(base: Params) -> Params:
    state = TrainState(param_tree.merge(base, adapters), optax.sgd(1.0).init(()), np.int32(0))
    after, _ = update(state, batch_of())
    return optax.tree.sub(lora.split(after.params)[1], adapters)

  rounded, exact = step(in_half(params)), step(params)
  change = optax.tree.norm(optax.tree.sub(rounded, exact)) / optax.tree.norm(exact)
  assert 0 < float(change) < 0.1


@pytest.mark.slow
def test_adapters_of_a_bfloat16_base_are_merged_in_float32():
  policy, state, _ = trained_from("bfloat16")
  merged = lora.merged(state.params, QUERIES)["decoder"]["layers"]["attn"]
  assert merged["q"]["kernel"].dtype == jnp.float32
  assert merged["k"]["kernel"].dtype == HALF, "without adapters nothing is added"
  sampled = compiled.decode_params(policy, compiled.train_mesh(policy), "compute")(state.params)
  first = sampled["decoder"]["layers"][0]["attn"]["q"]["kernel"]
  np.testing.assert_allclose(first, merged["q"]["kernel"][0], rtol=1e-6, atol=1e-7)
  assert first.dtype == policy.compute_dtype == jnp.float32


@pytest.mark.slow(always=True)
def test_a_checkpoint_stores_what_the_state_holds_and_loads_in_any_dtype(tmp_path):
  """A resumed state has the same bits; the export is the sum in float32."""
  policy, state, _ = trained_from("bfloat16")
  config = {"model": record(policy.cfg), "lora": dataclasses.asdict(QUERIES)}
  with checkpoint.Saver(tmp_path, 1) as saver:
    saver.save(state, Progress(2, None, config))
  rollout_fixtures.TOKENIZER.inner.save(str(tmp_path / "tokenizer.json"))
  mesh = compiled.train_mesh(policy)
  abstract = compiled.abstract_state(policy, make_optimizer(ADAM), mesh)
  again = checkpoint.restore(checkpoint.find(tmp_path), abstract)
  jax.tree.map(np.testing.assert_array_equal, again, state)
  assert jax.tree.map(lambda x: x.dtype, again) == jax.tree.map(lambda x: x.dtype, state)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), lora.merged(state.params, QUERIES))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
  jax.tree.map(close, load_policy(tmp_path, mesh).params, exact)
  rounded = load_params(read_policy(tmp_path), mesh, lambda path: HALF)
  assert {x.dtype for x in jax.tree.leaves(rounded)} == {HALF}
  jax.tree.map(lambda x, y: close(x.astype(jnp.float32), y, rtol=2**-8), rounded, exact)


def test_a_run_with_adapters_loads_merged_parameters(tmp_path: pathlib.Path):
  policy, _, state, _ = trained()
  config = {"model": record(policy.cfg), "lora": dataclasses.asdict(QUERIES)}
  with checkpoint.Saver(tmp_path, 1) as saver:
    saver.save(state, Progress(2, None, config))
  rollout_fixtures.TOKENIZER.inner.save(str(tmp_path / "tokenizer.json"))
  loaded = load_policy(
    tmp_path, sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
  )
  assert loaded.policy.lora == lora.OFF
  expected = lora.merged(state.params, QUERIES)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
  jax.tree.map(close, loaded.params, expected)
  assert optax.tree.norm(optax.tree.sub(loaded.params, lora.split(state.params)[0])) > 1e-3
