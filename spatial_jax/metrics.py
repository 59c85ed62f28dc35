"""What a run shows and records of itself, on the host: console, metrics.jsonl, TensorBoard, W&B.

{"step": 12, "stage": "grpo", "time_s": 95.1, "reward": 0.41, "loss": null, "not_finite": ["loss"]}
"""

import collections
import dataclasses
import functools
import importlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from spatial_jax.errors import CheckpointError, UserError
from spatial_jax.types import Array

FILE = "metrics.jsonl"
_ETA_STEPS = 20  # the time left is judged by so many last steps: the first ones compile
_COMPILED = "/jax/core/compile/backend_compile_duration"
NOT_FINITE = "not_finite"  # key of the names whose value was NaN or infinite


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """Where metrics go besides the console and metrics.jsonl.

  Attributes:
    tensorboard: event files in `workdir/tensorboard`; needs tensorboardX.
    wandb: a Weights & Biases run named after the work directory; needs wandb and its login.
  """

  tensorboard: bool
  wandb: bool


def programs_compiled() -> int:
  """Programs compiled, or found on disk, since this was first asked."""
  return _compilations()[0]


@functools.cache
def _compilations() -> list[int]:
  """The count, kept by a listener; JAX keeps listeners for good, so there is one."""
  count = [0]

  def heard(event: str, duration_secs: float, **_: str | int) -> None:
    count[0] += event == _COMPILED

  jax.monitoring.register_event_duration_secs_listener(heard)
  return count


class _Sink(NamedTuple):
  """A further output: called with the step and its finite values, and closed at the end."""

  write: Callable[[int, Mapping[str, float]], None]
  close: Callable[[], None]


class Metrics:
  """Writes one line per step; use it in `with`. Only process 0 writes.

  On a terminal a progress bar stays at the bottom; elsewhere every step prints one plain line.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    first_step: int,
    steps: int,
    config: LogConfig,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Opens the outputs; lines of metrics.jsonl from `first_step` on are dropped (they are re-run).

    Args:
      workdir: of the run; made when missing.
      first_step: the next step to run, 0 or the resumed one.
      steps: total steps of the run.
      config: further outputs.
      console: standard output by default; a test gives its own.
      clock: seconds.

    Raises:
      UserError: on the host, when TensorBoard or W&B is asked for and not installed.
      CheckpointError: I/O, when metrics.jsonl holds a broken line before its last.
    """
    self._active = jax.process_index() == 0
    self._steps, self._clock = steps, clock
    self._start = clock()
    self._ends = collections.deque([self._start], maxlen=_ETA_STEPS + 1)
    if not self._active:
      return
    path = pathlib.Path(workdir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    self._sinks = [_tensorboard(path.parent)] if config.tensorboard else []
    self._sinks += [_wandb(path.parent)] if config.wandb else []
    _truncate(path, first_step)
    self._file = path.open("a", encoding="utf-8")
    self._console = console or Console(highlight=False)
    self._bar = Progress(
      TextColumn("{task.fields[stage]}", markup=False),
      BarColumn(bar_width=None),
      MofNCompleteColumn(),
      TextColumn("{task.fields[summary]}", markup=False),
      console=self._console,
      auto_refresh=False,
      disable=not self._console.is_terminal,
    )
    self._task = self._bar.add_task("", total=steps, completed=first_step, stage="", summary="")
    self._bar.start()

  def write(self, step: int, stage: str, values: Mapping[str, float | int | Array]) -> None:
    """Records one finished step.

    Args:
      step: its number in the run, from 0, counted on over stages.
      stage: "grpo" or "pretrain", in front of the line.
      values: scalars by name; NaN and infinity become null and are named. "reward", "loss" and
        "tokens_per_s" are shown on the console when they are there.
    """
    if not self._active:
      return
    numbers = {name: float(value) for name, value in values.items()}
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    finite = {name: None if name in bad else _plain(value) for name, value in numbers.items()}
    self._ends.append(self._clock())
    elapsed = self._ends[-1] - self._start
    record = {"step": step, "stage": stage, "time_s": round(elapsed, 3), **finite}
    record |= {NOT_FINITE: bad} if bad else {}
    self._file.write(json.dumps(record, allow_nan=False) + "\n")
    self._file.flush()
    for sink in self._sinks:
      sink.write(step, {name: value for name, value in numbers.items() if name not in bad})
    self._show(step, stage, numbers, bad)

  def note(self, text: str) -> None:
    """Prints a line above the progress bar."""
    if self._active:
      self._console.print(text, markup=False)

  def close(self) -> None:
    """Ends the progress bar and closes the files."""
    if self._active:
      self._bar.stop()
      self._file.close()
      for sink in self._sinks:
        sink.close()

  def __enter__(self) -> "Metrics":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _show(self, step: int, stage: str, numbers: Mapping[str, float], bad: list[str]) -> None:
    seconds_per_step = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
    parts = [f"{name} {numbers[name]:.3f}" for name in ("reward", "loss") if name in numbers]
    if "tokens_per_s" in numbers:
      parts.append(f"{numbers['tokens_per_s']:,.0f} tokens/s")
    parts.append(f"ETA {duration(seconds_per_step * (self._steps - step - 1))}")
    summary = "  ".join(parts)
    warning = f"not finite: {', '.join(bad)}" if bad else ""
    if self._bar.disable:
      line = f"{stage} {step + 1}/{self._steps}  {summary}  {warning}".rstrip()
      self._console.print(line, markup=False, soft_wrap=True)
      return
    self._bar.update(self._task, completed=step + 1, stage=stage, summary=summary, refresh=True)
    if warning:
      self._console.print(f"{stage} {step + 1}: {warning}", style="red", markup=False)


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The records of metrics.jsonl in order, without a last line that a kill cut short.

  Raises:
    CheckpointError: I/O, naming a broken line before the last.
  """
  path = pathlib.Path(workdir) / FILE
  lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
  records = []
  for number, line in enumerate(lines[:-1], 1):  # a complete line ends in a newline
    try:
      record = json.loads(line)
      records.append(record | {"step": int(record["step"])})
    except (ValueError, TypeError, KeyError) as error:
      raise CheckpointError(
        f"{path} line {number} is not a metrics record; remove that line"
      ) from error
  return records


def duration(seconds: float) -> str:
  """Seconds as "0:45", "12:05" or "1:02:03"."""
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _truncate(path: pathlib.Path, first_step: int) -> None:
  """Drops the records from `first_step` on, in one rename."""
  kept = [record for record in read(path.parent) if record["step"] < first_step]
  partial = path.with_suffix(".partial")
  partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
  partial.replace(path)


def _plain(value: float) -> float | int:
  return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _tensorboard(workdir: pathlib.Path) -> _Sink:
  writer = _module("tensorboardX", "log.tensorboard").SummaryWriter(str(workdir / "tensorboard"))

  def write(step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      writer.add_scalar(name, value, step)
    writer.flush()

  return _Sink(write, writer.close)


def _wandb(workdir: pathlib.Path) -> _Sink:
  run = _module("wandb", "log.wandb").init(
    project="spatial_jax", name=workdir.name, dir=str(workdir), id=workdir.name, resume="allow"
  )
  return _Sink(lambda step, values: run.log(dict(values), step=step), run.finish)


def _module(name: str, key: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(
      f"config.{key} is on but {name} is not installed; pip install {name}, or turn it off"
    ) from error
