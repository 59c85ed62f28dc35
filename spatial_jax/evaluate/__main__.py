"""Entry point: python -m spatial_jax.evaluate --config=configs/NAME.py --checkpoint=A --workdir=B

Asks a policy (a Hugging Face folder or the work directory of a run) the held-out questions of the
config's source, beside the policy that `config.init` names ("" for none). Writes results.json,
predictions.jsonl and report.html into the work directory and prints the table. The config may be
one of training.
"""

import json
import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from spatial_jax.errors import UserError
from spatial_jax.evaluate.run import evaluate, settings_of

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py")
CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Hugging Face folder or work directory of a run", required=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of this evaluation", required=True)


def main(argv: list[str]) -> None:
  """Runs the evaluation; a user's mistake is one line and exit code 2."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache/spatial_jax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  try:
    settings = settings_of(json.loads(CONFIG.value.to_json_best_effort()))
    evaluate(settings, CHECKPOINT.value, pathlib.Path(WORKDIR.value))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
