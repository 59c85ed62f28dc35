"""Rounding of buckets and the dtype of the programs; test_sharded runs whole steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax import compiled, sharding
from spatial_jax.learn.train_batch import Microbatches
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.types import TokenArrays
from tests import policy_fixtures, step_fixtures


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  platform: str
  process_index: int = 0


def _fake_mesh(platform: str) -> jax.sharding.Mesh:
  return sharding.make_mesh(sharding.MeshConfig(1, 1, 1), [FakeDevice(platform)])


def test_only_cpu_computes_in_float32():
  assert compiled.compute_dtype(_fake_mesh("cpu")) == jnp.float32
  assert compiled.compute_dtype(_fake_mesh("tpu")) == jnp.bfloat16
  assert compiled.compute_dtype(_fake_mesh("gpu")) == jnp.bfloat16


def test_tpu_buckets_are_multiples_of_128():
  rollout = dataclasses.replace(step_fixtures.ROLLOUT, prompt_buckets=(64, 100, 128, 130))
  batch = dataclasses.replace(step_fixtures.SHAPES, prefix_buckets=(8, 40), tokens=300)
  here = compiled.train_mesh(policy_fixtures.small_policy())
  assert compiled.rollout_buckets(rollout, here) == rollout
  assert compiled.batch_buckets(batch, here) == batch
  micro = Microbatches(2, (64, 100, 300))
  assert compiled.micro_buckets(micro, here) == micro
  assert compiled.micro_buckets(micro, _fake_mesh("tpu")) == Microbatches(2, (128, 384))
  rollout = compiled.rollout_buckets(rollout, _fake_mesh("tpu"))
  batch = compiled.batch_buckets(batch, _fake_mesh("tpu"))
  assert rollout.prompt_buckets == (128, 256)
  assert batch.prefix_buckets == (128,)
  assert batch.tokens == 384
  assert rollout.vision.patches == batch.vision.patches == (128,)
  assert rollout.vision.windows == step_fixtures.ROLLOUT.vision.windows


def test_slots_are_rounded_up_to_the_devices_of_a_process():
  mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2), jax.devices())
  for slots, padded in ((1, 4), (4, 4), (5, 8)):
    rollout = dataclasses.replace(step_fixtures.ROLLOUT, slots=slots)
    assert compiled.rollout_buckets(rollout, mesh).slots == padded


@pytest.mark.parametrize(("rows", "padded"), [(0, 0), (3, 4), (10, 12), (15, 16), (16, 16)])
def test_rows_are_rounded_up_to_the_devices_of_a_process(rows, padded):
  mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2), jax.devices())
  rollout = dataclasses.replace(
    step_fixtures.ROLLOUT, slots=4, group=4, rows=rows, gather_fractions=(0.1, 0.3, 0.6)
  )
  found = compiled.rollout_buckets(rollout, mesh)
  assert found.rows == padded
  assert all(count % 4 == 0 for count in found.decode_row_counts)
  assert found.decode_row_counts[-1] == found.row_count


def test_decode_params_are_in_the_compute_dtype_and_change_no_bit():
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 2), jax.devices()[:2])
  cfg = policy_fixtures.small_config(True)
  policy = make_policy(cfg, jnp.bfloat16, mesh)
  params = policy_fixtures.small_params(cfg)
  placed = jax.device_put(params, sharding.param_shardings(params, mesh))
  weights = compiled.decode_params(policy, mesh, "compute")(placed)
  assert {x.dtype for x in jax.tree.leaves(weights)} == {jnp.dtype(jnp.bfloat16)}
  assert len(weights["decoder"]["layers"]) == cfg.decoder.layers
  row = policy_fixtures.sequence((9,), cfg)
  no_image = np.full((1, len(row.ids)), -1, np.int32)
  tokens = TokenArrays(
    row.ids[None], row.positions[None], np.ones((1, len(row.ids)), bool), no_image
  )
  unstacked = make_policy(cfg, jnp.bfloat16).unstack(params)
  weights = jax.device_put(weights, jax.devices()[0])
  hidden = jax.jit(make_policy(cfg, jnp.bfloat16).hidden)
  features_MYD = jnp.zeros((1, 1, cfg.decoder.width), jnp.bfloat16)
  expected = hidden(unstacked, tokens, features_MYD)
  np.testing.assert_array_equal(hidden(weights, tokens, features_MYD), expected)


def test_policy_without_a_mesh_is_compiled_for_one_device():
  mesh = compiled.train_mesh(policy_fixtures.small_policy())
  assert mesh.devices.flatten().tolist() == jax.devices()[:1]
