"""Host memory while a checkpoint is loaded onto the devices.

    python -m benchmarks.load [--name=Qwen2-VL-2B] [--dtype=bfloat16] [--folder=...]

Writes random weights of a released shape, in files of 1 GiB, and loads them in a fresh process.
Prints the peak host memory besides the arrays on the devices, relative to the largest stacked
parameter.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
from absl import app, flags
from rich.console import Console

from benchmarks import measure
from spatial_jax.hf import weights
from spatial_jax.hf.model_zoo import NAMES, parameter_count, released
from spatial_jax.hf.name_map import name_table
from spatial_jax.policy import param_tree

NAME = flags.DEFINE_enum("name", "Qwen2-VL-2B", list(NAMES), "released shape")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "dtype of the parameters")
LIMIT = 1.2  # times the size of the largest stacked parameter


def write(folder: pathlib.Path) -> None:
  """Writes random bfloat16 weights of the shape."""
  cfg = released(NAME.value)
  noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(ml_dtypes.bfloat16)
  params = {entry.path: np.resize(noise, entry.full_shape) for entry in name_table(cfg)}
  weights.save(param_tree.unflatten(params), cfg, folder, file_bytes=1 << 30)


class Watch:
  """Measures host memory besides the arrays that are already on the devices.

  `weights.load` calls it for the sharding of each parameter in turn.
  """

  def __init__(self, memory: measure.PeakMemory, size: int, sharding: jax.sharding.Sharding):
    self._memory, self._size, self._sharding = memory, size, sharding
    self._start_kib, self._placed, self._last = measure.anonymous_kib(), 0, 0
    self.peak = 0  # bytes

  def __call__(self, path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    self.close()
    self._last = int(np.prod(shape)) * self._size
    return self._sharding

  def close(self) -> None:
    """Ends the measurement of the last parameter, which is on the devices from now on."""
    host = (self._memory.peak_kib - self._start_kib) * 1024 - self._placed
    self.peak = max(self.peak, host)
    self._placed += self._last
    self._memory.peak_kib = measure.anonymous_kib()


def load(folder: pathlib.Path) -> dict[str, float]:
  """Seconds of loading, and host bytes besides the arrays on the devices."""
  cfg, dtype = weights.read_config(folder), np.dtype(DTYPE.value)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  jax.block_until_ready(jax.device_put(np.zeros(8, np.float32), place))
  start = time.perf_counter()
  with measure.PeakMemory() as memory:
    watch = Watch(memory, dtype.itemsize, place)
    params = weights.load(folder, cfg, lambda path: dtype, watch)
    jax.block_until_ready(params)
    watch.close()
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
  stacked = [entry for entry in name_table(cfg) if entry.layers]
  largest = max(int(np.prod(entry.full_shape)) for entry in stacked) * dtype.itemsize
  seconds = time.perf_counter() - start
  return {"seconds": seconds, "host": watch.peak, "largest": largest, "devices": sum(sizes)}


def report(folder: pathlib.Path) -> bool:
  """Prints the result; returns whether the memory is within the limit."""
  if not (folder / weights.CONFIG).exists():
    _part("write", folder)
  found = json.loads(_part("load", folder).splitlines()[-1])
  on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
  ratio, gib = found["host"] / found["largest"], 1 << 30
  console = Console()
  console.print(
    f"{NAME.value}: {parameter_count(released(NAME.value)):,} parameters, "
    f"{on_disk / gib:.2f} GiB in "
    f"{len(list(folder.glob('*.safetensors')))} files, loaded as {DTYPE.value} in "
    f"{found['seconds']:.1f} s",
    highlight=False,
  )
  console.print(
    f"on devices {found['devices'] / gib:.2f} GiB; on the host at most {found['host'] / gib:.2f} "
    f"GiB, {ratio:.2f} x the largest stacked parameter ({found['largest'] / gib:.2f} GiB); limit "
    f"{LIMIT}",
    highlight=False,
  )
  return ratio <= LIMIT


def _part(part: str, folder: pathlib.Path) -> str:
  options = [f"--name={NAME.value}", f"--dtype={DTYPE.value}", f"--folder={folder}"]
  command = [sys.executable, "-m", "benchmarks.load", f"--part={part}", *options]
  environment = {"JAX_PLATFORMS": "cpu", **os.environ}
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
  return done.stdout


def main(argv: list[str]) -> None:
  """Measures and prints; exit code 1 when the limit is exceeded."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  parts: dict[str, Callable[[pathlib.Path], object]] = {"write": write, "load": load}
  if measure.PART.value is not None:
    print(json.dumps(parts[measure.PART.value](pathlib.Path(measure.FOLDER.value))))
    return
  with tempfile.TemporaryDirectory() as temporary:
    fits = report(pathlib.Path(measure.FOLDER.value or temporary))
  sys.exit(int(not fits))


if __name__ == "__main__":
  app.run(main)
