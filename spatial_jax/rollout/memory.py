"""Bytes on each device while rollouts run: what is planned, and whether it fits."""

import math
import os
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from spatial_jax.config import ConfigError
from spatial_jax.rollout.config import RolloutConfig

MIB = 1 << 20


class Plan(NamedTuple):
  """Bytes on each device while rollouts run; scratch of the programs is left out.

  Attributes:
    resident: what lies there besides: training's state, other policies.
    weights: parameters, merged and in the compute dtype.
    prefixes, rows: caches of the prompts, and of what each row says behind its prompt.
    copies: of the most rows that are decoded by themselves.
    features: what the tower saw of images.
    cfg: what the caches are for.
    devices: that the slots divide over.
    device: bytes that one has.
  """

  resident: int
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
    return self.resident + self.weights + self.prefixes + self.rows + self.copies + self.features

  def __str__(self) -> str:
    parts = (
      ("held besides", self.resident),
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
  cfg, room = made.cfg, made.device - made.resident - made.weights - made.features
  own = made.rows + made.copies
  if cfg.rows:  # as many, whatever the slots
    fit = (room - own) * cfg.slots // made.prefixes
  else:
    fit = room * cfg.slots // (made.prefixes + own)
  fit = fit // made.devices * made.devices
  if fit * cfg.group < max(cfg.rows, 1):
    mend = (
      f"lower {slots}, or config.rollout: rows, feature_buffer_tokens, stop.max_response_tokens, "
      "prompt_buckets; or raise config.mesh.fsdp or .tensor"
    )
  else:
    mend = f"lower {slots} to {fit}"
  raise ConfigError(f"{made}: they do not fit; {mend}")


def bytes_of(*trees: Any) -> int:
  """On each device, of arrays or placed shapes."""
  return sum(tree_bytes(tree, jax.tree.map(lambda x: x.sharding, tree)) for tree in trees)


def device_bytes(mesh: Mesh) -> int:
  """Bytes that one device of this process has; those of a CPU share the machine's."""
  device = mesh.local_devices[0]
  statistics = device.memory_stats() or {}
  if "bytes_limit" in statistics:
    return int(statistics["bytes_limit"])
  machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return machine // len(mesh.local_devices)


def tree_bytes(tree: Any, shardings: Any) -> int:
  """Of one device's part of a tree of arrays or shapes."""
  sizes = jax.tree.map(
    lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings
  )
  return sum(jax.tree.leaves(sizes))
