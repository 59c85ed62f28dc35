"""Entry point: python -m spatial_jax.evaluate --config=configs/NAME.py --checkpoint=A --workdir=B

Asks a policy (a Hugging Face folder or the work directory of a run) the held-out questions of the
config's source, beside the policy that `config.init` names ("" for none). Writes results.json,
predictions.jsonl and report.html into the work directory and prints the table. The config may be
one of training.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from spatial_jax.cli import (
  CHECKPOINT_HELP,
  CONFIG_HELP,
  enable_compilation_cache,
  launch,
  no_arguments,
)
from spatial_jax.evaluate_main import EvaluateRun, evaluate
from spatial_jax.prepare import evaluation_settings, settings_as_json
from spatial_jax.stages.context import settings_of
from spatial_jax.workdir import to_path

CONFIG = config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP, required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of this evaluation", required=True)


def main(arguments: Sequence[str]) -> None:
  """Runs the evaluation."""
  no_arguments(arguments)
  enable_compilation_cache()
  settings = evaluation_settings(settings_as_json(CONFIG.value), CHECKPOINT.value)
  evaluate(settings_of(EvaluateRun, settings), CHECKPOINT.value, to_path(WORKDIR.value))


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  launch(main, "stopped; nothing of the table was written")
