"""Entry point: python -m spatial_jax.train --config=configs/NAME.py --workdir=DIR [--config.a.b=value]

Writes DIR/metrics.jsonl, DIR/checkpoints/, DIR/config.json and, at the end, DIR/report.html. Running the same
command again goes on where it stopped.
"""

import json
import pathlib
import sys
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from spatial_jax import checkpoint
from spatial_jax.config import build
from spatial_jax.errors import UserError
from spatial_jax.stages.pretrain import PretrainRun, pretrain

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; the same one resumes it")

# What a resumed run may change: how long, how often, where to; never what a step computes.
MAY_DIFFER = ("loop", "optimizer.total_steps", "optimizer.decay_steps", "out")


def main(argv: list[str]) -> None:
  """Runs the stage that the config names."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  try:
    run(CONFIG.value, pathlib.Path(WORKDIR.value))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def run(config: Any, workdir: pathlib.Path) -> None:
  """Claims the work directory and runs the stage."""
  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache/spatial_jax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  resolved = json.loads(config.to_json_best_effort())
  checkpoint.claim(workdir, resolved, MAY_DIFFER)
  settings = {key: value for key, value in config.items() if key != "stage"}
  pretrain(build(PretrainRun, settings), workdir, resolved)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
