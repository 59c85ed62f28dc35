"""Checkpoints: round trips, other meshes, retention, kills, damage and full disks."""

import errno
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spatial_jax import checkpoint
from spatial_jax.checkpoint import Progress, Saver
from spatial_jax.errors import CheckpointError
from spatial_jax.types import TrainState


def progress(step, **changes):
  fields = {"benchmark": None}
  return Progress(step=step, config={"seed": 0, "log": {}}, **(fields | changes))


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


def test_relative_work_directory(tmp_path, monkeypatch):
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


def test_donation_after_save_does_not_change_the_checkpoint(tmp_path):
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


def test_a_second_saver_continues_in_the_same_folder(tmp_path):
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


def test_parameters_are_restored_alone(tmp_path, caplog):
  state = train_state(3.0)
  with Saver(tmp_path, keep=1) as saver:
    saver.save(state, progress(1))
  params = checkpoint.restore_params(checkpoint.find(tmp_path), abstract(state).params)
  assert_equal(params, state.params)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
  rounded = checkpoint.restore_params(checkpoint.find(tmp_path), abstract(half))
  assert_equal(rounded, half)
  assert {x.dtype for x in jax.tree.leaves(rounded)} == {jnp.dtype(jnp.bfloat16)}
  assert not caplog.text  # Orbax logs deprecations


@pytest.mark.parametrize("exists", [True, False])
def test_missing_checkpoint_names_path_and_fix(tmp_path, exists):
  path = tmp_path if exists else tmp_path / "run"
  with pytest.raises(CheckpointError) as error:
    checkpoint.find(path)
  what = "has no complete checkpoint" if exists else "does not exist"
  assert f"{path} {what}; give" in str(error.value)
  assert "\n" not in str(error.value)


def test_checkpoint_of_another_program_is_refused(tmp_path):
  with ocp.StandardCheckpointer() as other:
    other.save(tmp_path / "5" / "state", train_state().params)
  with pytest.raises(CheckpointError, match=r"5 is damaged: files.json is missing; use another"):
    checkpoint.find(tmp_path / "5")


def test_wrong_shapes_dtypes_and_leaves_are_all_named(tmp_path):
  state = train_state()
  with Saver(tmp_path, keep=1) as saver:
    saver.save(state, progress(1))
  wrong = train_state(columns=6).params
  wrong["decoder"]["scale"] = wrong["decoder"]["scale"].astype(jnp.bfloat16)
  wrong["new"] = wrong.pop("embed")
  found = checkpoint.find(tmp_path)
  with pytest.raises(CheckpointError) as error:
    checkpoint.restore(found, abstract(state._replace(params=wrong)))
  for part in (
    "params/decoder/q: expected float32[4, 6], checkpoint has float32[4, 8]",
    "params/decoder/scale: expected bfloat16[4], checkpoint has float32[4]",
    "params/new is missing",
    "params/embed is unknown to this model",
  ):
    assert part in str(error.value)
  assert "opt_state" not in str(error.value)
  with pytest.raises(CheckpointError, match=r"opt_state/0/mu/decoder/q: expected float32\[4, 6\]"):
    checkpoint.restore(found, abstract(train_state(columns=6)))


# --- killed at any time --------------------------------------------------------------------------

WRITER = """
  import sys
  import jax.numpy as jnp
  from spatial_jax.checkpoint import Progress, Saver
  from spatial_jax.types import TrainState
  with Saver(sys.argv[1], keep=2) as saver:
    for step in range(int(sys.argv[2]), 10_000):
      w = jnp.full((256, 512), step, jnp.float32)
      state = TrainState({"w": w}, {}, jnp.asarray(step, jnp.int32))
      saver.save(state, Progress(step, None, {}))
"""


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
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
  assert names == [str(last + 1)]  # the half-written checkpoint of the kill is removed


# --- damaged -------------------------------------------------------------------------------------


