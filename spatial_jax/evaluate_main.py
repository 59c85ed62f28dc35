"""`python -m spatial_jax.evaluate`: one evaluation from config to report."""

import dataclasses
import pathlib
import shlex
import sys
from typing import Any

import jax

from spatial_jax import sharding
from spatial_jax.config import build
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.prompt_text import TextConfig
from spatial_jax.data.source import SourceConfig, make_source
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.executor import ExecutorConfig
from spatial_jax.errors import CheckpointError
from spatial_jax.evaluate import evaluator as evaluator_lib
from spatial_jax.evaluate.behaviour import behaviour
from spatial_jax.evaluate.benchmarks.summary import heading
from spatial_jax.evaluate.comparison import PredictionSet
from spatial_jax.evaluate.console import make_console, show_behaviour
from spatial_jax.evaluate.evaluator import EvaluationConfig, PolicyPair
from spatial_jax.evaluate.results import END_GREEDY
from spatial_jax.report.report import About, write_report
from spatial_jax.reward.compose import RewardConfig
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.memory import bytes_of
from spatial_jax.rollout.saved_groups import save_groups
from spatial_jax.sharding import MeshConfig
from spatial_jax.stages.context import open_context
from spatial_jax.stages.load import Loaded, check_normalisation, load_policy
from spatial_jax.workdir import bind_workdir, find_path, lock_workdir

# Keys of a training config that an evaluation does not use.
TRAINING_ONLY = ("stages", "remat", "loop", "learn", "lora")


@dataclasses.dataclass(frozen=True)
class EvaluateRun:
  """The config of an evaluation; see `configs/common.py`.

  Attributes:
    seed: of sampling.
    init: policy to compare with, as --checkpoint; "" for none.
    mesh, source, text, preprocess, rollout, style, executor: as in training.
    reward: how answers are scored.
    evaluation: the size of the evaluation.
  """

  seed: int
  init: str
  mesh: MeshConfig
  source: SourceConfig
  text: TextConfig
  preprocess: PreprocessConfig
  rollout: RolloutConfig
  style: Style
  executor: ExecutorConfig
  reward: RewardConfig
  evaluation: EvaluationConfig


def settings_of(settings: dict[str, Any]) -> dict[str, Any]:
  """The keys of `EvaluateRun`, from a config of its own or one of training."""
  if "learn" in settings:
    reward = settings["learn"]["reward"]
    kept = {name: value for name, value in settings.items() if name not in TRAINING_ONLY}
    return kept | {"reward": reward}
  return settings


def evaluate(settings: dict[str, Any], checkpoint: str, workdir: pathlib.Path) -> None:
  """Evaluates a policy: results.json, predictions.jsonl, saved rollouts, report.html.

  Raises:
    UserError: if config, policy or work directory cannot be used; nothing was written.
  """
  cfg = build(EvaluateRun, settings)
  mesh = sharding.make_mesh(cfg.mesh, jax.devices())
  for path in (checkpoint, cfg.init) if cfg.init else (checkpoint,):
    check_normalisation(cfg.preprocess, path)
  end = load_policy(checkpoint, mesh)
  start = _start(cfg.init, checkpoint, end, mesh)
  source = make_source(cfg.source)
  lock_workdir(workdir)
  bind_workdir(workdir, settings | {"checkpoint": checkpoint}, ())
  console = make_console()
  command = shlex.join(["python", "-m", "spatial_jax.evaluate", *sys.argv[1:]])
  fingerprint = {"command": command, "seed": cfg.seed, "checkpoint": checkpoint, "config": settings}
  with open_context(
    end.policy,
    end.tokenizer,
    cfg.text,
    cfg.preprocess,
    cfg.style,
    cfg.executor,
    cfg.rollout.weights,
    end.benchmark,
  ) as context:
    policies = PolicyPair(
      None if start is None else context.decode_params(start.params),
      context.decode_params(end.params),
    )
    del start
    resident = bytes_of(end.params, policies.start or {})
    evaluator = evaluator_lib.make_evaluator(
      lambda rollout: context.engine(rollout, resident, "config.evaluation.slots"),
      cfg.rollout,
      evaluator_lib.load_questions(source, cfg.evaluation, cfg.seed),
      cfg.reward,
      cfg.evaluation,
      cfg.seed,
      policies,
    )
    found = evaluator_lib.run_evaluation(evaluator, workdir, end.benchmark, fingerprint, console)
    save_groups(evaluator_lib.gallery(evaluator, found), workdir)
  above = heading(evaluator.evaluation_set.tasks, end.benchmark)
  show_behaviour(evaluator_lib.behaviours(found), console)
  about = _about(checkpoint, cfg, above, found)
  console.print(f"wrote {write_report(workdir, about, None, cfg.evaluation.gallery)}")


def _start(init: str, checkpoint: str, end: Loaded, mesh: jax.sharding.Mesh) -> Loaded | None:
  """The policy to compare with; None if there is none or it is the same one."""
  if not init or find_path(init).resolve() == find_path(checkpoint).resolve():
    return None
  start = load_policy(init, mesh)
  if start.policy.cfg != end.policy.cfg:
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
  facts = [("compared with", cfg.init or "nothing")]
  if cfg.text.response_prefix_fraction:
    share = f"{cfg.text.response_prefix_fraction:.0%} of numeric answers start with"
    facts.append((share, cfg.text.response_prefix))
  return About(
    title=f"{checkpoint} on {cfg.source.kind}",
    summary=f"{len(questions)} questions that training never used. {above or ''}".strip(),
    facts=(
      *facts,
      ("answers parsed", f"{statistics['parsed_share']:.0%}"),
      ("answers with a drawing", f"{statistics['drawing_share']:.0%}"),
      ("drawings without an error", f"{statistics['executable_share']:.0%}"),
    ),
  )
