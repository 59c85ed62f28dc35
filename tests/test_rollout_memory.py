"""The memory plan: what rollouts and update need on a device is known before anything runs."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_defaults
from spatial_jax import compiled, sharding
from spatial_jax.build_grpo import make_grpo
from spatial_jax.config import ConfigError, build
from spatial_jax.data.prompt_form import read_form
from spatial_jax.data.source import make_source
from spatial_jax.evaluate.evaluator import evaluation_rollout_config
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.policy import lora
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.rollout import memory
from spatial_jax.stages import context
from spatial_jax.stages.load import read_policy
from spatial_jax.train_config import TrainConfig, resident_bytes, training_parts
from tests import step_fixtures

KEY = "config.rollout.slots"


def on_one_device(tree) -> int:
  first = jax.devices()[0]
  shards = [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards]
  return sum(shard.data.nbytes for shard in shards if shard.device == first)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_plan_equals_the_allocated_bytes(sizes):
  lab, cfg = step_fixtures.step_setup(*sizes), step_fixtures.ROLLOUT
  plan = context.plan(lab.policy, cfg, 7, 1 << 30)
  state = lab.engine.programs.empty_state(cfg.prompt_buckets[-1])
  assert plan.prefix_cache == on_one_device(state.cache.prefix.layers)
  assert plan.suffix_cache == on_one_device(state.cache.layers)
  assert plan.feature_buffer == on_one_device(lab.engine.programs.empty_feature_buffer())
  assert plan.weights == on_one_device(lab.decode_params(lab.state.params))
  gathered = cfg.decode_row_counts[-2]
  assert plan.gathered_rows == plan.suffix_cache * gathered // cfg.row_count > 0
  caches = plan.prefix_cache + plan.suffix_cache + plan.gathered_rows
  assert plan.rollouts == 7 + plan.weights + caches + plan.feature_buffer
  state = lab.state
  assert memory.bytes_of(state, state.params) == on_one_device(state) + on_one_device(state.params)


@pytest.mark.parametrize("form", ["compute", "int8"])
@pytest.mark.parametrize("paths", [(), ("attn/[qv]/kernel$", "vision/blocks/qkv")])
def test_weights_of_the_plan_are_those_that_sample(form, paths):
  """With adapters, which are merged, and a frozen base in bfloat16."""
  adapters = LoraConfig(paths, 2, 2.0)
  policy = dataclasses.replace(
    step_fixtures.step_setup(2, 2, 2).policy,
    lora=adapters,
    frozen=lora.frozen_paths(adapters, ("^vision/patch",)),
    frozen_dtype=jnp.dtype(jnp.bfloat16),
  )
  mesh = compiled.train_mesh(policy)
  shapes = policy.abstract_params()
  make = jax.jit(policy.init, out_shardings=sharding.param_shardings(shapes, mesh))
  params = make(jax.random.key(0))
  assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, shapes)
  plan = context.plan(policy, dataclasses.replace(step_fixtures.ROLLOUT, weights=form), 0, 1 << 30)
  assert plan.weights == on_one_device(compiled.decode_params(policy, mesh, form)(params))
  assert plan.resharding == 2 * plan.weights, "gathered over fsdp first"


def test_weights_that_do_not_fit_while_they_are_gathered_are_refused():
  plan = PLAN._replace(weights_scratch=200 << 20)
  memory.check(plan._replace(device=plan.resharding), KEY)
  with pytest.raises(ConfigError, match=r"weights for sampling and 200 MiB .*mesh\.tensor"):
    memory.check(plan._replace(device=plan.resharding - 1), KEY)


def test_prefix_cache_does_not_grow_with_the_group():
  lab, cfg = step_fixtures.step_setup(1, 1, 1), step_fixtures.ROLLOUT
  plans = [
    context.plan(lab.policy, dataclasses.replace(cfg, group=group), 0, 1 << 40)
    for group in (1, 4, 16)
  ]
  assert len({plan.prefix_cache for plan in plans}) == 1
  assert [plan.suffix_cache // plans[0].suffix_cache for plan in plans] == [1, 4, 16]


def test_decoding_never_copies_a_prompt_for_each_row():
  """Its scratch, most of it scores, is below half of a copy of one layer for each row."""
  cfg = dataclasses.replace(
    step_fixtures.ROLLOUT,
    slots=2,
    group=8,
    prompt_buckets=(4096,),
    gather_fractions=(),
    suffix_block_edges=(),
  )
  lab = step_fixtures.step_setup(1, 1, 1, cfg)
  programs = lab.engine.programs
  state = jax.eval_shape(lambda: programs.empty_state(4096))
  weights = jax.eval_shape(compiled.reshard(lab.policy, lab.mesh, "compute"), lab.state.params)
  lowered = programs.decode.lower(weights, state, np.zeros(16, bool), None, False)
  layer = sum(x.size * x.dtype.itemsize for x in state.cache.prefix.layers[0])
  scratch = lowered.compile().memory_analysis().temp_size_in_bytes
  assert scratch < cfg.group * layer / 2


def one_device_plan(device: int = 1 << 40, **changed) -> memory.MemoryPlan:
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
  policy = make_policy(step_fixtures.step_config(), jnp.float32, mesh)
  return context.plan(policy, dataclasses.replace(step_fixtures.ROLLOUT, **changed), 0, device)


def test_caches_that_do_not_fit_are_refused_with_the_slots_that_do():
  plan = one_device_plan(slots=40)
  device = plan.weights + plan.feature_buffer + plan.caches // 4
  with pytest.raises(ConfigError, match=r"do not fit; lower config\.rollout\.slots to 10$"):
    memory.check(plan._replace(device=device), KEY)
  memory.check(one_device_plan(device, slots=10), KEY)
  with pytest.raises(ConfigError, match=r"slots to 5$"):
    memory.check(plan._replace(device=device, resident=plan.caches // 8), KEY)
  message = r"lower config\.rollout\.slots, or.*stop\.max_response_tokens"
  with pytest.raises(ConfigError, match=message):
    memory.check(plan._replace(device=plan.weights), KEY)


@pytest.mark.parametrize(
  ("share", "fix"), [(0.3, r"slots to 12$"), (0.05, "rows, feature_buffer_tokens")]
)
def test_with_a_fixed_number_of_rows_only_the_prefix_cache_shrinks(share, fix):
  plan = one_device_plan(slots=40, rows=8)
  device = plan.rollouts - plan.prefix_cache + int(plan.prefix_cache * share)
  with pytest.raises(ConfigError, match=fix):
    memory.check(plan._replace(device=device), KEY)
  memory.check(one_device_plan(plan.rollouts - plan.prefix_cache // 2, slots=12, rows=8), KEY)


def test_slots_that_fit_divide_over_the_devices():
  mesh = sharding.make_mesh(sharding.MeshConfig(4, 1, 1), jax.devices()[:4])
  policy = make_policy(step_fixtures.step_config(), jnp.float32, mesh)
  plan = context.plan(policy, dataclasses.replace(step_fixtures.ROLLOUT, slots=40), 0, 1 << 40)
  device = plan.weights + plan.feature_buffer + plan.caches // 4
  with pytest.raises(ConfigError, match=r"slots to 8$"):
    memory.check(plan._replace(device=device), KEY)


def test_cpu_devices_share_the_memory_of_the_machine():
  one = compiled.train_mesh(make_policy(step_fixtures.step_config(), jnp.float32))
  all_eight = sharding.make_mesh(sharding.MeshConfig(8, 1, 1), jax.devices())
  assert memory.device_bytes(one) // 8 == memory.device_bytes(all_eight) > 1 << 28


def test_engine_that_does_not_fit_is_not_made(monkeypatch):
  lab, cfg = step_fixtures.step_setup(1, 1, 1), step_fixtures.ROLLOUT
  plan, engine = context.plan(lab.policy, cfg, 1000, 1 << 40), lab.engine
  arguments = (lab.policy, engine.conversation, engine.executor, cfg, 1000, KEY)
  monkeypatch.setattr(memory, "device_bytes", lambda mesh: plan.rollouts)
  context.make_engine(*arguments)
  monkeypatch.setattr(memory, "device_bytes", lambda mesh: plan.rollouts - 1)
  with pytest.raises(ConfigError, match="do not fit; lower config"):
    context.make_engine(*arguments)


@contextlib.contextmanager
def default_run():
  """(config, parts, context) of the default run on one device; nothing is loaded."""
  cfg = build(TrainConfig, dict(tiny_defaults.get_config()))
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
  files = read_policy(cfg.init)
  parts = training_parts(cfg, files.cfg, mesh)
  with context.open_context(parts.policy, files, read_form(cfg.text), cfg, None) as opened:
    yield cfg, parts, opened


def test_evaluation_that_does_not_fit_is_refused_before_training(monkeypatch):
  """It has more rows than training, and its message names its own key."""
  with default_run() as (cfg, parts, opened):
    params = memory.bytes_of(compiled.abstract_state(*parts[:2], opened.mesh).params)
    frozen = dataclasses.replace(cfg.learn.optimizer, frozen=())
    resident = resident_bytes(cfg, parts.policy, make_optimizer(frozen))
    assert resident == pytest.approx(3 * params, rel=0.01), "parameters and two moments"
    shapes = evaluation_rollout_config(cfg.rollout, cfg.evaluation, cfg.evaluation.tasks, True)
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: 1 << 40)
    opened.evaluation_engine(shapes, has_start=True)
    plan = context.plan(parts.policy, shapes, 0)
    need = plan.rollouts + plan.weights  # of the start
    assert need > params + 2 * plan.weights
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: need)
    opened.evaluation_engine(shapes, has_start=True)
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: need - 1)
    with pytest.raises(ConfigError, match=r"lower config\.evaluation\.slots to \d+$"):
      opened.evaluation_engine(shapes, has_start=True)
    opened.evaluation_engine(shapes, has_start=False)


def test_policies_of_the_evaluation_must_fit_while_they_are_loaded(monkeypatch):
  with default_run() as (cfg, parts, opened):
    shapes = evaluation_rollout_config(cfg.rollout, cfg.evaluation, 1, True)
    weights = context.plan(parts.policy, shapes, 0).weights
    params = memory.bytes_of(compiled.abstract_state(*parts[:2], opened.mesh).params)
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: params + 2 * weights - 1)
    with pytest.raises(ConfigError, match=r"loading the policy needs .*; raise config\.mesh\.fsdp"):
      opened.evaluation_engine(shapes, has_start=True)


def test_the_update_is_part_of_the_plan_before_the_loop(monkeypatch, tmp_path):
  """Gradients are those of the trained leaves alone."""
  with default_run() as (cfg, parts, opened):
    state = compiled.abstract_state(*parts[:2], opened.mesh)
    trained = memory.bytes_of(state.opt_state) / 2  # two moments of each trained parameter
    plan = context.with_update(
      context.plan(parts.policy, cfg.rollout, 0),
      parts.policy,
      cfg.learn.micro,
      parts.shapes,
      cfg.rollout.prompts,
    )
    assert plan.gradients == pytest.approx(trained, rel=1e-3)
    assert 0 < plan.gradients < memory.bytes_of(state.params["decoder"])
    assert plan.update_scratch > plan.gradients
    resident = resident_bytes(cfg, parts.policy, parts.optimizer)
    device = max(plan.rollouts, plan.update) + resident
    source = make_source(cfg.source)
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: device)
    make_grpo(cfg, opened, parts, source, tmp_path)
    assert plan.update > plan.rollouts, "so the refusal below is that of the update"
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: device - 1)
    with pytest.raises(ConfigError, match=r"the update does not fit; lower config\.learn\.micro"):
      make_grpo(cfg, opened, parts, source, tmp_path)


# --- the update ----------------------------------------------------------------------------------

PLAN = memory.MemoryPlan(
  resident=100 << 20,
  reference=0,
  weights=10 << 20,
  weights_scratch=0,
  prefix_cache=20 << 20,
  suffix_cache=30 << 20,
  gathered_rows=15 << 20,
  feature_buffer=5 << 20,
  gradients=0,
  update_scratch=0,
  logprob_scratch=0,
  cfg=step_fixtures.ROLLOUT,
  data_devices=1,
  device=1000 << 20,
)


def test_total_is_that_of_the_larger_phase():
  rollouts, update = 180 << 20, (100 + 40 + 300) << 20
  assert PLAN.total == PLAN.rollouts == rollouts
  with_update = PLAN._replace(gradients=40 << 20, update_scratch=300 << 20)
  assert with_update.rollouts == rollouts
  assert with_update.total == with_update.update == update
  small_update = PLAN._replace(gradients=40 << 20, update_scratch=1 << 20)
  assert small_update.total == rollouts


def test_plan_prints_one_line():
  assert str(PLAN) == (
    "memory per device: rollouts 180 of 1,000 MiB (resident 100, weights 10, prompt cache 20, "
    "suffix cache 30, gathered rows 15, feature buffer 5)"
  )
  with_update = PLAN._replace(gradients=40 << 20, update_scratch=300 << 20)
  assert str(with_update) == (
    f"{PLAN}; update 440 MiB (resident 100, gradients 40, estimated scratch 300)"
  )


def test_update_that_does_not_fit_is_refused():
  plan = PLAN._replace(gradients=40 << 20, update_scratch=300 << 20, device=440 << 20)
  memory.check(plan, KEY)
  with pytest.raises(ConfigError, match=r"the update does not fit; lower config\.learn\.micro"):
    memory.check(plan._replace(device=(440 << 20) - 1), KEY)
  memory.check(plan._replace(device=(440 << 20) - 1, gradients=0, update_scratch=0), KEY)


def test_update_shapes_are_those_of_one_device():
  mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2), jax.devices())
  policy = make_policy(step_fixtures.step_config(), jnp.float32, mesh)
  sizes = compiled.update_shapes(policy, step_fixtures.MICRO, step_fixtures.SHAPES, 32)
  assert (sizes.prompts, sizes.prefix_tokens) == (8, 128), "over data and fsdp"
  assert (sizes.rows, sizes.tokens, sizes.logprob_tokens) == (1, 128, 128)
  assert (sizes.patches, sizes.tensor, sizes.itemsize) == (48 * 16 // 4, 2, 4)
  frozen = dataclasses.replace(policy, frozen=("vision/",))
  sizes = compiled.update_shapes(frozen, step_fixtures.MICRO, step_fixtures.SHAPES, 32)
  assert sizes.patches == 0
