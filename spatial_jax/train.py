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
from typing import Any

import jax
import optax
from absl import flags
from ml_collections import config_flags

from spatial_jax import checkpoint, compiled, sharding
from spatial_jax.cli import CONFIG_HELP, enable_compilation_cache, launch, no_arguments
from spatial_jax.config import ConfigError
from spatial_jax.data.background import compute_async
from spatial_jax.data.files import FileSource
from spatial_jax.data.prompt_form import form_record
from spatial_jax.data.source import Source, prompt_stream, refill_prompts
from spatial_jax.errors import UserError
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
from spatial_jax.machines import MACHINES, devices_of, this_machine
from spatial_jax.prepare import description, prepare, settings_as_json
from spatial_jax.report.report import About, write_report
from spatial_jax.report.reward_card import RewardCard
from spatial_jax.rollout import memory
from spatial_jax.rollout.encode import PromptEncoder
from spatial_jax.stages import loop
from spatial_jax.stages.context import (
  RunContext,
  open_context,
)
from spatial_jax.stages.grpo import GrpoStage, update_config
from spatial_jax.stages.health import BlindCheck, Health
from spatial_jax.stages.load import (
  DATA_KEY,
  FORM_KEY,
  MODEL_KEY,
  PolicyFiles,
  load_to_sample,
  read_policy,
  record,
  store_conversation_files,
)
from spatial_jax.stages.reference import MovingAverage, StartCopy, StartWithAdapters
from spatial_jax.stages.sampling import Sampler
from spatial_jax.stages.start import start_of
from spatial_jax.stages.updates import Reference, Updater
from spatial_jax.train_config import (
  MAY_DIFFER,
  TrainConfig,
  TrainingParts,
  has_start_copy,
  resident_bytes,
  whole_plan,
)
from spatial_jax.types import Params
from spatial_jax.workdir import bind_workdir, lock_workdir, to_path

# Kinds of sources, as the title of the report names them.
SOURCES = {
  "procedural": "procedural rooms",
  "rooms": "real rooms",
  "photos": "photographs",
  "files": "your data",
}


def main(arguments: Sequence[str]) -> None:
  """Trains, evaluates and writes the report."""
  no_arguments(arguments)
  if DRY_RUN.value:
    dry_run(CONFIG.value, DEVICES.value)
    return
  if WORKDIR.value is None:
    raise UserError(f"--workdir is missing: {flags.FLAGS['workdir'].help}")
  enable_compilation_cache()
  run(CONFIG.value, to_path(WORKDIR.value))


def dry_run(config: Any, machine: str) -> None:
  """Prints stages, prompts, memory and programs of a run; needs no weights and allocates nothing.

  Raises:
    UserError: if the run would be refused, or does not fit.
  """
  if machine:
    jax.config.update("jax_platforms", "cpu")  # shapes alone; nothing runs
  ready = prepare(settings_as_json(config), None, devices_of(machine), needs_weights=False)
  print(description(ready))
  memory.check(ready.plan, "config.rollout.slots")
  print("fits")


