"""Timeline of one call of `generate_rollouts`: when programs ran, and what each slot did.

    submitted ──► the device's queue ──► ready       a thread waits for each program and stamps it

A timeline does not change which programs run.
"""

import dataclasses
import json
import pathlib
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import jax

from spatial_jax.types import Array
from spatial_jax.workdir import write_text

TIMELINE = "timeline.json"

Program = Literal["encode_images", "prefill", "append", "decode"]


@dataclasses.dataclass(eq=False)
class ProgramSpan:
  """One run of a program on the devices."""

  program: Program  # its name
  # start_s, end_s: seconds since the timeline began; NaN until known.
  start_s: float
  end_s: float
  tokens: int  # tokens that were computed for a rollout
  positions: int  # token positions that were computed, including padding


class ChunkRecord(NamedTuple):
  """What the slots did during one chunk of decode steps."""

  decode: ProgramSpan  # the program that ran
  rows: int  # number of rows
  group: int  # rollouts per slot
  active: tuple[int, ...]  # for each slot, the rollouts that sampled
  drawing: tuple[int, ...]  # for each slot, the rollouts that waited for a drawing


class Timeline:
  """Records one call of `generate_rollouts`; enter it before the call, then read `summary`.

  Attributes:
    programs: every program, in the order of submission.
    chunks: every chunk of decode steps.
    drawing_wait_s, check_s: seconds in which the host waited for drawings, and in which it checked
      finished trajectories.
    total_s: seconds between entering and leaving.
    images_requested, images_encoded: images of prompts and observations, and how many of them the
      vision tower encoded.
    violations: message of each trajectory that broke an invariant and became a fault.
  """

  def __init__(self):
    self.programs: list[ProgramSpan] = []
    self.chunks: list[ChunkRecord] = []
    self.drawing_wait_s = self.check_s = self.total_s = 0.0
    self.images_requested = self.images_encoded = 0
    self.violations: list[str] = []
    self._queue: queue.SimpleQueue[tuple[ProgramSpan, Array] | None] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._wait, daemon=True, name="timeline")
    self._begin = 0.0

  def __enter__(self) -> "Timeline":
    self._begin = time.perf_counter()
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._queue.put(None)
    self._thread.join()
    self.total_s = self._now()

  def submitted(
    self, program: Program, ready_token: Array, tokens: int, positions: int
  ) -> ProgramSpan:
    """Records a program that was given to the devices.

    Args:
      ready_token: a result that no later program is given.
      tokens, positions: as in `ProgramSpan`.
    """
    span = ProgramSpan(program, self._now(), float("nan"), tokens, positions)
    self.programs.append(span)
    self._queue.put((span, ready_token))
    return span

  @contextmanager
  def waiting_for_drawing(self) -> Iterator[None]:
    """Counts the seconds of the block as waiting for a drawing."""
    begin = time.perf_counter()
    yield
    self.drawing_wait_s += time.perf_counter() - begin

  @contextmanager
  def checking_trajectory(self) -> Iterator[None]:
    """Counts the seconds of the block as checking a trajectory."""
    begin = time.perf_counter()
    yield
    self.check_s += time.perf_counter() - begin

  def summary(self) -> dict[str, float]:
    """Returns metrics of the call: rates, fractions and the number of violations.

    Programs that had not ended when the timeline was left are not counted.
    """
    ended = [span for span in self.programs if span.end_s == span.end_s]
    busy_s = sum(span.end_s - span.start_s for span in ended)
    positions = sum(span.positions for span in ended)

    def rate(*names: Program) -> float:
      spans = [span for span in ended if span.program in names]
      return sum(s.tokens for s in spans) / max(sum(s.end_s - s.start_s for s in spans), 1e-9)

    chunks = [chunk for chunk in self.chunks if chunk.decode in ended]
    active_s = sum(sum(c.active) * (c.decode.end_s - c.decode.start_s) for c in chunks)
    rows_s = sum(c.rows * (c.decode.end_s - c.decode.start_s) for c in chunks)
    return {
      "prefill_tokens_per_s": rate("prefill", "append"),
      "decode_tokens_per_s": rate("decode"),
      "slot_occupancy": active_s / max(rows_s, 1e-9),
      "padded_share": 1 - sum(span.tokens for span in ended) / max(positions, 1),
      "drawing_wait_share": self.drawing_wait_s / max(self.total_s, 1e-9),
      "device_idle_share": 1 - busy_s / max(self.total_s, 1e-9),
      "image_cache_hits": 1 - self.images_encoded / max(self.images_requested, 1),
      "trajectory_check_share": self.check_s / max(self.total_s, 1e-9),
      "trajectory_violations": float(len(self.violations)),
    }

  def record(self) -> dict[str, Any]:
    """Returns programs and chunks that had ended as JSON values, for the plot in the report."""
    fields = ("program", "start_s", "end_s")
    ended = [span for span in self.programs if span.end_s == span.end_s]
    return {
      "total_s": self.total_s,
      "programs": [{name: vars(span)[name] for name in fields} for span in ended],
      "chunks": [
        {
          "start_s": chunk.decode.start_s,
          "end_s": chunk.decode.end_s,
          "group": chunk.group,
          "active": chunk.active,
          "drawing": chunk.drawing,
        }
        for chunk in self.chunks
        if chunk.decode in ended
      ],
    }

  def _wait(self) -> None:
    """The thread: waits for one program after the other."""
    free_s = 0.0  # when the device had finished the program before
    while item := self._queue.get():
      span, ready_token = item
      jax.block_until_ready(ready_token)
      span.start_s = max(span.start_s, free_s)
      span.end_s = free_s = self._now()

  def _now(self) -> float:
    return time.perf_counter() - self._begin


def save_timeline(timeline: Timeline, step: int, workdir: pathlib.Path) -> None:
  """Writes the timeline of one step for the report, over that of an earlier step."""
  write_text(workdir / TIMELINE, json.dumps({"step": step, **timeline.record()}))
