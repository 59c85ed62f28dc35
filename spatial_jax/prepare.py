"""Config -> everything that a run needs before weights are loaded; None in the config is filled in.

    config (None: automatic)
      policy folder ──► mesh, pixel bounds, normalisation
      some prompts  ──► lengths, buckets
      memory plan   ──► slots, rows of a microbatch, buffers
    ──► config without None, which is printed and recorded

A value that the config gives is never changed. A run that resumes keeps its recorded values.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from spatial_jax import compiled, sharding
from spatial_jax.automatic import AUTOMATIC, Settings, changes, filled, get, has, is_automatic
from spatial_jax.config import ConfigError, build
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.pipeline import PipelineConfig, encode_in_order
from spatial_jax.data.prompt_form import PromptForm, read_form
from spatial_jax.data.source import Source, SourceConfig
from spatial_jax.data.video import VideoConfig
from spatial_jax.hf.model_zoo import NAMES, parameter_count, released, released_processor
from spatial_jax.machines import Devices, this_machine
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.memory import MemoryPlan, device_bytes
from spatial_jax.sharding import MeshConfig
from spatial_jax.stages import auto_values
from spatial_jax.stages.auto_values import ASSUMED, PromptSize
from spatial_jax.stages.load import (
  PolicyFiles,
  check_normalisation,
  has_tokenizer,
  own_processor,
  read_policy,
  read_shape,
  read_source,
  recorded_settings,
)
from spatial_jax.train_config import (
  StageName,
  TrainConfig,
  TrainingParts,
  stage_config,
  training_parts,
  whole_plan,
)
from spatial_jax.types import Prompt
from spatial_jax.workdir import recorded_config

# Prefixes of the keys whose values depend on the devices, and on the data.
_OF_DEVICES = (
  "mesh.", "rollout.slots", "rollout.prefill", "rollout.feature_buffer_tokens", "evaluation.",
)  # fmt: skip
_OF_DATA = ("rollout.", "learn.prefix", "learn.vision", "learn.micro", "evaluation.")
_CONDITIONS = "conditions"
_MEASURED_TASKS = 48  # of the training and of the held-out tasks


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """A run before its weights are loaded; nothing is on the devices."""

  settings: Settings  # the config as JSON values, without None
  cfg: TrainConfig
  form: PromptForm
  shape: QwenVLConfig
  files: PolicyFiles | None  # None: `init` is the name of a released model, without files
  source: Source | None  # None: the config names no data, and lengths are assumed
  parts: TrainingParts
  plan: MemoryPlan


def settings_as_json(config: Any) -> Settings:
  """Returns a ConfigDict as JSON values, without its conditions."""
  settings = json.loads(config.to_json_best_effort())
  settings.pop(_CONDITIONS, None)
  return settings


def evaluation_settings(given: Settings, checkpoint: str) -> Settings:
  """Fills in the config of an evaluation: with the values of the run, else automatic ones.

  Values that depend on the devices are automatic if their number differs from that of the run.
  Lengths and buckets are automatic if the data differ.
  """
  recorded = recorded_settings(checkpoint) or {}
  values = {key: get(recorded, key) for key in AUTOMATIC if has(recorded, key)}
  sizes = [value for key, value in values.items() if key.startswith("mesh.") and value]
  if sizes and math.prod(sizes) != len(jax.devices()):
    values = {key: value for key, value in values.items() if not key.startswith(_OF_DEVICES)}
  compared = filled(given, values)
  if any(compared[name] != recorded.get(name) for name in ("source", "video", "text")):
    values = {key: value for key, value in values.items() if not key.startswith(_OF_DATA)}
  settings = filled(given, values)
  if not is_automatic(settings):
    return settings
  init = settings["init"]
  ready = prepare(settings | {"init": checkpoint}, None, this_machine(), needs_weights=True)
  return ready.settings | {"init": "" if init in NAMES else init}


def check_values(given: Settings) -> None:
  """Names every wrong key and value of a config, before anything is read.

  Raises:
    ConfigError: if there is one.
  """
  build(TrainConfig, filled(given, AUTOMATIC))


def prepare(
  given: Settings, workdir: pathlib.Path | None, devices: Devices, needs_weights: bool
) -> Prepared:
  """Reads policy and data, and fills in the config.

  Args:
    given: config as JSON values.
    workdir: of the run; what an existing run recorded is used again. None: no run.
    devices: what it is prepared for.
    needs_weights: refuse a policy without weights.

  Raises:
    UserError: if config, policy or data cannot be used, or nothing fits the devices.
  """
  check_values(given)
  settings = filled(given, recorded_values(workdir))
  form = read_form(settings["text"])
  shape, files = read_model(settings["init"], needs_weights)
  check_parameters(shape, settings["max_parameters"], settings["init"])
  image, video = own_processor(files) if files else released_processor(shape)
  local = sharding.make_mesh(MeshConfig(-1, 1, 1), devices.all)
  usable = devices.usable or device_bytes(local)
  settings = filled(
    settings,
    auto_values.model_values(
      shape,
      image,
      video,
      len(devices.all),
      devices.local,
      usable,
      adapters=bool(settings["lora"]["paths"]),
    ),
  )
  mesh = sharding.make_mesh(build(MeshConfig, settings["mesh"], "config.mesh"), devices.all)
  if files:
    preprocess = build(PreprocessConfig, settings["preprocess"], "config.preprocess")
    check_normalisation(preprocess, files)
  source = None
  if needs_weights or settings["source"]["kind"] != "files" or settings["source"]["path"]:
    source = read_source(build(SourceConfig, settings["source"], "config.source"))
  sizes = prompt_sizes(settings, shape, files, form, source)
  conversation = conversation_of(settings, shape, files, form) if files else None
  settings, parts = fill_sizes(settings, sizes, form, conversation, shape, mesh, usable)
  cfg = build(TrainConfig, settings)
  plan = whole_plan(cfg, parts, devices.usable)
  if is_automatic(given):
    print("\n".join(["automatic values of the config:", *changes(given, settings)]))
  return Prepared(settings, cfg, form, shape, files, source, parts, plan)


def for_stage(ready: Prepared, name: StageName) -> Prepared:
  """What is ready for a run, with config and training parts of one of its stages."""
  cfg = stage_config(ready.cfg, name)
  mesh = compiled.train_mesh(ready.parts.policy)
  settings = ready.settings | {"stages": [name], "init": cfg.init}
  parts = training_parts(cfg, ready.shape, mesh)
  return dataclasses.replace(ready, cfg=cfg, settings=settings, parts=parts)


def after_stage(ready: Prepared, folder: pathlib.Path) -> Prepared:
  """What is ready for the stage after the one in `folder`, whose policy it starts from."""
  init = str(folder)
  return dataclasses.replace(
    ready,
    cfg=dataclasses.replace(ready.cfg, init=init),
    settings=ready.settings | {"init": init},
    files=read_policy(folder),
  )


def conditions_of(config: Any) -> dict[str, Settings]:
  """Returns the config of each condition by name; {"": settings} without conditions.

  Raises:
    ConfigError: if a condition changes a key that does not exist.
  """
  settings = settings_as_json(config)
  conditions = json.loads(config.to_json_best_effort()).get(_CONDITIONS, {})
  if not conditions:
    return {"": settings}
  return {name: _changed(settings, name, changes) for name, changes in conditions.items()}


def _changed(settings: Settings, name: str, changes: Settings) -> Settings:
  """The settings with the values of some dotted keys changed."""
  changed = json.loads(json.dumps(settings))
  for key, value in flat_changes(changes).items():
    *groups, last = key.split(".")
    group = changed
    for part in groups:
      group = group.get(part) if isinstance(group, dict) else None
    if not isinstance(group, dict) or last not in group:
      raise ConfigError(f"config.conditions.{name} changes {key}, which is no key of the config")
    group[last] = value
  return changed


def flat_changes(changes: Settings, prefix: str = "") -> Settings:
  """Nested changes as dotted keys."""
  found: Settings = {}
  for key, value in changes.items():
    if isinstance(value, dict):
      found |= flat_changes(value, f"{prefix}{key}.")
    else:
      found[f"{prefix}{key}"] = value
  return found


def read_model(init: str, needs_weights: bool) -> tuple[QwenVLConfig, PolicyFiles | None]:
  """Returns the shape of a policy, and its files if it has a tokenizer.

  Args:
    init: a folder, a run, or the name of a released model ("Qwen2.5-VL-7B"), whose shape is known.
    needs_weights: refuse a name, and a folder without weights.
  """
  if init in NAMES:
    if needs_weights:
      raise ConfigError(
        f"config.init is {init}, the name of a released model; download it and set "
        "--config.init=FOLDER, or use --dry_run"
      )
    return released(init), None
  if not init:
    raise ConfigError("config.init is empty; set it to the folder of a Qwen-VL model")
  if not needs_weights and not has_tokenizer(init):
    return read_shape(init), None
  files = read_policy(init, needs_weights)
  return files.cfg, files


def recorded_values(workdir: pathlib.Path | None) -> dict[str, Any]:
  """Returns the automatic values that an existing run recorded; {} for a new run."""
  recorded = recorded_config(workdir) if workdir else {}
  return {key: get(recorded, key) for key in AUTOMATIC if has(recorded, key)}


def conversation_of(
  settings: Settings, shape: QwenVLConfig, files: PolicyFiles, form: PromptForm
) -> Conversation:
  """Returns the conversation of a run, before its policy is made."""
  preprocess = build(PreprocessConfig, settings["preprocess"], "config.preprocess")
  video = build(VideoConfig, settings["video"], "config.video")
  return Conversation(files.tokenizer, form, files.template, preprocess, video, shape)


def prompt_sizes(
  settings: Settings,
  shape: QwenVLConfig,
  files: PolicyFiles | None,
  form: PromptForm,
  source: Source | None,
) -> list[PromptSize]:
  """Returns the sizes of some prompts; without data or a tokenizer those of ViLaSR are assumed."""
  if files is None or source is None or not is_automatic(settings):
    return [ASSUMED]
  pipeline = build(PipelineConfig, settings["pipeline"], "config.pipeline")
  conversation = conversation_of(settings, shape, files, form)
  return measured_sizes(conversation, source, settings["seed"], pipeline)


def measured_sizes(
  conversation: Conversation, source: Source, seed: int, pipeline: PipelineConfig
) -> list[PromptSize]:
  """Returns the sizes of some training and held-out prompts; tasks that cannot be read are skipped.

  Raises:
    DataError: if none can be read.
  """
  tasks = [*source.examples(seed, _MEASURED_TASKS), *source.held_out(_MEASURED_TASKS)]
  found = list(encode_in_order(tasks, conversation.prompt, pipeline))
  sizes = [auto_values.size_of(prompt) for prompt in found if isinstance(prompt, Prompt)]
  if not sizes:
    raise next(error for error in found if not isinstance(error, Prompt))
  return sizes


def fill_sizes(
  settings: Settings,
  sizes: Sequence[PromptSize],
  form: PromptForm,
  conversation: Conversation | None,
  shape: QwenVLConfig,
  mesh: jax.sharding.Mesh,
  usable: int,
) -> tuple[Settings, TrainingParts]:
  """Fills in everything that depends on data and memory: the most prompts, slots and rows that fit.

  Args:
    sizes: of some prompts.
    usable: bytes per device.
  """
  draws, devices = form.grammar.draws, sharding.rollout_mesh(mesh).shape["data"]

  def with_prompts(prompts: int) -> tuple[Settings, TrainingParts, bool]:
    tried = filled(settings, {"rollout.prompts": prompts})
    tried = filled(tried, auto_values.data_values(tried, sizes, draws, conversation, shape))
    return fill_from_memory(tried, sizes, draws, shape, mesh, usable)

  given = settings["rollout"]["prompts"]
  processes = sharding.island_mesh(mesh).shape["island"]
  multiple = devices * settings["learn"]["minibatches"]
  *larger, smallest = [given] if given else auto_values.prompts_to_try(multiple, processes)
  for prompts in larger:
    found, parts, fits = with_prompts(prompts)
    if fits:
      return found, parts
  found, parts, _ = with_prompts(smallest)
  return found, parts


def fill_from_memory(
  settings: Settings,
  sizes: Sequence[PromptSize],
  draws: bool,
  shape: QwenVLConfig,
  mesh: jax.sharding.Mesh,
  usable: int,
) -> tuple[Settings, TrainingParts, bool]:
  """Fills in slots, rows of a microbatch and buffers; returns whether they fit."""

  def with_sizes(slots: int, rows: int) -> Settings:
    values = auto_values.buffer_values(settings, sizes, slots, draws)
    return filled(settings, values | {"learn.micro.rows": rows})

  parts = training_parts(build(TrainConfig, with_sizes(1, 1)), shape, mesh)

  def plan_of(slots: int, rows: int) -> MemoryPlan:
    return whole_plan(build(TrainConfig, with_sizes(slots, rows)), parts, usable)

  devices = sharding.rollout_mesh(mesh).shape["data"]
  slots, rows, fits = auto_values.largest_fitting(settings, plan_of, devices)
  return with_sizes(slots, rows), parts, fits


def check_parameters(shape: QwenVLConfig, most: int, init: str) -> None:
  """Refuses a policy that is larger than the settings of a config are made for.

  Raises:
    ConfigError: naming the config to use.
  """
  count = parameter_count(shape)
  if most and count > most:
    raise ConfigError(
      f"config.init {init} has {count / 1e6:,.0f} M parameters, but image sizes, lengths and "
      f"optimizer of this config are for at most {most / 1e6:,.0f} M (config.max_parameters); use "
      "configs/qwen_vl.py"
    )
