"""What rollouts hold on a device is known before anything runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from spatial_jax import compiled, sharding
from spatial_jax.config import ConfigError, build
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.rollout import memory
from spatial_jax.stages import context
from spatial_jax.stages.load import load_policy
from spatial_jax.train import GrpoRun, check_evaluation_memory, resident_bytes
from tests import step_fixtures

KEY = "config.rollout.slots"


def on_one_device(tree) -> int:
  first = jax.devices()[0]
  shards = [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards]
  return sum(shard.data.nbytes for shard in shards if shard.device == first)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_plan_is_what_lies_there(sizes):
  lab, cfg = step_fixtures.lab(*sizes), step_fixtures.ROLLOUT
  made = context.plan(lab.policy, cfg, 7, 1 << 30)
  state = lab.engine.programs.empty(cfg.prompt_buckets[-1])
  assert made.prefixes == on_one_device(state.cache.prefix.layers)
  assert made.rows == on_one_device(state.cache.layers)
  assert made.features == on_one_device(lab.engine.programs.feature_buffer())
  assert made.weights == on_one_device(lab.decode_params(lab.state.params))
  few = cfg.decode_row_counts[-2]
  assert made.copies == made.rows * few // cfg.row_count > 0
  parts = (made.prefixes, made.rows, made.copies, made.features, made.weights)
  assert made.total == 7 + sum(parts)
  state = lab.state
  assert memory.bytes_of(state, state.params) == on_one_device(state) + on_one_device(state.params)


def test_prompts_take_no_more_room_for_more_samples_of_them():
  lab, cfg = step_fixtures.lab(1, 1, 1), step_fixtures.ROLLOUT
  made = [
    context.plan(lab.policy, dataclasses.replace(cfg, group=group), 0, 1 << 40)
    for group in (1, 4, 16)
  ]
  assert len({plan.prefixes for plan in made}) == 1
  assert [plan.rows // made[0].rows for plan in made] == [1, 4, 16]


def test_decoding_never_holds_a_prompt_for_each_row():
  """Its scratch, most of it scores, stays below half of what copies of one layer would take."""
  cfg = dataclasses.replace(
    step_fixtures.ROLLOUT,
    slots=2,
    group=8,
    prompt_buckets=(4096,),
    gather_fractions=(),
    suffix_block_edges=(),
  )
  lab = step_fixtures.lab(1, 1, 1, cfg)
  run = lab.engine.programs
  state = jax.eval_shape(lambda: run.empty(4096))
  weights = jax.eval_shape(compiled.reshard(lab.policy, lab.mesh, "compute"), lab.state.params)
  sample = run.sample.lower(weights, state, np.zeros(16, bool), None, False).compile()
  layer = sum(x.size * x.dtype.itemsize for x in state.cache.prefix.layers[0])
  assert sample.memory_analysis().temp_size_in_bytes < cfg.group * layer / 2


def test_caches_that_cannot_fit_are_refused_with_what_would():
  cfg, shape = step_fixtures.ROLLOUT, step_fixtures.step_config()
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
  policy = make_policy(shape, jnp.float32, mesh)
  many = dataclasses.replace(cfg, slots=40)
  made = context.plan(policy, many, 0, 1 << 40)
  room = made.weights + made.features + (made.prefixes + made.rows + made.copies) // 4
  with pytest.raises(ConfigError, match=r"do not fit; lower config\.rollout\.slots to 10$"):
    memory.check(made._replace(device=room), KEY)
  fewer = context.plan(policy, dataclasses.replace(cfg, slots=10), 0, room)
  memory.check(fewer, KEY)
  with pytest.raises(ConfigError, match=r"slots to 5$"):  # half of the room is somebody else's
    memory.check(
      made._replace(device=room, resident=(made.prefixes + made.rows + made.copies) // 8), KEY
    )
  with pytest.raises(ConfigError, match=r"lower config\.rollout\.slots, or.*stop\.max_response_tokens"):
    memory.check(made._replace(device=made.weights), KEY)


@pytest.mark.parametrize(("share", "mend"), [(0.3, r"slots to 12$"), (0.05, "rows, feature_buffer_tokens")])
def test_of_rows_without_a_slot_each_only_the_prompts_shrink(share, mend):
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
  policy = make_policy(step_fixtures.step_config(), jnp.float32, mesh)
  cfg = dataclasses.replace(step_fixtures.ROLLOUT, slots=40, rows=8)
  made = context.plan(policy, cfg, 0, 1 << 40)
  room = made.total - made.prefixes + int(made.prefixes * share)
  with pytest.raises(ConfigError, match=mend):
    memory.check(made._replace(device=room), KEY)
  fewer = context.plan(
    policy, dataclasses.replace(cfg, slots=12), 0, made.total - made.prefixes // 2
  )
  memory.check(fewer, KEY)


def test_slots_that_would_fit_divide_over_the_devices():
  mesh = sharding.make_mesh(sharding.MeshConfig(4, 1, 1), jax.devices()[:4])
  policy = make_policy(step_fixtures.step_config(), jnp.float32, mesh)
  made = context.plan(policy, dataclasses.replace(step_fixtures.ROLLOUT, slots=40), 0, 1 << 40)
  room = made.weights + made.features + (made.prefixes + made.rows + made.copies) // 4
  with pytest.raises(ConfigError, match=r"slots to 8$"):
    memory.check(made._replace(device=room), KEY)


def test_the_devices_of_a_machine_without_accelerators_share_its_memory():
  one = compiled.train_mesh(make_policy(step_fixtures.step_config(), jnp.float32))
  all_eight = sharding.make_mesh(sharding.MeshConfig(8, 1, 1), jax.devices())
  assert memory.device_bytes(one) // 8 == memory.device_bytes(all_eight) > 1 << 28


def test_an_engine_that_cannot_fit_is_never_made(monkeypatch):
  lab, cfg = step_fixtures.lab(1, 1, 1), step_fixtures.ROLLOUT
  made = context.plan(lab.policy, cfg, 1000, 1 << 40)
  engine = lab.engine
  arguments = (lab.policy, engine.conversation, engine.executor, cfg, 1000, KEY)
  monkeypatch.setattr(memory, "device_bytes", lambda mesh: made.total)
  context.make_engine(*arguments)
  monkeypatch.setattr(memory, "device_bytes", lambda mesh: made.total - 1)
  with pytest.raises(ConfigError, match="do not fit; lower config"):
    context.make_engine(*arguments)


def test_an_exam_without_room_is_refused_before_training(monkeypatch):
  """It has more rows than training, and its key is another."""
  settings = common.get_config()
  run = build(GrpoRun, {key: value for key, value in settings.items() if key != "stage"})
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
  loaded = load_policy(run.init, mesh)
  optimizer = make_optimizer(dataclasses.replace(run.learn.optimizer, frozen=()))
  resident = resident_bytes(run, loaded.policy, optimizer, loaded.params, mesh)
  monkeypatch.setattr(memory, "device_bytes", lambda mesh: 1 << 40)
  check_evaluation_memory(run, loaded.policy, resident, mesh)
  own = memory.bytes_of(loaded.params)
  assert resident == pytest.approx(4 * own, rel=0.01), "parameters, their start, two moments"
  training = context.planned(loaded.policy, run.rollout, resident)
  memory.check(training._replace(device=training.total), KEY)
  monkeypatch.setattr(memory, "device_bytes", lambda mesh: training.total)
  with pytest.raises(ConfigError, match=r"lower config\.evaluation\.slots to \d+$"):
    check_evaluation_memory(run, loaded.policy, resident, mesh)
