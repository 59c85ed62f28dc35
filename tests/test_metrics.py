"""Metrics: one record per step, resumed without loss, on every output."""

import errno
import io
import json
import os
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
from rich.console import Console

from spatial_jax import metrics
from spatial_jax.config import ConfigError, build
from spatial_jax.errors import CheckpointError, UserError
from spatial_jax.metrics import LogConfig, Metrics

CONSOLE_ONLY = LogConfig(tensorboard=False, wandb=False)


class Clock:
  """A clock that the test moves."""

  now = 0.0

  def __call__(self) -> float:
    return self.now


def open_metrics(workdir, first_step=0, steps=10, config=CONSOLE_ONLY, terminal=False, clock=None):
  output = io.StringIO()
  console = Console(file=output, force_terminal=terminal, width=120, highlight=False)
  return Metrics(workdir, "grpo", first_step, steps, config, console, clock or Clock()), output


def test_one_flushed_json_object_per_step(tmp_path):
  log, _ = open_metrics(tmp_path)
  with log:
    log.write(0, {"reward": np.float32(0.5), "images": 12})
    first = json.loads((tmp_path / metrics.FILE).read_text())  # readable while the run goes on
  assert first == {"step": 0, "stage": "grpo", "time_s": 0.0, "reward": 0.5, "images": 12}


def test_not_finite_values_are_null_and_named(tmp_path):
  log, output = open_metrics(tmp_path)
  with log:
    log.write(0, {"reward": 0.5, "loss": np.nan, "grad_norm": -np.inf})
  text = (tmp_path / metrics.FILE).read_text()
  assert "NaN" not in text
  assert "Infinity" not in text
  record = metrics.read(tmp_path)[0]
  assert record["loss"] is None
  assert record["grad_norm"] is None
  assert record[metrics.NOT_FINITE] == ["loss", "grad_norm"]
  assert "not finite: loss, grad_norm" in output.getvalue()


@pytest.mark.parametrize("torn", ["", '{"step": 5, "rewa', "\x00\x00"])
def test_resume_drops_the_lines_that_run_again(tmp_path, torn):
  log, _ = open_metrics(tmp_path)
  with log:
    for step in range(5):
      log.write(step, {"reward": step / 10})
  with (tmp_path / metrics.FILE).open("a") as file:
    file.write(torn)
  log, _ = open_metrics(tmp_path, first_step=3)
  with log:
    log.write(3, {"reward": 9.0})
  records = metrics.read(tmp_path)
  assert [record["step"] for record in records] == [0, 1, 2, 3]
  assert [record["reward"] for record in records] == [0, 0.1, 0.2, 9.0]


