"""What every stage and entry point needs, built once from a config and a policy."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from spatial_jax import compiled, sharding
from spatial_jax.checks import MAX_SEED
from spatial_jax.config import ConfigError, check_whole
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.pipeline import PipelineConfig
from spatial_jax.data.prompt_form import PromptForm
from spatial_jax.data.video import VideoConfig
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from spatial_jax.learn.train_batch import BatchConfig, Microbatches
from spatial_jax.policy import lora, param_tree
from spatial_jax.policy.cache import rollout_shardings
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout import memory
from spatial_jax.rollout.config import RolloutConfig, WeightForm
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.engine import Engine, forbidden_ids, stop_ids
from spatial_jax.rollout.memory import MIB, MemoryPlan
from spatial_jax.sharding import MeshConfig
from spatial_jax.stages.load import PolicyFiles
from spatial_jax.types import Params

# Top-level keys that some entry points read and others do not; training records "model", "form".
_OPTIONAL_KEYS = {
  "stages", "max_parameters", "init", "remat", "lora", "loop", "source", "learn", "reward",
  "sft", "reject", "dpo", "conditions",
  "evaluation",
  "model", "form",
  "frozen_dtype",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """The keys that training, evaluation and chat share; see `configs/common.py`."""

  seed: int  # of sampling and data
  mesh: MeshConfig
  text: str  # prompt form: the name of a shipped one or a TOML file, see `data.prompt_form`
  preprocess: PreprocessConfig  # of images
  video: VideoConfig
  rollout: RolloutConfig
  style: Style
  executor: ExecutorConfig
  pipeline: PipelineConfig

  def __post_init__(self):
    check_whole(self, "seed", at_least=0, at_most=MAX_SEED)


def settings_of(cls: type[RunConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
  """The settings of one entry point from those of any; its `reward` may come from `learn.reward`.

  Keys that no entry point reads stay, so that `config.build` names them.
  """
  names = {field.name for field in dataclasses.fields(cls)}
  found = {k: v for k, v in settings.items() if k in names or k not in _OPTIONAL_KEYS}
  if "reward" in names and "learn" in settings:
    found["reward"] = settings["learn"]["reward"]
  return found


@dataclasses.dataclass(frozen=True, eq=False)
class RunContext:
  """Policy, conversation, drawing workers and the resharding of weights; shared by all stages."""

  policy: Policy  # on the train mesh; with frozen paths and adapters
  conversation: Conversation
  executor: Executor
  decode_params: Callable[[Params], Params]  # train parameters -> rollout mesh; jitted once
  trained_on: str | None  # benchmark whose rooms the policy was trained on ("vsi-bench")
  stop_tokens: tuple[str, ...]  # of the policy, for a config that names none

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """The train mesh."""
    return compiled.train_mesh(self.policy)

  def engine(self, cfg: RolloutConfig, resident: int, slots_key: str) -> Engine:
    """A rollout engine whose caches fit the devices; arguments as in `make_engine`."""
    if not cfg.stop_tokens:
      cfg = dataclasses.replace(cfg, stop_tokens=self.stop_tokens)
    return make_engine(self.policy, self.conversation, self.executor, cfg, resident, slots_key)

  def evaluation_engine(
    self, cfg: RolloutConfig, has_start: bool, slots_key: str = "config.evaluation.slots"
  ) -> Engine:
    """An engine for one policy, or two if `has_start`, that are not trained.

    Policies are loaded one after the other, in the compute dtype; only their decode parameters
    stay.

    Raises:
      ConfigError: as in `make_engine`, or if the policies do not fit while they are loaded.
    """
    rollouts = plan(self.policy, compiled.rollout_buckets(cfg, self.mesh), 0)
    loading = loading_bytes(self.policy) + rollouts.weights * (1 + has_start)
    if loading > rollouts.device:
      raise ConfigError(
        f"loading the policy needs {loading / MIB:,.0f} of "
        f"{rollouts.device / MIB:,.0f} MiB per device; raise config.mesh.fsdp or .tensor"
      )
    return self.engine(cfg, rollouts.weights * has_start, slots_key)


@contextlib.contextmanager
def open_context(
  policy: Policy, files: PolicyFiles, form: PromptForm, cfg: RunConfig, trained_on: str | None
) -> Iterator[RunContext]:
  """Builds a RunContext and stops its drawing workers at the end; no array is allocated.

  The policy is on its train mesh, with frozen paths, adapters and remat.

  Args:
    files: of the policy, for tokenizer, chat template and stop tokens.
    form: of `cfg.text`, or the one that a run recorded.
  """
  conversation = Conversation(
    files.tokenizer, form, files.template, cfg.preprocess, cfg.video, policy.cfg
  )
  decode_params = compiled.decode_params(policy, compiled.train_mesh(policy), cfg.rollout.weights)
  with Executor(cfg.executor, cfg.style) as workers:
    yield RunContext(policy, conversation, workers, decode_params, trained_on, files.stop_tokens)


def make_engine(
  policy: Policy,
  conversation: Conversation,
  executor: Executor,
  cfg: RolloutConfig,
  resident: int,
  slots: str,
) -> Engine:
  """A rollout engine on the policy's mesh, with buckets that the kernels of the mesh can read.

  `resident` is the bytes per device that other arrays occupy meanwhile, from `bytes_of`; `slots` is
  the config key of `cfg.slots`, to be lowered if the caches do not fit.

  Raises:
    ConfigError: if the caches do not fit or a stop token is unknown; nothing was allocated.
  """
  mesh = compiled.train_mesh(policy)
  cfg = compiled.rollout_buckets(cfg, mesh)
  memory.check(plan(policy, cfg, resident), slots)
  stops = stop_ids(conversation, cfg)
  run = compiled.rollout_programs(policy, cfg, forbidden_ids(conversation, stops), stops)
  return Engine(conversation, run, executor, cfg, stops)


def with_update(
  rollouts: MemoryPlan, policy: Policy, micro: Microbatches, batch: BatchConfig, prompts: int
) -> MemoryPlan:
  """A plan of rollouts with the gradients and the estimated scratch of the update.

  The policy has the frozen paths and adapters of the run; the shapes of the update are those of
  `compiled.update_shapes`.
  """
  mesh = compiled.train_mesh(policy)
  _, trained = param_tree.partition(policy.abstract_params(), policy.frozen)
  shardings = sharding.param_shardings(trained, mesh)
  one = memory.tree_bytes(trained, shardings)
  shapes = compiled.update_shapes(policy, micro, batch, prompts)
  return rollouts._replace(
    gradients=memory.tree_bytes(_in_dtype(trained, policy.gradient_dtype), shardings),
    update_scratch=memory.estimate_update_scratch(policy.cfg, shapes, one),
    logprob_scratch=memory.estimate_logprob_scratch(policy.cfg, shapes),
  )


def loading_bytes(policy: Policy) -> int:
  """Bytes on each device of all parameters in the compute dtype."""
  params = _in_dtype(policy.abstract_params(), policy.compute_dtype)
  shardings = sharding.param_shardings(params, compiled.train_mesh(policy))
  return memory.tree_bytes(params, shardings)


def _in_dtype(tree: Any, dtype: Any) -> Any:
  """Shapes with another dtype."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def _weight_bytes(policy: Policy, weights: WeightForm) -> int:
  """Bytes on each device of the decode parameters."""
  mesh = compiled.train_mesh(policy)
  if weights == "compute":  # not traced: a plan is made often
    local = sharding.rollout_mesh(mesh)
    base, _ = lora.split(_in_dtype(policy.abstract_params(), policy.compute_dtype))
    layers = base["decoder"].pop("layers")
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), layers)
    return policy.cfg.decoder.layers * memory.tree_bytes(
      one, sharding.param_shardings({"decoder": {"layers": one}}, local)["decoder"]["layers"]
    ) + memory.tree_bytes(base, sharding.param_shardings(base, local))
  convert = compiled.reshard(policy, mesh, weights)
  params = jax.eval_shape(convert, policy.abstract_params())
  return memory.tree_bytes(params, sharding.param_shardings(params, sharding.rollout_mesh(mesh)))


