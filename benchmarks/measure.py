"""Time and memory of two sides, fairly: the machinery that comparisons share.

time     one process, all sides in turn, round after round; medians
memory   one fresh process per side: peak RssAnon (mapped files do not count) of its first two
         calls, less that before anything was loaded

Both run with the same threads and the same allocator: glibc with transparent huge pages, without
which the page faults of large temporaries cost both sides time. The machine must be quiet: threads
of torch wait for one another, and beside other work two of them took 80 s for what one does in 4.
"""

import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any, TypeVar

import jax
from absl import app, flags
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import shapes
from spatial_jax.evaluate.console import make_console
from spatial_jax.hf.weights import CONFIG
from spatial_jax.policy.config import QwenVLConfig

SHAPE = flags.DEFINE_enum("shape", "nano", list(shapes.SHAPES), "size of the model")
REPEATS = flags.DEFINE_integer("repeats", 5, "timed rounds after the warm-up", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "write the numbers here as JSON")
FOLDER = flags.DEFINE_string(
  "folder", None, "where the random weights lie; made when missing, temporary when not given"
)
SIDES = flags.DEFINE_list("sides", [], "which of them to run; all where none are named")
PART = flags.DEFINE_string("part", None, "used by the benchmark itself: 'time', or side to weigh")

PEER = "torch"  # sides whose name begins so are what a user would pick instead
HUGE_PAGES = "glibc.malloc.hugetlb=1"
_SAMPLE_S = 0.002
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Timed:
  """What the timing process found: seconds of each round, and how far the sides' results differ."""

  seconds: dict[str, list[float]]
  differences: dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
  """One comparison.

  Attributes:
    title: one line, what is done.
    unit, tokens: what one call makes, and how many of it.
    sides: names, ours first.
    time: (folder) -> times of all sides, results compared.
    load: (side, folder) -> the call of one side alone.
    notes: what a reader must know to believe the figures.
  """

  title: str
  unit: str
  tokens: int
  sides: tuple[str, ...]
  time: Callable[[pathlib.Path], Timed]
  load: Callable[[str, pathlib.Path], Callable[[], Any]]
  notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the table."""

  side: str
  seconds: list[float]
  median_s: float
  tokens_per_s: float
  peak_mib: float


def chosen(every: Mapping[str, T]) -> dict[str, T]:
  """Those sides that `--sides` names, in their order here.

  Raises:
    UsageError: on the host, for a side that there is not.
  """
  unknown = sorted(set(SIDES.value) - every.keys())
  if unknown:
    raise app.UsageError(f"--sides are of: {', '.join(every)}; got {', '.join(unknown)}")
  return {side: what for side, what in every.items() if side in (SIDES.value or every)}


def run(benchmark: Benchmark) -> None:
  """Measures, prints the table and writes JSON; in a process of its own, does one part of it."""
  with _checkpoint_folder(shapes.SHAPES[SHAPE.value]) as folder:
    if PART.value is None:
      _report(benchmark, folder)
      return
    # Compiling is no part of the figures: a run finds its programs on disk, as training does.
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if PART.value == "time":
      found = dataclasses.asdict(benchmark.time(folder))
    else:
      found = {"peak_mib": _peak_mib(benchmark, PART.value, folder)}
    print(json.dumps(found))


def alternate(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
  """Seconds of each call in each round; the calls take turns and are warm already."""
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      gc.collect()
      start = time.perf_counter()
      call()
      seconds[name].append(time.perf_counter() - start)
  return seconds


def require_close(name: str, difference: float, tolerance: float) -> None:
  """Both sides must compute the same.

  Raises:
    ValueError: on the host, when they do not.
  """
  if not difference <= tolerance:
    raise ValueError(f"the two sides differ: {name} by {difference:.2e}, tolerated {tolerance:.0e}")


class PeakMemory:
  """While entered, a thread samples the RssAnon of this process; `peak_kib` is the most it saw."""

  def __init__(self):
    self.peak_kib = anonymous_kib()
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def _watch(self) -> None:
    while not self._done.wait(_SAMPLE_S):
      self._sample()

  def _sample(self) -> None:
    self.peak_kib = max(self.peak_kib, anonymous_kib())

  def __enter__(self) -> "PeakMemory":
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._done.set()
    self._thread.join()
    self._sample()


def anonymous_kib() -> int:
  """Memory of this process that no file backs, KiB (Linux)."""
  with open("/proc/self/status", encoding="ascii") as status:
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def _peak_mib(benchmark: Benchmark, side: str, folder: pathlib.Path) -> float:
  """Of the first two calls, what they work on included; what loading alone needed is not."""
  start_kib = anonymous_kib()
  call = benchmark.load(side, folder)
  gc.collect()
  with PeakMemory() as memory:
    call()
    call()
  return (memory.peak_kib - start_kib) / 1024


# --- the process that waits --------------------------------------------------------------------


def _report(benchmark: Benchmark, folder: pathlib.Path) -> None:
  console = make_console()
  machine = _machine()
  with console.status("timing all sides"):
    timed = _in_process("time", folder)
  rows = []
  for side in benchmark.sides:
    with console.status(f"memory of {side}"):
      peak_mib = _in_process(side, folder)["peak_mib"]
    seconds = timed["seconds"][side]
    median_s = statistics.median(seconds)
    rows.append(Row(side, seconds, median_s, benchmark.tokens / median_s, peak_mib))
  _show(benchmark, rows, timed["differences"], machine, console)
  if OUT.value is not None:
    result = {
      "title": benchmark.title,
      "shape": SHAPE.value,
      "machine": machine,
      "unit": benchmark.unit,
      "tokens": benchmark.tokens,
      "rows": [dataclasses.asdict(row) for row in rows],
      "differences": timed["differences"],
      "notes": benchmark.notes,
    }
    pathlib.Path(OUT.value).write_text(json.dumps(result, indent=2) + "\n")


def _in_process(part: str, folder: pathlib.Path) -> dict[str, Any]:
  """This command again, for one part; the last line it prints is the result."""
  options = [f"--part={part}", f"--folder={folder}"]
  command = [sys.executable, *sys.orig_argv[1:], *options]
  done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
  """Ours, with huge pages, and JAX on the CPU unless told otherwise."""
  tunables = os.environ.get("GLIBC_TUNABLES")
  if tunables is None:
    tunables = HUGE_PAGES
  elif "glibc.malloc.hugetlb" not in tunables:
    tunables = f"{tunables}:{HUGE_PAGES}"
  return {"JAX_PLATFORMS": "cpu", **os.environ, "GLIBC_TUNABLES": tunables}


@contextlib.contextmanager
def _checkpoint_folder(cfg: QwenVLConfig) -> Iterator[pathlib.Path]:
  """Where both sides load from; the first process of a benchmark writes it."""
  with contextlib.ExitStack() as stack:
    if FOLDER.value is None:
      folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    else:
      folder = pathlib.Path(FOLDER.value)
    if PART.value is not None and not (folder / CONFIG).exists():
      shapes.write_checkpoint(cfg, folder)
    yield folder


def _machine() -> dict[str, Any]:
  model = platform.processor()
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    model = names[0].split(":")[1].strip() if names else model
  return {
    "processor": model,
    "threads": threads(),
    "load_average": os.getloadavg()[0],
    "glibc_tunables": environment()["GLIBC_TUNABLES"],
    "jax_platforms": environment()["JAX_PLATFORMS"],
    "versions": {name: metadata.version(name) for name in ("jax", "torch", "transformers")},
  }


def threads() -> int:
  """Cores this process may use; JAX takes all of them, and torch is told to."""
  return len(os.sched_getaffinity(0))


def _show(
  benchmark: Benchmark,
  rows: list[Row],
  differences: dict[str, float],
  machine: dict[str, Any],
  console: Console,
) -> None:
  """Every row against the best time and the best memory of the peer, or else against the first."""
  total, vision = shapes.parameter_counts(shapes.SHAPES[SHAPE.value])
  console.print(benchmark.title, style="bold")
  console.print(
    f"shape {SHAPE.value}: {total / 1e6:.2f} M parameters ({vision / 1e6:.2f} M vision), float32, "
    f"threads: {machine['threads']} of {machine['processor']}, load {machine['load_average']:.1f}"
  )
  peers = [row for row in rows if row.side.startswith(PEER)] or rows[:1]
  best_s = min(row.median_s for row in peers)
  best_mib = min(row.peak_mib for row in peers)
  grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  grid.add_column("side", no_wrap=True)
  for name in ("s", "min - max", f"{benchmark.unit}/s", "x speed", "peak MiB", "x memory"):
    grid.add_column(name, justify="right", no_wrap=True)
  for row in rows:
    grid.add_row(
      row.side,
      f"{row.median_s:.3f}",
      f"{min(row.seconds):.3f} - {max(row.seconds):.3f}",
      f"{row.tokens_per_s:,.0f}",
      f"{best_s / row.median_s:.2f}",
      f"{row.peak_mib:,.0f}",
      f"{row.peak_mib / best_mib:.2f}",
    )
  console.print(grid)
  console.print(
    f"s: median of {REPEATS.value}, sides in turn. x: against the best time and memory of "
    f"{', '.join(row.side for row in peers)}. "
    "Memory: fresh process, peak RssAnon of two calls less that after import. "
    f"{machine['glibc_tunables']}, all sides."
  )
  for note in benchmark.notes:
    console.print(note, markup=False)
  for name, difference in differences.items():
    console.print(f"same result: {name} differ by {difference:.1e}", markup=False)
