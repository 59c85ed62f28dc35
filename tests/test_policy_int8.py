"""Kernels in 8 bits: rounding error, sharding, and the effect on sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from spatial_jax import compiled, sharding
from spatial_jax.policy import int8
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.sharding import path_name
from tests import rollout_fixtures as fixtures
from tests.policy_fixtures import hashed_params, small_config
from tests.rollout_fixtures import (
  ROLLOUT,
  SAMPLED,
  flat,
  largest_difference,
  policy_and_params,
)
from tests.step_fixtures import step_config
from tests.test_rollout_engine import prompts


def unstacked(cfg):
  return make_policy(cfg, jnp.float32).unstack(hashed_params(cfg, 1))


def by_path(tree):
  is_leaf = lambda leaf: isinstance(leaf, qwix.QArray)  # noqa: E731
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return {path_name(path): leaf for path, leaf in leaves}


def test_only_kernels_of_decoder_layers_are_rounded():
  params = unstacked(small_config(tied=False))
  leaves = by_path(int8.quantized(params))
  rounded = {path for path, leaf in leaves.items() if isinstance(leaf, qwix.QArray)}
  assert rounded == {p for p in leaves if p.startswith("decoder/layers/") and p.endswith("/kernel")}
  assert len(rounded) == 7 * len(params["decoder"]["layers"])
  for path, leaf in by_path(params).items():
    if path not in rounded:
      np.testing.assert_array_equal(leaves[path], leaf)


def test_rounding_is_at_most_half_a_step_of_each_output_channel():
  params = unstacked(small_config(tied=False))
  quantized = int8.quantized(params)
  restored = int8.restored(quantized)
  for (path, q), x, y in zip(
    by_path(quantized).items(), jax.tree.leaves(params), jax.tree.leaves(restored), strict=True
  ):
    if not isinstance(q, qwix.QArray):
      continue
    assert q.qvalue.dtype == jnp.int8
    outputs = x.shape[2:] if path.endswith("o/kernel") else x.shape[1:]
    assert q.scale.size == np.prod(outputs), path
    assert (np.abs(np.asarray(x - y)) <= 0.5001 * np.broadcast_to(q.scale, x.shape)).all(), path
    assert np.abs(np.asarray(x - y)).max() > 0


def test_values_are_sharded_like_the_kernel_and_equal_on_every_mesh():
  cfg = step_config()
  params = hashed_params(cfg, 1)
  found = []
  for shape in ((1, 1, 1), (2, 2, 2)):
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    policy = make_policy(cfg, jnp.float32, mesh)
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    found.append(compiled.decode_params(policy, mesh, "int8")(placed))
  one, eight = found
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, eight)
  down = eight["decoder"]["layers"][0]["mlp"]["down"]["kernel"]
  assert down.qvalue.addressable_shards[0].data.size == down.qvalue.size // 2  # over `tensor`
  assert down.scale.sharding.is_fully_replicated


@pytest.mark.slow
def test_sampling_with_them_is_slightly_off_policy():
  policy, params, exact = policy_and_params()
  cfg = dataclasses.replace(ROLLOUT, weights="int8")
  weights = compiled.decode_params(policy, compiled.train_mesh(policy), "int8")(params)
  engine = fixtures.real_engine(policy, cfg)
  sampling_params = [SAMPLED] * cfg.group

  def difference(weights):
    job = RolloutJob(prompts(), 1, 3, sampling_params)
    rollouts = generate_rollouts(engine, weights, job)
    assert all(t.trained_T.any() for t in flat(rollouts))
    return largest_difference(rollouts)

  assert difference(exact) < 1e-4
  assert 1e-3 < difference(weights) < 1.0
