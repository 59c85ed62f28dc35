"""The loop around the steps of every stage: resume, record, save, and end well when stopped."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from spatial_jax import checkpoint, preemption
from spatial_jax.checkpoint import Progress, Saver
from spatial_jax.checks import is_whole
from spatial_jax.config import check_field
from spatial_jax.errors import CheckpointError, UserError
from spatial_jax.metrics import LogConfig, Metrics, programs_compiled
from spatial_jax.preemption import Preemption, Terminated
from spatial_jax.types import StageStep, TrainState


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """Length of a run, and its checkpoints."""

  steps: int  # updates of the whole run, >= 1
  checkpoint_every: int  # steps between two checkpoints, >= 1; the last step is always saved
  evaluate_every: int  # steps between two evaluations on held-out tasks; 0: never
  keep: int  # number of checkpoints to keep, >= 1
  log: LogConfig  # outputs besides console and metrics.jsonl

  def __post_init__(self):
    check_field(self, "steps", is_whole(self.steps, 1), "be at least 1")
    check_field(self, "checkpoint_every", is_whole(self.checkpoint_every, 1), "be at least 1")
    check_field(self, "evaluate_every", is_whole(self.evaluate_every, 0), "be at least 0")
    check_field(self, "keep", is_whole(self.keep, 1), "be at least 1")


Evaluate = Callable[[TrainState], Mapping[str, float]]
# (step, metrics) -> lines to print, and whether the run should end.
Monitor = Callable[[int, Mapping[str, Any]], tuple[list[str], bool]]


class Checkpoints:
  """Saves states at most once per step, with the Progress that belongs to them."""

  def __init__(self, saver: Saver, first: int, benchmark: str | None, config: dict[str, Any]):
    self._saver, self._benchmark, self._config = saver, benchmark, config
    self._saved = first  # step 0 is the start, which needs no checkpoint

  def save(self, state: TrainState, done: int) -> None:
    """Saves the state after `done` updates in the background, unless it is saved already."""
    if done != self._saved:
      self._saver.save(state, Progress(done, self._benchmark, self._config))
      self._saved = done

  def finish(self, state: TrainState, done: int) -> str:
    """Saves the state, waits until it is written, and returns one line for the user.

    A state that was donated to the running update cannot be saved any more.
    """
    if done == 0:
      return "stopped by SIGTERM before the first step was done; nothing to save"
    unsaved = f"stopped by SIGTERM; step {done} is not saved"
    donated = any(x.is_deleted() for x in jax.tree.leaves(state))
    try:
      if not donated:
        self.save(state, done)
      self._saver.close()
    except (CheckpointError, RuntimeError) as error:
      return f"{unsaved} ({error})"
    if donated and done != self._saved:
      return f"{unsaved} (the running update overwrites it)"
    return f"stopped by SIGTERM; step {done} is saved and the same command resumes from it"


def run(
  workdir: pathlib.Path,
  cfg: LoopConfig,
  stage: str,
  state: TrainState,
  step_of: Callable[[int], StageStep],
  evaluate: Evaluate | None,
  benchmark: str | None,
  config: dict[str, Any],
  monitor: Monitor | None = None,
) -> TrainState:
  """Runs the remaining steps and saves checkpoints.

  Args:
    workdir: of the run; its newest whole checkpoint, if there is one, replaces `state`.
    state: the start; donated. Shapes and shardings are enough if there is a checkpoint.
    step_of: called with the first step; returns the step function, which depends only on the state
      and the step number, so that a resumed run takes the same steps.
    evaluate: the state before a step -> metrics of that step, every `cfg.evaluate_every` steps.
    monitor: called after each step; it may end the run.

  Returns:
    The state after the last step.

  Raises:
    Terminated, UserError: after SIGTERM, or if the monitor ended the run; the state is saved.
  """
  first, state = resume(workdir, state)
  step = step_of(first)
  with (
    Saver(workdir, cfg.keep) as saver,
    Metrics(workdir, stage, first, cfg.steps, cfg.log) as metrics,
  ):
    checkpoints = Checkpoints(saver, first, benchmark, config)
    done = first
    with Preemption(lambda: checkpoints.finish(state, done), preemption.GRACE_S) as preempted:
      for number in range(first, cfg.steps):
        with preempted.step():
          due = cfg.evaluate_every and number % cfg.evaluate_every == 0
          held_out = dict(evaluate(state)) if evaluate and due else {}
          new_state, values = _timed(step, state, number)
        state, done = new_state, number + 1
        metrics.write(number, values | held_out)
        if done % cfg.checkpoint_every == 0 or done == cfg.steps:
          checkpoints.save(state, done)
        if monitor is not None:
          _obey(monitor(number, values), metrics, checkpoints, state, done)
        if preempted.requested:
          raise Terminated(checkpoints.finish(state, done))
  return state


def _obey(
  verdict: tuple[list[str], bool],
  metrics: Metrics,
  checkpoints: Checkpoints,
  state: TrainState,
  done: int,
) -> None:
  """Prints what a monitor found; if it asks for it, saves the state and ends the run."""
  lines, end = verdict
  for line in lines:
    metrics.print_line(f"warning: {line}")
  if end:
    checkpoints.save(state, done)
    raise UserError(
      f"stopped after step {done}, which is saved (config.learn.health.stop): {lines[0]}; the same "
      "command goes on"
    )


def resume(workdir: str | os.PathLike[str], state: TrainState) -> tuple[int, TrainState]:
  """(first step, state): the newest whole checkpoint, or the given start at step 0.

  With a checkpoint the arrays of the start are deleted, so that the devices never hold two states.
  """
  found = checkpoint.latest(workdir)
  if found is None:
    return 0, state
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  for x in jax.tree.leaves(state):
    if isinstance(x, jax.Array):
      x.delete()
  return checkpoint.read_progress(found).step, checkpoint.restore(found, abstract)


def _timed(step: StageStep, state: TrainState, number: int) -> tuple[TrainState, dict[str, float]]:
  """One finished step: its metrics as numbers, with its time and its compilations."""
  start, compiled = time.monotonic(), programs_compiled()
  state, metrics = step(state, number)
  values = {name: np.asarray(value).item() for name, value in metrics.items()}
  values["seconds"] = time.monotonic() - start
  values["programs_compiled"] = programs_compiled() - compiled
  return state, values
