import json
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spatial_jax import checkpoint
from spatial_jax.checkpoint import Progress, Saver
from spatial_jax.config import ConfigError
from spatial_jax.errors import CheckpointError
from spatial_jax.types import TrainState

CONFIG = {"seed": 0, "steps": 10, "log": {"wandb": False}, "advantage": {"alpha": 1.0}}


def progress(step, **changes):
  fields = {"schedule_step": step, "data": {"epoch": 1, "next": [3, 1]}, "benchmark": None}
  return Progress(step=step, config=CONFIG, **(fields | changes))


def train_state(value=1.0, columns=8, dtype=jnp.float32):
  """A state with the structure of a real one: nested params, AdamW moments, step."""
  params = {
    "decoder": {"q": jnp.full((4, columns), value, dtype), "scale": jnp.arange(4, dtype=dtype)},
    "embed": jnp.full((8, 2), -value, jnp.bfloat16),
  }
  with jax.numpy_dtype_promotion("standard"):
    opt_state = optax.adamw(1e-3).init(params)
  return TrainState(params, opt_state, jnp.asarray(7, jnp.int32))


def abstract(state, mesh=None, spec=P()):
  def leaf(x):
    sharding = NamedSharding(mesh, spec if x.ndim == 2 else P()) if mesh else x.sharding
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(leaf, state)


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_round_trip_of_state_and_progress(tmp_path):
  state, where = train_state(), progress(3, benchmark="vsi-bench")
  with Saver(tmp_path, keep=2) as saver:
    saver.save(state, where)
  found = checkpoint.find(tmp_path)
  assert checkpoint.read_progress(found) == where
  assert_equal(checkpoint.restore(found, abstract(state)), state)


def test_a_relative_work_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  state = train_state()
  with Saver("runs/tiny", keep=1) as saver:
    saver.save(state, progress(1))
  assert_equal(checkpoint.restore(checkpoint.find("runs/tiny"), abstract(state)), state)


def test_restores_onto_another_mesh(tmp_path):
  one = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  two = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  shardings = jax.tree.map(lambda x: x.sharding, abstract(train_state(), one, P(None, "fsdp")))
  shardings.params["embed"] = shardings.opt_state[0].mu["embed"] = NamedSharding(one, P("fsdp"))
  shardings.opt_state[0].nu["embed"] = NamedSharding(one, P("fsdp"))
  state = jax.device_put(train_state(), shardings)
  with Saver(tmp_path, keep=1) as saver:
    saver.save(state, progress(1))
  wanted = abstract(state, two, P("fsdp", "tensor"))
  restored = checkpoint.restore(checkpoint.find(tmp_path), wanted)
  assert restored.params["decoder"]["q"].sharding == NamedSharding(two, P("fsdp", "tensor"))
  assert_equal(restored, state)


def test_saving_survives_donation(tmp_path):
  """What is saved is the state at the call, though the next update takes its buffers at once."""
  state = train_state(1.0)
  wanted = abstract(state)
  double = jax.jit(
    lambda s: jax.tree.map(lambda x: x * jnp.asarray(2, x.dtype), s), donate_argnums=0
  )
  with Saver(tmp_path, keep=3) as saver:
    for step in range(3):
      saver.save(state, progress(step))
      state = double(state)
  for step in range(3):
    restored = checkpoint.restore(tmp_path / "checkpoints" / str(step), wanted)
    assert float(restored.params["decoder"]["q"][0, 0]) == 2.0**step
    assert int(restored.step) == 7 * 2**step


def test_keeps_the_last_n_and_finds_the_newest(tmp_path):
  assert checkpoint.latest(tmp_path) is None
  assert checkpoint.latest(tmp_path / "nowhere") is None
  with Saver(tmp_path, keep=2) as saver:
    for step in (2, 9, 10):
      saver.save(train_state(step), progress(step))
  folder = tmp_path / "checkpoints"
  assert sorted(path.name for path in folder.iterdir()) == ["10", "9"]
  for path in (tmp_path, folder, folder / "10"):
    assert checkpoint.find(path).name == "10"
  assert checkpoint.find(folder / "9").name == "9"


def test_goes_on_in_the_same_folder(tmp_path):
  for step in (1, 2, 3):
    with Saver(tmp_path, keep=2) as saver:
      saver.save(train_state(step), progress(step))
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
  with Saver(tmp_path, keep=2) as saver:
    with pytest.raises(CheckpointError, match="3 exists; resume"):
      saver.save(train_state(), progress(3))
    saver.save(train_state(), progress(4))
    with pytest.raises(CheckpointError, match="4 exists; resume"):  # still being written
      saver.save(train_state(), progress(4))


def test_parameters_alone(tmp_path, caplog):
  state = train_state(3.0)
  with Saver(tmp_path, keep=1) as saver:
    saver.save(state, progress(1))
  params = checkpoint.restore_params(checkpoint.find(tmp_path), abstract(state).params)
  assert_equal(params, state.params)
  assert "deprecated" not in caplog.text  # Orbax logs such warnings


@pytest.mark.parametrize("exists", [True, False])
def test_missing_checkpoint_names_path_and_mend(tmp_path, exists):
  path = tmp_path if exists else tmp_path / "run"
  with pytest.raises(CheckpointError) as error:
    checkpoint.find(path)
  what = "holds no complete checkpoint" if exists else "does not exist"
  assert f"checkpoint {path} {what}; give" in str(error.value)
  assert "\n" not in str(error.value)


def test_another_programs_checkpoint(tmp_path):
  from orbax.checkpoint import v1 as ocp

  ocp.save(tmp_path / "5", train_state())
  with pytest.raises(CheckpointError, match="5 has no record of its progress; give"):
    checkpoint.read_progress(checkpoint.find(tmp_path / "5"))


