"""Entry point: python -m spatial_jax.train --config=configs/NAME.py --workdir=DIR [--config.KEY=V]

  tasks ─► prompts ─► rollouts ─► scores ─► advantages ─► batch ─► update    stages/grpo.py

Writes DIR/metrics.jsonl, DIR/checkpoints/, DIR/config.json, DIR/results.json and DIR/report.html.
Running the same command again goes on where it stopped.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from spatial_jax import checkpoint, compiled, rng, sharding
from spatial_jax.cli import CONFIG_HELP, enable_compilation_cache, launch, no_arguments
from spatial_jax.config import ConfigError, build
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.pipeline import ahead
from spatial_jax.data.prompt_text import TextConfig
from spatial_jax.data.source import SourceConfig, make_source
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from spatial_jax.evaluate.console import make_console
from spatial_jax.evaluate.evaluator import (
  EvaluationConfig,
  Questions,
  evaluation_rollout_config,
  hold,
  load_questions,
  make_evaluator,
)
from spatial_jax.evaluate.results import is_up_to_date
from spatial_jax.learn.optimizer import check_steps, make_optimizer
from spatial_jax.policy import lora, param_tree
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.report.plots import RewardCard
from spatial_jax.report.report import About, write_report
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import Conversation, check_preprocess
from spatial_jax.rollout.memory import bytes_of, check
from spatial_jax.sharding import MeshConfig
from spatial_jax.stages import loop
from spatial_jax.stages.context import make_engine, planned
from spatial_jax.stages.grpo import GrpoConfig, Learner, batch_config
from spatial_jax.stages.load import MODEL_KEY, Loaded, load_policy, read_shape, record
from spatial_jax.stages.loop import LoopConfig
from spatial_jax.types import Params

CONFIG = config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
WORKDIR = flags.DEFINE_string(
  "workdir", None, "folder that the run is written to; one that exists is resumed", required=True
)

# What a resumed run may change: how long (which moves its schedules), how often, where to, and how
# far the update pads, which rounds otherwise; nothing else that a step computes.
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

# Kinds of sources, as the report's title names them.
ROOMS = {"procedural": "procedural rooms", "rooms": "real rooms", "photos": "photographs"}


@dataclasses.dataclass(frozen=True)
class GrpoRun:
  """Everything a reinforcement-learning config says; see `configs/common.py`.

  Attributes:
    seed: of sampling and data.
    init: where the policy starts: a Hugging Face folder or the work directory of a run.
    remat: recompute layers in the backward pass: less memory; more time on an accelerator.
    lora: kernels with adapters, which then are all that learns.
  """

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
    check_steps(learn.optimizer, self.loop.steps)
    if self.lora.paths and learn.optimizer.gains:
      raise ConfigError("config.learn.optimizer.gains must be () where config.lora has paths")
    if learn.micro.lengths[-1] <= rollout.stop.max_response_tokens:
      raise ConfigError(
        f"config.learn.micro.lengths ends at {learn.micro.lengths[-1]}: it must hold a response "
        "and one token before it, config.rollout.stop.max_response_tokens "
        f"{rollout.stop.max_response_tokens} + 1"
      )
    if learn.prefix_buckets[-1] < rollout.prompt_buckets[-1]:
      raise ConfigError(
        f"config.learn.prefix_buckets ends at {learn.prefix_buckets[-1]}: it must hold the longest "
        f"prompt, config.rollout.prompt_buckets {rollout.prompt_buckets[-1]}"
      )
    seen = dataclasses.asdict(rollout.vision)
    for name, sizes in dataclasses.asdict(learn.vision).items():
      if sizes[-1] < seen[name][-1]:
        raise ConfigError(
          f"config.learn.vision.{name} ends at {sizes[-1]}: it must hold what rollouts may see, "
          f"config.rollout.vision.{name} {seen[name][-1]}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyPair:
  """The policy at the start and at the end of training, and what both are asked, once."""

  policy: Policy
  questions: Callable[[], Questions] | None
  before: Params
  after: Params
  benchmark: str | None


def main(arguments: Sequence[str]) -> None:
  """Runs the stage that the config names."""
  no_arguments(arguments)
  run(CONFIG.value, pathlib.Path(WORKDIR.value))


def run(config: Any, workdir: pathlib.Path) -> None:
  """Checks the config, claims the work directory and runs the stage."""
  enable_compilation_cache()
  if config.stage != "grpo":
    raise ConfigError(f"config.stage must be grpo, got {config.stage!r}")
  settings = {key: value for key, value in config.items() if key != "stage"}
  resolved = json.loads(config.to_json_best_effort())
  grpo_run = build(GrpoRun, settings)
  mesh = sharding.make_mesh(grpo_run.mesh, jax.devices())
  shape = read_shape(grpo_run.init)
  check_preprocess(grpo_run.preprocess, shape, "config.preprocess")
  lora.kernels(grpo_run.lora, make_policy(shape, jax.numpy.float32).kernel_paths)
  loaded = load_policy(grpo_run.init, mesh)  # from here on there is something on the devices
  resolved |= {MODEL_KEY: record(loaded.policy.cfg)}
  checkpoint.bind_workdir(workdir, resolved, MAY_DIFFER)
  loaded.tokenizer.inner.save(str(workdir / "tokenizer.json"))
  grpo(grpo_run, loaded, mesh, workdir, resolved)


def grpo(
  cfg: GrpoRun, loaded: Loaded, mesh: jax.sharding.Mesh, workdir: pathlib.Path, resolved: dict
) -> None:
  """Reinforcement learning from start to report."""
  frozen = lora.frozen_paths(cfg.lora, cfg.learn.optimizer.frozen)
  policy = dataclasses.replace(loaded.policy, remat=cfg.remat, frozen=frozen, lora=cfg.lora)
  source = make_source(cfg.source)
  # Made while the first programs compile, which leaves cores idle.
  asked = is_up_to_date(workdir, fingerprint(cfg))
  questions = None if asked else ahead(lambda: load_questions(source, cfg.evaluation, cfg.seed))
  optimizer = make_optimizer(dataclasses.replace(cfg.learn.optimizer, frozen=frozen))
  conversation = Conversation(loaded.tokenizer, cfg.text, cfg.preprocess, policy.cfg)
  resident = resident_bytes(cfg, policy, optimizer, loaded.params, mesh)
  check_evaluation_memory(cfg, policy, resident, mesh)
  with contextlib.ExitStack() as stack:
    executor = stack.enter_context(Executor(cfg.executor, cfg.style))
    learner = Learner(
      engine=make_engine(
        policy, conversation, executor, cfg.rollout, resident, "config.rollout.slots"
      ),
      programs=compiled.learn_programs(policy, optimizer, cfg.learn.loss, cfg.learn.micro),
      decode_params=compiled.decode_params(policy, mesh, cfg.rollout.weights),
      tasks_of=source.batch,
      count=cfg.rollout.prompts,
      cfg=cfg.learn,
      shapes=compiled.batch_buckets(batch_config(cfg.learn, policy.cfg), mesh),
      steps=cfg.loop.steps,
      seed=cfg.seed,
      reference=reference_of(cfg, loaded.params),
      vision_trainable=policy.vision_trainable,
      workdir=workdir,
    )
    print(planned(policy, learner.engine.cfg, resident))
    state = compiled.init_state(policy, optimizer, start_of(cfg, policy, loaded, mesh), mesh)
    benchmark = source.benchmark or loaded.benchmark
    state = loop.run(workdir, cfg.loop, "grpo", state, learner.step_of, benchmark, resolved)
    before = lora.split(state.params)[0] if cfg.lora.paths else loaded.params
    finish(cfg, learner, PolicyPair(policy, questions, before, state.params, benchmark), workdir)


def resident_bytes(
  cfg: GrpoRun,
  policy: Policy,
  optimizer: optax.GradientTransformation,
  start: Params,
  mesh: jax.sharding.Mesh,
) -> int:
  """Bytes that training keeps on each device while it samples: its state, and where it started."""
  state = compiled.abstract_state(policy, optimizer, mesh)
  return bytes_of(state) if cfg.lora.paths else bytes_of(state, start)


def check_evaluation_memory(
  cfg: GrpoRun, policy: Policy, resident: int, mesh: jax.sharding.Mesh
) -> None:
  """Refuses a run whose exam would not fit, `held` bytes beside it, before it is trained.

  Raises:
    ConfigError: on the host.
  """
  evaluation_set = evaluation_rollout_config(cfg.rollout, cfg.evaluation, compared=True)
  made = planned(policy, compiled.rollout_buckets(evaluation_set, mesh), resident)
  other = made.weights  # start and end are asked, each by its own weights
  check(made._replace(resident=resident + other), "config.evaluation.slots")


def start_of(cfg: GrpoRun, policy: Policy, loaded: Loaded, mesh: jax.sharding.Mesh) -> Params:
  """What the loop may donate: a copy of what was loaded, or that itself with adapters beside."""
  if not cfg.lora.paths:
    return jax.tree.map(jax.numpy.copy, loaded.params)
  fresh = compiled.init_adapters(policy, rng.stream(cfg.seed, "adapters"), mesh)
  return param_tree.merge(loaded.params, fresh)


def reference_of(cfg: GrpoRun, start: Params) -> Callable[[Params], Params] | None:
  """The start, which adapters leave in the policy's own parameters."""
  if not cfg.learn.loss.kl_weight:
    return None
  return (lambda params: params) if cfg.lora.paths else (lambda _: start)


