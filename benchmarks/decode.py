"""A decode step beside its limits: the same matmuls alone, and what the machine can copy and add.

    python -m benchmarks.decode [--shape=nano] [--case=image|frames|drawing] [--own=64]

All rows of the case's slots sample behind a full prompt, with `own` tokens of their own in a cache
of the size that the case has. `bare matmuls` is the chain of the step's products with weights,
prompt and own cache, as often, compiled by XLA as it likes: no softmax, no norms, no rotation, no
sampling, nothing written to a cache.
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

OWN = flags.DEFINE_integer("own", 64, "tokens that each row has said", lower_bound=0)
PEAK_SIDE = 2_048  # of the matrices whose product is the machine's peak
COPIED = 1 << 26  # floats of the array whose copy is the machine's bandwidth


class Ours:
  """One chunk of the engine, all rows active, begun again and again from the same state."""

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
    length_R = jnp.full(self.rows, OWN.value, jnp.int32)
    return self.state._replace(
      cache=cache._replace(prefix=prefix, length_R=length_R),
      active_R=jnp.ones(self.rows, bool),
      sampling=self.state.sampling._replace(limit_R=jnp.full(self.rows, 1 << 20, jnp.int32)),
      count_R=jnp.zeros(self.rows, jnp.int32),
    )

  def _nobody(self) -> np.ndarray:
    return np.zeros(self.rows, bool)


def bare_matmuls(ours: Ours, cfg: DecoderConfig) -> Callable[[], None]:
  """The products of a chunk, in the order of the layers, each fed by the one before."""
  cache, steps = ours.state.cache, ours.engine.cfg.decode_steps
  groups, rows = cache.prefix.length_B.size, ours.rows
  own = own_read(ours)
  shape = (rows, cfg.kv_heads, own, cfg.head_dim)
  layers = [
    (*(jnp.copy(x) for x in prefix), jnp.zeros(shape), jnp.zeros(shape))
    for prefix in cache.prefix.layers
  ]

  def attend(q_RKQC: jax.Array, k_RKSC: jax.Array, v_RKSC: jax.Array) -> jax.Array:
    score = jnp.einsum("RKQC,RKSC->RKQS", q_RKQC, k_RKSC)
    return jnp.einsum("RKQS,RKSC->RKQC", score, v_RKSC)

  def step(_, carry):
    x_RD, weights, layers = carry
    for weight, kept in zip(weights["decoder"]["layers"], layers, strict=True):
      of = weight["attn"]
      q = jnp.einsum("RD,DHC->RHC", x_RD, of["q"]["kernel"])
      fresh = [jnp.einsum("RD,DKC->RKC", x_RD, of[name]["kernel"]) for name in "kv"]
      q = q.reshape(rows, cfg.kv_heads, -1, cfg.head_dim) + sum(fresh)[:, :, None]
      shared = jnp.swapaxes(q.reshape(groups, -1, *q.shape[1:]), 1, 2)
      shared = shared.reshape(groups, cfg.kv_heads, -1, cfg.head_dim)
      seen = attend(shared, *kept[:2]).reshape(
        groups, cfg.kv_heads, rows // groups, -1, cfg.head_dim
      )
      seen = jnp.swapaxes(seen, 1, 2).reshape(q.shape) + attend(q, *kept[2:])
      seen = seen.reshape(rows, cfg.heads, cfg.head_dim)
      x_RD = jnp.einsum("RHC,HCD->RD", seen, of["o"]["kernel"])
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


def own_read(ours: Ours) -> int:
  """How much of each row's own cache a chunk reads."""
  cfg = ours.engine.cfg
  ends = itertools.accumulate(cfg.suffix_block_sizes)
  found = next((end for end in ends if end >= OWN.value + cfg.decode_steps), None)
  if found is None:
    raise app.UsageError(f"--own is at most {cfg.stop.max_response_tokens - cfg.decode_steps}")
  return found


def work(ours: Ours, cfg: DecoderConfig) -> tuple[float, float]:
  """Bytes read and additions with multiplication of one step."""
  decoder = ours.weights["decoder"]
  kernels = [x for x in jax.tree.leaves(decoder["layers"]) if x.ndim > 1]
  table = decoder["embed" if cfg.tied else "head"]["embedding"]
  numbers = sum(x.size for x in kernels) + table.size
  groups = ours.state.cache.prefix.length_B.size
  prompt, own = ours.engine.cfg.prompt_buckets[-1], own_read(ours)
  cached = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * (groups * prompt + ours.rows * own)
  attention = 4 * cfg.layers * cfg.heads * cfg.head_dim * ours.rows * (prompt + own)
  return 4.0 * (numbers + cached), 2.0 * ours.rows * numbers + attention


def machine() -> dict[str, Callable[[], object]]:
  """What the machine can do: a large product, and a copy."""
  square = jnp.ones((PEAK_SIDE, PEAK_SIDE), jnp.float32)
  kept = [jnp.ones(COPIED, jnp.float32)]
  product = jax.jit(jnp.matmul)
  add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: fresh pages would be what is timed

  def copy() -> None:
    kept[0] = jax.block_until_ready(add(kept[0]))

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
    f"{bound} binds ({read_ms:.2f} ms to read, {count_ms:.2f} ms to compute); "
    f"ours reaches {share:.0%} of the bare matmuls' speed"
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
