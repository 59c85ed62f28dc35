"""What a run would do, without weights: stages, tokens, memory and programs of each."""

from typing import NamedTuple

from spatial_jax import compiled
from spatial_jax.data.files import FileSource
from spatial_jax.hf.model_zoo import parameter_count
from spatial_jax.prepare import Prepared, for_stage
from spatial_jax.rollout.memory import MemoryPlan
from spatial_jax.stages.context import plan
from spatial_jax.stages.demonstrations import DemonstrationSizes, DemonstrationTraining
from spatial_jax.supervised import Fitted, fit
from spatial_jax.train_config import StageName, TrainConfig, resident_bytes

# Demonstrations without data: a third of the longest response, and an answer alone.
_ASSUMED_SHARE, _ASSUMED_ANSWER = 3, 64


class StageDescription(NamedTuple):
  """One stage of a dry run."""

  lines: list[str]
  plan: MemoryPlan
  key: str  # to lower if it does not fit


def describe(ready: Prepared) -> list[StageDescription]:
  """The stages of a run; nothing is allocated, and no weights are needed."""
  return [_stage(ready, name) for name in ready.cfg.stages]


def head(ready: Prepared) -> list[str]:
  """Policy, data and tokens of a run."""
  rollout = ready.cfg.rollout
  data = ready.settings["source"]["kind"]
  if ready.source is None:
    data = f"no data: prompts of {rollout.prompt_buckets[-1]:,} tokens are assumed"
  elif isinstance(ready.source, FileSource):
    data = f"{ready.source.train_count:,} training tasks, {ready.source.bad_rows} rows left out"
  trained = "adapters" if ready.cfg.lora.paths else "the parameters that are not frozen"
  return [
    f"stages: {', '.join(ready.cfg.stages)}; trains {trained}",
    f"policy: {_size(parameter_count(ready.shape))} parameters, {ready.shape.family}",
    f"data: {data}",
    f"tokens: prompts up to {rollout.prompt_buckets[-1]:,}, responses up to "
    f"{rollout.stop.max_response_tokens:,}; {rollout.prompts} prompts x {rollout.group} rollouts",
  ]


def _size(count: int) -> str:
  return f"{count / 1e9:,.2f} B" if count >= 1e8 else f"{count / 1e6:,.2f} M"


def _stage(ready: Prepared, name: StageName) -> StageDescription:
  one = for_stage(ready, name)
  cfg = one.cfg
  if name == "grpo":
    each = "1 update" if cfg.learn.updates == 1 else f"{cfg.learn.updates} updates"
    lines = [f"grpo: {cfg.loop.steps:,} steps of {each}", str(ready.plan)]
    return StageDescription([*lines, _programs(cfg)], ready.plan, "config.rollout.slots")
  trained, fitted = training_of(cfg, name), fit_to_prompts(one, name)
  data = ("pairs" if name == "dpo" else "demonstrations") + _data_of(cfg, name)
  rows = ", ".join(map(str, fitted.shapes.rows))
  lines = [
    f"{name}: {trained.steps:,} steps of {trained.batch} {data}; {fitted.description}",
    f"programs: update {len(fitted.shapes.rows) * len(fitted.shapes.vision.windows)} (rows {rows})",
  ]
  return StageDescription(lines, fitted.plan, "the rows of a microbatch (micro_rows)")


def training_of(cfg: TrainConfig, name: StageName) -> DemonstrationTraining:
  """The config of the updates of a supervised stage."""
  return {"sft": cfg.sft, "reject": cfg.reject.train, "dpo": cfg.dpo}[name]


def fit_to_prompts(ready: Prepared, name: StageName) -> Fitted:
  """Shapes of a supervised stage for demonstrations about the largest prompts.

  Args:
    ready: of `for_stage`.
  """
  cfg, parts = ready.cfg, ready.parts
  shapes = compiled.rollout_buckets(cfg.rollout, compiled.train_mesh(parts.policy))
  resident = resident_bytes(cfg, parts.policy, parts.optimizer)
  rollouts = plan(parts.policy, shapes, resident, ready.plan.device)
  each = 2 if name == "dpo" else 1
  return fit(training_of(cfg, name), _assumed(cfg, name), each, parts, rollouts)


def _data_of(cfg: TrainConfig, name: StageName) -> str:
  """Where the data of a stage comes from, if that is not config.source."""
  sampled = {"reject": cfg.reject.tasks, "dpo": cfg.dpo.sampled_tasks}.get(name)
  path = {"sft": cfg.sft.path, "reject": cfg.reject.path, "dpo": cfg.dpo.path}[name]
  if path:
    return f" of {path}"
  if name == "reject" or (name == "dpo" and cfg.dpo.pairs == "samples"):
    return f", after sampling {sampled:,} tasks"
  return ""


def _assumed(cfg: TrainConfig, name: StageName) -> DemonstrationSizes:
  """Demonstrations about the largest prompts: they are measured when the run starts."""
  response = cfg.rollout.stop.max_response_tokens // _ASSUMED_SHARE
  prompt = cfg.rollout.prompt_buckets[-1]
  vision = cfg.rollout.vision
  return DemonstrationSizes(
    tokens=(prompt + (_ASSUMED_ANSWER if name == "dpo" else response),),
    windows=(vision.windows[-1],),
    frames=(vision.frames[-1],),
    patches=vision.patches[-1],
  )


def _programs(cfg: TrainConfig) -> str:
  rollout, learn = cfg.rollout, cfg.learn
  return (
    f"programs: encode_images {len(rollout.vision.windows)}, prefill "
    f"{len(rollout.prefill) * len(rollout.prompt_buckets)}, decode "
    f"{len(rollout.decode_row_counts)}, append "
    f"{len(rollout.append) * len(rollout.observation_buckets)}, update "
    f"{len(learn.prefix_buckets) * len(learn.vision.windows)}"
  )
