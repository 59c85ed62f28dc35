"""`python -m spatial_jax.evaluate`: one evaluation from config to report."""

import dataclasses
import pathlib
import shlex
import sys
from typing import Any

import jax

from spatial_jax import compiled, sharding
from spatial_jax.config import build
from spatial_jax.data.prompt_form import form_record, read_form
from spatial_jax.data.source import SOURCE_NAMES, SourceConfig
from spatial_jax.errors import CheckpointError
from spatial_jax.evaluate.behaviour import behaviour
from spatial_jax.evaluate.benchmarks.summary import heading
from spatial_jax.evaluate.comparison import PredictionSet
from spatial_jax.evaluate.console import make_console, show_behaviour
from spatial_jax.evaluate.evaluator import (
  EvaluationConfig,
  Evaluator,
  behaviours,
  evaluation_rollout_config,
  load_questions,
  run_evaluation,
)
from spatial_jax.evaluate.results import END_GREEDY
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.report.report import About, write_report
from spatial_jax.report.reward_card import RewardCard
from spatial_jax.reward.config import RewardConfig
from spatial_jax.rollout.engine import Engine
from spatial_jax.stages.context import RunConfig, open_context
from spatial_jax.stages.load import (
  FORM_KEY,
  PolicyFiles,
  check_normalisation,
  load_to_sample,
  read_policy,
  read_source,
)
from spatial_jax.workdir import bind_workdir, find_path, lock_workdir


@dataclasses.dataclass(frozen=True)
class EvaluateRun(RunConfig):
  """The config of an evaluation; see `configs/common.py`."""

  init: str  # policy to compare with, as --checkpoint; "" for none
  source: SourceConfig
  reward: RewardConfig
  evaluation: EvaluationConfig


def evaluate(settings: dict[str, Any], checkpoint: str, workdir: pathlib.Path) -> None:
  """Evaluates a policy: results.json, predictions.jsonl, saved rollouts, report.html.

  Raises:
    UserError: if config, policy or work directory cannot be used; nothing was written.
  """
  cfg = build(EvaluateRun, settings)
  form = read_form(cfg.text)
  settings = settings | {FORM_KEY: form_record(form)}
  sharding.refuse_several_processes()
  mesh = sharding.make_mesh(cfg.mesh, jax.devices())
  end = read_policy(checkpoint)
  start = _start(cfg.init, checkpoint, end)
  for files in (end, start or end):
    check_normalisation(cfg.preprocess, files)
  source = read_source(cfg.source)
  policy = make_policy(end.cfg, compiled.compute_dtype(mesh), mesh)
  with open_context(policy, end, form, cfg, end.benchmark) as context:

    def make_engine(tasks: int) -> Engine:
      has_start = start is not None
      shapes = evaluation_rollout_config(cfg.rollout, cfg.evaluation, tasks, has_start)
      return context.evaluation_engine(shapes, has_start)

    make_engine(cfg.evaluation.tasks)  # refuses what does not fit
    lock_workdir(workdir)
    questions = load_questions(source, cfg.evaluation, cfg.reward, cfg.seed)
    before = context.decode_params(load_to_sample(start, mesh)) if start else None
    after = context.decode_params(load_to_sample(end, mesh))
    bind_workdir(workdir, settings | {"checkpoint": checkpoint}, ())
    engine = make_engine(len(questions.tasks))
    console = make_console()
    command = shlex.join(["python", "-m", "spatial_jax.evaluate", *sys.argv[1:]])
    fingerprint = {"command": command, "seed": cfg.seed, "checkpoint": checkpoint}
    evaluator = Evaluator(engine, before, after, questions, cfg.evaluation, cfg.pipeline)
    found = run_evaluation(
      evaluator, workdir, end.benchmark, fingerprint | {"config": settings}, console
    )
  above = heading(questions.tasks, end.benchmark)
  show_behaviour(behaviours(found), console)
  about = _about(checkpoint, cfg, above, found)
  card = RewardCard(cfg.reward.for_evaluation(), advantage=None)
  console.print(f"wrote {write_report(workdir, about, card, cfg.evaluation.gallery)}")


def _start(init: str, checkpoint: str, end: PolicyFiles) -> PolicyFiles | None:
  """The policy to compare with; None if there is none or it is the same one."""
  if not init or find_path(init).resolve() == find_path(checkpoint).resolve():
    return None
  start = read_policy(init)
  if start.cfg != end.cfg:
    raise CheckpointError(
      f"config.init {init} and --checkpoint {checkpoint} have different shapes; "
      "set --config.init='' to evaluate the checkpoint alone"
    )
  return start


def _about(
  checkpoint: str, cfg: EvaluateRun, above: str | None, found: list[PredictionSet]
) -> About:
  questions = {prediction.task_id for prediction in found[0].predictions}
  statistics = behaviour(next(s.predictions for s in found if s.column.key == END_GREEDY))
  return About(
    title=f"{checkpoint} on {cfg.source.path or SOURCE_NAMES[cfg.source.kind]}",
    summary=f"{len(questions)} held-out questions. {above or ''}".strip(),
    facts=(
      ("compared with", cfg.init or "nothing"),
      ("answers parsed", f"{statistics['parsed_share']:.0%}"),
      ("answers with a drawing", f"{statistics['drawing_share']:.0%}"),
      ("drawings without an error", f"{statistics['executable_share']:.0%}"),
    ),
  )
