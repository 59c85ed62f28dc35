"""What SFT and DPO share: shapes of packed rows, the stream of demonstrations, memory.

tasks ─► demonstrations (or pairs) ─► PackedBatch ─► update
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from spatial_jax.config import check_field, check_whole
from spatial_jax.data.files import FileSource
from spatial_jax.data.pipeline import PipelineConfig, encode_in_order
from spatial_jax.data.source import Source
from spatial_jax.data.vision_packing import VisionBuckets, geometric_buckets, needs_of
from spatial_jax.errors import DataError
from spatial_jax.learn.optimizer import OptimizerConfig
from spatial_jax.learn.packing import PackConfig, row_buckets
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.rollout.demonstration import SequenceLimits
from spatial_jax.types import Task, Trajectory

Item = TypeVar("Item")
_MULTIPLE = 128  # lengths of rows are rounded up to it: the TPU kernel reads such blocks
_MEASURED = 96  # demonstrations whose sizes are measured
_MARGIN = 1.25  # of the longest measured one, and of its images
_MANY_PASSES = 20  # over the data
_LEAST_ROW = 512  # tokens: several short demonstrations share a row


@dataclasses.dataclass(frozen=True)
class DemonstrationTraining:
  """What SFT and DPO have in common in their config."""

  steps: int  # updates
  batch: int  # demonstrations, or pairs, per step
  tokens: int | None  # length of a row; None: measured on the data
  micro_rows: int | None  # rows of a microbatch per device; None: what fits
  pack: bool  # several demonstrations in a row
  optimizer: OptimizerConfig

  def __post_init__(self):
    check_whole(self, "steps", "batch", at_least=1)
    if self.tokens is not None:
      check_whole(self, "tokens", at_least=2)
    if self.micro_rows is not None:
      check_whole(self, "micro_rows", at_least=1)
    check_field(self, "pack", isinstance(self.pack, bool), "be True or False")


def passes(cfg: DemonstrationTraining, source: Source) -> str:
  """How often the data is used, for the user."""
  if not isinstance(source, FileSource):
    return f"{cfg.steps} steps of {cfg.batch} synthetic demonstrations"
  times = cfg.steps * cfg.batch / source.train_count
  line = f"{cfg.steps} steps of {cfg.batch}: {times:.1f} passes over {source.train_count:,} rows"
  if times > _MANY_PASSES:
    line += "; the policy may memorise them: take fewer steps or more rows"
  return line


@dataclasses.dataclass(frozen=True)
class DemonstrationSizes:
  """Sizes of some demonstrations."""

  tokens: tuple[int, ...]  # of each
  windows: tuple[int, ...]  # windows of the vision tower of its images
  frames: tuple[int, ...]
  patches: int  # of the largest frame that is expected


def measure(
  tasks: Sequence[Task],
  encode: Callable[[Task], Item],
  parts_of: Callable[[Item], Sequence[Trajectory]],
  shape: QwenVLConfig,
  most_patches: int,
  pipeline: PipelineConfig,
) -> DemonstrationSizes:
  """Encodes some tasks and returns the sizes; tasks that cannot be used are skipped.

  Args:
    parts_of: an encoded item -> its trajectories.
    most_patches: of an image, by the limits on pixels; frames are not expected to be larger.

  Raises:
    DataError: if none can be used.
  """
  found = list(encode_in_order(tasks[:_MEASURED], encode, pipeline))
  good = [t for item in found if not isinstance(item, DataError) for t in parts_of(item)]
  if not good:
    raise next(error for error in found if isinstance(error, DataError))
  blocks = shape.vision.window_blocks
  needs = [needs_of((image.grid_3 for image in t.images), blocks) for t in good]
  largest = max((max(need.frames) for need in needs if need.frames), default=4)
  return DemonstrationSizes(
    tokens=tuple(len(t.token_ids_T) for t in good),
    windows=tuple(need.windows for need in needs),
    frames=tuple(len(need.frames) for need in needs),
    patches=max(largest, min(math.ceil(largest * _MARGIN), most_patches)),
  )


def shapes_of(
  cfg: DemonstrationTraining,
  sizes: DemonstrationSizes,
  sequences: int,
  multiple: int,
  shape: QwenVLConfig,
) -> PackConfig:
  """The static shapes of packed rows; any sequences that `limits_of` accepts fit together.

  Args:
    sequences: in a batch.
    multiple: the number of rows is a multiple of it.
  """
  longest = int(max(sizes.tokens) * _MARGIN)
  tokens = cfg.tokens or max(-(-longest // _MULTIPLE) * _MULTIPLE, _LEAST_ROW)
  rows = {-(-sequences // multiple) * multiple}  # each has its own
  if cfg.pack:
    rows |= {*row_buckets(sequences, sizes.tokens, min(longest, tokens), tokens, multiple)}

  def of_batch(counts: Sequence[int]) -> tuple[int, ...]:
    usual = int(sequences * (np.mean(counts) + 1))
    most = max(sequences * math.ceil(max(counts) * _MARGIN), 1)
    return tuple(sorted({geometric_buckets(16, n)[-1] for n in (usual, most)}))

  patches = -(-sizes.patches // _MULTIPLE) * _MULTIPLE
  return PackConfig(
    tokens=tokens,
    rows=tuple(sorted(rows)),
    pack=cfg.pack,
    vision=VisionBuckets(of_batch(sizes.windows), of_batch(sizes.frames), (patches,)),
    window_blocks=shape.vision.window_blocks,
    vocabulary=shape.decoder.vocabulary,
  )


def limits_of(shapes: PackConfig, sequences: int) -> SequenceLimits:
  """What one of the sequences of a batch may need, so that any of them fit together."""
  images = shapes.vision
  return SequenceLimits(
    tokens=shapes.tokens,
    windows=images.windows[-1] // sequences,
    frames=images.frames[-1] // sequences,
    patches=images.patches[-1],
  )
