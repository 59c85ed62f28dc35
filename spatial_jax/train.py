"""Entry point: python -m spatial_jax.train --config=configs/NAME.py --workdir=DIR [--config.KEY=V]

  tasks ─► prompts ─► rollouts ─► scores ─► advantages ─► batch ─► update    stages/grpo.py

Writes DIR/metrics.jsonl, DIR/checkpoints/, DIR/config.json, DIR/results.json and DIR/report.html.
The same command resumes a run that was stopped.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import optax
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from spatial_jax import compiled, rng, sharding
from spatial_jax.cli import CONFIG_HELP, enable_compilation_cache, launch, no_arguments
from spatial_jax.config import ConfigError, build
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.pipeline import compute_async
from spatial_jax.data.prompt_text import TextConfig
from spatial_jax.data.source import Source, SourceConfig, make_source
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.executor import ExecutorConfig
from spatial_jax.evaluate.console import make_console
from spatial_jax.evaluate.evaluator import (
  EvaluationConfig,
  PolicyPair,
  Questions,
  evaluation_rollout_config,
  gallery,
  load_questions,
  make_evaluator,
  progress_evaluation,
  run_evaluation,
)
from spatial_jax.evaluate.results import is_up_to_date
from spatial_jax.learn.optimizer import check_steps, make_optimizer
from spatial_jax.policy import lora, param_tree
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.report.report import About, write_report
from spatial_jax.report.reward_card import RewardCard
from spatial_jax.rollout import memory
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import check_preprocess
from spatial_jax.rollout.memory import bytes_of
from spatial_jax.rollout.saved_groups import save_groups
from spatial_jax.sharding import MeshConfig
from spatial_jax.stages import loop
from spatial_jax.stages.context import RunContext, open_context, planned, with_update
from spatial_jax.stages.grpo import GrpoConfig, GrpoStage, batch_config
from spatial_jax.stages.load import (
  MODEL_KEY,
  check_normalisation,
  load_policy,
  read_shape,
  record,
)
from spatial_jax.stages.loop import LoopConfig
from spatial_jax.types import Params
from spatial_jax.workdir import bind_workdir, lock_workdir, to_path

# Keys that may differ when a run is resumed: lengths, intervals, outputs, and padded sizes.
MAY_DIFFER = (
  "loop",
  "learn.optimizer.total_steps",
  "learn.optimizer.decay_steps",
  "learn.prefix_buckets",
  "learn.vision",
  "learn.save_rollouts_every",
  "learn.saved_groups",
  "evaluation",
  "executor",
)

# Kinds of sources, as the title of the report names them.
SOURCES = {"procedural": "procedural rooms", "rooms": "real rooms", "photos": "photographs"}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The config of a training run; see `configs/common.py`.

  Attributes:
    stages: run in this order, each from the checkpoint of the one before; today "grpo" only.
    seed: of sampling and data.
    init: policy to start from: a Hugging Face folder or the work directory of a run.
    remat: recompute layers in the backward pass: less memory, more time on an accelerator.
    lora: kernels with adapters; then only the adapters are trained.
  """

  stages: tuple[Literal["grpo"], ...]
  seed: int
  init: str
  remat: bool
  lora: LoraConfig
  loop: LoopConfig
  mesh: MeshConfig
  source: SourceConfig
  text: TextConfig
  preprocess: PreprocessConfig
  rollout: RolloutConfig
  style: Style
  executor: ExecutorConfig
  learn: GrpoConfig
  evaluation: EvaluationConfig

  def __post_init__(self):
    learn, rollout = self.learn, self.rollout
    if len(self.stages) != 1:
      raise ConfigError(f"config.stages is {self.stages}; one stage can be run today: ('grpo',)")
    check_steps(learn.optimizer, self.loop.steps)
    if rollout.group < 2:
      raise ConfigError(
        f"config.rollout.group is {rollout.group} and must be at least 2: "
        "the advantage of a single rollout is 0"
      )
    if learn.micro.lengths[-1] <= rollout.stop.max_response_tokens:
      raise ConfigError(
        f"config.learn.micro.lengths ends at {learn.micro.lengths[-1]} and must be at least "
        f"config.rollout.stop.max_response_tokens + 1 = {rollout.stop.max_response_tokens + 1}"
      )
    if learn.prefix_buckets[-1] < rollout.prompt_buckets[-1]:
      raise ConfigError(
        f"config.learn.prefix_buckets ends at {learn.prefix_buckets[-1]} and must be at least the "
        f"last of config.rollout.prompt_buckets, {rollout.prompt_buckets[-1]}"
      )
    sizes = dataclasses.asdict(rollout.vision)
    for name, buckets in dataclasses.asdict(learn.vision).items():
      if buckets[-1] < sizes[name][-1]:
        raise ConfigError(
          f"config.learn.vision.{name} ends at {buckets[-1]} and must be at least the last of "
          f"config.rollout.vision.{name}, {sizes[name][-1]}"
        )


