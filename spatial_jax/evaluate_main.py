"""One evaluation from config to report: what `python -m spatial_jax.evaluate` does."""

import contextlib
import dataclasses
import pathlib
import shlex
import sys
from typing import Any

import jax

from spatial_jax import checkpoint as checkpoint_lib
from spatial_jax import compiled, sharding
from spatial_jax.config import build
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.prompt_text import TextConfig
from spatial_jax.data.source import SourceConfig, make_source
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from spatial_jax.errors import CheckpointError
from spatial_jax.evaluate import evaluator as evaluator_lib
from spatial_jax.evaluate.behaviour import behaviour
from spatial_jax.evaluate.benchmarks.summary import heading
from spatial_jax.evaluate.comparison import END_GREEDY, PredictionSet
from spatial_jax.evaluate.console import make_console, show_behaviour
from spatial_jax.evaluate.evaluator import EvaluationConfig
from spatial_jax.report.report import About, write_report
from spatial_jax.reward.compose import RewardConfig
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.memory import bytes_of
from spatial_jax.rollout.saved_groups import save_groups
from spatial_jax.sharding import MeshConfig
from spatial_jax.stages.context import make_engine
from spatial_jax.stages.load import Loaded, load_policy

# Keys of a training config that an evaluation has no use for.
TRAINING_ONLY = ("stage", "remat", "loop", "learn", "lora")


@dataclasses.dataclass(frozen=True)
class EvaluateRun:
  """Everything an evaluation config says; see `configs/common.py`.

  Attributes:
    seed: of sampling.
    init: the policy to compare with, as for --checkpoint; "" for none.
    mesh, source, text, preprocess, rollout, style, executor: as in training.
    reward: what is rewarded.
    evaluation: how much is asked.
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
  """From checkpoint to report.

  Raises:
    UserError: on the host or I/O, before any result is written, for what the user has to mend.
  """
  cfg = build(EvaluateRun, settings)
  mesh = sharding.make_mesh(cfg.mesh, jax.devices())
  after = load_policy(checkpoint, mesh)
  before = _other(cfg.init, checkpoint, after, mesh)
  source = make_source(cfg.source)
  checkpoint_lib.bind_workdir(workdir, settings | {"checkpoint": checkpoint}, ())
  unstack = compiled.decode_params(after.policy, mesh, cfg.rollout.weights)
  conversation = Conversation(after.tokenizer, cfg.text, cfg.preprocess, after.policy.cfg)
  console = make_console()
  with contextlib.ExitStack() as stack:
    executor = stack.enter_context(Executor(cfg.executor, cfg.style))
    asked = [loaded.params for loaded in (before, after) if loaded is not None]
    weights = [unstack(params) for params in asked]
    resident, slots = bytes_of(asked, weights[1:]), "config.evaluation.slots"
    contest = evaluator_lib.make_evaluator(
      lambda rollout: make_engine(after.policy, conversation, executor, rollout, resident, slots),
      cfg.rollout,
      evaluator_lib.load_questions(source, cfg.evaluation, cfg.seed),
      cfg.reward,
      cfg.evaluation,
      cfg.seed,
      weights[0] if before else None,
      weights[-1],
    )
    command = shlex.join(["python", "-m", "spatial_jax.evaluate", *sys.argv[1:]])
    origin = {"command": command, "seed": cfg.seed, "checkpoint": checkpoint, "config": settings}
    found = evaluator_lib.hold(contest, workdir, after.benchmark, origin, console)
    save_groups(evaluator_lib.gallery(contest, found), workdir)
  above = heading(contest.evaluation_set.tasks, after.benchmark)
  show_behaviour(evaluator_lib.behaviours(found), console)
  report = write_report(
    workdir, _about(checkpoint, cfg, above, found), None, cfg.evaluation.gallery
  )
  console.print(f"wrote {report}")


def _other(init: str, checkpoint: str, after: Loaded, mesh: jax.sharding.Mesh) -> Loaded | None:
  """The policy to compare with, None where there is none or it is the same."""
  if not init or pathlib.Path(init).resolve() == pathlib.Path(checkpoint).resolve():
    return None
  before = load_policy(init, mesh)
  if before.policy.cfg != after.policy.cfg:
    raise CheckpointError(
      f"config.init {init} and --checkpoint {checkpoint} are policies of different shape; "
      "set --config.init='' to ask the second alone"
    )
  return before


def _about(
  checkpoint: str, cfg: EvaluateRun, above: str | None, found: list[PredictionSet]
) -> About:
  asked = {a.task_id for a in found[0].answers}
  statistics = behaviour(next(s.answers for s in found if s.column.key == END_GREEDY))
  return About(
    title=f"{checkpoint} on {cfg.source.kind}",
    summary=f"{len(asked)} questions that training never saw. {above or ''}".strip(),
    facts=(
      ("compared with", cfg.init or "nothing"),
      (
        f"{cfg.text.response_prefix_fraction:.0%} of the numbers had to begin",
        cfg.text.response_prefix,
      ),
      ("answers that can be read", f"{statistics['parsed_share']:.0%}"),
      ("answers with a drawing", f"{statistics['drawing_share']:.0%}"),
      ("drawings without a mistake", f"{statistics['executable_share']:.0%}"),
    ),
  )