@pytest.mark.parametrize("broken", [b"nonsense", b"[1]", b'{"reward": 1}', b"\xff\xfe"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, broken):
  content = b'{"step": 0}\n' + broken + b'\n{"step": 2}\n'
  (tmp_path / metrics.FILE).write_bytes(content)
  with pytest.raises(CheckpointError, match=r"metrics\.jsonl line 2 is not a metrics record"):
    open_metrics(tmp_path, first_step=1)
  assert (tmp_path / metrics.FILE).read_bytes() == content  # nothing is overwritten


def test_steps_that_were_recorded_twice_are_kept_once(tmp_path):
  lines = [{"step": step, "reward": reward} for step, reward in ((0, 1), (1, 2), (0, 3), (2, 4))]
  (tmp_path / metrics.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
  log, output = open_metrics(tmp_path, first_step=2)
  log.close()
  assert metrics.read(tmp_path) == [{"step": 0, "reward": 3}, {"step": 1, "reward": 2}]
  assert output.getvalue() == ""


def test_missing_records_are_named_once(tmp_path):
  for first_step, expected in ((4, "metrics.jsonl has no records of steps 0 to 3"), (6, "")):
    log, output = open_metrics(tmp_path, first_step=first_step)
    with log:
      assert expected in output.getvalue().replace("\n", "")
      assert bool(expected) == bool(output.getvalue())
      for step in (first_step, first_step + 1):
        log.write(step, {})
  assert [record["step"] for record in metrics.read(tmp_path)] == [4, 5, 6, 7]


def test_a_full_disk_is_one_line_and_keeps_the_records(tmp_path, monkeypatch):
  log, _ = open_metrics(tmp_path)
  log.write(0, {"reward": 0.5})

  def refuse(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "fsync", refuse)
  with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device; free some space"):
    log.write(1, {"reward": 0.6})
  log.close()
  assert metrics.read(tmp_path)[0]["reward"] == 0.5


def test_without_a_terminal_every_step_is_a_plain_line(tmp_path):
  clock = Clock()
  (tmp_path / metrics.FILE).write_text('{"step": 3}\n')
  log, output = open_metrics(tmp_path, first_step=4, clock=clock)
  with log:
    for step in (4, 5):
      clock.now += 60
      log.write(step, {"reward": 0.41234, "tokens_per_s": 3120.4, "loss": 0.1, "score": 0.3})
  assert output.getvalue().splitlines() == [
    "grpo 5/10  score 0.300  reward 0.412  loss 0.100  3,120 tokens/s  ETA 5:00",
    "grpo 6/10  score 0.300  reward 0.412  loss 0.100  3,120 tokens/s  ETA 4:00",
  ]


def test_remaining_time_forgets_the_compilation(tmp_path):
  clock = Clock()
  log, output = open_metrics(tmp_path, steps=100, clock=clock)
  with log:
    for step in range(40):
      clock.now += 600 if step == 0 else 1
      log.write(step, {})
  assert output.getvalue().splitlines()[-1].endswith("ETA 1:00")


def test_a_terminal_shows_a_bar(tmp_path):
  log, output = open_metrics(tmp_path, terminal=True)
  assert "grpo" in output.getvalue()
  assert "compiling" in output.getvalue()
  with log:
    log.write(0, {"reward": 0.41, "[bold]": 1.0})
    log.print_line("saved [1]")
  text = output.getvalue()
  assert "1/10" in text
  assert "reward 0.410" in text
  assert "saved [1]" in text
  assert "━" in text


@pytest.mark.parametrize(("seconds", "text"), [(45, "0:45"), (725.4, "12:05"), (3723, "1:02:03")])
def test_duration(seconds, text):
  assert metrics.duration(seconds) == text


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_configured_output_that_is_not_installed_is_refused(monkeypatch, name, module):
  monkeypatch.setitem(sys.modules, module, None)
  message = rf"^config\.log\.{name} is True, but {module} is not installed; pip install {module}"
  with pytest.raises(ConfigError, match=message):
    build(LogConfig, {"tensorboard": False, "wandb": False} | {name: True}, "config.log")


def test_an_error_of_wandb_is_one_line(tmp_path, outputs, monkeypatch):
  def refuse(**_: object):
    raise RuntimeError("No API key configured.\nUse wandb login.")

  monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
  with pytest.raises(UserError, match=r"^config\.loop\.log\.wandb: No API key configured\.; run"):
    open_metrics(tmp_path, config=LogConfig(False, True))


@pytest.fixture
def outputs(monkeypatch):
  """What TensorBoard and Weights & Biases receive, as a list of calls."""
  calls = []
  writer = types.SimpleNamespace(
    add_scalar=lambda *scalar: calls.append(scalar), flush=lambda: None, close=lambda: None
  )
  run = types.SimpleNamespace(
    log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finished")
  )

  def open_writer(folder, purge_step):
    calls.append((pathlib.Path(folder).name, purge_step))
    return writer

  def init(**arguments):
    calls.append((arguments["id"], arguments["resume"]))
    return run

  tensorboard = types.SimpleNamespace(SummaryWriter=open_writer, __spec__="installed")
  monkeypatch.setitem(sys.modules, "tensorboardX", tensorboard)
  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, __spec__="installed"))
  return calls


def test_further_outputs_get_the_finite_values(tmp_path, outputs):
  (tmp_path / metrics.WANDB_ID).write_text("abc")
  (tmp_path / metrics.FILE).write_text('{"step": 2}\n')
  log, _ = open_metrics(tmp_path, first_step=3, config=LogConfig(True, True))
  with log:
    log.write(3, {"reward": 0.5, "loss": float("nan")})
  starts = [("tensorboard", 3), ("abc", "allow")]
  assert outputs == [*starts, ("reward", 0.5, 3), ({"reward": 0.5}, 3), "finished"]


def test_every_work_directory_has_its_own_wandb_run(tmp_path, outputs):
  for name in ("a/0", "b/0", "a/0"):
    open_metrics(tmp_path / name, config=LogConfig(False, True))[0].close()
  first, second, resumed = [call[0] for call in outputs if call != "finished"]
  assert first == resumed != second


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  log, output = open_metrics(tmp_path)
  with log:
    log.write(0, {"reward": 0.5})
    log.print_line("text")
  assert output.getvalue() == ""
  assert not list(tmp_path.iterdir())


def test_a_program_is_counted_once_per_shape():
  double = jax.jit(lambda x: x * 2 + 1)
  small, large = np.ones(3, np.float32), np.ones(4, np.float32)

  def compiled(x):
    before = metrics.programs_compiled()
    double(x)
    return metrics.programs_compiled() - before

  assert [compiled(x) for x in (small, small, large, small, large)] == [1, 0, 1, 0, 0]
