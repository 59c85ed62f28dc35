"""Drawings per second through the executor, parent and worker on one core.

    python -m benchmarks.drawing [--side_px=448] [--count=400] [--repeats=5]

A drawing is a box and a line with their labels on one image: planned here, sent to the worker,
painted there and sent back. The row `this process` has no worker.
"""

import os
import statistics
import time

import numpy as np
from absl import app, flags
from rich import box
from rich.table import Table

from spatial_jax.drawing.canvas import DrawnImage, Style
from spatial_jax.drawing.executor import Executor, ExecutorConfig, Fault
from spatial_jax.evaluate.console import make_console
from spatial_jax.types import Operation

SIDE_PX = flags.DEFINE_integer("side_px", 448, "side of the image", lower_bound=64)
COUNT = flags.DEFINE_integer("count", 400, "drawings per round", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "rounds after the warm-up", lower_bound=1)
STYLE = Style(line_px=4, dot_px=4, font_px=10, label_offset_px=(8, 6))


def drawings_per_s(workers: int) -> list[float]:
  """Returns the drawings per second of each round after the warm-up."""
  random = np.random.default_rng(0)
  pixels = random.integers(0, 256, (SIDE_PX.value, SIDE_PX.value, 3), np.uint8)
  image, rates = DrawnImage(pixels, ()), []
  with Executor(ExecutorConfig(workers, 20.0, 1024), STYLE) as executor:
    for _ in range(REPEATS.value + 1):
      start = time.perf_counter()
      drawings = [executor.submit([image], _operations(i)) for i in range(COUNT.value)]
      drawn = [drawing.result() for drawing in drawings]
      rates.append(COUNT.value / (time.perf_counter() - start))
      faults = [result for result in drawn if isinstance(result, Fault)]
      if faults:
        raise RuntimeError(f"{len(faults)} drawings failed: {faults[0].detail}")
  return rates[1:]


def _operations(number: int) -> list[Operation]:
  x = float(number % 200)
  corners = (x, 20.0, x + 150, 200.0)
  return [Operation("box", 1, corners, "chair"), Operation("line", 1, corners, "path")]


def main(argv: list[str]) -> None:
  """Measures and prints."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # workers inherit it
  grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  for name in ("drawn by", "drawings/s", "min - max"):
    grid.add_column(name, justify="left" if name == "drawn by" else "right")
  for name, workers in (("a worker", 1), ("this process", 0)):
    rates = drawings_per_s(workers)
    span = f"{min(rates):,.0f} - {max(rates):,.0f}"
    grid.add_row(name, f"{statistics.median(rates):,.0f}", span)
  console = make_console()
  console.print(f"{SIDE_PX.value} x {SIDE_PX.value} pixels, median of {REPEATS.value}, one core")
  console.print(grid)


if __name__ == "__main__":
  app.run(main)
