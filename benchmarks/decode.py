"""A decode step compared with its matrix products alone, and with the speed of the machine.

    python -m benchmarks.decode [--shape=nano] [--case=image|frames|drawing] [--suffix=64]

All rows of the case sample after a full prompt, with `suffix` tokens in the suffix of each row.
`bare matmuls` computes only the products of the step with weights, prefix cache and suffix cache,
the same number of times: no softmax, norms, rotation or sampling, and no cache is written.
"""

import itertools
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich import box
from rich.table import Table

from benchmarks import measure, rollout, shapes
from spatial_jax.evaluate.console import make_console
from spatial_jax.policy.config import DecoderConfig
from spatial_jax.rollout.device import SampleState
from spatial_jax.types import Params

SUFFIX = flags.DEFINE_integer("suffix", 64, "tokens in the suffix of each row", lower_bound=0)
PEAK_SIDE = 2_048  # side of the matrices for the peak of the machine
COPIED = 1 << 26  # floats of the array for the bandwidth of the machine


class Ours:
  """One chunk of the engine with all rows active, always from the same state."""

  def __init__(self, folder: pathlib.Path):
    side = rollout.Ours(folder)
    self.engine, self.weights = side.engine, side.weights
    cfg = self.engine.cfg
    state = self.engine.programs.empty_state(cfg.prompt_buckets[-1])
    self.rows = state.active_R.size
    self.state = state

  def __call__(self) -> None:
    """Samples `chunk` tokens in every row."""
    run = self.engine.programs
    state, token_RT, _ = run.decode(self.weights, self._full(), self._nobody(), None, False)
    assert bool((jax.block_until_ready(token_RT) >= 0).all()), "every row samples every token"
    self.state = state

  def _full(self) -> SampleState:
    cache, size = self.state.cache, self.engine.cfg.prompt_buckets[-1]
    prefix = cache.prefix._replace(length_B=jnp.full(cache.prefix.length_B.shape, size, jnp.int32))
    length_R = jnp.full(self.rows, SUFFIX.value, jnp.int32)
    return self.state._replace(
      cache=cache._replace(prefix=prefix, length_R=length_R),
      active_R=jnp.ones(self.rows, bool),
      sampling=self.state.sampling._replace(limit_R=jnp.full(self.rows, 1 << 20, jnp.int32)),
      count_R=jnp.zeros(self.rows, jnp.int32),
    )

  def _nobody(self) -> np.ndarray:
    return np.zeros(self.rows, bool)


