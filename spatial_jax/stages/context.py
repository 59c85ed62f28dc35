"""What the stages and entry points share: the rollout engine of a policy, and its memory plan."""

import jax

from spatial_jax import compiled, sharding
from spatial_jax.drawing.executor import Executor
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout import memory
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.engine import Engine, stop_ids
from spatial_jax.rollout.memory import Plan


def make_engine(
  policy: Policy,
  conversation: Conversation,
  executor: Executor,
  cfg: RolloutConfig,
  resident: int,
  slots: str,
) -> Engine:
  """An engine on the policy's mesh, its buckets such that the mesh's kernels can read them.

  Args:
    policy, conversation, executor, cfg: what samples, reads and draws, and how.
    resident: bytes on each device that are others', from `bytes_of`.
    slots: what to lower where the caches do not fit: the key that `cfg.slots` is from.

  Raises:
    ConfigError: on the host, before anything runs, for caches that cannot fit.
  """
  mesh = compiled.train_mesh(policy)
  cfg = compiled.rollout_buckets(cfg, mesh)
  memory.check(planned(policy, cfg, resident), slots)
  stops = stop_ids(conversation, cfg)
  run = compiled.rollout_programs(policy, cfg, conversation.forbidden_ids, stops)
  return Engine(conversation, run, executor, cfg, stops)


def planned(policy: Policy, cfg: RolloutConfig, resident: int) -> Plan:
  """`plan` for the devices that there are."""
  return plan(policy, cfg, resident, memory.device_bytes(compiled.train_mesh(policy)))


def plan(policy: Policy, cfg: RolloutConfig, resident: int, device: int) -> Plan:
  """What lies on each device of `device` bytes while rollouts run; nothing is made."""
  mesh = compiled.train_mesh(policy)
  local = sharding.rollout_mesh(mesh)
  run = compiled.rollout_programs(policy, cfg, (), ())
  state = jax.eval_shape(lambda: run.empty(cfg.prompt_buckets[-1]))
  params = jax.eval_shape(policy.init, jax.random.key(0))
  weights = jax.eval_shape(compiled.reshard(policy, mesh, cfg.weights), params)
  layout = sharding.rollout_shardings(state.cache, local)
  rows, few = memory.tree_bytes(state.cache.layers, layout.layers), cfg.decode_row_counts[:-1]
  return Plan(
    resident=resident,
    weights=memory.tree_bytes(weights, sharding.param_shardings(weights, local)),
    prefixes=memory.tree_bytes(state.cache.prefix.layers, layout.prefix.layers),
    rows=rows,
    copies=rows * few[-1] // cfg.row_count if few else 0,
    features=memory.tree_bytes(jax.eval_shape(run.feature_buffer), sharding.replicated(local)),
    cfg=cfg,
    devices=local.shape["data"],
    device=device,
  )
