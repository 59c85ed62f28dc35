"""A run's checkpoint as a Hugging Face folder that transformers loads; adapters are merged.

python -m spatial_jax.tools.export --checkpoint=WORKDIR --out=HF_DIR [--dtype=bfloat16]
"""

import argparse
import pathlib
import sys
from typing import Literal

import jax
import jax.numpy as jnp

from spatial_jax import checkpoint as checkpoint_lib
from spatial_jax import config as config_lib
from spatial_jax import sharding
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.errors import CheckpointError, UserError
from spatial_jax.hf import weights
from spatial_jax.hf.export import write_files
from spatial_jax.stages.load import load_policy


def export(
  checkpoint: str | pathlib.Path,
  out: pathlib.Path,
  files_from: pathlib.Path | None,
  dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
  """Writes a run's newest checkpoint: weights, config, tokenizer, processor, generation config.

  Args:
    checkpoint: work directory, its checkpoints folder, or one checkpoint.
    out: made when missing.
    files_from: a Hugging Face folder whose other files (chat template, tokenizer settings) are
      kept; None: the one that the run began with, where it is still there.
    dtype: of the weights; float32 keeps every bit.

  Raises:
    CheckpointError: on the host, I/O: no checkpoint, one that names no model, or `out` is taken.
    DataError: on the host, I/O: no tokenizer in the work directory.
  """
  taken = [name for name in (weights.WEIGHTS, weights.INDEX) if (out / name).exists()]
  if taken:
    raise CheckpointError(f"{out} already holds {taken[0]}; choose another --out")
  cpu = jax.local_devices(backend="cpu")[:1]
  loaded = load_policy(checkpoint, sharding.make_mesh(sharding.MeshConfig(1, 1, 1), cpu))
  config = checkpoint_lib.read_progress(checkpoint_lib.find(checkpoint)).config
  preprocess = config_lib.build(PreprocessConfig, config["preprocess"], "config.preprocess")
  began = pathlib.Path(config["init"])
  params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), loaded.params)
  weights.save(params, loaded.policy.cfg, out)
  like = files_from or (began if (began / weights.CONFIG).exists() else None)
  write_files(loaded.tokenizer, preprocess, out, like)


def main() -> None:
  """Reads the command line; a user's mistake is one line and exit code 2."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--checkpoint", required=True, help="work directory or checkpoint of a run")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
  parser.add_argument(
    "--files_from", type=pathlib.Path, help="keep other files of this folder, not of the run's init"
  )
  kinds = ("float32", "bfloat16")
  parser.add_argument("--dtype", choices=kinds, default=kinds[0], help="of the weights written")
  arguments = parser.parse_args()
  try:
    export(arguments.checkpoint, arguments.out, arguments.files_from, arguments.dtype)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  print(f"wrote {arguments.out}")


if __name__ == "__main__":
  main()
