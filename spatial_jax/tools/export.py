"""Exports a checkpoint of a run as a Hugging Face folder that transformers loads.

python -m spatial_jax.tools.export --checkpoint=WORKDIR --out=HF_DIR [--dtype=bfloat16]

Adapters are merged into the weights.
"""

import argparse
import json
import pathlib
import shlex
import sys
from typing import Literal

import jax
import jax.numpy as jnp

from spatial_jax import checkpoint as checkpoint_lib
from spatial_jax import config as config_lib
from spatial_jax import sharding
from spatial_jax.cli import one_line_exits
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.errors import CheckpointError
from spatial_jax.evaluate.results import ResultTable, is_up_to_date, read_results
from spatial_jax.hf import weights
from spatial_jax.hf.export import write_files
from spatial_jax.hf.folder import CONFIG, INDEX, WEIGHTS, has_weights
from spatial_jax.stages.load import load_policy
from spatial_jax.tools.model_card import model_card
from spatial_jax.workdir import find_path, to_path, write_text


def export(
  checkpoint: str | pathlib.Path,
  out: pathlib.Path,
  files_from: pathlib.Path | None,
  dtype: Literal["float32", "bfloat16"] = "float32",
  command: str = "python -m spatial_jax.tools.export",
) -> None:
  """Writes weights, config, tokenizer, processor settings, model card and the config of the run.

  Args:
    checkpoint: work directory of a run (its newest checkpoint), or one checkpoint.
    out: created if missing.
    files_from: Hugging Face folder with the chat template and tokenizer settings; None for the base
      policy of the run, if it is a folder.
    dtype: of the weights; float32 keeps every bit.
    command: for the model card.

  Raises:
    CheckpointError: if there is no checkpoint, it does not name its model, or `out` has weights.
    DataError: if the work directory has no tokenizer.
  """
  if files_from is not None and not files_from.is_dir():
    raise CheckpointError(f"--files_from={files_from} is not a folder; give a Hugging Face folder")
  if existing := [name for name in (WEIGHTS, INDEX) if (out / name).exists()]:
    raise CheckpointError(f"{out} already has {existing[0]}; choose another --out")
  if has_weights(find_path(checkpoint)):
    raise CheckpointError(f"{checkpoint} is a Hugging Face folder already; give a run")
  cpu = jax.local_devices(backend="cpu")[:1]
  loaded = load_policy(checkpoint, sharding.make_mesh(sharding.MeshConfig(1, 1, 1), cpu))
  step = checkpoint_lib.find(checkpoint)
  progress = checkpoint_lib.read_progress(step)
  preprocess = config_lib.build(
    PreprocessConfig, progress.config["preprocess"], "config.preprocess"
  )
  results = _results(pathlib.Path(step).parent.parent, progress)
  params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), loaded.params)
  weights.save(params, loaded.policy.cfg, out)
  base = find_path(progress.config["init"])
  like = files_from or (base if (base / CONFIG).exists() else None)
  write_files(loaded.tokenizer, loaded.template, preprocess, out, like)
  record = json.dumps(progress.config, indent=2, sort_keys=True)
  write_text(out / "training_config.json", record + "\n")
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  family = loaded.policy.cfg.family
  card = model_card(progress.config, progress.step, family, count, results, command)
  write_text(out / "README.md", card)


def _results(workdir: pathlib.Path, progress: checkpoint_lib.Progress) -> ResultTable | None:
  """The evaluation of this checkpoint; that of another step is not used."""
  origin = {"steps": progress.step, "seed": progress.config.get("seed")}
  return read_results(workdir) if is_up_to_date(workdir, origin) else None


def main() -> None:
  """Reads the command line; an error of the user is one line and exit code 2."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--checkpoint", required=True, help="work directory or checkpoint of a run")
  parser.add_argument("--out", required=True, help="folder to write")
  parser.add_argument(
    "--files_from",
    help="folder with chat template and tokenizer settings (default: base policy of the run)",
  )
  dtypes = ("float32", "bfloat16")
  parser.add_argument("--dtype", choices=dtypes, default=dtypes[0], help="dtype of the weights")
  arguments = parser.parse_args()
  command = shlex.join(["python", "-m", "spatial_jax.tools.export", *sys.argv[1:]])
  with one_line_exits("stopped; delete --out and export again"):
    out = to_path(arguments.out)
    files_from = to_path(arguments.files_from) if arguments.files_from else None
    export(arguments.checkpoint, out, files_from, arguments.dtype, command)
  print(f"wrote {arguments.out}")


if __name__ == "__main__":
  main()
