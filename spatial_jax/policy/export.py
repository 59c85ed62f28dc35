"""A run's checkpoint as a Hugging Face directory that transformers loads.

python -m spatial_jax.policy.export --checkpoint=WORKDIR --out=HF_DIR [--files_from=HF_DIR]
"""

import argparse
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp

from spatial_jax import checkpoint as checkpoint_lib
from spatial_jax import config as config_lib
from spatial_jax.errors import CheckpointError, UserError
from spatial_jax.policy import weights
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.stages.load import MODEL_KEY


def export(
  checkpoint: str | pathlib.Path, out: pathlib.Path, files_from: pathlib.Path | None
) -> None:
  """Writes config.json and model.safetensors of a run's newest checkpoint.

  Args:
    checkpoint: work directory, its checkpoints folder, or one checkpoint.
    out: made when missing.
    files_from: a Hugging Face directory whose other files (tokenizer, processor) are copied.

  Raises:
    CheckpointError: on the host, I/O: no checkpoint, one that names no model, or `out` is taken.
  """
  if (out / weights.WEIGHTS).exists():
    raise CheckpointError(f"{out} already holds {weights.WEIGHTS}; choose another --out")
  step = checkpoint_lib.find(checkpoint)
  config = checkpoint_lib.read_progress(step).config
  if MODEL_KEY not in config:
    raise CheckpointError(f"{step} does not say which model it holds (config.{MODEL_KEY} missing)")
  cfg = config_lib.build(QwenVLConfig, config[MODEL_KEY], f"config.{MODEL_KEY}")
  device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
    jax.eval_shape(make_policy(cfg, jnp.float32).init, jax.random.key(0)),
  )
  weights.save(checkpoint_lib.restore_params(step, abstract), cfg, out)
  for path in sorted(files_from.iterdir()) if files_from else ():
    if path.is_file() and path.suffix != ".safetensors" and not (out / path.name).exists():
      shutil.copy(path, out / path.name)


def main() -> None:
  """Reads the command line; a user's mistake is one line and exit code 2."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--checkpoint", required=True, help="work directory or checkpoint of a run")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--files_from", type=pathlib.Path, help="copy tokenizer files from here")
  arguments = parser.parse_args()
  try:
    export(arguments.checkpoint, arguments.out, arguments.files_from)
  except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
  print(f"wrote {arguments.out}")


if __name__ == "__main__":
  main()
