"""Configuration: exact keys and types, every mistake in one line, exit code 2."""

import dataclasses
import os
import pathlib
import subprocess
import sys
from typing import Any, Literal

import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

from spatial_jax import cli
from spatial_jax import config as config_lib
from spatial_jax.cli import parse_flags
from spatial_jax.config import ConfigError, build

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Inner:
  kind: Literal["a", "b"]
  sizes: tuple[int, ...]
  pair: tuple[float, str]


@dataclasses.dataclass(frozen=True)
class Outer:
  steps: int
  rate: float
  name: str
  flag: bool
  limit: float | None
  inner: Inner
  inners: tuple[Inner, ...]


GOOD: dict[str, Any] = {
  "steps": 3,
  "rate": 0.5,
  "name": "x",
  "flag": True,
  "limit": None,
  "inner": {"kind": "a", "sizes": (1, 2), "pair": (1.0, "y")},
  "inners": (),
}


def with_value(path: str, value: Any) -> dict[str, Any]:
  """GOOD with one key replaced, added or (by Ellipsis) removed."""
  *groups, key = path.split(".")
  config = {k: dict(v) if isinstance(v, dict) else v for k, v in GOOD.items()}
  place = config
  for group in groups:
    place = place[group]
  place.pop(key, None)
  if value is not ...:
    place[key] = value
  return config


@pytest.mark.parametrize("form", [dict, ConfigDict])
def test_build(form):
  built = build(Outer, form(GOOD))
  assert built == Outer(3, 0.5, "x", True, None, Inner("a", (1, 2), (1.0, "y")), ())


def test_lists_become_tuples_and_ints_floats():
  config = with_value("inner.sizes", [4, 5]) | {"rate": 2, "limit": 7, "inners": [GOOD["inner"]]}
  built = build(Outer, config)
  assert built.inner.sizes == (4, 5)
  assert (built.rate, built.limit) == (2.0, 7.0)
  assert isinstance(built.rate, float)
  assert built.inners == (Inner("a", (1, 2), (1.0, "y")),)


@pytest.mark.parametrize(
  ("path", "value", "says"),
  [
    ("steps", ..., "config.steps is missing"),
    ("inner.kind", ..., "config.inner.kind is missing"),
    ("bogus", 1, "config.bogus is unknown (known: steps, rate"),
    ("inner.bogus", 1, "config.inner.bogus is unknown (known: kind, sizes, pair)"),
    ("steps", 1.5, "config.steps must be int, got 1.5"),
    ("steps", True, "config.steps must be int, got True"),
    ("steps", None, "config.steps must be int, got None"),
    ("rate", "0.5", "config.rate must be float, got '0.5'"),
    ("rate", False, "config.rate must be float, got False"),
    ("flag", 1, "config.flag must be bool, got 1"),
    ("limit", "x", "config.limit must be float, got 'x'"),
    ("inner", 3, "config.inner must be a mapping, got 3"),
    ("inner.kind", "c", "config.inner.kind must be one of a, b, got 'c'"),
    ("inner.sizes", 3, "config.inner.sizes must be a list, got 3"),
    ("inner.sizes", (1, "2"), "config.inner.sizes[1] must be int, got '2'"),
    ("inner.pair", (1.0,), "config.inner.pair must have 2 items, got 1"),
    ("inners", ({"kind": "a"},), "config.inners[0].sizes is missing"),
  ],
)
def test_what_is_wrong_is_named(path, value, says):
  with pytest.raises(ConfigError) as caught:
    build(Outer, with_value(path, value))
  assert says in str(caught.value)
  assert "\n" not in str(caught.value)


@given(st.sets(st.sampled_from(sorted(GOOD))), st.sets(st.sampled_from(("p", "q"))))
def test_all_mistakes_at_once(missing, unknown):
  config = {k: v for k, v in GOOD.items() if k not in missing} | dict.fromkeys(unknown, 0)
  if not missing | unknown:
    build(Outer, config)
    return
  with pytest.raises(ConfigError) as caught:
    build(Outer, config)
  problems = str(caught.value).split("; ")
  assert {p.split()[0] for p in problems} == {f"config.{key}" for key in missing | unknown}


