"""Device programs during rollouts, from the trace of the profiler, and the idle time between them.

    python -m benchmarks.profile [--shape=nano] --case=drawing [--after=5] [--seconds=10]

Traces a few seconds of a call of `benchmarks.rollout`, after a call that compiles. Prints the
fraction of the time in which no program runs, the same fraction of the whole call from the run's
own timeline, and the operations that take longest. On a CPU their seconds are those of threads.
"""

import collections
import os
import pathlib
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
from absl import app, flags
from rich import box
from rich.table import Table

from benchmarks import measure, rollout, shapes
from spatial_jax.evaluate.console import make_console
from spatial_jax.rollout.profiling import Timeline

AFTER = flags.DEFINE_float("after", 5.0, "seconds of the call before the trace", lower_bound=0.0)
SECONDS = flags.DEFINE_float("seconds", 10.0, "of the trace", lower_bound=0.1)
SHOWN = 12  # kinds of operations in the table
RUNNING = "ThunkExecutor::Execute"  # on a CPU this event covers all operations of a program


class Event(NamedTuple):
  """An event in which the device is busy, nanoseconds."""

  name: str
  start_ns: float
  end_ns: float


def trace(folder: pathlib.Path) -> None:
  """Waits for `--after` seconds, then traces for `--seconds`."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # the Python tracer would slow down the host
  time.sleep(AFTER.value)
  with jax.profiler.trace(str(folder), profiler_options=options):
    time.sleep(SECONDS.value)


def read(folder: pathlib.Path) -> list[Event]:
  """Returns the events of a trace in which the device is busy."""
  return [
    Event(event.name, event.start_ns, event.end_ns)
    for path in folder.rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes
    for line in plane.lines
    for event in line.events
    if event.name.startswith(RUNNING) or any(name == "hlo_op" for name, _ in event.stats)
  ]


def idle_share(events: Sequence[Event], seconds: float) -> float:
  """Returns the fraction of `seconds`, from the first event on, without an event."""
  free_ns = min(event.start_ns for event in events)
  end_ns, idle_ns = free_ns + 1e9 * seconds, 0.0
  for _, start, end in sorted(events, key=lambda event: event.start_ns):
    idle_ns += max(min(start, end_ns) - free_ns, 0.0)
    free_ns = min(max(free_ns, end), end_ns)
  return (idle_ns + end_ns - free_ns) / (1e9 * seconds)


def longest(events: Sequence[Event]) -> Table:
  """Returns a table of the kinds of operations, the longest first."""
  seconds, count = collections.Counter[str](), collections.Counter[str]()
  for name, start, end in events:
    kind = re.sub(r"[.\d]+$", "", name)
    if not name.startswith(RUNNING):
      seconds[kind] += (end - start) / 1e9
      count[kind] += 1
  grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  grid.add_column("operations")
  for name in ("s", "share", "runs"):
    grid.add_column(name, justify="right")
  for kind, one_s in seconds.most_common(SHOWN):
    grid.add_row(kind, f"{one_s:.2f}", f"{one_s / seconds.total():.1%}", f"{count[kind]:,}")
  return grid


def main(argv: list[str]) -> None:
  """Measures and prints."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  if dict(os.environ) != measure.environment():
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], measure.environment())
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    shapes.write_checkpoint(shapes.SHAPES[measure.SHAPE.value], folder)
    ours = rollout.Ours(folder)
    ours()
    watch = threading.Thread(target=trace, args=(folder / "trace",))
    watch.start()
    with Timeline() as timeline:
      ours(timeline)
    watch.join()
    if timeline.total_s < AFTER.value + SECONDS.value:
      raise app.UsageError(
        f"the call took {timeline.total_s:.1f} s; lower --after or --seconds to stay within it"
      )
    events = read(folder / "trace")
  console = make_console()
  console.print(
    f"{SECONDS.value:g} s of {timeline.total_s:.1f}: no program ran for "
    f"{idle_share(events, SECONDS.value):.1%} of them; by the timeline for "
    f"{timeline.summary()['device_idle_share']:.1%} of the whole call"
  )
  console.print(longest(events))


if __name__ == "__main__":
  app.run(main)
