"""Builds the supervised stages: data, shapes that fit the memory, programs.

config, context ─► source ─► sizes of demonstrations ─► PackConfig ─► SftStage, DpoStage
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from spatial_jax import compiled, sharding
from spatial_jax.data.files import FileSource
from spatial_jax.data.pipeline import PromptBatch
from spatial_jax.data.source import Source, prompt_stream, solver_of
from spatial_jax.drawing.parser import Limits
from spatial_jax.errors import DataError
from spatial_jax.learn.dpo import DpoLossConfig
from spatial_jax.learn.packing import PackConfig
from spatial_jax.learn.train_batch import BatchConfig, Microbatches
from spatial_jax.rollout import memory
from spatial_jax.rollout.demonstration import Demonstrator
from spatial_jax.rollout.encode import PromptEncoder
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.memory import MIB, MemoryPlan
from spatial_jax.stages.collect import Collector, Keep
from spatial_jax.stages.context import RunContext, with_update
from spatial_jax.stages.demonstrations import (
  DemonstrationSizes,
  DemonstrationTraining,
  Item,
  limits_of,
  measure,
  passes,
  shapes_of,
)
from spatial_jax.stages.dpo import DpoConfig, DpoStage, Pair
from spatial_jax.stages.load import read_source
from spatial_jax.stages.pairs import CorruptedPairs, answers_by_type
from spatial_jax.stages.reject import best_and_worst, keep
from spatial_jax.stages.replaced import ReplacedTasks
from spatial_jax.stages.sft import ImitationConfig, SftConfig, SftStage
from spatial_jax.train_config import StageName, TrainConfig, TrainingParts
from spatial_jax.types import Params, Prompt, Task, Trajectory

_MICRO_ROWS = (8, 4, 2, 1)
_EXAMPLES = 2000  # tasks whose answers in words are known to the corrupter


@dataclasses.dataclass(frozen=True, eq=False)
class Supervised:
  """What the builders of supervised stages share."""

  cfg: TrainConfig
  context: RunContext
  parts: TrainingParts
  source: Source  # of the run
  rollouts: MemoryPlan  # with the state of this stage
  workdir: pathlib.Path
  data: FileSource | None  # of `stage_data`

  def sft(self, cfg: SftConfig) -> SftStage:
    """The stage of SFT."""
    source = self._source(cfg.path)
    return self._imitation(cfg, source, cfg.draw_fraction, cfg.correct_fraction)

  def _imitation(
    self, cfg: ImitationConfig, source: Source, draw: float, correct: float
  ) -> SftStage:
    demonstrator = self._demonstrator(source, draw, correct)
    shapes, micro = self._shapes(cfg, source, demonstrator, lambda one: [one], 1)
    encode = dataclasses.replace(demonstrator, sizes=limits_of(shapes, cfg.batch))
    run = self.cfg
    return SftStage(
      programs=compiled.PackedPrograms(self.parts.policy, self.parts.optimizer, micro),
      stream=lambda first: prompt_stream(source, encode, run.seed, first, cfg.batch, run.pipeline),
      cfg=cfg,
      shapes=shapes,
    )

  def dpo(self, cfg: DpoConfig, loss: DpoLossConfig) -> DpoStage:
    """The stage of DPO on pairs that the data or a corrupter gives."""
    source, run = self._source(cfg.path), self.cfg
    demonstrator = self._demonstrator(source, 0.0, 0.0)
    corrupts = cfg.pairs == "corrupted"
    words = answers_by_type(source.examples(run.seed, _EXAMPLES)) if corrupts else {}

    def pairs_of(one: Demonstrator) -> Callable[[Task], Pair]:
      return CorruptedPairs(one, words, run.seed) if corrupts else one.pair

    shapes, micro = self._shapes(cfg, source, pairs_of(demonstrator), list, 2)
    encode = pairs_of(dataclasses.replace(demonstrator, sizes=limits_of(shapes, 2 * cfg.batch)))
    return DpoStage(
      programs=compiled.PackedPrograms(self.parts.policy, self.parts.optimizer, micro, loss),
      stream=lambda first: prompt_stream(source, encode, run.seed, first, cfg.batch, run.pipeline),
      shapes=shapes,
      steps=cfg.steps,
      workdir=self.workdir,
    )

  def collector(self, engine: Engine, keeps: Keep, tasks: int, folder: str) -> Collector:
    """Samples `tasks` training tasks of the source of the run."""
    run, count = self.cfg, engine.cfg.prompts
    encode = PromptEncoder(self.context.conversation, engine.cfg)

    def stream(first: int) -> Iterator[PromptBatch[Prompt]]:
      return prompt_stream(self.source, encode, run.seed, first, count, run.pipeline)

    return Collector(
      engine=engine,
      batch_of=ChunkPrompts(stream),
      reward=run.learn.reward,
      keep=keeps,
      chunks=-(-tasks // count),
      seed=run.seed,
      folder=self.workdir / folder,
    )

  def rejection(self, engine: Engine, weights_of: Callable[[], Params]) -> SftStage:
    """Samples and filters, then the stage of SFT on what was kept."""
    cfg = self.cfg.reject
    path = cfg.path
    if not path:
      keeps = functools.partial(keep, cfg.keep)
      path = str(self.collector(engine, keeps, cfg.tasks, "kept").run(weights_of))
    return self._imitation(cfg.train, self._source(path), 0.0, 0.0)

  def sampled_pairs(self, engine: Engine, weights_of: Callable[[], Params]) -> DpoStage:
    """Samples pairs of the policy's own responses, then the stage of DPO on them."""
    cfg = self.cfg.dpo
    keeps = functools.partial(best_and_worst, cfg.min_gap)
    path = self.collector(engine, keeps, cfg.sampled_tasks, "pairs").run(weights_of)
    return self.dpo(dataclasses.replace(cfg, path=str(path), pairs="rows"), cfg.loss)

  def _source(self, path: str) -> Source:
    if not path:
      return self.source
    return self.data or read_files(self.cfg, path)

  def _demonstrator(self, source: Source, draw: float, correct: float) -> Demonstrator:
    run, solver = self.cfg, None
    if not isinstance(source, FileSource):
      solver = solver_of(run.source, draw, correct)
    limits: Limits = run.rollout.limits
    return Demonstrator(self.context.conversation, run.style, limits, solver, None)

  def _shapes(
    self,
    cfg: DemonstrationTraining,
    source: Source,
    encode: Callable[[Task], Item],
    parts_of: Callable[[Item], Sequence[Trajectory]],
    each: int,
  ) -> tuple[PackConfig, Microbatches]:
    """Shapes of packed rows, measured on the data, and the most rows that fit the memory.

    Args:
      encode: task -> a demonstration, or a pair.
      parts_of: the sequences of that.
      each: their number.
    """
    run, policy = self.cfg, self.parts.policy
    tasks = list(source.examples(run.seed, 96))
    pixels = max(run.preprocess.max_pixels, run.video.max_pixels)
    most = pixels // policy.cfg.vision.patch_size**2
    sizes = measure(tasks, encode, parts_of, policy.cfg, most, run.pipeline)
    fitted = fit(cfg, sizes, each, self.parts, self.rollouts)
    print(f"{passes(cfg, source)}; {fitted.description}")
    memory.check(fitted.plan, "the rows of a microbatch (micro_rows)")
    return fitted.shapes, fitted.micro


