"""Loads a policy: from a Hugging Face folder, or from the work directory of a run."""

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
from spatial_jax.config import ConfigError
from spatial_jax.data import tokenizer as tokenizer_lib
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.tokenizer import Tokenizer, load_tokenizer
from spatial_jax.errors import CheckpointError, DataError
from spatial_jax.hf import processor, weights
from spatial_jax.hf.folder import check_folder, has_weights
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.rollout.conversation import check_preprocess
from spatial_jax.types import Params
from spatial_jax.workdir import find_path

# Keys of a run's resolved config: QwenVLConfig, LoraConfig, PreprocessConfig.
MODEL_KEY, LORA_KEY, PREPROCESS_KEY = "model", "lora", "preprocess"


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
  """A policy with its parameters and tokenizer.

  Attributes:
    policy: pure functions, for the mesh of the parameters.
    params: stacked, float32, sharded over the mesh; the adapters of a run are merged.
    tokenizer: of the policy.
    benchmark: benchmark whose rooms the policy was trained on ("vsi-bench"); None if there is none
      or it was not recorded.
  """

  policy: Policy
  params: Params
  tokenizer: Tokenizer
  benchmark: str | None


def record(cfg: QwenVLConfig) -> dict[str, Any]:
  """Returns the JSON values that a run stores under MODEL_KEY of its resolved config."""
  return dataclasses.asdict(cfg)


def load_policy(path: pathlib.Path | str, mesh: Mesh) -> Loaded:
  """Loads a policy, each array straight to its shards.

  Args:
    path: a Hugging Face folder (config.json, safetensors, tokenizer.json), the work directory of a
      run, its `checkpoints` folder, or one checkpoint.
    mesh: train mesh.

  Returns:
    The policy. Everything was checked before an array was allocated.

  Raises:
    CheckpointError: if the path holds no weights, or they do not fit their config.
    ConfigError: if the processor of the folder makes patches of another size than the policy needs.
    DataError: if the tokenizer is missing or does not fit the policy.
  """
  path = find_path(path)
  return _load_folder(path, mesh) if _is_hf_folder(path) else _load_run(path, mesh)


def read_shape(path: pathlib.Path | str) -> QwenVLConfig:
  """Reads the config of a policy alone. Arguments and errors are those of `load_policy`."""
  path = find_path(path)
  return weights.read_config(path) if _is_hf_folder(path) else _recorded(path)[1]


def recorded_settings(path: pathlib.Path | str) -> dict[str, Any] | None:
  """Reads the resolved config of the run that saved a policy; None for a Hugging Face folder.

  Raises:
    CheckpointError: if there is no checkpoint, or it is of a stage without rollouts.
  """
  if _is_hf_folder(find_path(path)):
    return None
  settings = checkpoint_lib.read_progress(checkpoint_lib.find(path)).config
  if "rollout" not in settings:
    raise CheckpointError(
      f"{path} is of a stage without rollouts; give the Hugging Face folder that it wrote"
    )
  return settings


def check_normalisation(preprocess: PreprocessConfig, path: pathlib.Path | str) -> None:
  """Refuses mean and std of pixels that differ from those that the policy was trained with.

  Args:
    preprocess: settings of the config.
    path: as for `load_policy`.

  Raises:
    ConfigError: if mean or std differ.
    DataError: if the processor of the folder cannot be read.
  """
  path = find_path(path)
  trained = _trained_preprocess(path)
  if trained is None:
    return
  for name, given, needed in (
    ("mean", preprocess.mean, trained.mean),
    ("std", preprocess.std, trained.std),
  ):
    if not np.allclose(given, needed, rtol=0, atol=1e-4):
      raise ConfigError(
        f"config.preprocess.{name} is {given}, but {path} was trained with {needed}; "
        f"set --config.preprocess.{name}='{needed}'"
      )


