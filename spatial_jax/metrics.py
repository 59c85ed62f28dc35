"""The records of a run: console, metrics.jsonl, TensorBoard, Weights & Biases.

{"step": 12, "stage": "grpo", "time_s": 95.1, "reward": 0.41, "loss": null, "not_finite": ["loss"]}
"""

import collections
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from spatial_jax.config import FieldError
from spatial_jax.errors import CheckpointError, UserError
from spatial_jax.types import Array
from spatial_jax.workdir import one_line_errors, write_text

FILE = "metrics.jsonl"
WANDB_ID = "wandb_id"  # file with the id of the Weights & Biases run of a work directory
_ETA_STEPS = 20  # the remaining time is estimated from the last 20 steps: the first ones compile
_COMPILED = "/jax/core/compile/backend_compile_duration"
NOT_FINITE = "not_finite"  # key of the names whose value was NaN or infinite


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """Where metrics go besides the console and metrics.jsonl."""

  tensorboard: bool  # event files in `workdir/tensorboard`; needs tensorboardX
  wandb: bool  # a Weights & Biases run per work directory; needs wandb and its login

  def __post_init__(self):
    for name, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
      if vars(self)[name] and importlib.util.find_spec(module) is None:
        raise FieldError(
          f"{name} is True, but {module} is not installed; pip install {module}, or set it to False"
        )


def programs_compiled() -> int:
  """The number of programs compiled, or read from the cache on disk, since the first call."""
  return _compilations()[0]


@functools.cache
def _compilations() -> list[int]:
  """The count, kept by one listener: JAX never removes a listener."""
  count = [0]

  def listener(event: str, duration_secs: float, **_: str | int) -> None:
    count[0] += event == _COMPILED

  jax.monitoring.register_event_duration_secs_listener(listener)
  return count


class _TensorBoard:
  """Event files in `workdir/tensorboard`."""

  def __init__(self, workdir: pathlib.Path, first_step: int):
    module = importlib.import_module("tensorboardX")
    self._writer = module.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class _WandB:
  """A Weights & Biases run, the same one for every process of a work directory."""

  def __init__(self, workdir: pathlib.Path):
    wandb, path = importlib.import_module("wandb"), workdir / WANDB_ID
    if not path.exists():
      write_text(path, uuid.uuid4().hex)
    run_id, name = path.read_text(encoding="utf-8").strip(), workdir.resolve().name
    try:
      self._run = wandb.init(
        project="spatial_jax", name=name, dir=str(workdir), id=run_id, resume="allow"
      )
    except Exception as error:  # no login, no connection: the library raises several types
      reason = next(iter(str(error).splitlines()), type(error).__name__)
      raise UserError(
        f"config.loop.log.wandb: {reason}; run `wandb login`, or set it to False"
      ) from error

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    self._run.finish()


