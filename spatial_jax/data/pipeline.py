"""Tasks -> prompts ahead of time: worker processes read, resize, cut and tokenise.

    position ──► Task ──encode──► Prompt          position = step * prompts per step + place
                   └── cannot be read: another task takes its place, and is counted

Which tasks a step has is a pure function of (seed, step): no iterator is saved, and the number of
workers changes nothing.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import grain
import numpy as np

from spatial_jax.config import check_whole
from spatial_jax.errors import DataError
from spatial_jax.types import Task

Item = TypeVar("Item")  # a prompt, or what a stage makes of a task
Encode = Callable[[Task], Item]  # raises DataError for a task that cannot be used

_UNREADABLE = (DataError, OSError, ValueError)  # what libraries raise for damaged media
_MAX_REPLACEMENTS = 16  # tasks in a row that cannot be used before the run is refused
_END = 2**62  # more positions than any run has
_REPLACEMENT_STREAM = 6  # of random numbers


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
  """Work ahead of the training step."""

  workers: int  # processes; 0: a thread
  steps_ahead: int  # steps whose prompts are prepared, at least 1

  def __post_init__(self):
    check_whole(self, "workers", at_least=0, at_most=256)
    check_whole(self, "steps_ahead", at_least=1, at_most=64)


class PromptBatch(NamedTuple, Generic[Item]):
  """The prompts of one step, and why tasks were replaced by others."""

  prompts: list[Item]
  replaced: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _PromptAt(Generic[Item]):
  """The prompt at a position; runs in the workers."""

  tasks: grain.MapDataset[Task]
  encode: Encode[Item]
  seed: int

  def __call__(self, position: int) -> tuple[Item, tuple[str, ...]]:
    replaced: list[str] = []
    for attempt in range(_MAX_REPLACEMENTS):
      at = position if attempt == 0 else _other_position(self.seed, position, attempt)
      try:
        task = self.tasks[at]
        assert task is not None  # grain's type allows None
        return self.encode(task), tuple(replaced)
      except _UNREADABLE as error:
        replaced.append(str(error))
    raise DataError(
      f"{_MAX_REPLACEMENTS} tasks in a row cannot be used; the last one: {replaced[-1]}"
    )


def _other_position(seed: int, position: int, attempt: int) -> int:
  words = np.random.SeedSequence((seed, position, attempt, _REPLACEMENT_STREAM)).generate_state(1)
  return int(words[0])


def prompt_batches(
  tasks: grain.MapDataset[Task],
  encode: Encode[Item],
  seed: int,
  first_step: int,
  count: int,
  cfg: PipelineConfig,
  process: int = 0,
  processes: int = 1,
) -> Iterator[PromptBatch[Item]]:
  """Yields the prompts of one step after the other, without end.

  Args:
    tasks: endless order of tasks.
    encode: makes the prompt of a task; it is sent to the workers.
    seed: of replacements.
    first_step: the first step that is yielded.
    count: prompts per step of this process.
    process, processes: this process takes its share of the positions of each step.
  """
  positions = grain.MapDataset.range(first_step * count, _END)
  if processes > 1:
    positions = positions.map(_ShareOf(count, process, processes))
  items = positions.map(_PromptAt(tasks, encode, seed))
  ahead = cfg.steps_ahead * count
  if cfg.workers:
    each = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    per_worker = max(1, -(-ahead // cfg.workers))
    options = grain.MultiprocessingOptions(cfg.workers, per_worker_buffer_size=per_worker)
    stream = items.to_iter_dataset(each).mp_prefetch(options)
  else:
    stream = items.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead))
  for batch in stream.batch(count, batch_fn=list):
    replaced = [reason for _, reasons in batch for reason in reasons]
    yield PromptBatch([prompt for prompt, _ in batch], tuple(replaced))


@dataclasses.dataclass(frozen=True)
class _ShareOf:
  """Position among those of one process -> position among those of all processes."""

  count: int
  process: int
  processes: int

  def __call__(self, position: int) -> int:
    step, place = divmod(position, self.count)
    return (step * self.processes + self.process) * self.count + place


def encode_in_order(
  tasks: Sequence[Task], encode: Encode[Item], cfg: PipelineConfig
) -> Iterator[Item | DataError]:
  """Yields the item of each task in order, or why the task cannot be used."""
  items = grain.MapDataset.source(tasks).map(_OrError(encode))
  if cfg.workers:
    stream = items.to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(
      grain.MultiprocessingOptions(cfg.workers, per_worker_buffer_size=8)
    )
  else:
    stream = items.to_iter_dataset(grain.ReadOptions(1, 16))
  yield from stream


@dataclasses.dataclass(frozen=True, eq=False)
class _OrError(Generic[Item]):
  encode: Encode[Item]

  def __call__(self, task: Task) -> Item | DataError:
    try:
      return self.encode(task)
    except _UNREADABLE as error:
      return error if isinstance(error, DataError) else DataError(f"task {task.task_id}: {error}")
