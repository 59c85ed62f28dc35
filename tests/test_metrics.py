import io
import json
import sys
import types

import jax
import numpy as np
import pytest
from rich.console import Console

from spatial_jax import metrics
from spatial_jax.errors import CheckpointError, UserError
from spatial_jax.metrics import LogConfig, Metrics

CONSOLE_ONLY = LogConfig(tensorboard=False, wandb=False)


class Clock:
  """A clock that a test sets by hand."""

  now = 0.0

  def __call__(self) -> float:
    return self.now


def open_metrics(workdir, first_step=0, steps=10, config=CONSOLE_ONLY, terminal=False, clock=None):
  output = io.StringIO()
  console = Console(file=output, force_terminal=terminal, width=120, highlight=False)
  return Metrics(workdir, first_step, steps, config, console, clock or Clock()), output


def test_one_flushed_json_object_per_step(tmp_path):
  log, _ = open_metrics(tmp_path)
  with log:
    log.write(0, "grpo", {"reward": np.float32(0.5), "images": 12})
    first = json.loads((tmp_path / metrics.FILE).read_text())  # readable while the run goes on
  assert first == {"step": 0, "stage": "grpo", "time_s": 0.0, "reward": 0.5, "images": 12}


def test_not_finite_values_are_null_and_named(tmp_path):
  log, output = open_metrics(tmp_path)
  with log:
    log.write(0, "grpo", {"reward": 0.5, "loss": np.nan, "grad_norm": -np.inf})
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
      log.write(step, "grpo", {"reward": step / 10})
  with (tmp_path / metrics.FILE).open("a") as file:
    file.write(torn)
  log, _ = open_metrics(tmp_path, first_step=3)
  with log:
    log.write(3, "grpo", {"reward": 9.0})
  records = metrics.read(tmp_path)
  assert [record["step"] for record in records] == [0, 1, 2, 3]
  assert [record["reward"] for record in records] == [0, 0.1, 0.2, 9.0]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
  (tmp_path / metrics.FILE).write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
  with pytest.raises(CheckpointError, match=r"metrics\.jsonl line 2 is not a metrics record"):
    open_metrics(tmp_path, first_step=1)
  assert "nonsense" in (tmp_path / metrics.FILE).read_text()  # nothing overwritten


def test_plain_lines_where_there_is_no_terminal(tmp_path):
  clock = Clock()
  log, output = open_metrics(tmp_path, first_step=4, clock=clock)
  with log:
    for step in (4, 5):
      clock.now += 60
      log.write(step, "grpo", {"reward": 0.41234, "tokens_per_s": 3120.4})
  assert output.getvalue().splitlines() == [
    "grpo 5/10  reward 0.412  3,120 tokens/s  ETA 5:00",
    "grpo 6/10  reward 0.412  3,120 tokens/s  ETA 4:00",
  ]


def test_time_left_forgets_the_compilation(tmp_path):
  clock = Clock()
  log, output = open_metrics(tmp_path, steps=100, clock=clock)
  with log:
    for step in range(40):
      clock.now += 600 if step == 0 else 1
      log.write(step, "grpo", {})
  assert output.getvalue().splitlines()[-1].endswith("ETA 1:00")


def test_a_bar_on_a_terminal(tmp_path):
  log, output = open_metrics(tmp_path, terminal=True)
  with log:
    log.write(0, "grpo", {"reward": 0.41, "[bold]": 1.0})
    log.print_line("saved [1]")
  text = output.getvalue()
  assert "1/10" in text
  assert "reward 0.410" in text
  assert "saved [1]" in text
  assert "━" in text


@pytest.mark.parametrize(("seconds", "text"), [(45, "0:45"), (725.4, "12:05"), (3723, "1:02:03")])
def test_duration(seconds, text):
  assert metrics.duration(seconds) == text


@pytest.mark.parametrize(
  ("config", "module"),
  [(LogConfig(True, False), "tensorboardX"), (LogConfig(False, True), "wandb")],
)
def test_asked_for_and_not_installed(tmp_path, monkeypatch, config, module):
  monkeypatch.setitem(sys.modules, module, None)
  (tmp_path / metrics.FILE).write_text('{"step": 7}\n')
  with pytest.raises(UserError, match=f"{module} is not installed; pip install {module}"):
    open_metrics(tmp_path, config=config)
  assert (tmp_path / metrics.FILE).read_text() == '{"step": 7}\n'  # nothing overwritten


def test_further_outputs_get_the_finite_values(tmp_path, monkeypatch):
  seen = []
  writer = types.SimpleNamespace(
    add_scalar=lambda *scalar: seen.append(scalar), flush=lambda: None, close=lambda: None
  )
  run = types.SimpleNamespace(
    log=lambda values, step: seen.append((values, step)), finish=lambda: seen.append("finished")
  )
  tensorboard = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
  wandb = types.SimpleNamespace(init=lambda **_: run)
  monkeypatch.setitem(sys.modules, "tensorboardX", tensorboard)
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  log, _ = open_metrics(tmp_path, config=LogConfig(True, True))
  with log:
    log.write(3, "grpo", {"reward": 0.5, "loss": float("nan")})
  assert seen == [("reward", 0.5, 3), ({"reward": 0.5}, 3), "finished"]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  log, output = open_metrics(tmp_path)
  with log:
    log.write(0, "grpo", {"reward": 0.5})
    log.print_line("hello")
  assert output.getvalue() == ""
  assert not list(tmp_path.iterdir())


def test_programs_are_counted_once_per_shape():
  double = jax.jit(lambda x: x * 2 + 1)
  small, large = np.ones(3, np.float32), np.ones(4, np.float32)

  def compiled(x):
    before = metrics.programs_compiled()
    double(x)
    return metrics.programs_compiled() - before

  assert [compiled(x) for x in (small, small, large, small, large)] == [1, 0, 1, 0, 0]
