"""Rules of parameters, meshes, and shardings of batches and caches."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.tiny.dense_loss import init_heads
from spatial_jax import abstract_inputs, compiled, sharding
from spatial_jax.config import ConfigError
from spatial_jax.errors import UserError
from spatial_jax.hf import weights
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.policy import cache, lora
from spatial_jax.policy.config import DecoderConfig, QwenVLConfig, VisionConfig
from spatial_jax.policy.int8 import quantized
from spatial_jax.policy.qwen_vl import make_policy
from tests import policy_fixtures, step_fixtures

# Qwen2.5-VL-7B.
SEVEN = QwenVLConfig(
  VisionConfig(
    32, 1280, 16, 3420, 14, 2, 2, 112, (7, 15, 23, 31), 1e-6, *policy_fixtures.QWEN2_5_TOWER
  ),
  DecoderConfig(
    *(28, 3584, 28, 4, 128, 18944, 152064, 1e6, (16, 24, 24), 1e-6, False),
    *policy_fixtures.QWEN2_DECODER,
  ),
  *(151655, 151656, 151652, 151653, 2, "qwen2_5_vl"),
)


def _mesh(data, fsdp, tensor):
  cfg = sharding.MeshConfig(data, fsdp, tensor)
  return sharding.make_mesh(cfg, jax.devices()[: data * fsdp * tensor])


def _abstract_mesh(data, fsdp, tensor):
  """A mesh without devices."""
  sizes, names = (data, fsdp, tensor), ("data", "fsdp", "tensor")
  return jax.sharding.AbstractMesh(sizes, names)


# --- parameters --------------------------------------------------------------------------------


def _paths(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}


def test_every_rule_is_needed_and_no_parameter_matches_two():
  """Over all families, their adapters, kernels in 8 bits and the heads of pretraining."""
  paths = _paths({"heads": init_heads(16)})
  adapters = lora.LoraConfig(("/kernel$",), 2, 1.0)
  for cfg in policy_fixtures.family_configs().values():
    policy = make_policy(cfg, jnp.float32)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    adapted = dataclasses.replace(policy, lora=adapters)
    paths |= _paths(jax.eval_shape(adapted.init, jax.random.key(0)))
    paths |= _paths(jax.eval_shape(lambda p, policy=policy: quantized(policy.unstack(p)), params))
  paths = {path.removesuffix("/qvalue") for path in paths}
  matches = {
    pattern: {path for path in paths if re.search(pattern, path)}
    for pattern, _ in sharding.PARAM_RULES
  }
  assert all(matches.values()), [pattern for pattern, found in matches.items() if not found]
  assert sum(map(len, matches.values())) == len(set.union(*matches.values())) == len(paths)


def test_every_parameter_and_moment_is_sharded_alike():
  mesh, leaves = _mesh(2, 2, 2), jax.tree_util.tree_leaves_with_path
  name_of = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
  for tied in (True, False):
    policy = make_policy(policy_fixtures.small_config(tied), jnp.float32, mesh)
    state = compiled.abstract_state(policy, make_optimizer(step_fixtures.OPTIMIZER), mesh)
    assert state.params["decoder"]["layers"]["attn"]["q"]["kernel"].sharding.spec == P(
      None, "fsdp", "tensor", None
    )
    specs = {name_of(path): x.sharding.spec for path, x in leaves(state.params)}
    mu = {
      name_of(path).split("/mu/")[1]: x.sharding.spec
      for path, x in leaves(state.opt_state)
      if "/mu/" in name_of(path)
    }
    assert mu == specs, "moments are sharded like their parameters"


def test_a_policy_of_7b_divides_over_fsdp_and_tensor():
  mesh = _abstract_mesh(1, 64, 4)
  for entry in weights.name_table(SEVEN):
    spec = sharding.param_spec(entry.path, entry.full_shape, mesh)
    axes = [axis for axis in spec if axis]
    if entry.kernel or "embedding" in entry.path:
      assert "fsdp" in axes, f"{entry.path} {entry.full_shape} -> {spec}"
      assert "tensor" in axes or entry.path == "vision/patch/kernel", f"{entry.path} -> {spec}"
    assert len(entry.full_shape) == len(spec)
    if entry.layers:
      assert spec[0] is None, "the layer axis is not sharded"


def test_unstacked_layers_follow_the_same_rules():
  mesh, policy = _mesh(2, 2, 2), policy_fixtures.small_policy()
  params = jax.eval_shape(policy.init, jax.random.key(0))
  stacked = sharding.param_shardings(params, mesh)["decoder"]["layers"]
  unstacked = sharding.param_shardings(jax.eval_shape(policy.unstack, params), mesh)
  expected = [P(*place.spec[1:]) for place in jax.tree.leaves(stacked)]
  for layer in unstacked["decoder"]["layers"]:
    assert [place.spec for place in jax.tree.leaves(layer)] == expected


def test_axes_that_the_mesh_lacks_or_that_do_not_divide_are_replicated():
  path, shape = "decoder/layers/attn/k/kernel", (2, 8, 2, 4)
  assert sharding.param_spec(path, shape, _abstract_mesh(1, 3, 2)) == P(None, None, "tensor", None)
  assert sharding.param_spec(path, shape, _abstract_mesh(1, 2, 4)) == P(None, "fsdp", None, None)
  rollout = sharding.rollout_mesh(_mesh(2, 2, 2))
  assert sharding.param_spec(path, shape, rollout) == P(None, None, "tensor", None)


def test_a_parameter_needs_exactly_one_rule(monkeypatch):
  mesh = _mesh(1, 1, 1)
  unknown = r"one rule of PARAM_RULES must match parameter .*gate/weights \(2, 8\); matching: none"
  with pytest.raises(ValueError, match=unknown):
    sharding.param_spec("decoder/layers/attn/gate/weights", (2, 8), mesh)
  rules = (*sharding.PARAM_RULES, (r"q/kernel$", P()))
  monkeypatch.setattr(sharding, "PARAM_RULES", rules)
  with pytest.raises(
    ValueError, match=r"attn/q/kernel .*matching: attn/\[qkv\]/kernel\$, q/kernel\$"
  ):
    sharding.param_spec("decoder/layers/attn/q/kernel", (2, 8, 2, 4), mesh)


def test_a_parameter_with_fewer_axes_than_its_rule_is_an_error():
  with pytest.raises(ValueError, match=r"attn/q/kernel \(8, 8\) has fewer axes than its rule"):
    sharding.param_spec("decoder/layers/attn/q/kernel", (8, 8), _mesh(1, 1, 1))


def test_axes_that_do_not_divide_are_reported_in_one_line():
  params = jax.eval_shape(policy_fixtures.small_policy().init, jax.random.key(0))
  assert sharding.replication_report(params, _abstract_mesh(4, 2, 2)) is None
  report = sharding.replication_report(params, _abstract_mesh(1, 5, 4))
  attention = "decoder/layers/attn/"
  heads = ", ".join(f"{attention}{name}" for name in ("k/bias", "k/kernel", "v/bias", "v/kernel"))
  assert f"2 over tensor=4 ({heads}, " in report, "KV heads; then two heads of the vision tower"
  assert re.search(rf"48 over fsdp=5 \([^)]*{attention}q/kernel[,)]", report)
  assert "norm" not in report, "no rule shards norms"
  assert "\n" not in report


# --- meshes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("key", "value"),
  [("data", 0), ("data", -2), ("data", True), ("fsdp", 0), ("fsdp", 2.0), ("tensor", -1)],
)
def test_mesh_sizes_outside_their_range_are_refused(key, value):
  with pytest.raises(ConfigError, match=f"{key} is {value} and must be a whole number, at least 1"):
    sharding.MeshConfig(**({"data": -1, "fsdp": 1, "tensor": 1} | {key: value}))


def test_several_processes_are_refused(monkeypatch):
  sharding.refuse_several_processes()
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(
    UserError, match="several processes are not supported yet; run one process per"
  ):
    sharding.refuse_several_processes()


def test_meshes_hold_the_same_devices_in_the_same_order():
  train = _mesh(2, 2, 2)
  islands, local = sharding.island_mesh(train), sharding.rollout_mesh(train)
  assert dict(islands.shape) == {"island": 1, "data": 4, "tensor": 2}
  assert dict(local.shape) == {"data": 4, "tensor": 2}
  assert train.devices.reshape(-1).tolist() == islands.devices.reshape(-1).tolist()
  assert train.devices.reshape(-1).tolist() == local.devices.reshape(-1).tolist()


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  id: int
  process_index: int


def test_a_mesh_keeps_the_devices_of_a_process_together():
  devices = [FakeDevice(i, i % 2) for i in range(8)]
  mesh = sharding.make_mesh(sharding.MeshConfig(-1, 2, 2), devices)
  assert [d.process_index for d in mesh.devices.flat] == [0] * 4 + [1] * 4
  islands = sharding.island_mesh(mesh)
  assert dict(islands.shape) == {"island": 2, "data": 2, "tensor": 2}
  assert {d.process_index for d in sharding.rollout_mesh(mesh).devices.flat} == {0}
  with pytest.raises(ConfigError, match=r"mesh\.tensor is 8 and does not divide the 4 devices"):
    sharding.island_mesh(sharding.make_mesh(sharding.MeshConfig(1, 1, 8), devices))


def test_a_mesh_that_does_not_fit_names_sizes_and_devices():
  with pytest.raises(ConfigError, match="data=3 x fsdp=2 x tensor=1 and does not fit 8 devices"):
    sharding.make_mesh(sharding.MeshConfig(3, 2, 1), jax.devices())
  with pytest.raises(ConfigError, match="does not fit 8 devices"):
    sharding.make_mesh(sharding.MeshConfig(-1, 16, 1), jax.devices())


# --- batches -----------------------------------------------------------------------------------


def _numpy_batch(prompts, windows, frames):
  generator = np.random.default_rng(0)
  vision = policy_fixtures.small_config(True).vision
  cfg = dataclasses.replace(
    step_fixtures.SHAPES,
    vision=dataclasses.replace(step_fixtures.ROLLOUT.vision, windows=(windows,), frames=(frames,)),
  )
  shapes = abstract_inputs.train_batch(vision, prompts, 2 * prompts, cfg)

  def fill(x):
    return generator.integers(0, 2, x.shape).astype(x.dtype)

  batch = jax.tree.map(fill, shapes)
  prefix_R = np.repeat(np.arange(prompts, dtype=np.int32), 2)
  return batch._replace(rows=batch.rows._replace(prefix_R=prefix_R))


def test_a_batch_is_sharded_by_rows_and_whole_windows():
  mesh, window = _mesh(2, 2, 2), 16
  batch = _numpy_batch(8, windows=12, frames=6)
  placed = sharding.place_train_batch(batch, window, mesh)
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  assert placed.rows.tokens.token_RT.sharding.spec == P(("data", "fsdp"))
  assert placed.rows.tokens.token_RT.addressable_shards[0].data.shape == (4, 128)
  assert placed.vision.frame_P.addressable_shards[0].data.shape == (3 * window,)
  assert placed.vision.frame_NS.sharding.is_fully_replicated, "6 frames do not divide over 4"
  assert placed.forbidden_V.sharding.is_fully_replicated
  odd = sharding.place_train_batch(_numpy_batch(8, windows=10, frames=4), window, mesh)
  assert odd.vision.patches_PX.sharding.is_fully_replicated, "10 windows do not divide over 4"
  assert not odd.vision.frame_NS.sharding.is_fully_replicated


def test_prompts_that_do_not_divide_are_refused():
  with pytest.raises(
    ConfigError, match=r"config\.rollout\.prompts\) is 6 and must be a multiple of"
  ):
    sharding.place_train_batch(_numpy_batch(6, 16, 4), 16, _mesh(2, 2, 2))


def test_caches_are_sharded_by_rows_and_heads_and_known_by_type():
  """An array with four axes that is no KV has no heads."""
  mesh = sharding.rollout_mesh(_mesh(2, 2, 2))
  heads, other = np.zeros((8, 2, 4, 4)), np.zeros((8, 2, 4, 4))
  few = cache.KV(np.zeros((2, 3, 4, 4)), np.zeros((2, 3, 4, 4)))
  tree = {"cache": cache.KV(heads, heads), "few": few, "other": other, "rows": np.zeros(8)}
  places = cache.rollout_shardings(tree, mesh)
  assert places["cache"].k_RKSC.spec == places["cache"].v_RKSC.spec == P(("data",), "tensor")
  assert places["few"].k_RKSC.spec == P(None, None), "neither 2 rows over 4 nor 3 heads over 2"
  assert places["other"].spec == places["rows"].spec == P(("data",))
