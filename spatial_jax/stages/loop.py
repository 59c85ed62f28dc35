"""The frame around every training loop: resume, count, save; a kill loses a few steps at most."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from spatial_jax import checkpoint
from spatial_jax.checkpoint import Progress
from spatial_jax.metrics import LogConfig, Metrics, programs_compiled
from spatial_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """How long, and how often it is saved.

  Attributes:
    steps: updates of the whole run.
    checkpoint_every: steps.
    keep: checkpoints that stay.
    log: outputs besides console and metrics.jsonl.
  """

  steps: int
  checkpoint_every: int
  keep: int
  log: LogConfig


Step = Callable[[TrainState, int], tuple[TrainState, Mapping[str, Any]]]


def run(
  workdir: pathlib.Path,
  cfg: LoopConfig,
  stage: str,
  state: TrainState,
  step_of: Callable[[int], Step],
  benchmark: str | None,
  config: dict[str, Any],
) -> TrainState:
  """Runs the steps that are left and saves on the way.

  Args:
    workdir: of the run; its newest checkpoint, where there is one, replaces `state`.
    cfg: how long.
    stage: name in the logs.
    state: the start; donated.
    step_of: first step -> the function of one step, of state and step alone, so that a
      resumed run takes the same steps.
    benchmark: recorded with every checkpoint.
    config: the resolved config, recorded likewise.

  Returns:
    The state after the last step.
  """
  first, state = resume(workdir, state)
  step = step_of(first)
  with (
    checkpoint.Saver(workdir, cfg.keep) as saver,
    Metrics(workdir, first, cfg.steps, cfg.log) as metrics,
  ):
    for number in range(first, cfg.steps):
      begin, compiled = time.monotonic(), programs_compiled()
      state, values = step(state, number)
      values = {name: np.asarray(value).item() for name, value in values.items()}
      values["seconds"] = time.monotonic() - begin
      values["programs_compiled"] = programs_compiled() - compiled
      metrics.write(number, stage, values)
      done = number + 1
      if done % cfg.checkpoint_every == 0 or done == cfg.steps:
        saver.save(state, Progress(done, done, {"step": done}, benchmark, config))
  return state


def resume(workdir: pathlib.Path, state: TrainState) -> tuple[int, TrainState]:
  """(first step, state): the newest checkpoint, or the given start at step 0."""
  found = checkpoint.latest(workdir)
  if found is None:
    return 0, state
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  return checkpoint.read_progress(found).step, checkpoint.restore(found, abstract)