def main(arguments: Sequence[str]) -> None:
  """Trains, evaluates and writes the report."""
  no_arguments(arguments)
  enable_compilation_cache()
  run(CONFIG.value, to_path(WORKDIR.value))


def run(config: Any, workdir: pathlib.Path) -> None:
  """Checks the config, binds the work directory, runs the stages, evaluates.

  Args:
    config: ConfigDict.
    workdir: created if missing; an existing run is resumed.

  Raises:
    UserError: if config, policy or work directory cannot be used.
  """
  sharding.refuse_several_processes()
  cfg = build(TrainConfig, dict(config))
  mesh = sharding.make_mesh(cfg.mesh, jax.devices())
  shape = read_shape(cfg.init)
  check_preprocess(cfg.preprocess, shape, "config.preprocess")
  check_normalisation(cfg.preprocess, cfg.init)
  lora.kernels(cfg.lora, make_policy(shape, jax.numpy.float32).kernel_paths)
  loaded = load_policy(cfg.init, mesh)  # from here on arrays are on the devices
  resolved = json.loads(config.to_json_best_effort()) | {MODEL_KEY: record(loaded.policy.cfg)}
  lock_workdir(workdir)
  bind_workdir(workdir, resolved, MAY_DIFFER)
  loaded.tokenizer.inner.save(str(workdir / "tokenizer.json"))
  source = make_source(cfg.source)
  frozen = lora.frozen_paths(cfg.lora, cfg.learn.optimizer.frozen)
  with open_context(
    dataclasses.replace(loaded.policy, remat=cfg.remat, frozen=frozen, lora=cfg.lora),
    loaded.tokenizer,
    cfg.text,
    cfg.preprocess,
    cfg.style,
    cfg.executor,
    cfg.rollout.weights,
    source.benchmark or loaded.benchmark,
  ) as context:
    train(cfg, context, loaded.params, source, workdir, resolved)


def train(
  cfg: TrainConfig,
  context: RunContext,
  start: Params,
  source: Source,
  workdir: pathlib.Path,
  resolved: dict[str, Any],
) -> None:
  """Reinforcement learning, then the evaluation of start and end, then the report.

  Args:
    cfg, context, source: of the run.
    start: parameters of the policy to start from; donated unless the KL term needs them.
    workdir: of the run.
    resolved: the config as JSON values, saved with every checkpoint.
  """
  # Questions are rendered while the first programs compile.
  is_evaluated = is_up_to_date(workdir, fingerprint(cfg))
  questions = (
    None
    if is_evaluated
    else compute_async(lambda: load_questions(source, cfg.evaluation, cfg.seed))
  )
  optimizer = make_optimizer(dataclasses.replace(cfg.learn.optimizer, frozen=context.policy.frozen))
  resident = resident_bytes(cfg, context.policy, optimizer)
  check_evaluation_memory(cfg, context.policy)
  stage = GrpoStage(
    context=context,
    engine=context.engine(cfg.rollout, resident, "config.rollout.slots"),
    programs=compiled.LearnPrograms(context.policy, optimizer, cfg.learn.loss, cfg.learn.micro),
    tasks_of=source.batch,
    cfg=cfg.learn,
    shapes=compiled.batch_buckets(batch_config(cfg.learn, context.policy.cfg), context.mesh),
    steps=cfg.loop.steps,
    seed=cfg.seed,
    reference=reference_of(cfg, start),
    workdir=workdir,
  )
  plan = with_update(
    planned(context.policy, stage.engine.cfg, resident),
    context.policy,
    cfg.learn.micro,
    stage.shapes,
    cfg.rollout.prompts,
  )
  print(plan)
  memory.check(plan, "config.rollout.slots")
  params = trainable_start(cfg, context, start)
  del start
  state = compiled.init_state(context.policy, optimizer, params, context.mesh)
  del params
  if replicated := sharding.replication_report(state.params, context.mesh):
    print(replicated)
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
  finish(cfg, context, state.params, questions, workdir)


