"""Entry point: python -m spatial_jax.train --config=configs/NAME.py --workdir=DIR [--config.KEY=V]

  tasks ─► prompts ─► rollouts ─► scores ─► advantages ─► batch ─► update    stages/grpo.py

Writes DIR/metrics.jsonl, DIR/checkpoints/, DIR/config.json, DIR/results.json and DIR/report.html.
The same command resumes a run that was stopped.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags
from ml_collections import config_flags

from spatial_jax import checkpoint, compiled, sharding
from spatial_jax.cli import CONFIG_HELP, enable_compilation_cache, launch, no_arguments
from spatial_jax.compiled import FrozenDtype
from spatial_jax.config import ConfigError, build, check_choice
from spatial_jax.data import tokenizer as tokenizer_lib
from spatial_jax.data.pipeline import compute_async
from spatial_jax.data.source import Source, SourceConfig, make_source
from spatial_jax.evaluate.console import make_console
from spatial_jax.evaluate.evaluator import (
  EvaluationConfig,
  Evaluator,
  evaluation_rollout_config,
  load_questions,
  progress_evaluation,
  run_evaluation,
)
from spatial_jax.evaluate.predictions import EvaluationSet
from spatial_jax.evaluate.results import is_up_to_date
from spatial_jax.learn.optimizer import check_steps, make_optimizer
from spatial_jax.learn.train_batch import BatchConfig
from spatial_jax.policy import lora
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.report.report import About, write_report
from spatial_jax.report.reward_card import RewardCard
from spatial_jax.reward.parse import check_truth
from spatial_jax.rollout import memory
from spatial_jax.rollout.conversation import check_preprocess
from spatial_jax.rollout.memory import MemoryPlan, bytes_of
from spatial_jax.stages import loop
from spatial_jax.stages.context import (
  RunConfig,
  RunContext,
  open_context,
  plan,
  with_update,
)
from spatial_jax.stages.grpo import GrpoConfig, GrpoStage, batch_config
from spatial_jax.stages.load import (
  MODEL_KEY,
  PolicyFiles,
  check_normalisation,
  load_to_sample,
  read_policy,
  record,
)
from spatial_jax.stages.loop import LoopConfig
from spatial_jax.stages.start import reference_shapes, start_of
from spatial_jax.types import Params
from spatial_jax.workdir import bind_workdir, lock_workdir, to_path, write_text

# Keys that may differ when a run is resumed: lengths, intervals, outputs, padded sizes and places.
# Another loop.steps changes warm-up, decay and sharpness from the resumed step on.
MAY_DIFFER = (
  "loop",
  "learn.optimizer.total_steps",
  "learn.optimizer.warmup_steps",
  "learn.optimizer.decay_steps",
  "learn.prefix_buckets",
  "learn.vision",
  "learn.reference",
  "learn.save_rollouts_every",
  "learn.saved_groups",
  "evaluation",
  "executor",
)

# Kinds of sources, as the title of the report names them.
SOURCES = {"procedural": "procedural rooms", "rooms": "real rooms", "photos": "photographs"}


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
  """The config of a training run; see `configs/common.py`."""

  stages: tuple[Literal["grpo"], ...]  # run in this order; today one
  init: str  # policy to start from: a Hugging Face folder or the work directory of a run
  remat: bool  # recompute layers in the backward pass: less memory, more time on an accelerator
  # Parameters that are not trained (`learn.optimizer.frozen`; with adapters, all others) are stored
  # in this dtype. "compute": that of the activations, to which every use rounds them.
  frozen_dtype: FrozenDtype
  lora: LoraConfig  # kernels with adapters; then only the adapters are trained
  loop: LoopConfig
  source: SourceConfig
  learn: GrpoConfig
  evaluation: EvaluationConfig

  def __post_init__(self):
    super().__post_init__()
    check_choice(self, "frozen_dtype")
    learn, rollout = self.learn, self.rollout
    if len(self.stages) != 1:
      raise ConfigError(f"config.stages is {self.stages}; one stage can be run today: ('grpo',)")
    check_steps(learn.optimizer, self.loop.steps)
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


def _check_last(name: str, buckets: Sequence[int], least: int, of: str) -> None:
  """Refuses buckets of the update that do not hold what rollouts produce."""
  if buckets[-1] < least:
    raise ConfigError(
      f"config.learn.{name} ends at {buckets[-1]} and must be at least {least}, the largest of "
      f"config.rollout.{of}"
    )


def main(arguments: Sequence[str]) -> None:
  """Trains, evaluates and writes the report."""
  no_arguments(arguments)
  enable_compilation_cache()
  run(CONFIG.value, to_path(WORKDIR.value))


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
  name = "config.rollout.prompts" + (f" x {hosts} processes" if hosts > 1 else "")
  sharding.check_rows(cfg.rollout.prompts * hosts, name, mesh)
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


def run(config: Any, workdir: pathlib.Path) -> None:
  """Checks everything, then trains, evaluates and writes the report; an existing run is resumed.

  Raises:
    UserError: if config (a ConfigDict), policy or work directory cannot be used; the work directory
      is then not bound to the config.
  """
  cfg = build(TrainConfig, dict(config))
  sharding.refuse_several_processes()
  mesh = sharding.make_mesh(cfg.mesh, jax.devices())
  files = read_policy(cfg.init)
  check_normalisation(cfg.preprocess, files)
  parts = training_parts(cfg, files.cfg, mesh)
  source = make_source(cfg.source)
  for task in source.batch(cfg.seed, 0, 1):  # refuses a source without training tasks
    check_truth(task)
  trained_on = source.benchmark or files.benchmark
  shapes = evaluation_rollout_config(cfg.rollout, cfg.evaluation, cfg.evaluation.tasks, True)
  with open_context(parts.policy, files.tokenizer, cfg, trained_on) as context:
    stage = make_stage(cfg, context, parts, source, workdir)
    context.evaluation_engine(shapes, has_start=True)  # refuses what would not fit at the end
    lock_workdir(workdir)
    resolved = json.loads(config.to_json_best_effort()) | {MODEL_KEY: record(files.cfg)}
    questions = None
    if not is_up_to_date(workdir, fingerprint(cfg)):  # rendered while the first programs compile
      make = functools.partial(load_questions, source, cfg.evaluation, cfg.learn.reward, cfg.seed)
      questions = compute_async(make)
    end, size = train(cfg, context, stage, parts.optimizer, files, source, resolved)
    if questions is None:
      print(f"{workdir}/results.json has this evaluation; delete it to evaluate again")
    else:
      evaluate(cfg, context, end, questions(), workdir)
  report(cfg, size, workdir)


def make_stage(
  cfg: TrainConfig,
  context: RunContext,
  parts: TrainingParts,
  source: Source,
  workdir: pathlib.Path,
) -> GrpoStage:
  """The stage without its KL reference.

  Raises:
    ConfigError: if rollouts or update do not fit the devices; nothing was allocated.
  """
  resident = resident_bytes(cfg, parts.policy, parts.optimizer)
  engine = context.engine(cfg.rollout, resident, "config.rollout.slots")
  whole = whole_plan(cfg, parts)
  print(whole)
  memory.check(whole, "config.rollout.slots")
  return GrpoStage(
    engine=engine,
    programs=compiled.LearnPrograms(parts.policy, parts.optimizer, cfg.learn.loss, cfg.learn.micro),
    decode_params=context.decode_params,
    keep_features=not context.policy.vision_trainable,
    tasks_of=source.batch,
    cfg=cfg.learn,
    shapes=parts.shapes,
    steps=cfg.loop.steps,
    seed=cfg.seed,
    reference=None,
    workdir=workdir,
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
  return with_update(rollouts, policy, cfg.learn.micro, parts.shapes, cfg.rollout.prompts)


def train(
  cfg: TrainConfig,
  context: RunContext,
  stage: GrpoStage,
  optimizer: optax.GradientTransformation,
  files: PolicyFiles,
  source: Source,
  resolved: dict[str, Any],
) -> tuple[Params, int]:
  """Loads the start, binds the work directory to the config and runs the stage.

  Returns the decode parameters of the end, and the number of parameters. Nothing else stays on the
  devices: the evaluation needs the memory of moments and KL reference.
  """
  workdir = stage.workdir
  # From here on arrays are on the devices.
  resumes = checkpoint.exists(workdir)
  place = cfg.learn.reference if has_start_copy(cfg) else None
  state, reference = start_of(context.policy, optimizer, files, cfg.seed, place, resumes)
  stage = dataclasses.replace(stage, reference=reference)
  if replicated := sharding.replication_report(state.params, context.mesh):
    print(replicated)
  bind_workdir(workdir, resolved, MAY_DIFFER)
  write_text(workdir / tokenizer_lib.FILE, files.tokenizer.inner.to_str(pretty=True))
  evaluate_state = progress_evaluation(
    stage.engine,
    context.decode_params,
    source.held_out(cfg.evaluation.progress_tasks) if cfg.loop.evaluate_every else [],
    cfg.learn.reward,
    cfg.seed,
  )
  state = loop.run(
    workdir,
    cfg.loop,
    "grpo",
    state,
    stage.step_function,
    evaluate_state,
    context.trained_on,
    resolved,
  )
  size = sum(x.size for x in jax.tree.leaves(state.params))
  return context.decode_params(state.params), size


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
  return bool(cfg.learn.loss.kl_weight) and not cfg.lora.paths


def fingerprint(cfg: TrainConfig) -> dict[str, Any]:
  """The values that results.json must have to be the evaluation of this run."""
  return {
    "seed": cfg.seed,
    "steps": cfg.loop.steps,
    "evaluation": dataclasses.asdict(cfg.evaluation),
  }


def evaluate(
  cfg: TrainConfig,
  context: RunContext,
  end: Params,
  questions: EvaluationSet,
  workdir: pathlib.Path,
) -> None:
  """Evaluates start and end; the start is read again, so that training need not keep it."""
  start = context.decode_params(load_to_sample(read_policy(cfg.init), context.mesh))
  size = len(questions.tasks)
  shapes = evaluation_rollout_config(cfg.rollout, cfg.evaluation, size, has_start=True)
  engine = context.evaluation_engine(shapes, has_start=True)
  evaluator = Evaluator(engine, start, end, questions, cfg.evaluation)
  run_evaluation(evaluator, workdir, context.trained_on, fingerprint(cfg), make_console())


def report(cfg: TrainConfig, parameters: int, workdir: pathlib.Path) -> None:
  """Writes report.html; `parameters` is their number."""
  card = RewardCard(cfg.learn.reward, cfg.learn.advantage)
  about = About(
    title=f"{'AP-GRPO' if cfg.learn.advantage.alpha else 'GRPO'} on {SOURCES[cfg.source.kind]}",
    summary=(
      "A Qwen-VL policy learns to answer questions about space from its own rollouts. It thinks, "
      "may draw boxes on the image, looks at the drawing and answers."
    ),
    facts=(
      ("policy", f"{parameters:,} parameters"),
      ("rollouts per step", f"{cfg.rollout.prompts} questions x {cfg.rollout.group}"),
      ("seed", str(cfg.seed)),
    ),
  )
  print(f"wrote {write_report(workdir, about, card, cfg.learn.saved_groups)}")


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
  WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder that the run is written to; an existing run is resumed", required=True
  )
  flags.mark_flag_as_required("config")
  launch(main, "stopped; the same command goes on from the last checkpoint")
