"""What every entry point does with flags, config files, mistakes, full disks and signals."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import ClassVar

import jax
import pytest
from absl import app, flags
from ml_collections import config_flags

from spatial_jax import cli
from spatial_jax.cli import parse_flags
from spatial_jax.errors import DataError, UserError
from spatial_jax.preemption import Terminated

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def launched(monkeypatch, capsys):
  """Launches a command without flags; gives the exit code and the text on standard error."""
  handler = signal.getsignal(signal.SIGTERM)
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

  def launch(command):
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
    with pytest.raises(SystemExit) as exit_:
      cli.launch(command, "stopped; it can be resumed", read=list)
    return exit_.value.code, capsys.readouterr().err

  yield launch
  signal.signal(signal.SIGTERM, handler)


def test_a_user_error_is_one_line_and_exit_code_2(launched):
  def command(_):
    raise DataError("room.png cannot be read")

  assert launched(command) == (2, "error: room.png cannot be read\n")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOTDIR])
def test_an_error_of_the_file_system_is_one_line_and_exit_code_2(launched, code):
  def command(_):
    raise OSError(code, os.strerror(code), "runs/x/report.html")

  exit_code, text = launched(command)
  assert exit_code == 2
  assert text.startswith(f"error: runs/x/report.html: {os.strerror(code)}; ")
  assert text.count("\n") == 1


def test_ctrl_c_is_one_line(launched):
  def command(_):
    raise KeyboardInterrupt

  assert launched(command) == (130, "\nstopped; it can be resumed\n")


def test_sigterm_is_one_line_and_exit_code_143(launched):
  def command(_):
    signal.raise_signal(signal.SIGTERM)

  assert launched(command) == (143, "\nstopped; it can be resumed\n")

  def saved(_):
    raise Terminated("step 3 is saved")

  assert launched(saved) == (143, "\nstep 3 is saved\n")


@pytest.mark.parametrize("bug", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "a bug")])
def test_a_bug_keeps_its_traceback(launched, bug):
  def command(_):
    raise bug

  with pytest.raises(type(bug), match="a bug"):
    launched(command)


def test_arguments_that_are_not_flags_are_refused():
  cli.no_arguments([])
  with pytest.raises(UserError, match="unknown arguments: -v more"):
    cli.no_arguments(["-v", "more"])


def test_the_users_compilation_cache_is_kept(monkeypatch):
  updates = {}
  monkeypatch.setattr(jax.config, "update", updates.__setitem__)
  cli.enable_compilation_cache()  # conftest.py has set a folder, as the environment variable does
  assert not updates
  monkeypatch.setattr(cli.jax, "config", Unset(updates))
  cli.enable_compilation_cache()
  assert updates["jax_compilation_cache_dir"].endswith(".cache/spatial_jax")


class Unset:
  """jax.config of a process without a compilation cache."""

  values: ClassVar = {"jax_compilation_cache_dir": None}

  def __init__(self, updates):
    self.update = updates.__setitem__


# --- the command line ----------------------------------------------------------------------------

# ml_collections loads config files with a deprecated function.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")

SMALL = """
from ml_collections import ConfigDict
def get_config():
  inner = {"rate": 0.5, "limit": None}
  return ConfigDict({"steps": 3, "inner": inner, "sizes": (1, 2), "on": True})