def resident_bytes(
  cfg: TrainConfig, policy: Policy, optimizer: optax.GradientTransformation
) -> int:
  """Bytes per device that training keeps during rollouts: its state, and the KL reference."""
  mesh = compiled.train_mesh(policy)
  state = compiled.abstract_state(policy, optimizer, mesh)
  has_copy = cfg.learn.loss.kl_weight and not cfg.lora.paths
  return bytes_of(state, state.params) if has_copy else bytes_of(state)


def check_evaluation_memory(cfg: TrainConfig, policy: Policy) -> None:
  """Refuses a run whose evaluation would not fit the devices, before it is trained.

  Raises:
    ConfigError: naming the slots that fit.
  """
  mesh = compiled.train_mesh(policy)
  shapes = evaluation_rollout_config(cfg.rollout, cfg.evaluation, has_start=True)
  plan = planned(policy, compiled.rollout_buckets(shapes, mesh), 0)
  params = jax.eval_shape(policy.init, jax.random.key(0))
  params = compiled.placed(params, sharding.param_shardings(params, mesh))
  memory.check(plan._replace(resident=bytes_of(params) + plan.weights), "config.evaluation.slots")


def trainable_start(cfg: TrainConfig, context: RunContext, start: Params) -> Params:
  """The parameters that the loop may donate: the start, a copy if the KL term needs it too."""
  if cfg.lora.paths:
    key = rng.stream(cfg.seed, "adapters")
    fresh = compiled.init_adapters(context.policy, key, context.mesh)
    return param_tree.merge(start, fresh)
  return jax.tree.map(jax.numpy.copy, start) if cfg.learn.loss.kl_weight else start


def reference_of(cfg: TrainConfig, start: Params) -> Callable[[Params], Params] | None:
  """Train parameters -> the reference policy of the KL term: the start, or adapters off."""
  if not cfg.learn.loss.kl_weight:
    return None
  return (lambda params: params) if cfg.lora.paths else (lambda _: start)


def fingerprint(cfg: TrainConfig) -> dict[str, Any]:
  """The values that results.json must have to be the evaluation of this run."""
  return {
    "seed": cfg.seed,
    "steps": cfg.loop.steps,
    "evaluation": dataclasses.asdict(cfg.evaluation),
  }


def finish(
  cfg: TrainConfig,
  context: RunContext,
  end: Params,
  questions: Callable[[], Questions] | None,
  workdir: pathlib.Path,
) -> None:
  """Evaluates start and end once on the same held-out questions and writes the report."""
  console = make_console()
  if questions is None:
    console.print(f"{workdir}/results.json has this evaluation; delete it to evaluate again")
  else:
    evaluate(cfg, context, end, questions(), workdir, console)
  card = RewardCard(cfg.learn.reward, cfg.learn.advantage, progress=1.0)
  about = About(
    title=f"{'AP-GRPO' if cfg.learn.advantage.alpha else 'GRPO'} on {SOURCES[cfg.source.kind]}",
    summary=(
      "A Qwen-VL policy learns to answer questions about space from its own rollouts. It thinks, "
      "may draw boxes on the image, looks at the drawing and answers."
    ),
    facts=(
      ("policy", f"{sum(x.size for x in jax.tree.leaves(end)):,} parameters"),
      ("steps", f"{cfg.loop.steps} of {cfg.rollout.prompts} x {cfg.rollout.group} rollouts"),
      ("seed", str(cfg.seed)),
    ),
  )
  console.print(f"wrote {write_report(workdir, about, card, cfg.learn.saved_groups)}")


def evaluate(
  cfg: TrainConfig,
  context: RunContext,
  end: Params,
  questions: Questions,
  workdir: pathlib.Path,
  console: Console,
) -> None:
  """Evaluates start and end; the start is read again, so that training need not keep it."""
  base = load_policy(cfg.init, context.mesh)
  decode_start = compiled.decode_params(base.policy, context.mesh, cfg.rollout.weights)
  policies = PolicyPair(decode_start(base.params), context.decode_params(end))
  del base
  resident = bytes_of(end, policies.start)
  evaluator = make_evaluator(
    lambda rollout: context.engine(rollout, resident, "config.evaluation.slots"),
    cfg.rollout,
    questions,
    cfg.learn.reward,
    cfg.evaluation,
    cfg.seed,
    policies,
  )
  found = run_evaluation(evaluator, workdir, context.trained_on, fingerprint(cfg), console)
  save_groups(gallery(evaluator, found), workdir)


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
  WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder that the run is written to; an existing run is resumed", required=True
  )
  flags.mark_flag_as_required("config")
  launch(main, "stopped; the same command goes on from the last checkpoint")
