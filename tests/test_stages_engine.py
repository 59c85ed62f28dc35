"""What rollouts hold on a device is known before anything runs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from spatial_jax import programs, sharding
from spatial_jax.config import ConfigError
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.stages import engine as engine_lib
from tests import step_fixtures


def on_one_device(tree) -> int:
  first = jax.devices()[0]
  shards = [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards]
  return sum(shard.data.nbytes for shard in shards if shard.device == first)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_plan_is_what_lies_there(sizes):
  lab, cfg = step_fixtures.lab(*sizes), step_fixtures.ROLLOUT
  made = engine_lib.plan(lab.policy, cfg, 1 << 30)
  state = lab.engine.programs.empty(cfg.prompt_buckets[-1])
  assert made.prefixes == on_one_device(state.cache.prefix.layers)
  assert made.rows == on_one_device(state.cache.layers)
  assert made.features == on_one_device(lab.engine.programs.pool())
  assert made.weights == on_one_device(lab.decode_params(lab.state.params))
  assert made.total == made.prefixes + made.rows + made.features + made.weights


def test_caches_that_cannot_fit_are_refused_with_what_would():
  cfg, shape = step_fixtures.ROLLOUT, step_fixtures.step_config()
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
  policy = make_policy(shape, jnp.float32, mesh)
  many = dataclasses.replace(cfg, slots=40)
  made = engine_lib.plan(policy, many, 1 << 40)
  room = made.weights + made.features + (made.prefixes + made.rows) // 4
  with pytest.raises(ConfigError, match=r"do not fit; lower config\.rollout\.slots to 10$"):
    engine_lib.check(made._replace(device=room))
  fewer = engine_lib.plan(policy, dataclasses.replace(cfg, slots=10), room)
  engine_lib.check(fewer)
  with pytest.raises(ConfigError, match=r"stop\.tokens.*config\.mesh\.tensor$"):
    engine_lib.check(made._replace(device=made.weights))


@pytest.mark.parametrize(("share", "mend"), [(0.3, r"slots to 12$"), (0.05, "rows, features")])
def test_of_rows_without_a_slot_each_only_the_prompts_shrink(share, mend):
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
  policy = make_policy(step_fixtures.step_config(), jnp.float32, mesh)
  cfg = dataclasses.replace(step_fixtures.ROLLOUT, slots=40, rows=8)
  made = engine_lib.plan(policy, cfg, 1 << 40)
  room = made.total - made.prefixes + int(made.prefixes * share)
  with pytest.raises(ConfigError, match=mend):
    engine_lib.check(made._replace(device=room))
  fewer = engine_lib.plan(
    policy, dataclasses.replace(cfg, slots=12), made.total - made.prefixes // 2
  )
  engine_lib.check(fewer)


def test_slots_that_would_fit_divide_over_the_devices():
  mesh = sharding.make_mesh(sharding.MeshConfig(4, 1, 1), jax.devices()[:4])
  policy = make_policy(step_fixtures.step_config(), jnp.float32, mesh)
  made = engine_lib.plan(policy, dataclasses.replace(step_fixtures.ROLLOUT, slots=40), 1 << 40)
  room = made.weights + made.features + (made.prefixes + made.rows) // 4
  with pytest.raises(ConfigError, match=r"slots to 8$"):
    engine_lib.check(made._replace(device=room))


def test_the_devices_of_a_machine_without_accelerators_share_its_memory():
  one = programs.train_mesh(make_policy(step_fixtures.step_config(), jnp.float32))
  all_eight = sharding.make_mesh(sharding.MeshConfig(8, 1, 1), jax.devices())
  assert engine_lib.memory(one) // 8 == engine_lib.memory(all_eight) > 1 << 28