def own_preprocess(path: pathlib.Path | str, preprocess: PreprocessConfig) -> PreprocessConfig:
  """Returns the image settings that a policy was trained with, with the pixel bounds of a config.

  Args:
    path: as for `load_policy`.
    preprocess: settings of the config; returned for a Hugging Face folder without a processor.

  Raises:
    CheckpointError: if the path holds no policy.
    DataError: if the processor of the folder cannot be read.
  """
  trained = _trained_preprocess(find_path(path))
  if trained is None:
    return preprocess
  bounds = {"min_pixels": preprocess.min_pixels, "max_pixels": preprocess.max_pixels}
  return dataclasses.replace(trained, **bounds)


def _trained_preprocess(path: pathlib.Path) -> PreprocessConfig | None:
  """The image settings that a policy was trained with, None if they are not recorded."""
  if _is_hf_folder(path):
    return processor.read_processor(path) if processor.processor_file(path) else None
  settings = _recorded(path)[2].config.get(PREPROCESS_KEY)
  name = f"{path}: config.{PREPROCESS_KEY}"
  return config_lib.build(PreprocessConfig, settings, name) if settings else None


def _is_hf_folder(path: pathlib.Path) -> bool:
  """Whether this is a Hugging Face folder, not a run. Refuses a path that is clearly neither."""
  check_folder(path)
  return has_weights(path)


def _load_folder(folder: pathlib.Path, mesh: Mesh) -> Loaded:
  cfg, tokenizer = weights.read_config(folder), load_tokenizer(folder)
  _check_tokenizer(tokenizer, cfg, folder)
  if file := processor.processor_file(folder):
    check_preprocess(processor.read_processor(folder), cfg, str(file))

  def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, sharding.param_spec(name, shape, mesh))

  params = weights.load(folder, cfg, np.dtype(np.float32), place)
  return Loaded(make_policy(cfg, compiled.compute_dtype(mesh), mesh), params, tokenizer, None)


def _check_tokenizer(tokenizer: Tokenizer, cfg: QwenVLConfig, folder: pathlib.Path) -> None:
  """Refuses a tokenizer with ids that the policy does not have, or with other special tokens."""
  file, rows = folder / tokenizer_lib.FILE, cfg.decoder.vocabulary
  largest = max(tokenizer.used_ids, default=0)
  if largest >= rows:
    raise DataError(
      f"{file}: token {tokenizer.inner.id_to_token(largest)!r} has id {largest}, but the embedding "
      f"has {rows} rows; use the policy's own tokenizer, or resize its embedding and save it again"
    )
  expected = {
    tokenizer_lib.IM_START: None,
    tokenizer_lib.IM_END: None,
    tokenizer_lib.IMAGE_PAD: cfg.image_pad_id,
    tokenizer_lib.VIDEO_PAD: cfg.video_pad_id,
    tokenizer_lib.VISION_START: cfg.vision_start_id,
    tokenizer_lib.VISION_END: cfg.vision_end_id,
  }
  for token, token_id in expected.items():
    found = tokenizer.inner.token_to_id(token)
    if found is None or tokenizer.encode(token) != [found]:
      raise DataError(f"{file} has no special token {token}; use the policy's own tokenizer")
    if token_id not in (None, found):
      raise DataError(
        f"{file}: {token} has id {found}, but the config of the policy has {token_id}; "
        "use the policy's own tokenizer"
      )


def _recorded(path: pathlib.Path) -> tuple[epath.Path, QwenVLConfig, Progress]:
  """The newest checkpoint of a run, its model and its progress."""
  step = checkpoint_lib.find(path)
  progress = checkpoint_lib.read_progress(step)
  if MODEL_KEY not in progress.config:
    raise CheckpointError(
      f"{step} does not say which model it holds (config.{MODEL_KEY} is missing); "
      "give the Hugging Face folder that its run wrote"
    )
  cfg = config_lib.build(QwenVLConfig, progress.config[MODEL_KEY], f"config.{MODEL_KEY}")
  return step, cfg, progress


def _load_run(path: pathlib.Path, mesh: Mesh) -> Loaded:
  step, cfg, progress = _recorded(path)
  workdir = pathlib.Path(step).parent.parent
  tokenizer = load_tokenizer(workdir)
  _check_tokenizer(tokenizer, cfg, workdir)
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
