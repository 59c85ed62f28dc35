"""The engine of a run: its policy's rollout programs, words, drawing workers and memory."""

import math
import os
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from spatial_jax import programs, sharding
from spatial_jax.config import ConfigError
from spatial_jax.drawing.executor import Executor
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.engine import Engine, RolloutConfig, stop_ids

MIB = 1 << 20


class Plan(NamedTuple):
  """Bytes on each device while rollouts run, scratch left out.

  Attributes:
    weights: parameters, merged and in the compute dtype.
    prefixes, rows: caches of the prompts, and of what each row says behind its prompt.
    features: what the tower saw of images.
    cfg: what the caches are for.
    devices: that the slots divide over.
    device: bytes that one has.
  """

  weights: int
  prefixes: int
  rows: int
  features: int
  cfg: RolloutConfig
  devices: int
  device: int

  @property
  def total(self) -> int:
    """All of them."""
    return self.weights + self.prefixes + self.rows + self.features

  def __str__(self) -> str:
    parts = (
      ("weights", self.weights),
      (f"prompts of {self.cfg.slots} slots", self.prefixes),
      ("their rows", self.rows),
      ("pictures", self.features),
    )
    shares = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in parts)
    return (
      f"rollouts: {self.total / MIB:,.0f} of {self.device / MIB:,.0f} MiB per device ({shares})"
    )


def make_engine(
  policy: Policy, conversation: Conversation, executor: Executor, cfg: RolloutConfig
) -> Engine:
  """An engine on the policy's mesh, its buckets such that the mesh's kernels can read them.

  Raises:
    ConfigError: on the host, before anything runs, for caches that cannot fit.
  """
  mesh = programs.train_mesh(policy)
  cfg = programs.rollout_buckets(cfg, mesh)
  check(planned(policy, cfg))
  stops = stop_ids(conversation, cfg)
  run = programs.rollout_programs(policy, cfg, conversation.forbidden_ids, stops)
  return Engine(conversation, run, executor, cfg, stops)


def planned(policy: Policy, cfg: RolloutConfig) -> Plan:
  """`plan` for the devices that there are."""
  return plan(policy, cfg, memory(programs.train_mesh(policy)))


def plan(policy: Policy, cfg: RolloutConfig, device: int) -> Plan:
  """What rollouts hold on each device of `device` bytes; nothing is made."""
  mesh = programs.train_mesh(policy)
  local = sharding.rollout_mesh(mesh)
  run = programs.rollout_programs(policy, cfg, (), ())
  state = jax.eval_shape(lambda: run.empty(cfg.prompt_buckets[-1]))
  params = jax.eval_shape(policy.init, jax.random.key(0))
  weights = jax.eval_shape(programs.reshard(policy, mesh, cfg.weights), params)
  layout = sharding.rollout_shardings(state.cache, local)
  return Plan(
    weights=_bytes(weights, sharding.param_shardings(weights, local)),
    prefixes=_bytes(state.cache.prefix.layers, layout.prefix.layers),
    rows=_bytes(state.cache.layers, layout.layers),
    features=_bytes(jax.eval_shape(run.pool), sharding.replicated(local)),
    cfg=cfg,
    devices=local.shape["data"],
    device=device,
  )


def check(made: Plan) -> None:
  """Refuses caches that cannot fit, saying how many slots would.

  Raises:
    ConfigError: on the host.
  """
  if made.total <= made.device:
    return
  cfg, room = made.cfg, made.device - made.weights - made.features
  if cfg.rows:  # as many, whatever the slots
    slots = (room - made.rows) * cfg.slots // made.prefixes
  else:
    slots = room * cfg.slots // (made.prefixes + made.rows)
  slots = slots // made.devices * made.devices
  if slots * cfg.group < max(cfg.rows, 1):
    mend = (
      "lower config.rollout: rows, features, stop.tokens, prompt_buckets; or raise "
      "config.mesh.tensor"
    )
  else:
    mend = f"lower config.rollout.slots to {slots}"
  raise ConfigError(f"{made}: they do not fit; {mend}")


def memory(mesh: Mesh) -> int:
  """Bytes that one device of this process has; those of a CPU share the machine's."""
  device = mesh.local_devices[0]
  statistics = device.memory_stats() or {}
  if "bytes_limit" in statistics:
    return int(statistics["bytes_limit"])
  machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return machine // len(mesh.local_devices)


def _bytes(tree: Any, shardings: Any) -> int:
  """Of one device's part of a tree of arrays or shapes."""
  sizes = jax.tree.map(
    lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings
  )
  return sum(jax.tree.leaves(sizes))