def run(config: Any, workdir: pathlib.Path) -> None:
  """Checks everything, then trains, evaluates and writes the report; an existing run is resumed.

  Raises:
    UserError: if config (a ConfigDict), policy or work directory cannot be used; the work directory
      is then not bound to the config.
  """
  sharding.refuse_several_processes()
  ready = prepare(settings_as_json(config), workdir, this_machine(), needs_weights=True)
  cfg, form, parts = ready.cfg, ready.form, ready.parts
  files, source = ready.files, ready.source
  assert files is not None  # both are needed with weights
  assert source is not None
  source.batch(cfg.seed, 0, 1)  # refuses a source without training tasks
  check_held_out(cfg, source)
  trained_on = source.benchmark or files.benchmark
  with open_context(parts.policy, files, form, cfg, trained_on) as context:
    stage = make_stage(cfg, context, parts, source, workdir)
    check_evaluation(cfg, context)
    lock_workdir(workdir)
    recorded: dict[str, Any] = {MODEL_KEY: record(files.cfg), FORM_KEY: form_record(form)}
    if isinstance(source, FileSource):
      recorded[DATA_KEY] = source.contents
    resolved = json.loads(json.dumps(ready.settings | recorded))  # tuples are lists
    questions = None
    if cfg.evaluation.tasks and not is_up_to_date(workdir, fingerprint(cfg)):
      # Rendered while the first programs compile.
      make = functools.partial(load_questions, source, cfg.evaluation, cfg.learn.reward, cfg.seed)
      questions = compute_async(make)
    end, size = train(cfg, context, stage, parts.optimizer, files, source, resolved)
    if questions is not None:
      evaluate(cfg, context, end, questions(), workdir)
    elif cfg.evaluation.tasks:
      print(f"{workdir}/results.json has this evaluation; delete it to evaluate again")
  report(cfg, size, form.grammar.draws, workdir)


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
  learn, encode = cfg.learn, PromptEncoder(context.conversation, engine.cfg)
  programs = compiled.LearnPrograms(
    parts.policy, parts.optimizer, learn.loss, learn.micro, learn.reward.attention
  )
  sampler = Sampler(
    engine=engine,
    decode_params=context.decode_params,
    keep_features=not context.policy.vision_trainable,
    reward=learn.reward,
    shapes=parts.shapes,
    seed=cfg.seed,
    max_refills=learn.max_refills,
    refill=lambda step, attempt, count: refill_prompts(
      source, encode, cfg.seed, step, attempt, count
    ),
    place=programs.place,
    attention=programs.attention,
  )
  blind = BlindCheck(
    learn.health, parts.shapes, programs.local_row_shards, programs.place, programs.policy_logprobs
  )
  return GrpoStage(
    sampler=sampler,
    updater=Updater(programs, update_config(learn), parts.shapes, cfg.seed, None),
    prompt_stream=lambda first: prompt_stream(
      source, encode, cfg.seed, first, cfg.rollout.prompts, cfg.pipeline
    ),
    cfg=learn,
    steps=cfg.loop.steps,
    workdir=workdir,
    blind=blind if learn.health.blind_every else None,
  )


def reference_of(
  cfg: TrainConfig, context: RunContext, start: StartCopy | None
) -> Reference | None:
  """The reference of the KL term; `start` is a copy of the start, if one is needed."""
  kl = cfg.learn.loss.kl
  if not kl.weight:
    return None
  if kl.reference == "average":
    return MovingAverage(context.policy.frozen)
  return StartWithAdapters() if start is None else start


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
  state, copy = start_of(context.policy, optimizer, files, cfg.seed, place, resumes)
  reference = reference_of(cfg, context, copy)
  stage = dataclasses.replace(
    stage, updater=dataclasses.replace(stage.updater, reference=reference)
  )
  if replicated := sharding.replication_report(state.params, context.mesh):
    print(replicated)
  bind_workdir(workdir, resolved, MAY_DIFFER)
  store_conversation_files(files, workdir)
  evaluate_state = progress_evaluation(
    stage.sampler.engine,
    context.decode_params,
    source.held_out(cfg.evaluation.progress_tasks) if cfg.loop.evaluate_every else [],
    cfg.learn.reward,
    cfg.seed,
    cfg.pipeline,
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
    Health(cfg.learn.health, workdir).monitor,
  )
  size = sum(x.size for x in jax.tree.leaves(state.params))
  return context.decode_params(state.params), size


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


def report(cfg: TrainConfig, parameters: int, draws: bool, workdir: pathlib.Path) -> None:
  """Writes report.html; `parameters` is their number, `draws` whether the prompt form draws."""
  card = RewardCard(cfg.learn.reward, cfg.learn.advantage)
  about = About(
    title=f"{'AP-GRPO' if cfg.learn.advantage.alpha else 'GRPO'} on {SOURCES[cfg.source.kind]}",
    summary=(
      "A Qwen-VL policy learns to answer questions about space from its own rollouts. "
      + (
        "It thinks, may draw boxes on the image, looks at the drawing and answers." if draws else ""
      )
    ).strip(),
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
    "workdir", None, "folder that the run is written to; an existing run is resumed"
  )
  DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "print stages, tokens, memory and programs, without weights, and exit"
  )
  DEVICES = flags.DEFINE_string(
    "devices", "", f"of --dry_run: {', '.join(MACHINES)}; default: this machine"
  )
  flags.mark_flag_as_required("config")
  launch(main, "stopped; the same command goes on from the last checkpoint")