"""


@pytest.fixture
def command(monkeypatch, tmp_path):
  """Runs `parse_flags` with the flags of a program and small.py as its config file."""
  (tmp_path / "small.py").write_text(SMALL)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=values)
  workdir = flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
  flags.mark_flag_as_required(workdir)
  monkeypatch.setattr(cli.flags, "FLAGS", values)
  monkeypatch.setattr(sys, "path", list(sys.path))

  def parse(*arguments, path="small.py", workdir="w"):
    argv = ["program", f"--config={tmp_path / path}", *arguments]
    argv += [f"--workdir={workdir}"] if workdir else []
    monkeypatch.setattr(sys, "argv", argv)  # ml_collections reads overrides there
    return parse_flags(argv), values

  return parse


def test_flags_override_the_config(command):
  rest, values = command("--config.inner.rate=0.25", "--config.steps=9", "--noconfig.on", "more")
  assert rest == ["program", "more"]
  config = values["config"].value.to_dict()
  assert config == {
    "steps": 9,
    "inner": {"rate": 0.25, "limit": None},
    "sizes": (1, 2),
    "on": False,
  }
  assert values["workdir"].value == "w"


def test_field_references_follow_the_key_that_a_flag_sets(command, tmp_path):
  (tmp_path / "linked.py").write_text(
    "from ml_collections import ConfigDict, FieldReference\n"
    "def get_config():\n"
    "  steps = FieldReference(50)\n"
    "  optimizer = {'total': steps * 1, 'decay': steps // 2}\n"
    "  return ConfigDict({'steps': steps, 'optimizer': optimizer})\n"
  )
  _, values = command("--config.steps=200", "--config.optimizer.total=90", path="linked.py")
  config = json.loads(values["config"].value.to_json_best_effort())
  assert config == {"steps": 200, "optimizer": {"total": 90, "decay": 100}}


@pytest.mark.parametrize(
  ("argument", "key", "value"),
  [
    ("--config.inner.rate=None", "rate", None),
    ("--config.inner.limit=None", "limit", None),
    ("--config.inner.limit=0.5", "limit", 0.5),
    ("--config.inner.limit=near", "limit", "near"),
  ],
)
def test_none_is_a_value(command, argument, key, value):
  _, values = command(argument)
  assert values["config"].value.inner[key] == value


@pytest.mark.parametrize(
  ("argument", "expected"),
  [
    ("--config.bogus=1", "--config.bogus=1: config has no key 'bogus' (keys: inner, on, sizes"),
    ("--config.inner.rat=1", "config.inner has no key 'rat' (did you mean rate?)"),
    ("--config.bogus.rate=1", "config has no key 'bogus'"),
    ("--config.steps.rate=1", "config.steps is a value without keys"),
    ("--noconfig.bogus", "config has no key 'bogus'"),
    ("--config.steps=many", "--config.steps=many must be an integer"),
    ("--config.steps=1.5", "--config.steps=1.5 must be an integer"),
    ("--config.inner.rate=1: 2", "--config.inner.rate=1: 2 must be a number"),
    ("--config.on=maybe", "--config.on=maybe must be true or false"),
    ("--config.inner=3", "--config.inner is a group of keys; set them one by one: limit, rate"),
    ("--wrokdir=w", "Unknown command line flag 'wrokdir'. Did you mean: workdir ?"),
  ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(command, capsys, argument, expected):
  assert expected in refused(capsys, command, argument)


def refused(capsys, command, *arguments, **options):
  """The one line of a refused command line."""
  with pytest.raises(SystemExit) as exit_:
    command(*arguments, **options)
  assert exit_.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  return line


def test_a_missing_flag_is_named_with_its_meaning(command, capsys):
  line = refused(capsys, command, workdir=None)
  assert line == "error: --workdir is missing: folder of the run"


@pytest.mark.parametrize(
  ("path", "text", "expected"),
  [
    ("nowhere.py", None, "nowhere.py does not exist"),
    ("", None, "is a folder"),
    ("small.py:big", SMALL, "has no variants"),
    ("v.py", "def get_config(name):\n  return {}", "v.py needs a variant, --config="),
    ("v.py:c", "def get_config(name):\n  raise ValueError('no variant ' + name)", "no variant c"),
    ("v.py", "", "has no function get_config()"),
  ],
)
def test_a_wrong_config_file_is_one_line(command, capsys, tmp_path, path, text, expected):
  if text is not None:
    (tmp_path / path.partition(":")[0]).write_text(text)
  assert expected in refused(capsys, command, path=path)


def test_a_bug_in_a_config_file_keeps_its_traceback(command, tmp_path):
  (tmp_path / "broken.py").write_text("def get_config():\n  return {}['x']\n")
  with pytest.raises(KeyError):
    command(path="broken.py")


def test_train_in_another_folder_names_an_unknown_key(tmp_path):
  """The real program: exit code 2, one line, and no work directory."""
  (tmp_path / "wrong.py").write_text(
    "from configs import common\n"
    "def get_config():\n"
    "  cfg = common.get_config()\n  cfg.loop.bogus = 1\n  return cfg\n"
  )
  command = ["-m", "spatial_jax.train", "--workdir=run", "--config=wrong.py"]
  done = subprocess.run(
    [sys.executable, *command],
    cwd=tmp_path,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": installed_alone(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2, done.stderr
  (line,) = done.stderr.splitlines()
  assert "config.loop.bogus is unknown" in line
  assert not done.stdout
  assert not (tmp_path / "run").exists()


def installed_alone(folder):
  """A folder with the package but not its neighbours, as an editable installation has it."""
  site = folder / "site"
  site.mkdir()
  (site / "spatial_jax").symlink_to(ROOT / "spatial_jax")
  return str(site)
