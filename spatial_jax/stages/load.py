"""A policy from disk: a Hugging Face folder, or what a run has saved in its work directory."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from spatial_jax import checkpoint as checkpoint_lib
from spatial_jax import compiled, sharding
from spatial_jax import config as config_lib
from spatial_jax.checkpoint import Progress
from spatial_jax.data.tokenizer import Tokenizer, load_tokenizer
from spatial_jax.errors import CheckpointError
from spatial_jax.hf import processor, weights
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.rollout.conversation import check_preprocess
from spatial_jax.types import Params

MODEL_KEY = "model"  # where a run's resolved config holds the QwenVLConfig it trained
LORA_KEY = "lora"  # and its LoraConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
  """A policy ready to be trained or asked.

  Attributes:
    policy: its functions, for the mesh it was loaded onto.
    params: stacked, float32, sharded over that mesh; a run's adapters are merged into them.
    tokenizer: that it was trained with.
    benchmark: whose rooms it was trained on ("vsi-bench"), None when on nobody's or not recorded.
  """

  policy: Policy
  params: Params
  tokenizer: Tokenizer
  benchmark: str | None


def record(cfg: QwenVLConfig) -> dict[str, Any]:
  """What a run stores under MODEL_KEY of its resolved config, as JSON values."""
  return dataclasses.asdict(cfg)


def load_policy(path: pathlib.Path | str, mesh: Mesh) -> Loaded:
  """Reads a policy, each array straight to its shards.

  Args:
    path: a Hugging Face folder (config.json, safetensors, tokenizer.json), a run's work directory,
      its `checkpoints` folder, or one checkpoint.
    mesh: train mesh.

  Raises:
    CheckpointError: I/O, when there is no checkpoint or it does not fit its own config.
    ConfigError: I/O, when the folder's processor cuts patches that the policy does not read.
    DataError: I/O, when there is no tokenizer beside it.
  """
  path = pathlib.Path(path)
  return _load_folder(path, mesh) if _is_folder(path) else _load_run(path, mesh)


def read_shape(path: pathlib.Path | str) -> QwenVLConfig:
  """The policy's config alone, nothing of it on a device; arguments and errors as `load_policy`."""
  path = pathlib.Path(path)
  return weights.read_config(path) if _is_folder(path) else _recorded(path)[1]


def recorded_settings(path: pathlib.Path | str) -> dict[str, Any] | None:
  """The resolved config of the run that saved a policy; None for a Hugging Face folder.

  Raises:
    CheckpointError: I/O, when there is no checkpoint, or it is of a run that does not sample.
  """
  if _is_folder(pathlib.Path(path)):
    return None
  settings = checkpoint_lib.read_progress(checkpoint_lib.find(path)).config
  if "rollout" not in settings:
    raise CheckpointError(
      f"{path} is of a stage without rollouts; give the Hugging Face folder that it wrote"
    )
  return settings


def _is_folder(path: pathlib.Path) -> bool:
  """Whether it is one of Hugging Face's."""
  return any((path / name).exists() for name in (weights.WEIGHTS, weights.INDEX))


def _load_folder(folder: pathlib.Path, mesh: Mesh) -> Loaded:
  cfg, tokenizer = weights.read_config(folder), load_tokenizer(folder)
  if (folder / processor.IMAGES).exists():
    pixels = processor.read_processor(folder)
    check_preprocess(pixels, cfg, str(folder / processor.IMAGES))

  def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, sharding.param_spec(name, shape, mesh))

  params = weights.load(folder, cfg, np.dtype(np.float32), place)
  return Loaded(make_policy(cfg, compiled.compute_dtype(mesh), mesh), params, tokenizer, None)


def _recorded(path: pathlib.Path) -> tuple[epath.Path, QwenVLConfig, Progress]:
  """A run's newest checkpoint, and what is written beside it."""
  step = checkpoint_lib.find(path)
  progress = checkpoint_lib.read_progress(step)
  if MODEL_KEY not in progress.config:
    raise CheckpointError(
      f"{step} does not say which model it holds (config.{MODEL_KEY} missing); "
      "give the Hugging Face folder that its run wrote"
    )
  cfg = config_lib.build(QwenVLConfig, progress.config[MODEL_KEY], f"config.{MODEL_KEY}")
  return step, cfg, progress


def _load_run(path: pathlib.Path, mesh: Mesh) -> Loaded:
  step, cfg, progress = _recorded(path)
  tokenizer = load_tokenizer(pathlib.Path(step).parent.parent)
  policy = make_policy(cfg, compiled.compute_dtype(mesh), mesh)
  if LORA_KEY in progress.config:
    adapters = config_lib.build(LoraConfig, progress.config[LORA_KEY], f"config.{LORA_KEY}")
    policy = dataclasses.replace(policy, lora=adapters)
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  abstract = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    shapes,
    sharding.param_shardings(shapes, mesh),
  )
  params = checkpoint_lib.restore_params(step, abstract)
  if policy.lora.paths:
    params = compiled.merge_adapters(policy, params, mesh)
  return Loaded(policy.without_adapters, params, tokenizer, progress.benchmark)
