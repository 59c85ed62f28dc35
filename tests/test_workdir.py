"""The work directory: paths, the lock, and the config that a resumed run must share."""

import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

import spatial_jax
from configs import tiny_defaults, tiny_pretrain
from experiments.tiny import pretrain
from spatial_jax import chat, cli
from spatial_jax import workdir as workdir_lib
from spatial_jax.config import ConfigError, build
from spatial_jax.data.source import SourceConfig, make_source
from spatial_jax.errors import CheckpointError, UserError
from spatial_jax.tools import export, verify
from spatial_jax.workdir import bind_workdir, find_path, lock_workdir, to_path, write_text

CONFIG = {"seed": 0, "steps": 10, "log": {"wandb": False}, "advantage": {"alpha": 1.0}}


# --- the config ----------------------------------------------------------------------------------


def test_bind_writes_and_accepts_the_same_config(tmp_path):
  run = tmp_path / "run"
  bind_workdir(run, CONFIG, may_differ=())
  bind_workdir(run, json.loads(json.dumps(CONFIG)), may_differ=())
  assert json.loads((run / "config.json").read_text()) == CONFIG
  assert sorted(path.name for path in run.iterdir()) == ["config.json", "lock"]


def test_bind_compares_values_and_not_their_text(tmp_path):
  batches = [{"scenes": 16, "group": 6, "limits": {"turns": 2, "images": 4}}, {"scenes": 8}]
  (tmp_path / "config.json").write_text(json.dumps({"batches": batches, "seed": 0, "rate": 1}))
  turned = {"images": 4, "turns": 2}
  same = [{"limits": turned, "group": 6, "scenes": 16}, {"scenes": 8}]
  bind_workdir(tmp_path, {"seed": 0, "rate": 1.0, "batches": same}, ())
  for other in (same[::-1], [same[0] | {"group": 7}, same[1]], [same[0] | {"limits": {}}, same[1]]):
    with pytest.raises(ConfigError, match=r"another config: config\.batches is .*; use a new"):
      bind_workdir(tmp_path, {"seed": 0, "rate": 1.0, "batches": other}, ())
  with pytest.raises(ConfigError, match=r"config\.seed is not set, workdir has 0; use"):
    bind_workdir(tmp_path, {"rate": 1.0, "batches": same}, ())


def test_bind_lets_listed_keys_and_groups_change(tmp_path):
  bind_workdir(tmp_path, CONFIG, ())
  changed = CONFIG | {"steps": 20, "log": {"wandb": True, "every": 5}}
  bind_workdir(tmp_path, changed, may_differ=("steps", "log"))
  assert json.loads((tmp_path / "config.json").read_text()) == changed


def test_bind_refuses_another_config_and_overwrites_nothing(tmp_path):
  bind_workdir(tmp_path, CONFIG, ())
  before = (tmp_path / "config.json").read_text()
  changed = {"seed": 1, "steps": 20, "log": CONFIG["log"], "advantage": {"clip": 0.2}}
  with pytest.raises(ConfigError) as error:
    bind_workdir(tmp_path, changed, may_differ=("steps",))
  assert str(error.value) == (
    "work directory of another config: config.advantage.alpha is not set, workdir has 1.0; "
    "config.advantage.clip is 0.2, workdir has not set; config.seed is 1, workdir has 0; "
    "use a new --workdir"
  )
  assert (tmp_path / "config.json").read_text() == before


def test_bind_of_a_damaged_config_names_the_file(tmp_path):
  for text, problem in (("{", "is not JSON"), ("[1]", "is not the config of a run")):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json {problem}.*; use a new --workdir"):
      bind_workdir(tmp_path, CONFIG, ())
    assert (tmp_path / "config.json").read_text() == text


# --- the lock ------------------------------------------------------------------------------------

RUN = """
  import sys, time
  from spatial_jax.workdir import bind_workdir
  bind_workdir(sys.argv[1], {}, ())
  print("locked", flush=True)
  time.sleep(600)
"""


