"""Runs one stage: builds it, trains from the last checkpoint, evaluates, writes the report.

Prepared ─► RunContext ─► stage ─► loop.run ─► Evaluator ─► report.html
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from spatial_jax import checkpoint, compiled, sharding
from spatial_jax.build_grpo import make_grpo, reference_of
from spatial_jax.config import ConfigError
from spatial_jax.data.background import compute_async
from spatial_jax.data.files import FileSource
from spatial_jax.data.prompt_form import form_record
from spatial_jax.data.source import SOURCE_NAMES, Source
from spatial_jax.evaluate.console import make_console
from spatial_jax.evaluate.evaluator import (
  Evaluator,
  evaluation_rollout_config,
  load_questions,
  progress_evaluation,
  run_evaluation,
)
from spatial_jax.evaluate.predictions import EvaluationSet
from spatial_jax.evaluate.results import is_up_to_date
from spatial_jax.prepare import Prepared
from spatial_jax.report.report import About, write_report
from spatial_jax.report.reward_card import RewardCard
from spatial_jax.reward.custom import check_functions
from spatial_jax.rollout.engine import Engine
from spatial_jax.stages import loop
from spatial_jax.stages.context import RunContext, open_context, plan
from spatial_jax.stages.grpo import GrpoStage
from spatial_jax.stages.health import Health
from spatial_jax.stages.load import (
  DATA_KEY,
  FORM_KEY,
  MODEL_KEY,
  STAGE_DATA_KEY,
  load_to_sample,
  read_policy,
  record,
  store_conversation_files,
)
from spatial_jax.stages.reference import StartCopy
from spatial_jax.stages.start import start_of
from spatial_jax.supervised import Supervised, stage_data
from spatial_jax.train_config import (
  MAY_DIFFER,
  StageName,
  TrainConfig,
  has_start_copy,
  resident_bytes,
)
from spatial_jax.types import Params, StageStep, TrainState
from spatial_jax.workdir import bind_workdir, lock_workdir


class BuiltStage(NamedTuple):
  """A stage that is ready to run."""

  step_function: Callable[[int], StageStep]  # first step -> the function of one step
  engine: Engine  # of the progress evaluation
  monitor: loop.Monitor | None


def run_stage(ready: Prepared, name: StageName, workdir: pathlib.Path) -> None:
  """Runs one stage; an existing run is resumed, a finished one is left as it is.

  Args:
    ready: with the config of this stage, see `train_config.stage_config`.
    name: of the stage.
    workdir: of the stage.

  Raises:
    UserError: if config, policy or work directory cannot be used; the work directory is then not
      bound to the config.
  """
  cfg, form, files, source = ready.cfg, ready.form, ready.files, ready.source
  assert files is not None  # both are needed with weights
  assert source is not None
  if is_finished(cfg, workdir):
    print(f"{workdir} is finished; delete {workdir}/results.json to evaluate again")
    return
  data = check_stage(ready, name)
  trained_on = source.benchmark or files.benchmark
  with open_context(ready.parts.policy, files, form, cfg, trained_on) as context:
    check_evaluation(cfg, context)
    recorded: dict[str, Any] = {MODEL_KEY: record(files.cfg), FORM_KEY: form_record(form)}
    if isinstance(source, FileSource):
      recorded[DATA_KEY] = source.contents
    if data is not None:
      recorded[STAGE_DATA_KEY] = data.contents
    resolved = json.loads(json.dumps(ready.settings | recorded))  # tuples are lists
    questions = None
    if cfg.evaluation.tasks:
      # Rendered while the first programs compile.
      make = functools.partial(load_questions, source, cfg.evaluation, cfg.learn.reward, cfg.seed)
      questions = compute_async(make)
    end, size = train(ready, name, context, data, resolved, workdir)
    if questions is not None:
      evaluate(cfg, context, end, questions(), workdir)
  report(cfg, name, size, form.grammar.draws, workdir)


def check_stage(ready: Prepared, name: StageName) -> FileSource | None:
  """Checks the data of a stage and its custom rewards; needs no weights.

  Args:
    ready: with the config of this stage.
    name: of the stage.

  Returns:
    The data files of the stage, see `stage_data`.
  """
  cfg, source = ready.cfg, ready.source
  assert source is not None  # needed with weights
  examples = source.batch(cfg.seed, 0, 3)  # refuses a source without training tasks
  if name in ("grpo", "reject") or (name == "dpo" and cfg.dpo.pairs == "samples"):
    check_functions(cfg.learn.reward, examples)
  check_held_out(cfg, source)
  return stage_data(cfg, name)


def is_finished(cfg: TrainConfig, workdir: pathlib.Path) -> bool:
  """Whether the last checkpoint is that of the last step, and its evaluation is there."""
  found = checkpoint.latest(workdir)
  if found is None or checkpoint.read_progress(found).step != cfg.loop.steps:
    return False
  return not cfg.evaluation.tasks or is_up_to_date(workdir, fingerprint(cfg))


def check_held_out(cfg: TrainConfig, source: Source) -> None:
  """Refuses files without a held-out task, unless nothing is evaluated."""
  wanted = cfg.evaluation.tasks or cfg.loop.evaluate_every
  if wanted and isinstance(source, FileSource) and not source.held_out_count:
    raise ConfigError(
      "config.source.path has no held-out task to evaluate on; set config.source.files.held_out or"
      " held_out_fraction, or config.evaluation.tasks=0 and config.loop.evaluate_every=0"
    )


def check_evaluation(cfg: TrainConfig, context: RunContext) -> None:
  """Refuses an evaluation that would not fit after the training."""
  if cfg.evaluation.tasks:
    tasks = cfg.evaluation.tasks
    shapes = evaluation_rollout_config(cfg.rollout, cfg.evaluation, tasks, has_start=True)
    context.evaluation_engine(shapes, has_start=True)


def train(
  ready: Prepared,
  name: StageName,
  context: RunContext,
  data: FileSource | None,
  resolved: dict[str, Any],
  workdir: pathlib.Path,
) -> tuple[Params, int]:
  """Builds the stage, loads the start, binds the work directory to the config and runs the loop.

  Returns the decode parameters of the end and their number. The evaluation needs all other memory.
  """
  cfg, files, source = ready.cfg, ready.files, ready.source
  assert files is not None  # checked by `run_stage`
  assert source is not None
  # GRPO is built before an array is allocated, so that what does not fit is refused at once.
  grpo = make_grpo(cfg, context, ready.parts, source, workdir) if name == "grpo" else None
  lock_workdir(workdir)
  resumes = checkpoint.exists(workdir)
  place = cfg.learn.reference if name == "grpo" and has_start_copy(cfg) else None
  state, copy = start_of(context.policy, ready.parts.optimizer, files, cfg.seed, place, resumes)
  if replicated := sharding.replication_report(state.params, context.mesh):
    print(replicated)
  bind_workdir(workdir, resolved, MAY_DIFFER)
  store_conversation_files(files, workdir)
  if grpo is not None:
    built = build_grpo(cfg, context, grpo, copy, workdir)
  else:
    built = build_supervised(ready, name, context, data, state, resumes, workdir)
  evaluate_state = progress_evaluation(
    built.engine,
    context.decode_params,
    source.held_out(cfg.evaluation.progress_tasks) if cfg.loop.evaluate_every else [],
    cfg.learn.reward,
    cfg.seed,
    cfg.pipeline,
  )
  state = loop.run(
    workdir,
    cfg.loop,
    name,
    state,
    built.step_function,
    evaluate_state,
    context.trained_on,
    resolved,
    built.monitor,
  )
  size = sum(x.size for x in jax.tree.leaves(state.params))
  return context.decode_params(state.params), size


def build_grpo(
  cfg: TrainConfig,
  context: RunContext,
  stage: GrpoStage,
  start: StartCopy | None,
  workdir: pathlib.Path,
) -> BuiltStage:
  """The stage of GRPO with the reference of its KL term and its health rules."""
  updater = dataclasses.replace(stage.updater, reference=reference_of(cfg, context, start))
  whole = dataclasses.replace(stage, updater=updater)
  monitor = Health(cfg.learn.health, workdir).monitor
  return BuiltStage(whole.step_function, stage.sampler.engine, monitor)


def build_supervised(
  ready: Prepared,
  name: StageName,
  context: RunContext,
  data: FileSource | None,
  state: TrainState,
  resumes: bool,
  workdir: pathlib.Path,
) -> BuiltStage:
  """A stage of SFT, rejection sampling or DPO; the latter two may sample from the start first.

  Args:
    data: of the stage, see `supervised.stage_data`.
    state: at step 0, or shapes if the run resumes.
  """
  cfg, source, files = ready.cfg, ready.source, ready.files
  assert source is not None  # checked by `run_stage`
  assert files is not None
  resident = resident_bytes(cfg, ready.parts.policy, ready.parts.optimizer)
  engine = context.engine(cfg.rollout, resident, "config.rollout.slots")
  shapes = compiled.rollout_buckets(cfg.rollout, context.mesh)
  rollouts = plan(context.policy, shapes, resident)
  build = Supervised(cfg, context, ready.parts, source, rollouts, workdir, data)

  def weights() -> Params:
    if resumes:  # the state on the devices is not the start
      return context.decode_params(load_to_sample(files, context.mesh))
    return context.decode_params(state.params)

  if name == "sft":
    return BuiltStage(build.sft(cfg.sft).step_function, engine, None)
  if name == "reject":
    return BuiltStage(build.rejection(engine, weights).step_function, engine, None)
  sampled = cfg.dpo.pairs == "samples"
  stage = build.sampled_pairs(engine, weights) if sampled else build.dpo(cfg.dpo, cfg.dpo.loss)
  if not resumes:
    stage.score_reference(state.params)
  return BuiltStage(stage.step_function, engine, None)


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
  evaluator = Evaluator(engine, start, end, questions, cfg.evaluation, cfg.pipeline)
  run_evaluation(evaluator, workdir, context.trained_on, fingerprint(cfg), make_console())


def report(
  cfg: TrainConfig, name: StageName, parameters: int, draws: bool, workdir: pathlib.Path
) -> None:
  """Writes report.html; `parameters` is their number, `draws` whether the prompt form draws."""
  is_grpo = name == "grpo"
  reward = cfg.learn.reward if is_grpo else cfg.learn.reward.for_evaluation()
  card = RewardCard(reward, cfg.learn.advantage if is_grpo else None)
  titles = {
    "sft": "SFT",
    "reject": "Rejection sampling",
    "dpo": "DPO",
    "grpo": "AP-GRPO" if cfg.learn.advantage.alpha else "GRPO",
  }
  learns = {
    "sft": "imitates demonstrated answers. ",
    "reject": "imitates its own best answers. ",
    "dpo": "learns to prefer right answers over wrong ones. ",
    "grpo": "learns from the rewards of its own rollouts. ",
  }
  thinks = "It thinks, may draw boxes on the image, looks at the drawing and answers."
  sft = cfg.reject.train if name == "reject" else cfg.sft
  batches = {
    "sft": ("demonstrations per step", str(sft.batch)),
    "reject": ("demonstrations per step", str(sft.batch)),
    "dpo": ("pairs per step", str(cfg.dpo.batch)),
    "grpo": ("rollouts per step", f"{cfg.rollout.prompts} questions x {cfg.rollout.group}"),
  }
  about = About(
    title=f"{titles[name]} on {SOURCE_NAMES[cfg.source.kind]}",
    summary=f"A Qwen-VL policy {learns[name]}{thinks if draws else ''}".strip(),
    facts=(
      ("policy", f"{parameters:,} parameters"),
      batches[name],
      ("seed", str(cfg.seed)),
    ),
  )
  print(f"wrote {write_report(workdir, about, card, cfg.learn.saved_groups)}")
