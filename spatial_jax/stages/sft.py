"""Supervised fine-tuning on demonstrated responses.

tasks ─► demonstrations (text, drawings, answer) ─► PackedBatch ─► update
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import jax
import numpy as np

from spatial_jax.config import check_choice, check_number
from spatial_jax.data.pipeline import PromptBatch
from spatial_jax.learn.packing import PackConfig, sequence_weights, to_packed_batch
from spatial_jax.stages.demonstrations import DemonstrationTraining
from spatial_jax.stages.replaced import ReplacedTasks
from spatial_jax.types import PackedBatch, StageStep, TrainState, Trajectory


@dataclasses.dataclass(frozen=True)
class ImitationConfig(DemonstrationTraining):
  """What SFT and rejection sampling have in common in their config."""

  # Every token counts the same, or every demonstration (ViLaSR's Eq. 4 is the latter).
  normalise: Literal["token", "sequence"]

  def __post_init__(self):
    super().__post_init__()
    check_choice(self, "normalise")


@dataclasses.dataclass(frozen=True)
class SftConfig(ImitationConfig):
  """The config of an SFT stage."""

  path: str  # data files, joined by commas; "": the tasks of config.source
  draw_fraction: float  # of the demonstrations of a solver that draw, in [0, 1]
  correct_fraction: float  # of those that draw, how many correct a mistake first, in [0, 1]

  def __post_init__(self):
    super().__post_init__()
    check_number(self, "draw_fraction", "correct_fraction", at_least=0, at_most=1)


class SftPrograms(Protocol):
  """What SFT runs on the devices; `compiled.PackedPrograms` are the programs."""

  def place(self, batch: PackedBatch, /) -> PackedBatch:
    """Moves a NumPy batch to the devices."""
    ...

  def sft(self, state: TrainState, batch: PackedBatch, /) -> tuple[TrainState, Mapping[str, Any]]:
    """One optimizer step; the state is donated."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class SftStage:
  """Everything that an SFT step needs besides the train state and the step number."""

  programs: SftPrograms
  stream: Callable[[int], Iterator[PromptBatch[Trajectory]]]  # first step -> demonstrations
  cfg: ImitationConfig
  shapes: PackConfig

  def step_function(self, first: int) -> StageStep:
    """The function of one step, for a run that begins with the step `first`."""
    stream, replaced = self.stream(first), ReplacedTasks()

    def run(state: TrainState, step: int) -> tuple[TrainState, Mapping[str, Any]]:
      batch = next(stream)
      state, metrics = self.step(state, batch.prompts)
      return state, {**metrics, "replaced_tasks": replaced.count(batch.replaced)}

    return run

  def step(
    self, state: TrainState, demonstrations: list[Trajectory]
  ) -> tuple[TrainState, Mapping[str, Any]]:
    """One step: demonstrations, packed batch, update; the state is donated."""
    weight_N = sequence_weights(demonstrations, by_token=self.cfg.normalise == "token")
    batch = to_packed_batch(demonstrations, weight_N, self.shapes)
    state, metrics = self.programs.sft(state, self.programs.place(batch))
    valid_RT = batch.rows.tokens.valid_RT > 0
    return state, {
      **jax.device_get(metrics),
      "padded_share": float(1 - valid_RT.mean()),
      "response_tokens": float(np.mean([t.trained_T.sum() for t in demonstrations])),
      "drawing_share": float(
        np.mean([any(turn.produced for turn in t.turns) for t in demonstrations])
      ),
    }