def test_wrong_shapes_dtypes_and_leaves_are_all_named(tmp_path):
  state = train_state()
  with Saver(tmp_path, keep=1) as saver:
    saver.save(state, progress(1))
  wrong = train_state(columns=6).params
  wrong["decoder"]["scale"] = wrong["decoder"]["scale"].astype(jnp.bfloat16)
  wrong["new"] = wrong.pop("embed")
  found = checkpoint.find(tmp_path)
  with pytest.raises(CheckpointError) as error:
    checkpoint.restore_params(found, abstract(wrong))
  for part in (
    "params/decoder/q: expected float32[4, 6], checkpoint has float32[4, 8]",
    "params/decoder/scale: expected bfloat16[4], checkpoint has float32[4]",
    "params/new is missing",
    "params/embed is unknown to this model",
    "opt_state",
  ):
    assert (part in str(error.value)) == (part != "opt_state")
  with pytest.raises(CheckpointError, match=r"opt_state/0/mu/decoder/q: expected float32\[4, 6\]"):
    checkpoint.restore(found, abstract(train_state(columns=6)))


# --- killed at any time ------------------------------------------------------------------------

WRITER = """
  import sys
  import jax.numpy as jnp
  from spatial_jax.checkpoint import Progress, Saver
  from spatial_jax.types import TrainState
  with Saver(sys.argv[1], keep=2) as saver:
    for step in range(int(sys.argv[2]), 10_000):
      w = jnp.full((256, 512), step, jnp.float32)
      state = TrainState({"w": w}, {}, jnp.asarray(step, jnp.int32))
      saver.save(state, Progress(step, step, {"next": step}, None, {}))
"""


def test_killed_while_saving_leaves_a_whole_checkpoint(tmp_path):
  zero = jnp.zeros((), jnp.int32)
  wanted = abstract(TrainState({"w": jnp.zeros((256, 512))}, {}, zero))
  last = -1
  for delay_s in (0.0, 0.013, 0.029, 0.041):
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), str(last + 1)]
    with subprocess.Popen(command) as process:
      while not (newest := checkpoint.latest(tmp_path)) or int(newest.name) < last + 3:
        assert process.poll() is None
        time.sleep(0.005)
      time.sleep(delay_s)
      process.send_signal(signal.SIGKILL)
    found = checkpoint.find(tmp_path)
    step = checkpoint.read_progress(found).step
    restored = checkpoint.restore(found, wanted)
    assert step == int(found.name) == int(restored.step)
    assert step > last
    np.testing.assert_array_equal(restored.params["w"], np.full((256, 512), step, np.float32))
    last = step
  with Saver(tmp_path, keep=1) as saver:
    saver.save(restored, progress(last + 1))
  names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
  assert names == [str(last + 1)]  # what the kill left half-written is gone


# --- the work directory's config ---------------------------------------------------------------


def test_claim_writes_and_accepts_the_same_config(tmp_path):
  run = tmp_path / "run"
  checkpoint.bind_workdir(run, CONFIG, may_differ=())
  checkpoint.bind_workdir(run, json.loads(json.dumps(CONFIG)), may_differ=())
  assert json.loads((run / "config.json").read_text()) == CONFIG
  assert [path.name for path in run.iterdir()] == ["config.json"]


def test_claim_compares_values_and_not_their_text(tmp_path):
  batches = [{"scenes": 16, "group": 6, "limits": {"turns": 2, "images": 4}}, {"scenes": 8}]
  (tmp_path / "config.json").write_text(json.dumps({"batches": batches, "seed": 0, "rate": 1}))
  turned = {"images": 4, "turns": 2}
  same = [{"limits": turned, "group": 6, "scenes": 16}, {"scenes": 8}]
  checkpoint.bind_workdir(tmp_path, {"seed": 0, "rate": 1.0, "batches": same}, ())
  for other in (same[::-1], [same[0] | {"group": 7}, same[1]], [same[0] | {"limits": {}}, same[1]]):
    with pytest.raises(ConfigError, match=r"another config: config\.batches is .*; use a new"):
      checkpoint.bind_workdir(tmp_path, {"seed": 0, "rate": 1.0, "batches": other}, ())
  with pytest.raises(ConfigError, match=r"config\.seed is not set, workdir has 0; use"):
    checkpoint.bind_workdir(tmp_path, {"rate": 1.0, "batches": same}, ())


def test_claim_lets_listed_keys_and_groups_change(tmp_path):
  checkpoint.bind_workdir(tmp_path, CONFIG, ())
  changed = CONFIG | {"steps": 20, "log": {"wandb": True, "every": 5}}
  checkpoint.bind_workdir(tmp_path, changed, may_differ=("steps", "log"))
  assert json.loads((tmp_path / "config.json").read_text()) == changed


def test_claim_refuses_another_config_and_overwrites_nothing(tmp_path):
  checkpoint.bind_workdir(tmp_path, CONFIG, ())
  before = (tmp_path / "config.json").read_text()
  changed = {"seed": 1, "steps": 20, "log": CONFIG["log"], "advantage": {"clip": 0.2}}
  with pytest.raises(ConfigError) as error:
    checkpoint.bind_workdir(tmp_path, changed, may_differ=("steps",))
  assert str(error.value) == (
    "work directory of another config: config.advantage.alpha is not set, workdir has 1.0; "
    "config.advantage.clip is 0.2, workdir has not set; config.seed is 1, workdir has 0; "
    "use a new --workdir"
  )
  assert (tmp_path / "config.json").read_text() == before


def test_claim_of_a_damaged_work_directory(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(CheckpointError, match=r"config\.json is not JSON .* use a new --workdir"):
    checkpoint.bind_workdir(tmp_path, CONFIG, ())
