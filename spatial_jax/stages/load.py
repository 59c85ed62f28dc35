"""Loads a policy: from a Hugging Face folder, or from the work directory of a run."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from rich import progress
from rich.console import Console

from spatial_jax import checkpoint as checkpoint_lib
from spatial_jax import compiled, sharding
from spatial_jax import config as config_lib
from spatial_jax.checkpoint import Progress
from spatial_jax.config import ConfigError
from spatial_jax.data import chat_template as chat_template_lib
from spatial_jax.data import tokenizer as tokenizer_lib
from spatial_jax.data.chat_template import CHATML, ChatTemplate, read_chat_template
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.source import Source, SourceConfig, make_source
from spatial_jax.data.tokenizer import IM_END, Tokenizer, load_tokenizer
from spatial_jax.errors import CheckpointError, DataError
from spatial_jax.hf import generation as generation_lib
from spatial_jax.hf import processor, weights
from spatial_jax.hf.folder import check_folder, has_model_config, has_weights
from spatial_jax.hf.generation import Generation, read_generation
from spatial_jax.hf.model_zoo import released_processor
from spatial_jax.policy import lora, param_tree
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.reward.parse import check_truth
from spatial_jax.rollout.conversation import check_preprocess
from spatial_jax.types import Params
from spatial_jax.workdir import final_folder, find_path, write_text

T = TypeVar("T")

# Keys of a run's resolved config: QwenVLConfig, LoraConfig, PreprocessConfig, PromptForm, and
# `FileSource.contents`, of the run and of a stage with data files of its own.
MODEL_KEY, LORA_KEY, PREPROCESS_KEY, FORM_KEY = "model", "lora", "preprocess", "form"
DATA_KEY, STAGE_DATA_KEY = "data", "stage_data"


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyFiles:
  """A policy before its parameters are loaded."""

  path: pathlib.Path
  checkpoint: epath.Path | None  # of a run; None: `path` is a Hugging Face folder
  cfg: QwenVLConfig
  lora: LoraConfig  # adapters among the parameters of the checkpoint
  tokenizer: Tokenizer
  template: ChatTemplate
  generation: Generation  # stop tokens and sampling values
  preprocess: PreprocessConfig | None  # of its training; None: not recorded
  benchmark: str | None  # whose rooms it was trained on ("vsi-bench"); None: not recorded

  @property
  def stop_tokens(self) -> tuple[str, ...]:
    """<|im_end|>, and the other tokens that end a turn of this policy."""
    found = [self.tokenizer.inner.id_to_token(i) for i in self.generation.stop_ids]
    return tuple(dict.fromkeys([IM_END, *(token for token in found if token is not None)]))


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
  """A policy with its parameters."""

  policy: Policy  # for the mesh of the parameters
  params: Params  # stacked, float32, sharded over the mesh; the adapters of a run are merged
  # tokenizer, template, benchmark: as in `PolicyFiles`.
  tokenizer: Tokenizer
  template: ChatTemplate
  benchmark: str | None


def record(cfg: QwenVLConfig) -> dict[str, Any]:
  """Returns the JSON values that a run stores under MODEL_KEY of its resolved config."""
  return dataclasses.asdict(cfg)


def read_policy(path: pathlib.Path | str, needs_weights: bool = True) -> PolicyFiles:
  """Reads and checks all of a policy except its weights.

  Args:
    path: a Hugging Face folder (config.json, safetensors, tokenizer.json), the work directory of a
      run (of several stages: the last one), its `checkpoints` folder, or one checkpoint.
    needs_weights: False: a Hugging Face folder may have no weights yet.

  Raises:
    CheckpointError: if the path holds no weights.
    ConfigError: if the processor of the folder makes patches of another size than the policy needs.
    DataError: if the tokenizer is missing or does not fit the policy, or its chat template or
      generation settings cannot be used.
  """
  path = final_folder(find_path(path))
  is_model = not needs_weights and has_model_config(path)
  if not is_model and not _is_hf_folder(path):
    step, cfg, progress = _recorded(path)
    tokenizer, template, generation = _conversation_files(pathlib.Path(step).parents[1], cfg)
    adapters = _recorded_config(LoraConfig, LORA_KEY, progress, str(path)) or lora.OFF
    preprocess = _recorded_config(PreprocessConfig, PREPROCESS_KEY, progress, str(path))
    return PolicyFiles(
      path=path,
      checkpoint=step,
      cfg=cfg,
      lora=adapters,
      tokenizer=tokenizer,
      template=template,
      generation=generation,
      preprocess=preprocess,
      benchmark=progress.benchmark,
    )
  cfg, preprocess = weights.read_config(path), None
  tokenizer, template, generation = _conversation_files(path, cfg)
  if file := processor.processor_file(path):
    preprocess = processor.read_processor(path)
    check_preprocess(preprocess, cfg, str(file))
  return PolicyFiles(
    path=path,
    checkpoint=None,
    cfg=cfg,
    lora=lora.OFF,
    tokenizer=tokenizer,
    template=template,
    generation=generation,
    preprocess=preprocess,
    benchmark=None,
  )


def store_conversation_files(files: PolicyFiles, workdir: pathlib.Path) -> None:
  """Writes tokenizer, chat template and generation settings into the work directory of a run."""
  write_text(workdir / tokenizer_lib.FILE, files.tokenizer.inner.to_str(pretty=True))
  if files.template != CHATML:
    write_text(workdir / chat_template_lib.FILE, files.template.source)
  if files.generation != generation_lib.NOTHING:
    record = generation_lib.to_hf(files.generation)
    write_text(workdir / generation_lib.FILE, json.dumps(record, indent=2) + "\n")


def load_params(files: PolicyFiles, mesh: Mesh, dtype_of: Callable[[str], np.dtype]) -> Params:
  """Loads the parameters of a policy on the train mesh, each array straight to its shards.

  Args:
    dtype_of: parameter path -> dtype, to which the values are rounded as they are read. Adapters of
      a run are merged in float32.

  Raises:
    CheckpointError: if the weights do not fit their config; nothing was allocated.
  """
  if files.checkpoint is None:
    return weights.load(
      files.path,
      files.cfg,
      dtype_of,
      lambda name, shape: NamedSharding(mesh, sharding.param_spec(name, shape, mesh)),
    )
  policy = make_policy(files.cfg, compiled.compute_dtype(mesh), mesh)
  policy = dataclasses.replace(policy, lora=files.lora)
  leaves = param_tree.flatten(policy.abstract_params())
  for path, leaf in leaves.items():
    if not param_tree.matches(path, (lora.ADAPTERS,)):
      leaves[path] = jax.ShapeDtypeStruct(leaf.shape, dtype_of(path))
  shapes = param_tree.unflatten(leaves)
  abstract = compiled.placed(shapes, sharding.param_shardings(shapes, mesh))
  params = checkpoint_lib.restore_params(files.checkpoint, abstract)
  return compiled.merge_adapters(policy, params, mesh) if policy.lora.paths else params


def load_to_sample(files: PolicyFiles, mesh: Mesh) -> Params:
  """`load_params` in the compute dtype, for a policy that is not trained."""
  return load_params(files, mesh, compute_dtypes(mesh))


def compute_dtypes(mesh: Mesh) -> Callable[[str], np.dtype]:
  """Returns the compute dtype for every parameter path."""
  return lambda path: compiled.compute_dtype(mesh)


def load_policy(path: pathlib.Path | str, mesh: Mesh) -> Loaded:
  """`read_policy` and `load_params`. Everything is checked before an array is allocated."""
  files = read_policy(path)
  policy = make_policy(files.cfg, compiled.compute_dtype(mesh), mesh)
  params = load_params(files, mesh, lambda path: np.dtype(np.float32))
  return Loaded(policy, params, files.tokenizer, files.template, files.benchmark)


def read_shape(path: pathlib.Path | str) -> QwenVLConfig:
  """Reads the config of a policy alone; a Hugging Face folder needs no weights.

  Arguments and errors are those of `read_policy`.
  """
  path = final_folder(find_path(path))
  is_model = has_model_config(path) or _is_hf_folder(path)
  return weights.read_config(path) if is_model else _recorded(path)[1]


def has_tokenizer(path: pathlib.Path | str) -> bool:
  """Returns whether a policy can encode text; a run always can."""
  path = find_path(path)
  return not has_model_config(path) or (path / tokenizer_lib.FILE).exists()


def recorded_settings(path: pathlib.Path | str) -> dict[str, Any] | None:
  """Reads the resolved config of the run that saved a policy; None for a Hugging Face folder.

  Raises:
    CheckpointError: if there is no checkpoint, or it is of a stage without rollouts.
  """
  path = final_folder(find_path(path))
  if _is_hf_folder(path):
    return None
  settings = checkpoint_lib.read_progress(checkpoint_lib.find(path)).config
  if "rollout" not in settings:
    raise CheckpointError(
      f"{path} is of a stage without rollouts; give the Hugging Face folder that it wrote"
    )
  return settings


def read_source(cfg: SourceConfig) -> Source:
  """`make_source` with a progress bar; every row of a file must have an answer that can be scored.

  Raises:
    UserError: as `make_source`.
  """
  columns = (
    progress.SpinnerColumn(),
    progress.TextColumn("checking row {task.completed:,.0f} of the data files"),
  )
  with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
    task = bar.add_task("rows", total=None, visible=cfg.kind == "files")
    return make_source(cfg, check_truth, lambda: bar.advance(task))


def check_normalisation(preprocess: PreprocessConfig, files: PolicyFiles) -> None:
  """Refuses mean and std of pixels that differ from those that the policy was trained with.

  Raises:
    ConfigError: if mean or std of the config differ from the recorded ones.
  """
  trained = files.preprocess or preprocess
  for name, given, needed in (
    ("mean", preprocess.mean, trained.mean),
    ("std", preprocess.std, trained.std),
  ):
    if not np.allclose(given, needed, rtol=0, atol=1e-4):
      raise ConfigError(
        f"config.preprocess.{name} is {given}, but {files.path} was trained with {needed}; "
        f"set --config.preprocess.{name}='{needed}'"
      )


def own_processor(files: PolicyFiles) -> tuple[PreprocessConfig, PreprocessConfig]:
  """Returns the settings of images and of videos that belong to a policy.

  A folder without processor files gets those of the released checkpoints of its family.
  """
  image, video = released_processor(files.cfg)
  if files.checkpoint is None and processor.processor_file(files.path):
    video = processor.read_processor(files.path, video=True)
  return files.preprocess or image, video


def own_preprocess(files: PolicyFiles, preprocess: PreprocessConfig) -> PreprocessConfig:
  """Returns the image settings that a policy was trained with, with the pixel bounds of a config.

  The settings of the config are returned if those of the training were not recorded.
  """
  bounds = {"min_pixels": preprocess.min_pixels, "max_pixels": preprocess.max_pixels}
  return dataclasses.replace(files.preprocess or preprocess, **bounds)


def _is_hf_folder(path: pathlib.Path) -> bool:
  """Whether this is a Hugging Face folder, not a run. Refuses a path that is clearly neither."""
  check_folder(path)
  return has_weights(path)


def _conversation_files(
  folder: pathlib.Path, cfg: QwenVLConfig
) -> tuple[Tokenizer, ChatTemplate, Generation]:
  return _tokenizer(folder, cfg), read_chat_template(folder), read_generation(folder)


def _tokenizer(folder: pathlib.Path, cfg: QwenVLConfig) -> Tokenizer:
  """Refuses a tokenizer with ids that the policy does not have, or with other special tokens."""
  tokenizer = load_tokenizer(folder)
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
  return tokenizer


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


def _recorded_config(cls: type[T], key: str, progress: Progress, path: str) -> T | None:
  """A group of the config of the run, None if it was not recorded."""
  settings = progress.config.get(key)
  return config_lib.build(cls, settings, f"{path}: config.{key}") if settings else None