class Metrics:
  """Writes one line per step; use it in `with`. Only process 0 writes.

  On a terminal a progress bar stays at the bottom; elsewhere every step prints one plain line.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    stage: str,
    first_step: int,
    steps: int,
    config: LogConfig,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Opens the outputs. Drops lines of metrics.jsonl from `first_step` on: those steps run again.

    Args:
      workdir: created if missing.
      stage: "grpo" or "pretrain", the first word of every line.
      first_step: the next step to run, 0 or the resumed one, of `steps` of the whole run.
      console: standard output by default.

    Raises:
      UserError: if W&B refuses to start, or a file cannot be written.
      CheckpointError: I/O, if metrics.jsonl has a broken line before its last.
    """
    self._active = jax.process_index() == 0
    self._stage, self._steps, self._clock = stage, steps, clock
    self._start = clock()
    self._ends = collections.deque([self._start], maxlen=_ETA_STEPS + 1)
    if not self._active:
      return
    self._path = pathlib.Path(workdir) / FILE
    with one_line_errors(self._path):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      folder = self._path.parent
      self._sinks = [_TensorBoard(folder, first_step)] if config.tensorboard else []
      self._sinks += [_WandB(folder)] if config.wandb else []
      recorded = _truncate(self._path, first_step)
      self._file = self._path.open("a", encoding="utf-8")
    self._console = console or Console(highlight=False)
    self._bar = Progress(
      TextColumn("{task.description}", markup=False),
      BarColumn(bar_width=None),
      MofNCompleteColumn(),
      TextColumn("{task.fields[summary]}", markup=False),
      console=self._console,
      auto_refresh=False,
      disable=not self._console.is_terminal,
    )
    self._task = self._bar.add_task(stage, total=steps, completed=first_step, summary="compiling")
    self._bar.start()
    if recorded < first_step:
      self.print_line(f"{self._path} has no records of steps {recorded} to {first_step - 1}")

  def write(self, step: int, values: Mapping[str, float | int | Array]) -> None:
    """Records one finished step.

    Args:
      step: its number in the run, from 0, over all stages.
      values: scalars by name; NaN and infinity become null and are named. The console shows
        "score", "reward", "loss" and "tokens_per_s".

    Raises:
      UserError: I/O, e.g. if the disk is full.
    """
    if not self._active:
      return
    numbers = {name: float(value) for name, value in values.items()}
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    finite = {name: None if name in bad else _plain(value) for name, value in numbers.items()}
    self._ends.append(self._clock())
    elapsed = self._ends[-1] - self._start
    record = {"step": step, "stage": self._stage, "time_s": round(elapsed, 3), **finite}
    record |= {NOT_FINITE: bad} if bad else {}
    with one_line_errors(self._path):
      self._file.write(json.dumps(record, allow_nan=False) + "\n")
      self._file.flush()
      os.fsync(self._file.fileno())  # a checkpoint must not outlive the records before it
    for sink in self._sinks:
      sink.write(step, {name: value for name, value in numbers.items() if name not in bad})
    self._show(step, numbers, bad)

  def print_line(self, text: str) -> None:
    """Prints a line above the progress bar."""
    if self._active:
      self._console.print(text, markup=False)

  def close(self) -> None:
    """Ends the progress bar and closes the files."""
    if self._active:
      self._bar.stop()
      for sink in self._sinks:
        sink.close()
      with one_line_errors(self._path):
        self._file.close()

  def __enter__(self) -> "Metrics":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _show(self, step: int, numbers: Mapping[str, float], bad: list[str]) -> None:
    seconds_per_step = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
    names = [name for name in ("score", "reward", "loss") if name in numbers]
    parts = [f"{name} {numbers[name]:.3f}" for name in names]
    if "tokens_per_s" in numbers:
      parts.append(f"{numbers['tokens_per_s']:,.0f} tokens/s")
    parts.append(f"ETA {duration(seconds_per_step * (self._steps - step - 1))}")
    summary = "  ".join(parts)
    warning = f"not finite: {', '.join(bad)}" if bad else ""
    if self._bar.disable:
      line = f"{self._stage} {step + 1}/{self._steps}  {summary}  {warning}".rstrip()
      self._console.print(line, markup=False, soft_wrap=True)
      return
    self._bar.update(self._task, completed=step + 1, summary=summary, refresh=True)
    if warning:
      self._console.print(f"{self._stage} {step + 1}: {warning}", style="red", markup=False)


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The records of metrics.jsonl in order; a last line without an end is left out.

  Raises:
    CheckpointError: I/O, naming a broken line before the last.
  """
  path = pathlib.Path(workdir) / FILE
  text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
  lines = text.split("\n")
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


def _truncate(path: pathlib.Path, first_step: int) -> int:
  """Drops the records from `first_step` on and repeated ones; returns the next step to record."""
  by_step = {record["step"]: record for record in read(path.parent) if record["step"] < first_step}
  kept = [by_step[step] for step in sorted(by_step)]
  write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
  return kept[-1]["step"] + 1 if kept else 0


def _plain(value: float) -> float | int:
  return int(value) if value.is_integer() and abs(value) < 2**53 else value