@dataclasses.dataclass(frozen=True)
class Share:
  share: float

  def __post_init__(self):
    config_lib.check_field(self, "share", 0 <= self.share <= 1, "be at least 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Shares:
  first: Share
  others: tuple[Share, ...]


def test_values_out_of_range_are_named_by_their_full_keys():
  config = {"first": {"share": 2.0}, "others": ({"share": 0.5}, {"share": float("nan")})}
  rule = "and must be at least 0 and at most 1"
  with pytest.raises(ConfigError) as caught:
    build(Shares, config, "config.learn")
  assert str(caught.value).split("; ") == [
    f"config.learn.first.share is 2.0 {rule}",
    f"config.learn.others[1].share is nan {rule}",
  ]
  with pytest.raises(ConfigError, match=r"^share is -1.0 and must"):
    Share(-1.0)


# --- the command line ----------------------------------------------------------------------------

old_loader = pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections reads files so


@pytest.fixture
def command(monkeypatch, tmp_path):
  """Runs `parse_flags` on a config file of its own, in place of the program's flags."""
  (tmp_path / "small.py").write_text(
    "from ml_collections import ConfigDict\n"
    "def get_config():\n  return ConfigDict({'steps': 3, 'inner': {'rate': 0.5}})\n"
  )
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=values)
  flags.DEFINE_string("workdir", None, "", flag_values=values)
  monkeypatch.setattr(cli.flags, "FLAGS", values)

  def parse(*arguments, path="small.py"):
    argv = ["program", f"--config={tmp_path / path}", *arguments]
    monkeypatch.setattr(sys, "argv", argv)  # the config's own flags are read off there
    return parse_flags(argv), values

  return parse


@old_loader
def test_command_line(command):
  rest, values = command("--workdir=w", "--config.inner.rate=0.25", "--config.steps=9", "more")
  assert rest == ["program", "more"]
  assert values["config"].value.to_dict() == {"steps": 9, "inner": {"rate": 0.25}}
  assert values["workdir"].value == "w"


@old_loader
@pytest.mark.parametrize(
  ("argument", "says"),
  [
    ("--config.bogus=1", "--config.bogus=1: the config has no key 'bogus'"),
    ("--config.inner.bogus=1", "the config has no key 'bogus'"),
    ("--config.bogus.rate=1", "the config has no key 'bogus'"),
    ("--config.steps=many", "--config.steps=many"),
    ("--wrokdir=w", "Unknown command line flag 'wrokdir'. Did you mean: workdir ?"),
  ],
)
def test_mistakes_are_one_line_and_exit_2(command, capsys, argument, says):
  with pytest.raises(SystemExit) as left:
    command(argument)
  assert left.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  assert says in line


@old_loader
def test_config_file_that_is_not_there(command, capsys):
  with pytest.raises(SystemExit) as left:
    command(path="nowhere.py")
  assert left.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "nowhere.py" in line


@old_loader
def test_a_bug_in_a_config_file_keeps_its_traceback(command, tmp_path):
  (tmp_path / "broken.py").write_text("def get_config():\n  return {}['x']\n")
  with pytest.raises(KeyError):
    command(path="broken.py")


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["--config=configs/tiny.py", "--config.loop.bogus=1"], "no key 'bogus'"),
    (["--config=wrong.py"], "config.loop.bogus is unknown"),
  ],
  ids=["flag", "file"],
)
def test_train_with_an_unknown_key(tmp_path, arguments, says):
  """The real program: exit code 2, one line, and no work directory."""
  (tmp_path / "wrong.py").write_text(
    "from configs import common\n"
    "def get_config():\n"
    "  cfg = common.get_config()\n  cfg.loop.bogus = 1\n  return cfg\n"
  )
  arguments = [argument.replace("wrong.py", str(tmp_path / "wrong.py")) for argument in arguments]
  workdir = tmp_path / "run"
  done = subprocess.run(
    [sys.executable, "-m", "spatial_jax.train", f"--workdir={workdir}", *arguments],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2, done.stderr
  (line,) = done.stderr.splitlines()
  assert says in line
  assert not done.stdout
  assert not workdir.exists()
