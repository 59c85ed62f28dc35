"""The KL reference: the same bits on the devices and on the host, and no second copy of a state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_defaults
from spatial_jax import checkpoint, compiled, sharding, train_config
from spatial_jax.checkpoint import Progress
from spatial_jax.config import ConfigError, build
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.policy import param_tree
from spatial_jax.rollout import memory
from spatial_jax.stages import loop
from spatial_jax.stages import start as start_lib
from spatial_jax.stages.load import read_policy
from spatial_jax.stages.reference import make_reference
from spatial_jax.stages.start import reference_shapes, start_of
from spatial_jax.train_config import TrainConfig
from tests import step_fixtures
from tests.test_learn_update import LOSS, MICRO, batch_of, policy_and_params

FROZEN = ("^vision/",)


def start_on(mesh, frozen=FROZEN, dtype=jnp.float32):
  """A policy with a frozen tower on a mesh, and its start."""
  policy = policy_and_params()[0]
  policy = dataclasses.replace(
    policy, mesh=mesh, frozen=frozen, compute_dtype=jnp.dtype(dtype), frozen_dtype=jnp.dtype(dtype)
  )
  flat = param_tree.flatten(policy_and_params()[1])
  params = param_tree.unflatten(
    {path: jnp.array(x, policy.param_dtype(path), copy=True) for path, x in flat.items()}
  )
  return policy, jax.device_put(params, sharding.param_shardings(params, mesh))


def small_mesh(data=1, fsdp=1):
  return sharding.make_mesh(sharding.MeshConfig(data, fsdp, 1), jax.devices()[: data * fsdp])


@pytest.mark.slow(always=True)
def test_a_reference_on_the_host_gives_the_same_bits():
  """Of every row, after the state has moved away from the start and its arrays were donated."""
  mesh = small_mesh()
  policy, start = start_on(mesh)
  run = compiled.LearnPrograms(policy, make_optimizer(step_fixtures.OPTIMIZER), LOSS, MICRO)
  batch = run.place(batch_of())
  expected = np.asarray(run.logprobs(start, batch))
  both = [reference_of(policy, start, place) for place in ("device", "host")]
  moved = jax.tree.map(lambda x: x + jnp.asarray(0.5, x.dtype), start["decoder"])
  current = {"decoder": moved, "vision": jax.tree.map(jnp.copy, start["vision"])}
  for x in jax.tree.leaves(start):
    x.delete()
  for reference in both:
    found = run.logprobs(reference.on_devices(current), batch)
    np.testing.assert_array_equal(found, expected)
  kinds = [{x.sharding.memory_kind for x in jax.tree.leaves(one.params)} for one in both]
  assert kinds == [{jax.devices()[0].default_memory().kind}, {"pinned_host"}]


def test_a_reference_holds_the_trained_parameters_in_the_compute_dtype():
  mesh = small_mesh(1, 2)
  policy, start = start_on(mesh, dtype=jnp.bfloat16)
  reference = reference_of(policy, start, "host")
  assert list(reference.params) == ["decoder"], "the frozen tower is that of the policy"
  abstract = reference_shapes(policy)
  for one, shape in zip(jax.tree.leaves(reference.params), jax.tree.leaves(abstract), strict=True):
    assert (one.shape, one.dtype) == (shape.shape, shape.dtype) == (one.shape, jnp.bfloat16)
  on_devices = reference.on_devices(start)
  assert on_devices["vision"]["patch"]["kernel"] is start["vision"]["patch"]["kernel"]
  moved = memory.bytes_of(on_devices["decoder"])
  assert moved == memory.bytes_of(abstract) < memory.bytes_of(start["decoder"]) * 0.51


def reference_of(policy, start, place):
  return make_reference(start, policy.frozen, policy.compute_dtype, place)


# --- a run -------------------------------------------------------------------------------------


def run_of(**changes):
  """(config, parts, files) of a run of the embedded policy on one device."""
  config = tiny_defaults.get_config()
  config.update_from_flattened_dict(changes)
  cfg, mesh = build(TrainConfig, dict(config)), small_mesh()
  files = read_policy(cfg.init)
  parts = train_config.training_parts(cfg, files.cfg, mesh)
  return cfg, parts, files


def test_the_plan_counts_a_reference_where_it_is():
  sizes = {}
  for place in ("device", "host"):
    cfg, parts, _ = run_of(**{"learn.loss.kl.weight": 0.1, "learn.reference": place})
    sizes[place] = train_config.whole_plan(cfg, parts, 1 << 40)
  on_device, on_host = sizes["device"], sizes["host"]
  copy = memory.bytes_of(reference_shapes(parts.policy))
  assert on_device.resident - on_host.resident == on_host.reference == copy > 0
  assert on_device.reference == 0
  expected = on_host.resident + copy + on_host.logprob_scratch
  assert on_host.reference_logprobs == expected
  assert "; reference log-probabilities " in str(on_host)
  # A phase that needs most decides.
  large = on_host._replace(logprob_scratch=1 << 41)
  assert large.total == large.reference_logprobs
  with pytest.raises(ConfigError, match="the update does not fit"):
    memory.check(large, "slots")
  cfg, parts, _ = run_of(**{"learn.loss.kl.weight": 0.0})
  assert train_config.whole_plan(cfg, parts, 1 << 40).resident == on_host.resident


def test_a_resumed_run_loads_its_start_only_for_the_reference(monkeypatch):
  """And then in the compute dtype; its state is restored without a start beside it."""
  loaded = []
  monkeypatch.setattr(
    start_lib, "load_params", lambda files, mesh, dtype_of: loaded.append(1) or {}
  )
  cfg, parts, files = run_of()
  start = (parts.policy, parts.optimizer, files, cfg.seed)
  state, reference = start_of(*start, None, resumes=True)
  assert (loaded, reference) == ([], None)
  assert {type(x) for x in jax.tree.leaves(state)} == {jax.ShapeDtypeStruct}
  monkeypatch.undo()
  cfg, parts, files = run_of(**{"learn.loss.kl.weight": 0.1, "learn.reference": "host"})
  start = (parts.policy, parts.optimizer, files, cfg.seed, "host")
  state, reference = start_of(*start, resumes=True)
  fresh, other = start_of(*start, resumes=False)
  assert {type(x) for x in jax.tree.leaves(state)} == {jax.ShapeDtypeStruct}
  jax.tree.map(np.testing.assert_array_equal, reference.params, other.params)
  kept = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(fresh)}
  assert not kept & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(other.params)}
  for shape, x in zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True):
    assert (shape.shape, shape.dtype, shape.sharding) == (x.shape, x.dtype, x.sharding)


@pytest.mark.filterwarnings("ignore")
def test_the_arrays_of_a_start_are_deleted_before_a_checkpoint_is_read(tmp_path, monkeypatch):
  state = step_fixtures.step_setup(1, 1, 1).state
  with checkpoint.Saver(tmp_path, 1) as saver:
    saver.save(state, Progress(3, None, {}))
  start = jax.tree.map(jnp.zeros_like, state)
  restore, alive = checkpoint.restore, []

  def restored(path, abstract):
    alive.extend(not x.is_deleted() for x in jax.tree.leaves(start))
    return restore(path, abstract)

  monkeypatch.setattr(checkpoint, "restore", restored)
  step, found = loop.resume(tmp_path, start)
  assert step == 3
  assert not any(alive)
  jax.tree.map(np.testing.assert_array_equal, found, state)
  assert checkpoint.exists(tmp_path)
  assert not checkpoint.exists(tmp_path / "nothing")
