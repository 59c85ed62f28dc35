"""Direct preference optimisation on pairs of responses about the same images.

tasks ─► pairs ─► log-probabilities of the reference, once ─► PackedBatch ─► update
"""

import dataclasses
import itertools
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from spatial_jax.config import check_choice, check_field, check_number, check_whole
from spatial_jax.data.pipeline import PromptBatch
from spatial_jax.errors import CheckpointError
from spatial_jax.learn.dpo import DpoLossConfig
from spatial_jax.learn.packing import PackConfig, to_packed_batch
from spatial_jax.stages.demonstrations import DemonstrationTraining
from spatial_jax.stages.replaced import ReplacedTasks
from spatial_jax.types import Array, PackedBatch, Params, StageStep, TrainState, Trajectory
from spatial_jax.workdir import write_text

REFERENCE = "reference_logprobs.jsonl"  # one line per step: checksum, two sums of each pair
Pair = tuple[Trajectory, Trajectory]  # preferred, rejected


@dataclasses.dataclass(frozen=True)
class DpoConfig(DemonstrationTraining):
  """The config of a DPO stage."""

  path: str  # data files, joined by commas; "": the tasks of config.source
  # rows: the fields turns and rejected of the data. corrupted: the true answer against a changed
  # one (vsGRPO). samples: the best against the worst of the policy's own responses.
  pairs: Literal["rows", "corrupted", "samples"]
  loss: DpoLossConfig
  sampled_tasks: int  # of "samples": tasks that are sampled before training
  min_gap: float  # of "samples": smallest difference of the rewards of a pair

  def __post_init__(self):
    super().__post_init__()
    check_choice(self, "pairs")
    check_whole(self, "sampled_tasks", at_least=1)
    check_number(self, "min_gap", at_least=0)
    unread = self.pairs == "samples" and self.path
    check_field(self, "path", not unread, 'be "" with pairs="samples", which samples config.source')


class DpoPrograms(Protocol):
  """What DPO runs on the devices; `compiled.PackedPrograms` are the programs."""

  def place(self, batch: PackedBatch, /) -> PackedBatch:
    """Moves a NumPy batch to the devices."""
    ...

  def sequence_logprobs(self, params: Params, batch: PackedBatch, count: int, /) -> Array:
    """Log-probability [N] of each sequence under a policy without adapters."""
    ...

  def dpo(
    self, state: TrainState, batch: PackedBatch, ref_logp_N: Array, /
  ) -> tuple[TrainState, Mapping[str, Any]]:
    """One optimizer step; the state is donated."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class DpoStage:
  """Everything that a DPO step needs besides the train state and the step number."""

  programs: DpoPrograms
  stream: Callable[[int], Iterator[PromptBatch[Pair]]]  # first step -> pairs
  shapes: PackConfig
  steps: int
  workdir: pathlib.Path

  def score_reference(self, params: Params) -> None:
    """Computes the log-probabilities of all pairs under the start, once, and writes them.

    Args:
      params: of the start; with adapters, those are left out.
    """
    path = self.workdir / REFERENCE
    done = len(path.read_text().splitlines()) if path.exists() else 0
    if done == self.steps:
      return
    stream = itertools.islice(self.stream(0), self.steps)
    lines = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
      for batch in bar.track(stream, total=self.steps, description="scoring the reference"):
        packed = self.programs.place(self._batch(batch.prompts))
        logp_N = self.programs.sequence_logprobs(params, packed, 2 * len(batch.prompts))
        logp = np.asarray(logp_N, np.float64).tolist()
        lines.append(json.dumps([checksum(batch.prompts), *logp]))
    write_text(path, "".join(f"{line}\n" for line in lines))

  def step_function(self, first: int) -> StageStep:
    """The function of one step, for a run that begins with the step `first`.

    A step raises CheckpointError if its pairs are not those that the reference was scored on.
    """
    stream, replaced = self.stream(first), ReplacedTasks()
    path = self.workdir / REFERENCE
    reference = [json.loads(line) for line in path.read_text().splitlines()]

    def run(state: TrainState, step: int) -> tuple[TrainState, Mapping[str, Any]]:
      batch = next(stream)
      known, *logp = reference[step] if step < len(reference) else [None]
      if known != checksum(batch.prompts):
        raise CheckpointError(
          f"{path} has other pairs in step {step}, or none: data or steps have changed since the "
          "reference was scored; use a new --workdir"
        )
      ref_logp_N = np.array(logp, np.float32)
      packed = self.programs.place(self._batch(batch.prompts))
      state, metrics = self.programs.dpo(state, packed, ref_logp_N)
      return state, {**jax.device_get(metrics), "replaced_tasks": replaced.count(batch.replaced)}

    return run

  def _batch(self, pairs: Sequence[Pair]) -> PackedBatch:
    sequences = list(itertools.chain(*pairs))
    return to_packed_batch(sequences, np.zeros(len(sequences)), self.shapes)


def checksum(pairs: Sequence[Pair]) -> int:
  """A number that changes with the tokens and the images of the pairs."""
  found = 0
  for trajectory in itertools.chain(*pairs):
    found = zlib.crc32(trajectory.token_ids_T.tobytes(), found)
    found = zlib.crc32("".join(i.content_hash for i in trajectory.images).encode(), found)
  return found
