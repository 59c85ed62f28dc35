"""Memory and seconds of the vision tower on a long clip.

    python -m benchmarks.clip [--name=Qwen2.5-VL-3B] [--frames=16] [--repeats=1]

A clip of so many temporal patches of 448 x 448 pixels (32 x 32 patches each), random weights of the
released tower, float32, one pass. Printed: peak RssAnon, weights included, against 8 GiB.
"""

import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console

from benchmarks import measure
from spatial_jax.data.vision_packing import VisionBuckets, plan_vision, window_layout
from spatial_jax.hf.model_zoo import NAMES, released
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.types import PatchedImage, VisionBatch

NAME = flags.DEFINE_enum("name", "Qwen2.5-VL-3B", list(NAMES), "released shape")
FRAMES = flags.DEFINE_integer("frames", 16, "temporal patches of the clip", lower_bound=1)
SIDE = 32  # patches along 448 pixels
LIMIT_GIB = 8.0


def clip_batch(cfg: QwenVLConfig, frames: int) -> VisionBatch:
  """A clip of noise, in exactly the room it needs."""
  grid, blocks = (frames, SIDE, SIDE), cfg.vision.window_blocks
  noise_PX = np.random.default_rng(0).standard_normal(
    (frames * SIDE**2, cfg.vision.patch_values), np.float32
  )
  clip = PatchedImage("clip", noise_PX, grid, np.zeros((0, 0, 3), np.uint8))
  slots = window_layout(grid, blocks).slots
  return plan_vision([clip], blocks, VisionBuckets((slots,), (frames,), (SIDE**2,)))[0]


def run() -> dict[str, float]:
  """Seconds of the passes behind the first, and the most memory there was."""
  cfg = released(NAME.value)
  policy = make_policy(cfg, jnp.dtype("float32"))
  with measure.PeakMemory() as memory:
    make = jax.jit(lambda key: {"vision": policy.init(key)["vision"]})
    params = make(jax.random.key(0))
    batch, encode = jax.device_put(clip_batch(cfg, FRAMES.value)), jax.jit(policy.encode)
    seconds = []
    for _ in range(1 + measure.REPEATS.value):
      start = time.perf_counter()
      features_MYD = jax.block_until_ready(encode(params, batch))
      seconds.append(time.perf_counter() - start)
  assert bool(jnp.isfinite(features_MYD).all())
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  patches = int(np.prod(batch.window_P.shape))
  return {
    "seconds": float(np.median(seconds[1:])),
    "peak_gib": memory.peak_kib / (1 << 20),
    "weights_gib": weights / (1 << 30),
    "patches": patches,
  }


def main(argv: list[str]) -> None:
  """Measures in a fresh process and prints; exit code 1 above the limit."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  if measure.PART.value is not None:
    print(json.dumps(run()))
    return
  command = [sys.executable, *sys.orig_argv[1:], "--part=run"]
  environment = {"JAX_PLATFORMS": "cpu", **os.environ}
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
  found = json.loads(done.stdout.splitlines()[-1])
  Console().print(
    f"{NAME.value}: {FRAMES.value} x {SIDE * SIDE} patches in {found['seconds']:.1f} s, peak "
    f"{found['peak_gib']:.2f} GiB, of it weights {found['weights_gib']:.2f} GiB; limit {LIMIT_GIB}",
    highlight=False,
  )
  sys.exit(int(found["peak_gib"] > LIMIT_GIB))


if __name__ == "__main__":
  app.run(main)
