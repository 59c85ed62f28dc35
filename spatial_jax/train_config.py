"""The config of a training run, and what follows from it without any array.

    TrainConfig + shape of the policy + mesh ──► TrainingParts ──► MemoryPlan

Training, ahead-of-time compilation and memory plans share these functions.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spatial_jax import compiled, sharding
from spatial_jax.compiled import FrozenDtype
from spatial_jax.config import ConfigError, check_choice, check_whole
from spatial_jax.data.source import SourceConfig
from spatial_jax.evaluate.evaluator import (
  EvaluationConfig,
)
from spatial_jax.learn.optimizer import check_steps, make_optimizer
from spatial_jax.learn.train_batch import BatchConfig
from spatial_jax.machines import Machine, absent_devices
from spatial_jax.policy import lora
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.rollout.conversation import check_preprocess
from spatial_jax.rollout.memory import MemoryPlan, bytes_of
from spatial_jax.stages.context import (
  RunConfig,
  plan,
  with_update,
)
from spatial_jax.stages.dpo import DpoConfig
from spatial_jax.stages.grpo import GrpoConfig, batch_config
from spatial_jax.stages.loop import LoopConfig
from spatial_jax.stages.reject import RejectConfig
from spatial_jax.stages.sft import SftConfig
from spatial_jax.stages.start import reference_shapes

StageName = Literal["sft", "reject", "dpo", "grpo"]

# Keys that may differ when a run is resumed: lengths, intervals, outputs, padded sizes and places.
# Another loop.steps changes warm-up, decay and sharpness from the resumed step on.
MAY_DIFFER = (
  "loop",
  "learn.optimizer.total_steps",
  "learn.optimizer.warmup_steps",
  "learn.optimizer.decay_steps",
  "rollout.prompt_buckets",  # raised when prompts are left out as too long
  "rollout.vision",
  "learn.prefix_buckets",
  "learn.vision",
  "learn.reference",
  "learn.save_rollouts_every",
  "learn.saved_groups",
  "learn.health",
  "sft.steps",
  "sft.optimizer.total_steps",
  "sft.optimizer.warmup_steps",
  "sft.optimizer.decay_steps",
  "reject.train.steps",
  "reject.train.optimizer.total_steps",
  "reject.train.optimizer.warmup_steps",
  "reject.train.optimizer.decay_steps",
  "stages",  # of a run with several: the folder of each has its own config
  "evaluation",
  "executor",
  "pipeline",
  "text",  # where the prompt form is; "form" is what it says
)


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
  """The config of a training run; see `configs/common.py`."""

  # Run in this order, each from the checkpoint of the one before it.
  stages: tuple[StageName, ...]
  # The values of this config are for policies of at most this number of parameters; 0: any.
  max_parameters: int
  init: str  # policy to start from: a Hugging Face folder or the work directory of a run
  remat: bool  # recompute layers in the backward pass: less memory, more time on an accelerator
  # Parameters that are not trained (`learn.optimizer.frozen`; with adapters, all others) are stored
  # in this dtype. "compute": that of the activations, to which every use rounds them.
  frozen_dtype: FrozenDtype
  lora: LoraConfig  # kernels with adapters; then only the adapters are trained
  loop: LoopConfig
  source: SourceConfig
  sft: SftConfig
  reject: RejectConfig
  dpo: DpoConfig
  learn: GrpoConfig
  evaluation: EvaluationConfig

  def __post_init__(self):
    super().__post_init__()
    check_choice(self, "frozen_dtype")
    check_whole(self, "max_parameters", at_least=0)
    learn, rollout = self.learn, self.rollout
    _check_stages(self.stages)
    check_steps(learn.optimizer, self.loop.steps * learn.updates)
    if rollout.group < 2:
      raise ConfigError(
        f"config.rollout.group is {rollout.group} and must be at least 2: "
        "the advantage of a single rollout is 0"
      )
    longest = rollout.stop.max_response_tokens + 1
    _check_last("micro.lengths", learn.micro.lengths, longest, "stop.max_response_tokens + 1")
    longest = rollout.prompt_buckets[-1]
    _check_last("prefix_buckets", learn.prefix_buckets, longest, "prompt_buckets")
    sizes = dataclasses.asdict(rollout.vision)
    for name, buckets in dataclasses.asdict(learn.vision).items():
      _check_last(f"vision.{name}", buckets, sizes[name][-1], f"vision.{name}")


def _check_stages(stages: Sequence[str]) -> None:
  """Refuses no stage, a stage twice, and orders that make no sense."""
  if not stages:
    raise ConfigError("config.stages is empty; name at least one of sft, reject, dpo, grpo")
  if len(set(stages)) != len(stages):
    raise ConfigError(f"config.stages is {stages} and names a stage twice")
  order = [name for name in ("sft", "reject", "dpo", "grpo") if name in stages]
  if list(stages) != order:
    raise ConfigError(f"config.stages is {stages}; the order must be {tuple(order)}")


def _check_last(name: str, buckets: Sequence[int], least: int, of: str) -> None:
  """Refuses buckets of the update that do not hold what rollouts produce."""
  if buckets[-1] < least:
    raise ConfigError(
      f"config.learn.{name} ends at {buckets[-1]} and must be at least {least}, the largest of "
      f"config.rollout.{of}"
    )


def stage_config(cfg: TrainConfig, name: StageName) -> TrainConfig:
  """The config of one stage: its optimizer and number of steps are where GRPO has them."""
  if name == "grpo":
    return dataclasses.replace(cfg, stages=("grpo",))
  trained = {"sft": cfg.sft, "reject": cfg.reject.train, "dpo": cfg.dpo}[name]
  # The average of GRPO's parameters is not needed, and neither are its minibatches.
  kl = dataclasses.replace(cfg.learn.loss.kl, weight=0.0, final_weight=0.0)
  learn = dataclasses.replace(
    cfg.learn,
    optimizer=trained.optimizer,
    loss=dataclasses.replace(cfg.learn.loss, kl=kl),
    minibatches=1,
    epochs=1,
  )
  loop = dataclasses.replace(cfg.loop, steps=trained.steps)
  return dataclasses.replace(cfg, stages=(name,), learn=learn, loop=loop)


class TrainingParts(NamedTuple):
  """What training makes of its config and the shape of its policy; `aot` compiles the same."""

  policy: Policy  # on the train mesh, with frozen paths, adapters and remat
  optimizer: optax.GradientTransformation
  shapes: BatchConfig  # of the update, rounded up for the platform


def training_parts(cfg: TrainConfig, shape: QwenVLConfig, mesh: jax.sharding.Mesh) -> TrainingParts:
  """The policy on the train mesh, its optimizer and the shapes of the update, without any array.

  Raises:
    ConfigError: if prompts, image settings, adapters or frozen paths do not fit mesh or policy.
  """
  hosts = sharding.island_mesh(mesh).shape["island"]
  if cfg.rollout.prompts % cfg.learn.minibatches:
    raise ConfigError(
      f"config.learn.minibatches is {cfg.learn.minibatches} and must divide config.rollout.prompts,"
      f" {cfg.rollout.prompts}"
    )
  name = "config.rollout.prompts" + (f" x {hosts} processes" if hosts > 1 else "")
  sharding.check_rows(cfg.rollout.prompts // cfg.learn.minibatches * hosts, name, mesh)
  check_preprocess(cfg.preprocess, shape, "config.preprocess")
  policy = make_policy(shape, compiled.compute_dtype(mesh), mesh, cfg.remat)
  lora.kernels(cfg.lora, policy.kernel_paths)
  frozen = lora.frozen_paths(cfg.lora, cfg.learn.optimizer.frozen)
  policy = dataclasses.replace(
    policy,
    frozen=frozen,
    frozen_dtype=compiled.frozen_dtype(mesh, cfg.frozen_dtype),
    gradient_dtype=jnp.dtype(cfg.learn.optimizer.gradient_dtype),
    lora=cfg.lora,
  )
  optimizer = make_optimizer(dataclasses.replace(cfg.learn.optimizer, frozen=frozen))
  jax.eval_shape(optimizer.init, policy.abstract_params())
  return TrainingParts(
    policy, optimizer, compiled.batch_buckets(batch_config(cfg.learn, shape), mesh)
  )


def whole_plan(cfg: TrainConfig, parts: TrainingParts, device: int | None = None) -> MemoryPlan:
  """Bytes per device during every phase of a step; nothing is allocated.

  `device` is the size of a device of the policy's mesh, which may be absent; None: of this machine.
  """
  policy = parts.policy
  rollout = compiled.rollout_buckets(cfg.rollout, compiled.train_mesh(policy))
  rollouts = plan(policy, rollout, resident_bytes(cfg, policy, parts.optimizer), device)
  on_host = cfg.learn.reference == "host"
  rollouts = rollouts._replace(reference=reference_bytes(cfg, policy) if on_host else 0)
  hosts = sharding.island_mesh(compiled.train_mesh(policy)).shape["island"]
  return with_update(rollouts, policy, cfg.learn.micro, parts.shapes, cfg.rollout.prompts * hosts)


def plan_for(cfg: TrainConfig, shape: QwenVLConfig, machine: Machine) -> MemoryPlan:
  """Returns the memory plan of a training run on absent devices; no array is allocated.

  Raises:
    ConfigError: if training would refuse the config with this policy and mesh.
  """
  mesh = sharding.make_mesh(cfg.mesh, absent_devices(machine))
  return whole_plan(cfg, training_parts(cfg, shape, mesh), machine.usable)


def resident_bytes(
  cfg: TrainConfig, policy: Policy, optimizer: optax.GradientTransformation
) -> int:
  """Bytes per device that training keeps all the time: its state, and a reference beside it."""
  state = compiled.abstract_state(policy, optimizer, compiled.train_mesh(policy))
  on_device = cfg.learn.reference == "device"
  return bytes_of(state) + (reference_bytes(cfg, policy) if on_device else 0)


def reference_bytes(cfg: TrainConfig, policy: Policy) -> int:
  """Bytes per device of the KL reference while it is used; 0 if it is not a copy of the start."""
  return bytes_of(reference_shapes(policy)) if has_start_copy(cfg) else 0


def has_start_copy(cfg: TrainConfig) -> bool:
  """Whether the KL term needs the start beside the trained policy; adapters can be left out."""
  kl = cfg.learn.loss.kl
  return bool(kl.weight) and kl.reference == "start" and not cfg.lora.paths
