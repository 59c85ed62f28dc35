"""What the devices did while rollouts ran, and who was where: the engine's instruments.

    handed over ──► the device's queue ──► ready       a thread waits for each program and stamps it

Watching changes nothing of what runs.
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

TIMELINE = "timeline.json"

Program = Literal["encode_images", "prefill", "append", "decode"]


@dataclasses.dataclass(eq=False)
class Span:
  """One program on the devices.

  Attributes:
    program: which.
    start_s, end_s: since the timeline began; NaN until it is done.
    tokens: that were of use.
    places: token positions computed, padding included.
  """

  program: Program
  start_s: float
  end_s: float
  tokens: int
  places: int


class Frame(NamedTuple):
  """During a chunk: rows in all, rollouts of a group; of each slot, those that sample, and draw."""

  decode: Span
  rows: int
  group: int
  active: tuple[int, ...]
  drawing: tuple[int, ...]


class Timeline:
  """Context manager around a call of the engine; `summary` says how it went."""

  def __init__(self):
    self.spans: list[Span] = []
    self.frames: list[Frame] = []
    self.waited_s = self.total_s = 0.0
    self.pictures_asked = self.pictures_seen = 0
    self._queue: queue.SimpleQueue[tuple[Span, Array] | None] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._watch, daemon=True, name="timeline")
    self._begin = 0.0

  def __enter__(self) -> "Timeline":
    self._begin = time.perf_counter()
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._queue.put(None)
    self._thread.join()
    self.total_s = self._now()

  def submitted(self, program: Program, mark: Array, tokens: int, places: int) -> Span:
    """Notes a program that was given to the devices; `mark` is a result that none takes over."""
    span = Span(program, self._now(), float("nan"), tokens, places)
    self.spans.append(span)
    self._queue.put((span, mark))
    return span

  @contextmanager
  def waiting(self) -> Iterator[None]:
    """Around waiting for drawings."""
    begin = time.perf_counter()
    yield
    self.waited_s += time.perf_counter() - begin

  def summary(self) -> dict[str, float]:
    """Rates and shares of the call, of programs that were done when it ended."""
    done = [span for span in self.spans if span.end_s == span.end_s]
    busy_s = sum(span.end_s - span.start_s for span in done)
    places = sum(span.places for span in done)

    def rate(*programs: Program) -> float:
      of = [span for span in done if span.program in programs]
      return sum(s.tokens for s in of) / max(sum(s.end_s - s.start_s for s in of), 1e-9)

    frames = [frame for frame in self.frames if frame.decode in done]
    used_s = sum(sum(f.active) * (f.decode.end_s - f.decode.start_s) for f in frames)
    all_s = sum(f.rows * (f.decode.end_s - f.decode.start_s) for f in frames)
    return {
      "prefill_tokens_per_s": rate("prefill", "append"),
      "decode_tokens_per_s": rate("decode"),
      "slot_occupancy": used_s / max(all_s, 1e-9),
      "padded_share": 1 - sum(span.tokens for span in done) / max(places, 1),
      "drawing_wait_share": self.waited_s / max(self.total_s, 1e-9),
      "device_idle_share": 1 - busy_s / max(self.total_s, 1e-9),
      "image_cache_hits": 1 - self.pictures_seen / max(self.pictures_asked, 1),
    }

  def record(self) -> dict[str, Any]:
    """What a picture of the call needs, as JSON values, of programs that were done."""
    kept = ("program", "start_s", "end_s")
    spans = [span for span in self.spans if span.end_s == span.end_s]
    return {
      "total_s": self.total_s,
      "programs": [{name: span.__dict__[name] for name in kept} for span in spans],
      "chunks": [
        {
          "start_s": frame.decode.start_s,
          "end_s": frame.decode.end_s,
          "group": frame.group,
          "active": frame.active,
          "drawing": frame.drawing,
        }
        for frame in self.frames
        if frame.decode in spans
      ],
    }

  def _watch(self) -> None:
    free_s = 0.0  # when the device was done with what came before
    while item := self._queue.get():
      span, mark = item
      jax.block_until_ready(mark)
      span.start_s = max(span.start_s, free_s)
      span.end_s = free_s = self._now()

  def _now(self) -> float:
    return time.perf_counter() - self._begin


def save_timeline(timeline: Timeline, step: int, workdir: pathlib.Path) -> None:
  """Keeps the timeline of one step for the page, in place of an earlier one."""
  partial = workdir / f"{TIMELINE}.partial"
  partial.write_text(json.dumps({"step": step, **timeline.record()}), encoding="utf-8")
  partial.replace(workdir / TIMELINE)