def finish(cfg: GrpoRun, learner: Learner, ends: PolicyPair, workdir: pathlib.Path) -> None:
  """Asks start and end the same held-out questions, once, and writes table and report."""
  console = make_console()
  if ends.questions is None:
    console.print(f"{workdir}/results.json has this evaluation; delete it to evaluate again")
  else:
    evaluation_set(cfg, learner, ends, ends.questions(), workdir, console)
  card = RewardCard(cfg.learn.reward, cfg.learn.advantage, progress=1.0)
  about = About(
    title=f"{'AP-GRPO' if cfg.learn.advantage.alpha else 'GRPO'} on {ROOMS[cfg.source.kind]}",
    summary=(
      "A Qwen-VL policy learns to answer questions about space from its own rollouts: it "
      "thinks, may draw boxes on the picture, looks at the drawing and answers."
    ),
    facts=(
      ("policy", f"{sum(x.size for x in jax.tree.leaves(ends.after)):,} parameters"),
      ("steps", f"{cfg.loop.steps} of {cfg.rollout.prompts} x {cfg.rollout.group} rollouts"),
      ("seed", str(cfg.seed)),
    ),
  )
  console.print(f"wrote {write_report(workdir, about, card, cfg.learn.saved_groups)}")


def fingerprint(cfg: GrpoRun) -> dict[str, Any]:
  """What makes an exam that was held the one that this run would hold."""
  return {
    "seed": cfg.seed,
    "steps": cfg.loop.steps,
    "evaluation": dataclasses.asdict(cfg.evaluation),
  }


def evaluation_set(
  cfg: GrpoRun,
  learner: Learner,
  ends: PolicyPair,
  questions: Questions,
  workdir: pathlib.Path,
  console: Console,
) -> None:
  """Asks start and end the same held-out questions."""
  asked, slots = learner.engine, "config.evaluation.slots"
  weights = [learner.decode_params(params) for params in (ends.before, ends.after)]
  resident = bytes_of(ends.before, ends.after, weights[0])
  contest = make_evaluator(
    lambda rollout: make_engine(
      ends.policy, asked.conversation, asked.executor, rollout, resident, slots
    ),
    cfg.rollout,
    questions,
    cfg.learn.reward,
    cfg.evaluation,
    cfg.seed,
    *weights,
  )
  hold(contest, workdir, ends.benchmark, fingerprint(cfg), console)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  launch(main, "stopped; the same command goes on from the last checkpoint")
