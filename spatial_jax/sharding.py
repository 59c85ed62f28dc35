"""Where arrays live: the mesh, one table from parameter path to spec, and batch specs.

    train mesh     data x fsdp x tensor        rows over (data, fsdp); matrices over fsdp and tensor
    rollout mesh   data x tensor, on the devices of one host; weights replicated over data

The only importer of PartitionSpec. Parameters carry no sharding of their own; the table below is matched
against their path, first match wins, and a leaf no line matches is an error.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spatial_jax.config import ConfigError
from spatial_jax.types import Params


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the train mesh; their product is the number of devices.

  Attributes:
    data: replicas; -1: whatever is left.
    fsdp: shards of every matrix and of the optimizer.
    tensor: shards of heads and feed-forward; at most the KV heads.
  """

  data: int
  fsdp: int
  tensor: int


# (path regex, spec). Leading L is the stacked layer axis and is never sharded.
PARAM_RULES: tuple[tuple[str, P], ...] = (
  (r"decoder/(embed|head)/embedding$", P("tensor", "fsdp")),  # V, D
  (r"decoder/layers/attn/[qkv]/kernel$", P(None, "fsdp", "tensor", None)),  # L, D, H, C
  (r"decoder/layers/attn/[qkv]/bias$", P(None, "tensor", None)),  # L, H, C
  (r"decoder/layers/attn/o/kernel$", P(None, "tensor", None, "fsdp")),  # L, H, C, D
  (r"decoder/layers/mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),  # L, D, F
  (r"decoder/layers/mlp/down/kernel$", P(None, "tensor", "fsdp")),  # L, F, D
  (r"(scale|bias)$", P()),  # norms and biases of the vision tower: replicated
  (r"vision/.*/kernel$", P("fsdp")),  # by the layer axis or the input axis, whichever stands first
  (r"head/kernel$", P()),  # the temporary dense head
)


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
  """The train mesh. Raises ConfigError (host) naming both sides when the sizes do not fit the devices."""
  fixed = cfg.fsdp * cfg.tensor
  data = len(devices) // fixed if cfg.data == -1 else cfg.data
  if data < 1 or data * fixed != len(devices):
    raise ConfigError(
      f"mesh data={cfg.data} x fsdp={cfg.fsdp} x tensor={cfg.tensor} does not fit "
      f"{len(devices)} devices; set config.mesh so that the product is {len(devices)}"
    )
  grid = np.asarray(devices).reshape(data, cfg.fsdp, cfg.tensor)
  return Mesh(grid, ("data", "fsdp", "tensor"))


def rollout_mesh(train_mesh: Mesh) -> Mesh:
  """This host's devices as data x tensor: sampling runs here, in its own order."""
  local = [d for d in train_mesh.devices.flat if d.process_index == jax.process_index()]
  tensor = train_mesh.shape["tensor"]
  return Mesh(np.asarray(local).reshape(-1, tensor), ("data", "tensor"))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
  """Leading axis over all data axes of the mesh."""
  axes = tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)
  return NamedSharding(mesh, P(axes))


def attention_specs(mesh: Mesh, rows: int, kv_heads: int) -> tuple[P, P]:
  """Specs of [R, K, ...] and [R, ...] arrays for a kernel that runs per device.

  Rows lie over the data axes and heads over `tensor`, each only where it divides; else every device
  computes all of them.
  """
  data = tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)
  over_data = math.prod(mesh.shape[axis] for axis in data)
  row = data if rows % over_data == 0 else None
  head = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
  return P(row, head), P(row)


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """The spec of one parameter: its line of the table, without axes the mesh lacks or that do not divide.

  Raises:
    ValueError: on the host, when no line matches.
  """
  for pattern, spec in PARAM_RULES:
    if re.search(pattern, path):
      break
  else:
    raise ValueError(f"no sharding rule matches parameter {path} {shape}; add a line to PARAM_RULES")
  sizes = dict(mesh.shape)

  def kept(axis: Any, size: int) -> Any:
    return axis if axis in sizes and size % sizes[axis] == 0 else None

  return P(*(kept(axis, size) for axis, size in zip(spec, shape, strict=False)))


def param_shardings(params: Params, mesh: Mesh) -> Params:
  """The shardings of a parameter tree (arrays or abstract) or of anything shaped like one inside.

  An optimizer state holds copies of the tree; their paths end like the parameters' own, and scalars are
  replicated.
  """

  def one(path: Any, leaf: Any) -> NamedSharding:
    if len(leaf.shape) == 0:
      return replicated(mesh)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, param_spec(name, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(one, params)