def data_file(step):
  """The largest file of the arrays of a checkpoint."""
  return max((step / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def flip(path, position):
  content = bytearray(path.read_bytes())
  content[position] ^= 1
  path.write_bytes(content)


DAMAGES = {
  "truncated": (lambda step: data_file(step).write_bytes(b""), r"state/\S+ has 0 of [\d,]+ bytes"),
  "changed": (lambda step: flip(data_file(step), 100), r"state/\S+ has other bytes"),
  "metadata": (lambda step: flip(step / "state/_METADATA", 3), "state/_METADATA has other bytes"),
  "no state": (lambda step: shutil.rmtree(step / "state"), r"state/\S+ is missing"),
  "no progress": (lambda step: shutil.rmtree(step / "progress"), r"progress/\S+ is missing"),
  "no list": (lambda step: (step / "files.json").unlink(), "files.json is missing"),
  "broken list": (lambda step: (step / "files.json").write_text("[1"), "files.json cannot be read"),
  "empty": (lambda step: [shutil.rmtree(step), step.mkdir()], "files.json is missing"),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  """A work directory with checkpoints 1 and 2; parameters that do not compress."""
  workdir, state = tmp_path_factory.mktemp("run"), train_state()
  state.params["decoder"]["q"] = jax.random.normal(jax.random.key(0), (64, 64))
  with Saver(workdir, keep=2) as saver:
    for step in (1, 2):
      saver.save(state, progress(step))
  return workdir, state


@pytest.fixture
def run(two_steps, tmp_path):
  """A copy of those checkpoints."""
  shutil.copytree(two_steps[0], tmp_path / "run")
  return tmp_path / "run"


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, two_steps, capsys, kind):
  damage, problem = DAMAGES[kind]
  damage(run / "checkpoints" / "2")
  found = checkpoint.find(run)
  (line,) = capsys.readouterr().err.splitlines()
  assert re.fullmatch(rf"warning: checkpoint \S+/2 is damaged: {problem}.*; using \S+/1", line)
  assert found.name == "1"
  assert_equal(checkpoint.restore(found, abstract(two_steps[1])), two_steps[1])


def test_only_damaged_checkpoints_are_an_error_that_names_folder_and_fix(run):
  for step in ("1", "2"):
    data_file(run / "checkpoints" / step).unlink()
  with pytest.raises(CheckpointError) as error:
    checkpoint.latest(run)
  message = str(error.value)
  assert re.search(r"/2 is damaged: state/\S+ is missing; damaged too: 1; delete", message)
  assert message.endswith(f"; delete {run / 'checkpoints'} to start again")


def test_a_damaged_checkpoint_that_is_named_itself_points_to_a_whole_one(run):
  data_file(run / "checkpoints" / "2").unlink()
  with pytest.raises(CheckpointError, match=rf"/2 is damaged: .*; use {run}/checkpoints/1$"):
    checkpoint.find(run / "checkpoints" / "2")


def test_saving_replaces_a_damaged_checkpoint(run, capsys):
  data_file(run / "checkpoints" / "2").unlink()
  with Saver(run, keep=2) as saver:
    saver.save(train_state(5.0), progress(2))
  assert checkpoint.find(run).name == "2"
  assert not capsys.readouterr().err


@pytest.mark.parametrize(("damaged", "kept"), [(2, ["1", "3"]), (7, ["2", "3"])])
def test_damaged_checkpoints_do_not_count_as_kept(run, damaged, kept):
  shutil.rmtree(run / "checkpoints" / str(damaged), ignore_errors=True)
  (run / "checkpoints" / str(damaged)).mkdir()
  with Saver(run, keep=2) as saver:
    saver.save(train_state(), progress(3))
  assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept


def test_progress_of_another_version_is_refused(run):
  step = run / "checkpoints" / "2"
  (step / "progress" / "metadata").write_text('{"step": 2}')
  with pytest.raises(CheckpointError, match="2 was written by another version of this program"):
    checkpoint.read_progress(step)


# --- disk full -----------------------------------------------------------------------------------

FULL = """
  import pathlib, resource, signal, sys
  import jax, jax.numpy as jnp
  from absl import flags
  from spatial_jax import cli
  from spatial_jax.checkpoint import Progress, Saver
  from spatial_jax.types import TrainState

  def train(_):
    with Saver(sys.argv[1], keep=9) as saver:
      for step in range(1, 9):
        rows = 10 if step < 3 else 400
        w = jax.random.normal(jax.random.key(step), (8, rows, 400))
        state = TrainState({str(i): w[i] for i in range(8)}, {}, jnp.asarray(step, jnp.int32))
        saver.save(state, Progress(step, None, {}))

  if sys.argv[2] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
  cli.launch(train, "stopped", read=lambda argv: flags.FLAGS(argv))
"""


@pytest.fixture
def small_disk(tmp_path):
  """A folder of 3 MB, or without the right to mount one a limit of file sizes; and the error."""
  mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
  if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
    yield tmp_path, "limit", "File too large; raise the limit of file sizes"
  else:
    yield tmp_path, "mount", "No space left on device; free some space"
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_one_line_and_keeps_older_checkpoints(small_disk):
  folder, mode, reason = small_disk
  command = [sys.executable, "-c", textwrap.dedent(FULL), str(folder / "run"), mode]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2, done.stderr
  lines = done.stderr.splitlines()
  assert len(lines) == 1, done.stderr
  (line,) = lines
  assert line.startswith("error: checkpoint 3 cannot be written to ")
  assert reason in line
  names = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
  assert names == ["1", "2"]  # the partial folder of step 3 is removed
  assert checkpoint.find(folder / "run").name == "2"


def refuse(code):
  def write(*_, **__):
    raise OSError(code, os.strerror(code))

  return write


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_refused_write_is_one_line(tmp_path, monkeypatch, code):
  with Saver(tmp_path, keep=2) as saver:
    saver.save(train_state(), progress(1))
  saver = Saver(tmp_path, keep=2)
  monkeypatch.setattr(pathlib.Path, "write_text", refuse(code))  # of files.json
  saver.save(train_state(), progress(2))
  with pytest.raises(CheckpointError) as error:
    saver.close()
  assert os.strerror(code) in str(error.value)
  assert "\n" not in str(error.value)
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_partial_folder_that_is_still_written_is_removed(tmp_path, monkeypatch):
  """A thread that writes another array makes the first removal fail."""
  remove, calls = shutil.rmtree, []

  def remove_late(folder, **options):
    calls.append(folder)
    if len(calls) > 2:
      remove(folder, **options)

  saver = Saver(tmp_path, keep=2)
  monkeypatch.setattr(pathlib.Path, "write_text", refuse(errno.ENOSPC))  # of files.json
  monkeypatch.setattr(checkpoint.shutil, "rmtree", remove_late)
  saver.save(train_state(), progress(1))
  with pytest.raises(CheckpointError):
    saver.close()
  saver.close()  # the failure is reported once
  assert len(calls) > 2
  assert list((tmp_path / "checkpoints").iterdir()) == []
