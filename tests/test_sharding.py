"""The table of parameter specs, meshes and batch specs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.tiny.dense_loss import init_heads
from spatial_jax import abstract_inputs, compiled, sharding
from spatial_jax.config import ConfigError
from spatial_jax.hf import weights
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.policy.config import DecoderConfig, QwenVLConfig, VisionConfig
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


def _wide(data, fsdp, tensor):
  """A mesh of more devices than there are: only its sizes count."""
  sizes, names = (data, fsdp, tensor), ("data", "fsdp", "tensor")
  return jax.sharding.AbstractMesh(sizes, names)


# --- parameters --------------------------------------------------------------------------------


def test_every_parameter_and_moment_matches_a_rule():
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
    assert specs.pop("decoder/norm/scale") == P(None)
    assert mu.pop("decoder/norm/scale") == P(), "of a gain: one number"
    assert mu == specs, "moments lie with their parameters"
  head = {"policy": {}, "heads": init_heads(16)}
  sharding.param_shardings(head, mesh)


def test_a_policy_of_7b_divides_over_fsdp_and_tensor():
  mesh = _wide(1, 64, 4)
  for entry in weights.name_table(SEVEN):
    spec = sharding.param_spec(entry.path, entry.full_shape, mesh)
    axes = [axis for axis in spec if axis]
    if entry.kernel or "embedding" in entry.path:
      assert "fsdp" in axes, f"{entry.path} {entry.full_shape} -> {spec}"
      assert "tensor" in axes or entry.path == "vision/patch/kernel", f"{entry.path} -> {spec}"
    assert len(entry.full_shape) == len(spec)
    if entry.layers:
      assert spec[0] is None, "layers are never sharded"


def test_unstacked_layers_follow_the_same_rules():
  mesh, policy = _mesh(2, 2, 2), policy_fixtures.small_policy()
  params = jax.eval_shape(policy.init, jax.random.key(0))
  stacked = sharding.param_shardings(params, mesh)["decoder"]["layers"]
  unstacked = sharding.param_shardings(jax.eval_shape(policy.unstack, params), mesh)
  expected = [P(*place.spec[1:]) for place in jax.tree.leaves(stacked)]
  for layer in unstacked["decoder"]["layers"]:
    assert [place.spec for place in jax.tree.leaves(layer)] == expected


def test_axes_that_the_mesh_lacks_or_that_do_not_divide_are_left_out():
  path, shape = "decoder/layers/attn/k/kernel", (2, 8, 2, 4)
  assert sharding.param_spec(path, shape, _wide(1, 3, 2)) == P(None, None, "tensor", None)
  assert sharding.param_spec(path, shape, _wide(1, 2, 4)) == P(None, "fsdp", None, None)
  rollout = sharding.rollout_mesh(_mesh(2, 2, 2))
  assert sharding.param_spec(path, shape, rollout) == P(None, None, "tensor", None)


def test_an_unknown_parameter_is_an_error():
  with pytest.raises(ValueError, match=r"decoder/layers/attn/gate/weights \(2, 8\).*PARAM_RULES"):
    sharding.param_spec("decoder/layers/attn/gate/weights", (2, 8), _mesh(1, 1, 1))


# --- meshes ------------------------------------------------------------------------------------


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
  with pytest.raises(ConfigError, match="tensor=8 does not divide the 4 devices of a process"):
    sharding.island_mesh(sharding.make_mesh(sharding.MeshConfig(1, 1, 8), devices))


def test_a_mesh_that_does_not_fit_names_both_sides():
  with pytest.raises(ConfigError, match="data=3 x fsdp=2 x tensor=1 does not fit 8 devices"):
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

  return jax.tree.map(fill, shapes)


def test_a_batch_lies_by_rows_and_whole_windows():
  mesh, window = _mesh(2, 2, 2), 16
  batch = _numpy_batch(8, windows=12, frames=6)
  placed = sharding.place_train_batch(batch, window, mesh)
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  assert placed.token_RT.sharding.spec == P(("data", "fsdp"))
  assert placed.token_RT.addressable_shards[0].data.shape == (4, 128)
  assert placed.vision.frame_P.addressable_shards[0].data.shape == (3 * window,)
  assert placed.vision.frame_NS.sharding.is_fully_replicated, "6 frames do not divide over 4"
  assert placed.forbidden_V.sharding.is_fully_replicated
  odd = sharding.place_train_batch(_numpy_batch(8, windows=10, frames=4), window, mesh)
  assert odd.vision.patches_PX.sharding.is_fully_replicated, "10 windows do not divide over 4"
  assert not odd.vision.frame_NS.sharding.is_fully_replicated


def test_prompts_that_do_not_divide_are_refused():
  with pytest.raises(ConfigError, match=r"prompts of an update .* is 6: not a multiple of .* 4"):
    sharding.place_train_batch(_numpy_batch(6, 16, 4), 16, _mesh(2, 2, 2))


def test_rollout_arrays_lie_by_rows_and_heads():
  mesh = sharding.rollout_mesh(_mesh(2, 2, 2))
  arrays = {"cache": np.zeros((8, 2, 4, 4)), "few": np.zeros((2, 3, 4, 4)), "rows": np.zeros(8)}
  placed = sharding.rollout_shardings(arrays, mesh)
  assert placed["cache"].spec == P(("data",), "tensor")
  assert placed["few"].spec == P(None, None), "neither 2 rows over 4 nor 3 heads over 2"
  assert placed["rows"].spec == P(("data",))
