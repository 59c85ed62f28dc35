"""Pictures per second of the ray-caster on one core, with and without shadows.

    python -m benchmarks.render [--scenes=20] [--out=render.json]

Time is that of the calling thread for whole `render` calls (packing included), the best of a few
rounds per picture, so that other work on the machine disturbs little.
"""

import argparse
import json
import pathlib
import time

import numpy as np

from spatial_jax.synthetic.camera_path import make_camera_path
from spatial_jax.synthetic.floorplan import ProceduralConfig, procedural_scene
from spatial_jax.synthetic.render.renderer import render
from spatial_jax.synthetic.scene import Camera, Scene

SIZES_PX = (128, 168, 224, 448)
ROUNDS = 5
CONFIG = ProceduralConfig(objects=(10, 16), side_m=(3.6, 6.0), l_shape_share=0.35, repeat_share=0.4)


def main() -> None:
  """Prints the table and writes it as JSON where asked."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--scenes", type=int, default=20, help="rooms to look into")
  parser.add_argument("--out", type=pathlib.Path, help="write the numbers here as JSON")
  arguments = parser.parse_args()
  scenes = [procedural_scene(seed, CONFIG) for seed in range(arguments.scenes)]
  parts = float(np.mean([sum(len(thing.parts) for thing in scene.objects) for scene in scenes]))
  rows = []
  print(f"{len(scenes)} rooms, {parts:.0f} primitives each\n  size  shadows  images/s")
  for size_px in SIZES_PX:
    cameras = [
      make_camera_path(scene, np.random.default_rng(i), 1, size_px, size_px, 70.0)[0]
      for i, scene in enumerate(scenes)
    ]
    for shadows in (True, False):
      rate = images_per_second(scenes, cameras, shadows)
      rows.append({"size_px": size_px, "shadows": shadows, "images_per_second": round(rate, 1)})
      print(f"  {size_px:4d}  {'yes' if shadows else 'no ':7s}  {rate:8.1f}")
  if arguments.out is not None:
    arguments.out.write_text(json.dumps({"primitives": parts, "rows": rows}, indent=2) + "\n")


def images_per_second(scenes: list[Scene], cameras: list[Camera], shadows: bool) -> float:
  """One over the mean time of a picture, each picture at its best of ROUNDS."""
  render(scenes[0], cameras[0], shadows)  # compile, or load what was compiled
  best = np.full(len(scenes), np.inf)
  for _ in range(ROUNDS):
    for index, (scene, camera) in enumerate(zip(scenes, cameras, strict=True)):
      start = time.thread_time()
      render(scene, camera, shadows)
      best[index] = min(best[index], time.thread_time() - start)
  return 1.0 / float(best.mean())


if __name__ == "__main__":
  main()