class ChunkPrompts:
  """Chunk -> its prompts; chunks in their order read one stream, whose workers start once.

  Tasks that were replaced by others are named.
  """

  def __init__(self, stream_of: Callable[[int], Iterator[PromptBatch[Prompt]]]):
    self._stream_of = stream_of
    self._stream: Iterator[PromptBatch[Prompt]] = iter(())
    self._next, self._replaced = -1, ReplacedTasks()

  def __call__(self, chunk: int) -> PromptBatch[Prompt]:
    if chunk != self._next:
      self._stream = self._stream_of(chunk)
    self._next = chunk + 1
    batch = next(self._stream)
    self._replaced.count(batch.replaced)
    return batch


def stage_data(cfg: TrainConfig, name: StageName) -> FileSource | None:
  """The data files of a stage of its own, read and checked; None if it has none."""
  paths = {"sft": cfg.sft.path, "reject": cfg.reject.path, "dpo": cfg.dpo.path, "grpo": ""}
  return read_files(cfg, paths[name]) if paths[name] else None


def read_files(cfg: TrainConfig, path: str) -> FileSource:
  """Data files in the place of config.source."""
  files = dataclasses.replace(cfg.source.files, weights=())  # those of config.source.path
  found = read_source(dataclasses.replace(cfg.source, kind="files", path=path, files=files))
  assert isinstance(found, FileSource)  # by its kind
  if not found.train_count:
    raise DataError(f"{path} has no training task; see the split of its rows")
  return found


class Fitted(NamedTuple):
  """Shapes of packed rows that fit the memory, or the smallest ones."""

  shapes: PackConfig
  micro: Microbatches
  plan: MemoryPlan

  @property
  def description(self) -> str:
    """One line for the user."""
    return (
      f"rows of {self.shapes.tokens:,} tokens, {self.micro.rows} per microbatch; the update takes "
      f"{self.plan.update / MIB:,.0f} of {self.plan.device / MIB:,.0f} MiB per device"
    )


def fit(
  cfg: DemonstrationTraining,
  sizes: DemonstrationSizes,
  each: int,
  parts: TrainingParts,
  rollouts: MemoryPlan,
) -> Fitted:
  """The most rows of a microbatch that fit the memory; nothing is allocated.

  Args:
    sizes: of some demonstrations.
    each: sequences of one item: 1, or 2 for a pair.
    parts: of the stage.
    rollouts: plan of the rollouts with the state of the stage.
  """
  policy, devices = parts.policy, sharding.row_devices(compiled.train_mesh(parts.policy))
  tried = [cfg.micro_rows] if cfg.micro_rows else list(_MICRO_ROWS)

  def with_rows(rows: int) -> Fitted:
    shapes = shapes_of(cfg, sizes, each * cfg.batch, rows * devices, policy.cfg)
    micro = Microbatches(rows, (shapes.tokens,))
    images = shapes.images
    batch = BatchConfig((1,), shapes.tokens, images.vision, images.window_blocks, images.vocabulary)
    return Fitted(shapes, micro, with_update(rollouts, policy, micro, batch, 0))

  found = [with_rows(rows) for rows in tried]
  fitting = [one for one in found if one.plan.update <= one.plan.device]
  return (fitting or found[-1:])[0]