def bare_matmuls(ours: Ours, cfg: DecoderConfig) -> Callable[[], None]:
  """The matrix products of a chunk, in the order of the layers, each with the last one's output."""
  cache, steps = ours.state.cache, ours.engine.cfg.decode_steps
  groups, rows = cache.prefix.length_B.size, ours.rows
  shape = (rows, cfg.kv_heads, suffix_read(ours), cfg.head_dim)
  layers = [
    (*(jnp.copy(x) for x in prefix), jnp.zeros(shape), jnp.zeros(shape))
    for prefix in cache.prefix.layers
  ]

  def attend(q_RKQC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array) -> jax.Array:
    score = jnp.einsum("RKQC,RKSC->RKQS", q_RKQC, k_RKSC)
    return jnp.einsum("RKQS,RKSC->RKQC", score, v_RKSC)

  def step(_, carry):
    x_RD, weights, layers = carry
    for weight, kv in zip(weights["decoder"]["layers"], layers, strict=True):
      of = weight["attn"]
      q = jnp.einsum("RD,DHC->RHC", x_RD, of["q"]["kernel"])
      new = [jnp.einsum("RD,DKC->RKC", x_RD, of[name]["kernel"]) for name in "kv"]
      q = q.reshape(rows, cfg.kv_heads, -1, cfg.head_dim) + sum(new)[:, :, None]
      shared = jnp.swapaxes(q.reshape(groups, -1, *q.shape[1:]), 1, 2)
      shared = shared.reshape(groups, cfg.kv_heads, -1, cfg.head_dim)
      out = attend(shared, *kv[:2]).reshape(groups, cfg.kv_heads, rows // groups, -1, cfg.head_dim)
      out = jnp.swapaxes(out, 1, 2).reshape(q.shape) + attend(q, *kv[2:])
      out = out.reshape(rows, cfg.heads, cfg.head_dim)
      x_RD = jnp.einsum("RHC,HCD->RD", out, of["o"]["kernel"])
      mlp = weight["mlp"]
      hidden = (x_RD @ mlp["gate"]["kernel"]) * (x_RD @ mlp["up"]["kernel"])
      x_RD = hidden @ mlp["down"]["kernel"]
    table_VD = weights["decoder"]["embed" if cfg.tied else "head"]["embedding"]
    logits_RV = jnp.einsum("RD,VD->RV", x_RD, table_VD)
    return logits_RV[:, : cfg.width], weights, layers

  @jax.jit
  def chain(x_RD: jax.Array, weights: Params, layers: list) -> jax.Array:
    return jax.lax.fori_loop(0, steps, step, (x_RD, weights, layers))[0]

  x_RD = jnp.full((rows, cfg.width), 1e-3, jnp.float32)
  return lambda: jax.block_until_ready(chain(x_RD, ours.weights, layers))


def suffix_read(ours: Ours) -> int:
  """The number of suffix tokens of each row that a chunk reads: whole blocks."""
  cfg = ours.engine.cfg
  ends = itertools.accumulate(cfg.suffix_block_sizes)
  found = next((end for end in ends if end >= SUFFIX.value + cfg.decode_steps), None)
  if found is None:
    most = cfg.stop.max_response_tokens - cfg.decode_steps
    raise app.UsageError(f"--suffix is {SUFFIX.value} and must be at most {most}; lower it")
  return found


def work(ours: Ours, cfg: DecoderConfig) -> tuple[float, float]:
  """Bytes read and floating-point operations of one step."""
  decoder = ours.weights["decoder"]
  kernels = [x for x in jax.tree.leaves(decoder["layers"]) if x.ndim > 1]
  table = decoder["embed" if cfg.tied else "head"]["embedding"]
  numbers = sum(x.size for x in kernels) + table.size
  groups = ours.state.cache.prefix.length_B.size
  prefix, suffix = ours.engine.cfg.prompt_buckets[-1], suffix_read(ours)
  cached = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * (groups * prefix + ours.rows * suffix)
  attention = 4 * cfg.layers * cfg.heads * cfg.head_dim * ours.rows * (prefix + suffix)
  return 4.0 * (numbers + cached), 2.0 * ours.rows * numbers + attention


def machine() -> dict[str, Callable[[], object]]:
  """A large matrix product and a copy, which measure the speed of the machine."""
  square = jnp.ones((PEAK_SIDE, PEAK_SIDE), jnp.float32)
  array = [jnp.ones(COPIED, jnp.float32)]
  product = jax.jit(jnp.matmul)
  # In place, because page faults of a new array would take most of the time.
  add = jax.jit(lambda x: x + 1, donate_argnums=0)

  def copy() -> None:
    array[0] = jax.block_until_ready(add(array[0]))

  return {"matmul": lambda: jax.block_until_ready(product(square, square)), "copy": copy}


def report(seconds: Mapping[str, list[float]], ours: Ours, cfg: DecoderConfig) -> None:
  """Prints the table."""
  median = {name: statistics.median(values) for name, values in seconds.items()}
  size, flops = work(ours, cfg)
  peak = 2 * PEAK_SIDE**3 / median["matmul"]
  bandwidth = 8 * COPIED / median["copy"]  # read and written
  grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  grid.add_column("one step")
  for name in ("ms", "min - max", "GB/s", "GFLOP/s"):
    grid.add_column(name, justify="right")
  steps = ours.engine.cfg.decode_steps
  for name in ("ours", "bare matmuls"):
    ms = [1e3 * value / steps for value in seconds[name]]
    one_s = median[name] / steps
    span = f"{min(ms):.2f} - {max(ms):.2f}"
    rates = f"{size / one_s / 1e9:.1f}", f"{flops / one_s / 1e9:.0f}"
    grid.add_row(name, f"{1e3 * one_s:.2f}", span, *rates)
  console = make_console()
  console.print(
    f"{ours.rows} rows, {size / 1e6:.0f} MB and {flops / 1e9:.2f} GFLOP a step; this machine "
    f"copies {bandwidth / 1e9:.1f} GB/s and multiplies at {peak / 1e9:.0f} GFLOP/s"
  )
  console.print(grid)
  read_ms, count_ms = 1e3 * size / bandwidth, 1e3 * flops / peak
  bound = "memory" if read_ms > count_ms else "arithmetic"
  share = median["bare matmuls"] / median["ours"]
  console.print(
    f"{bound} is the limit ({read_ms:.2f} ms to read, {count_ms:.2f} ms to compute); "
    f"ours reaches {share:.0%} of the speed of the bare matmuls"
  )


def main(argv: list[str]) -> None:
  """Measures and prints."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  if dict(os.environ) != measure.environment():
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], measure.environment())
  shape = shapes.SHAPES[measure.SHAPE.value]
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    shapes.write_checkpoint(shape, folder)
    ours = Ours(folder)
    calls = {"ours": ours, "bare matmuls": bare_matmuls(ours, shape.decoder), **machine()}
    for call in calls.values():
      call()
      call()
    seconds = measure.alternate(calls, measure.REPEATS.value)
  report(seconds, ours, shape.decoder)


if __name__ == "__main__":
  app.run(main)
