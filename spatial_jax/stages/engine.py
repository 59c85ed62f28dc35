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
  """Bytes on each device while rollouts run; scratch of the programs is left out.

  Attributes:
    held: what lies there besides: training's state, other policies.
    weights: parameters, merged and in the compute dtype.
    prefixes, rows: caches of the prompts, and of what each row says behind its prompt.
    copies: of the most rows that are decoded by themselves.
    features: what the tower saw of images.
    cfg: what the caches are for.
    devices: that the slots divide over.
    device: bytes that one has.
  """

  held: int
  weights: int
  prefixes: int
  rows: int
  copies: int
  features: int
  cfg: RolloutConfig
  devices: int
  device: int

  @property
  def total(self) -> int:
    """All of them."""
    return self.held + self.weights + self.prefixes + self.rows + self.copies + self.features

  def __str__(self) -> str:
    parts = (
      ("held besides", self.held),
      ("weights", self.weights),
      (f"prompts of {self.cfg.slots} slots", self.prefixes),
      ("their rows", self.rows),
      ("copies of few rows", self.copies),
      ("pictures", self.features),
    )
    shares = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in parts)
    return (
      f"rollouts: {self.total / MIB:,.0f} of {self.device / MIB:,.0f} MiB per device ({shares})"
    )


def make_engine(
  policy: Policy,
  conversation: Conversation,
  executor: Executor,
  cfg: RolloutConfig,
  held: int,
  slots: str,
) -> Engine:
  """An engine on the policy's mesh, its buckets such that the mesh's kernels can read them.

  Args:
    policy, conversation, executor, cfg: what samples, reads and draws, and how.
    held: bytes on each device that are others', from `bytes_of`.
    slots: what to lower where the caches do not fit: the key that `cfg.slots` is from.

  Raises:
    ConfigError: on the host, before anything runs, for caches that cannot fit.
  """
  mesh = programs.train_mesh(policy)
  cfg = programs.rollout_buckets(cfg, mesh)
  check(planned(policy, cfg, held), slots)
  stops = stop_ids(conversation, cfg)
  run = programs.rollout_programs(policy, cfg, conversation.forbidden_ids, stops)
  return Engine(conversation, run, executor, cfg, stops)


def planned(policy: Policy, cfg: RolloutConfig, held: int) -> Plan:
  """`plan` for the devices that there are."""
  return plan(policy, cfg, held, memory(programs.train_mesh(policy)))


def plan(policy: Policy, cfg: RolloutConfig, held: int, device: int) -> Plan:
  """What lies on each device of `device` bytes while rollouts run; nothing is made."""
  mesh = programs.train_mesh(policy)
  local = sharding.rollout_mesh(mesh)
  run = programs.rollout_programs(policy, cfg, (), ())
  state = jax.eval_shape(lambda: run.empty(cfg.prompt_buckets[-1]))
  params = jax.eval_shape(policy.init, jax.random.key(0))
  weights = jax.eval_shape(programs.reshard(policy, mesh, cfg.weights), params)
  layout = sharding.rollout_shardings(state.cache, local)
  rows, few = _bytes(state.cache.layers, layout.layers), cfg.widths[:-1]
  return Plan(
    held=held,
    weights=_bytes(weights, sharding.param_shardings(weights, local)),
    prefixes=_bytes(state.cache.prefix.layers, layout.prefix.layers),
    rows=rows,
    copies=rows * few[-1] // cfg.row_count if few else 0,
    features=_bytes(jax.eval_shape(run.pool), sharding.replicated(local)),
    cfg=cfg,
    devices=local.shape["data"],
    device=device,
  )


def check(made: Plan, slots: str) -> None:
  """Refuses caches that cannot fit, saying how many slots would.

  Args:
    made: the plan.
    slots: the key to lower, as in `make_engine`.

  Raises:
    ConfigError: on the host.
  """
  if made.total <= made.device:
    return
  cfg, room = made.cfg, made.device - made.held - made.weights - made.features
  own = made.rows + made.copies
  if cfg.rows:  # as many, whatever the slots
    fit = (room - own) * cfg.slots // made.prefixes
  else:
    fit = room * cfg.slots // (made.prefixes + own)
  fit = fit // made.devices * made.devices
  if fit * cfg.group < max(cfg.rows, 1):
    mend = (
      f"lower {slots}, or config.rollout: rows, features, stop.tokens, prompt_buckets; or raise "
      "config.mesh.fsdp or .tensor"
    )
  else:
    mend = f"lower {slots} to {fit}"
  raise ConfigError(f"{made}: they do not fit; {mend}")


def bytes_of(*trees: Any) -> int:
  """On each device, of arrays or placed shapes."""
  return sum(_bytes(tree, jax.tree.map(lambda x: x.sharding, tree)) for tree in trees)


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