def plan(
  policy: Policy, cfg: RolloutConfig, resident: int, device: int | None = None
) -> MemoryPlan:
  """Bytes on each device during rollouts; nothing is allocated, and the mesh may be absent.

  `device` is the size of a device of the policy's mesh, by default that of this machine.
  """
  mesh = compiled.train_mesh(policy)
  local = sharding.rollout_mesh(mesh)
  run = compiled.rollout_programs(policy, cfg, (), ())
  state = jax.eval_shape(lambda: run.empty_state(cfg.prompt_buckets[-1]))
  layout, weights = rollout_shardings(state.cache, local), _weight_bytes(policy, cfg.weights)
  rows, few = memory.tree_bytes(state.cache.layers, layout.layers), cfg.decode_row_counts[:-1]
  return MemoryPlan(
    resident=resident,
    reference=0,
    weights=weights,
    # Parameters that are sharded over fsdp are gathered first.
    weights_scratch=weights if mesh.shape["fsdp"] > 1 else 0,
    prefix_cache=memory.tree_bytes(state.cache.prefix.layers, layout.prefix.layers),
    suffix_cache=rows,
    gathered_rows=rows * few[-1] // cfg.row_count if few else 0,
    feature_buffer=memory.tree_bytes(
      jax.eval_shape(run.empty_feature_buffer), sharding.replicated(local)
    ),
    gradients=0,
    update_scratch=0,
    logprob_scratch=0,
    cfg=cfg,
    data_devices=local.shape["data"],
    device=memory.device_bytes(mesh) if device is None else device,
  )
