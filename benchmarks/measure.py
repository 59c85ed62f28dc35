"""Measures time and memory of the sides of a benchmark under equal conditions.

time     one process; every round calls each side once; the median counts
memory   one fresh process per side: peak RssAnon (without mapped files) of its first two calls,
         minus RssAnon before loading

All sides use the same threads and the same allocator: glibc with transparent huge pages. Without
them, page faults of large temporaries slow down all sides. The machine must be idle: the threads of
torch wait for one another; on a busy machine two threads took 80 s for the work of 4 s.
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
OUT = flags.DEFINE_string("out", None, "file for the numbers as JSON")
FOLDER = flags.DEFINE_string(
  "folder", None, "folder of the random weights, made if missing; default: a temporary folder"
)
SIDES = flags.DEFINE_list("sides", [], "the sides to run; default: all")
PART = flags.DEFINE_string("part", None, "internal: 'time', or the side whose memory is measured")

PEER = "torch"  # prefix of the sides that the other sides are compared with
HUGE_PAGES = "glibc.malloc.hugetlb=1"
_SAMPLE_S = 0.002
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Timed:
  """Seconds of each round for every side, and the differences between the results of the sides."""

  seconds: dict[str, list[float]]
  differences: dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
  """One comparison.

  Attributes:
    title: one line.
    unit, tokens: unit of the output of one call ("tokens"), and its number.
    sides: names, ours first.
    time: (folder) -> times of all sides, after their results were compared.
    load: (side, folder) -> the call of one side alone.
    notes: conditions of the measurement.
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
  """One row of the table."""

  side: str
  seconds: list[float]
  median_s: float
  tokens_per_s: float
  peak_mib: float


def chosen(every: Mapping[str, T]) -> dict[str, T]:
  """The entries that `--sides` names, in the order of `every`; all by default.

  Raises:
    UsageError: if a name is unknown.
  """
  unknown = sorted(set(SIDES.value) - every.keys())
  if unknown:
    raise app.UsageError(f"--sides {', '.join(unknown)} must be of: {', '.join(every)}")
  return {side: value for side, value in every.items() if side in (SIDES.value or every)}


def run(benchmark: Benchmark) -> None:
  """Measures all sides, prints the table and writes JSON; with `--part`, runs one part."""
  with _checkpoint_folder(shapes.SHAPES[SHAPE.value]) as folder:
    if PART.value is None:
      _report(benchmark, folder)
      return
    # Compilation is not measured: programs are read from the compilation cache, as in training.
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if PART.value == "time":
      found = dataclasses.asdict(benchmark.time(folder))
    else:
      found = {"peak_mib": _peak_mib(benchmark, PART.value, folder)}
    print(json.dumps(found))


def alternate(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
  """Seconds of each call in each round; a round calls each once, after a warm-up."""
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      gc.collect()
      start = time.perf_counter()
      call()
      seconds[name].append(time.perf_counter() - start)
  return seconds


def require_close(name: str, difference: float, tolerance: float) -> None:
  """Checks that both sides compute the same.

  Raises:
    ValueError: if `difference` exceeds `tolerance` or is NaN.
  """
  if not difference <= tolerance:
    raise ValueError(f"{name} of the sides differs by {difference:.2e}, more than {tolerance:.0e}")


class PeakMemory:
  """A context in which a thread samples RssAnon of this process; `peak_kib` is the maximum."""

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
  """RssAnon of this process, KiB: memory that is not mapped from files (Linux)."""
  with open("/proc/self/status", encoding="ascii") as status:
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def _peak_mib(benchmark: Benchmark, side: str, folder: pathlib.Path) -> float:
  """Peak of the first two calls, including their inputs, but not the peak of loading."""
  start_kib = anonymous_kib()
  call = benchmark.load(side, folder)
  gc.collect()
  with PeakMemory() as memory:
    call()
    call()
  return (memory.peak_kib - start_kib) / 1024


# --- parent process ----------------------------------------------------------------------------


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
  """Runs this command again for one part; its last output line is the result."""
  options = [f"--part={part}", f"--folder={folder}"]
  command = [sys.executable, *sys.orig_argv[1:], *options]
  done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
  """The environment of this process with huge pages; JAX runs on the CPU by default."""
  tunables = os.environ.get("GLIBC_TUNABLES")
  if tunables is None:
    tunables = HUGE_PAGES
  elif "glibc.malloc.hugetlb" not in tunables:
    tunables = f"{tunables}:{HUGE_PAGES}"
  return {"JAX_PLATFORMS": "cpu", **os.environ, "GLIBC_TUNABLES": tunables}


@contextlib.contextmanager
def _checkpoint_folder(cfg: QwenVLConfig) -> Iterator[pathlib.Path]:
  """The folder from which all sides load; the first process of a benchmark writes it."""
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
  """The number of cores of this process; JAX uses all of them, torch is set to use all."""
  return len(os.sched_getaffinity(0))


def _show(
  benchmark: Benchmark,
  rows: list[Row],
  differences: dict[str, float],
  machine: dict[str, Any],
  console: Console,
) -> None:
  """Prints the table: every row against the best time and memory of the peer, or the first row."""
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
    f"s: median of {REPEATS.value} rounds. x: against the best time and memory of "
    f"{', '.join(row.side for row in peers)}. "
    "Memory: fresh process, peak RssAnon of two calls minus RssAnon after import. "
    f"All sides: {machine['glibc_tunables']}."
  )
  for note in benchmark.notes:
    console.print(note, markup=False)
  for name, difference in differences.items():
    console.print(f"equal results: {name} differ by {difference:.1e}", markup=False)
