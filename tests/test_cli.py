"""What every entry point does with mistakes and with Ctrl-C."""

import sys

import pytest
from absl import app

from spatial_jax import cli
from spatial_jax.errors import DataError, UserError


@pytest.fixture
def launched(monkeypatch, capsys):
  """Launches a command without flags; gives the exit code and what stood on stderr."""

  def launch(command):
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
    with pytest.raises(SystemExit) as left:
      cli.launch(command, "stopped; it goes on", read=list)
    return left.value.code, capsys.readouterr().err

  return launch


def test_a_users_mistake_is_one_line_and_exit_2(launched):
  def command(arguments):
    raise DataError("room.png cannot be read")

  assert launched(command) == (2, "error: room.png cannot be read\n")


def test_ctrl_c_is_one_line(launched):
  def command(arguments):
    raise KeyboardInterrupt

  assert launched(command) == (130, "\nstopped; it goes on\n")


def test_a_bug_keeps_its_traceback(launched):
  def command(arguments):
    raise ValueError("a bug")

  with pytest.raises(ValueError, match="a bug"):
    launched(command)


def test_what_is_no_flag_is_refused():
  cli.no_arguments([])
  with pytest.raises(UserError, match="unknown arguments: -v more"):
    cli.no_arguments(["-v", "more"])