@pytest.fixture
def other_run(tmp_path):
  """Another process that holds the lock of the work directory."""
  command = [sys.executable, "-c", textwrap.dedent(RUN), str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path, other_run):
  with pytest.raises(CheckpointError) as error:
    bind_workdir(tmp_path, CONFIG, ())
  line = f"--workdir={tmp_path} is in use by process {other_run.pid} on {os.uname().nodename}; stop"
  assert str(error.value).startswith(line)
  assert "\n" not in str(error.value)
  assert json.loads((tmp_path / "config.json").read_text()) == {}
  other_run.send_signal(signal.SIGKILL)
  other_run.wait()
  bind_workdir(tmp_path, {}, ())
  assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_one_process_may_lock_twice_and_a_stale_file_does_not_matter(tmp_path):
  (tmp_path / "lock").write_text("process 1 on elsewhere, with a long name that must not stay")
  lock_workdir(tmp_path)
  lock_workdir(tmp_path)
  assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
  def refuse(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(workdir_lib.fcntl, "flock", refuse)
  lock_workdir(tmp_path)
  assert "cannot be locked" in capsys.readouterr().err


# --- paths ---------------------------------------------------------------------------------------


def test_a_work_directory_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  for name, problem in (("file", "is a file"), ("file/run", r"cannot be written \(Not a dir.*\)")):
    with pytest.raises(CheckpointError, match=rf"--workdir=\S+/{name} {problem}; choose another"):
      bind_workdir(tmp_path / name, CONFIG, ())

  def refuse(*_, **__):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

  monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
  with pytest.raises(CheckpointError, match=r"cannot be written \(Permission denied\); choose"):
    bind_workdir(tmp_path / "run", CONFIG, ())


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "results.json"
  write_text(path, "old")

  def fill(self, text, **_):
    os.truncate(os.open(self, os.O_CREAT | os.O_WRONLY), 1)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(pathlib.Path, "write_text", fill)
  with pytest.raises(UserError, match=r"results\.json: No space left on device; free some space"):
    write_text(path, "new")
  assert path.read_text() == "old"
  assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run/checkpoints/3"])
def test_remote_paths_are_refused_in_full(path):
  for function in (to_path, find_path):
    with pytest.raises(UserError, match=f"^{path} is remote, .* give a local path$"):
      function(path)


def refuse_config(path):
  cli.parse_flags(["program", f"--config={path}"])


def refuse_source(path):
  config = build(SourceConfig, tiny_defaults.source())
  make_source(dataclasses.replace(config, kind="rooms", path=path))


def refuse_out_of_pretraining(path):
  config = tiny_pretrain.get_config()
  config.out = path
  pretrain.run(config, pathlib.Path("unused"))


def refuse_image(path):
  chat.read_images([path])


def tool(module, *flags):
  """Runs the command line of a tool, each of whose arguments may be PATH."""

  def run(path):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(sys, "argv", ["tool", *(flag.replace("PATH", path) for flag in flags)])
      module.main()

  return run


@pytest.mark.parametrize(
  "refuse",
  [
    refuse_config,
    refuse_source,
    refuse_out_of_pretraining,
    refuse_image,
    tool(export, "--checkpoint=PATH", "--out=hf"),
    tool(export, "--checkpoint=runs/a", "--out=PATH"),
    tool(export, "--checkpoint=runs/a", "--out=hf", "--files_from=PATH"),
    tool(verify, "--checkpoint=PATH"),
    tool(verify, "--checkpoint=spatial_jax/assets/tiny", "--golden=PATH"),
    tool(verify, "--checkpoint=spatial_jax/assets/tiny", "--export=PATH"),
  ],
  ids=range(10),
)
def test_every_remote_path_is_refused_as_it_was_given(refuse, capsys):
  path = "gs://bucket/run"
  with pytest.raises((UserError, SystemExit)) as caught:
    refuse(path)
  assert f"{path} is remote" in f"{caught.value} {capsys.readouterr().err}"


def test_paths_of_the_package_are_found_everywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  package = pathlib.Path(spatial_jax.__file__).parent
  assert find_path("spatial_jax/assets/tiny") == package / "assets" / "tiny"
  assert to_path("spatial_jax/assets/tiny") == pathlib.Path("spatial_jax/assets/tiny")
  (tmp_path / "spatial_jax" / "assets" / "tiny").mkdir(parents=True)
  assert find_path("spatial_jax/assets/tiny") == pathlib.Path("spatial_jax/assets/tiny")
  assert find_path("runs/nowhere") == pathlib.Path("runs/nowhere")
  with pytest.raises(UserError, match="an empty path"):
    to_path("")


def test_the_last_stage_has_the_checkpoint_of_a_run(tmp_path):
  assert workdir_lib.final_folder(tmp_path) == tmp_path
  for name in ("1_sft", "2_reject", "checkpoints", "10"):
    (tmp_path / name).mkdir()
  assert [path.name for path in workdir_lib.stage_folders(tmp_path)] == ["1_sft", "2_reject"]
  assert workdir_lib.final_folder(tmp_path) == tmp_path / "2_reject"
