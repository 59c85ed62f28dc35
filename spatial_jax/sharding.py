"""Placement of arrays on devices: meshes, one table from parameter path to spec, specs of batches.

    train mesh     data x fsdp x tensor        rows over (data, fsdp); matrices over fsdp and tensor
    island mesh    island x data x tensor      the same devices; an island is one process
    rollout mesh   data x tensor               the devices of one island, for sampling

No other module imports PartitionSpec. Parameters carry no sharding of their own: exactly one rule
of PARAM_RULES must match the path of each parameter.
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

from spatial_jax.checks import is_whole
from spatial_jax.config import ConfigError, check_field
from spatial_jax.errors import UserError
from spatial_jax.types import (
  Array,
  FeatureBatch,
  PackedBatch,
  Params,
  TrainBatch,
  VisionBatch,
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the train mesh; their product is the number of devices.

  Attributes:
    data: replicas of the parameters; -1: all remaining devices.
    fsdp: shards of every matrix and of the optimizer state.
    tensor: shards of heads and feed-forward width.

  An axis of a parameter that a mesh axis does not divide is replicated and named at the start.
  """

  data: int
  fsdp: int
  tensor: int

  def __post_init__(self):
    valid = is_whole(self.data, 1) or is_whole(self.data, -1, -1)
    check_field(self, "data", valid, "be a whole number, at least 1, or -1 for all other devices")
    for name in ("fsdp", "tensor"):
      check_field(self, name, is_whole(vars(self)[name], 1), "be a whole number, at least 1")


# (path regex, spec of the last axes). The axes before them are not sharded: the layer axis of a
# stacked parameter, so that one rule serves stacked and unstacked parameters.
PARAM_RULES: tuple[tuple[str, P], ...] = (
  (r"decoder/(embed|head)/embedding$", P("tensor", "fsdp")),  # V, D
  (r"attn/[qkv]/kernel$", P("fsdp", "tensor", None)),  # query, key, value: D, H, C
  (r"attn/[qkv]/bias$", P("tensor", None)),  # H, C
  (r"attn/o/kernel$", P("tensor", None, "fsdp")),  # H, C, D
  (r"blocks/qkv/kernel$", P("fsdp", None, "tensor", None)),  # E, 3, H, C
  (r"blocks/qkv/bias$", P(None, "tensor", None)),  # 3, H, C
  (r"blocks/proj/kernel$", P("tensor", None, "fsdp")),  # H, C, E
  (r"mlp/(gate|up)/kernel$", P("fsdp", "tensor")),  # D or E, F; in the mergers 4E, 4E
  (r"mlp/down/kernel$", P("tensor", "fsdp")),  # F, D or E; 4E, D
  (r"mlp/(gate|up)/bias$", P("tensor")),  # F, in the mergers 4E
  (r"/(o|proj|down)/kernel_lora_a$", P("tensor", None)),  # H*C or F, rank of the adapter
  (r"/(o|proj|down)/kernel_lora_b$", P(None, "fsdp")),  # rank, D or E
  (r"/(q|k|v|qkv|gate|up|patch)/kernel_lora_a$", P("fsdp", None)),  # D or E, rank
  (r"/(q|k|v|qkv|gate|up|patch)/kernel_lora_b$", P(None, "tensor")),  # rank, H*C or F
  (r"vision/patch/kernel$", P(None, "fsdp")),  # X = 3 * 2 * 14 * 14 divides by 8 only; E
  (r"vision/position/embedding$", P(None, "fsdp")),  # learned positions, E
  (r"/scale$", P()),  # of norms, and of kernels in 8 bits: replicated
  (r"(norm|proj|down|patch)/bias$", P()),  # of norms, and of sums over `tensor`: replicated
  (r"heads/\w+/(kernel|bias)$", P()),  # the temporary heads of pretraining
)

_FACTORED = re.compile(r"(^|/)v_(row|col)/")  # of the optimizer state of Adafactor


# --- processes ---------------------------------------------------------------------------------


def refuse_several_processes() -> None:
  """Refuses to run if this process is one of several.

  Raises:
    UserError: if jax.process_count() is larger than 1.
  """
  if jax.process_count() > 1:
    raise UserError(
      "several processes are not supported yet; run one process per job "
      f"(this job has {jax.process_count()})"
    )


# --- meshes ------------------------------------------------------------------------------------


def make_mesh(
  cfg: MeshConfig,
  devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]  (a type made at import)
) -> Mesh:
  """The train mesh; the devices of each process are adjacent.

  Raises:
    ConfigError: if the product of the sizes is not the number of devices.
  """
  fixed = cfg.fsdp * cfg.tensor
  data = len(devices) // fixed if cfg.data == -1 else cfg.data
  if data < 1 or data * fixed != len(devices):
    raise ConfigError(
      f"config.mesh is data={cfg.data} x fsdp={cfg.fsdp} x tensor={cfg.tensor} and does not fit "
      f"{len(devices)} devices; set sizes whose product is {len(devices)}"
    )
  by_process = sorted(devices, key=lambda device: device.process_index)
  return Mesh(
    np.asarray(by_process).reshape(data, cfg.fsdp, cfg.tensor), ("data", "fsdp", "tensor")
  )


def island_mesh(train_mesh: Mesh) -> Mesh:
  """The devices of the train mesh, in the same order, as island x data x tensor.

  Raises:
    ConfigError: if `tensor` does not divide the number of devices of a process.
  """
  devices, tensor = train_mesh.devices.reshape(-1), train_mesh.shape["tensor"]
  islands = len({device.process_index for device in devices})
  if len(devices) // islands % tensor:
    raise ConfigError(
      f"config.mesh.tensor is {tensor} and does not divide the {len(devices) // islands} devices "
      "of a process, which samples on its own devices; set a divisor"
    )
  return Mesh(devices.reshape(islands, -1, tensor), ("island", "data", "tensor"))


def rollout_mesh(train_mesh: Mesh) -> Mesh:
  """The island of this process as data x tensor."""
  islands = island_mesh(train_mesh)
  owners = [island.flat[0].process_index for island in islands.devices]
  return Mesh(islands.devices[owners.index(jax.process_index())], ("data", "tensor"))


def row_devices(mesh: Mesh) -> int:
  """The number of shards that rows are divided into."""
  return math.prod(mesh.shape[axis] for axis in _row_axes(mesh))


def _row_axes(mesh: Mesh) -> tuple[str, ...]:
  return tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
  """The leading axis over all data axes of the mesh."""
  return NamedSharding(mesh, P(_row_axes(mesh)))


def attention_specs(mesh: Mesh, rows: int, kv_heads: int) -> tuple[P, P]:
  """Specs of [R, K, ...] and [R, ...] arrays: R over the data axes, K over `tensor`.

  An axis that does not divide is replicated.
  """
  row = _row_axes(mesh) if rows % row_devices(mesh) == 0 else None
  head = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
  return P(row, head), P(row)


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
  """Sharding of [R, ...] arrays, see `attention_specs`."""
  return NamedSharding(mesh, attention_specs(mesh, rows, 1)[1])


def kv_sharding(mesh: Mesh, rows: int, kv_heads: int) -> NamedSharding:
  """Sharding of [R, K, ...] arrays, see `attention_specs`."""
  return NamedSharding(mesh, attention_specs(mesh, rows, kv_heads)[0])


# --- parameters --------------------------------------------------------------------------------


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """The spec of one parameter: that of its rule; what the mesh cannot divide is replicated.

  Args:
    path: "decoder/layers/attn/q/kernel"; anything may precede it.
    mesh: any of the three meshes. An axis that the mesh lacks, or that does not divide, is
      replicated; `replication_report` lists the latter.

  Raises:
    ValueError: if not exactly one rule matches, or its spec has more axes than the parameter.
  """

  def divided(axis: Any, size: int) -> Any:
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None

  rule = _rule_axes(path, shape)
  return P(*(divided(axis, size) for axis, size in zip(rule, shape, strict=True)))


def _rule_axes(path: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
  """The mesh axis, or None, that PARAM_RULES gives to each axis of a parameter."""
  path = path.removesuffix("/qvalue")  # a kernel in 8 bits
  found = [(pattern, spec) for pattern, spec in PARAM_RULES if re.search(pattern, path)]
  if len(found) != 1:
    patterns = ", ".join(pattern for pattern, _ in found) or "none"
    raise ValueError(
      f"exactly one rule of PARAM_RULES must match parameter {path} {shape}; matching: {patterns}"
    )
  pattern, spec = found[0]
  if len(spec) > len(shape):
    raise ValueError(f"parameter {path} {shape} has fewer axes than its rule {pattern} {spec}")
  return (None,) * (len(shape) - len(spec)) + tuple(spec)


def param_shardings(params: Params, mesh: Mesh) -> Params:
  """The shardings of a tree of parameters (arrays or abstract arrays), or of a tree of such trees.

  A TrainState or an optimizer state contains copies of the tree: their paths end like the paths of
  the parameters. Scalars are replicated. The values of a kernel in 8 bits are sharded like the
  kernel, its scales are replicated. So are the row and column means of Adafactor.
  """

  def one(path: Any, leaf: Any) -> NamedSharding:
    name = path_name(path)
    if leaf.shape in ((), (1,)) or _FACTORED.search(name):
      return replicated(mesh)
    return NamedSharding(mesh, param_spec(name, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(one, params)


def path_name(path: Any) -> str:
  """A key path of JAX as "vision/blocks/qkv/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def replication_report(params: Params, mesh: Mesh) -> str | None:
  """One line that names each parameter axis that a rule shards but the mesh does not divide.

  Returns:
    "replicated, because the size does not divide: 2 over tensor=4 (decoder/layers/attn/k/kernel,
    decoder/layers/attn/v/kernel)"; None if every axis divides.
  """
  found: dict[str, list[str]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = path_name(path)
    for axis, size in zip(_rule_axes(name, leaf.shape), leaf.shape, strict=True):
      if axis in mesh.shape and size % mesh.shape[axis]:
        found.setdefault(f"{size} over {axis}={mesh.shape[axis]}", []).append(name)
  axes = ", ".join(f"{division} ({', '.join(names)})" for division, names in found.items())
  return f"replicated, because the size does not divide: {axes}" if found else None


def local_view(tree: Params, mesh: Mesh) -> Params:
  """Arrays of the island mesh as arrays of this process' rollout mesh; buffers are not copied."""

  def one(x: jax.Array) -> jax.Array:
    assert isinstance(x.sharding, NamedSharding)
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(
      x.shape, NamedSharding(mesh, x.sharding.spec), shards
    )

  return jax.tree.map(one, tree)


# --- batches -----------------------------------------------------------------------------------


def check_rows(count: int, name: str, mesh: Mesh) -> None:
  """Refuses a number of rows that does not divide over the mesh.

  Raises:
    ConfigError: if `count` is not a multiple of data x fsdp.
  """
  if count % row_devices(mesh):
    raise ConfigError(
      f"{name} is {count} and must be a multiple of data x fsdp = {row_devices(mesh)} devices"
    )


def train_batch_shardings(batch: TrainBatch, window: int, mesh: Mesh) -> TrainBatch:
  """Shardings of a batch: rows, prefixes, patches (by whole windows), frames and features.

  All are sharded over data x fsdp; images that do not divide are replicated.

  Args:
    window: patches in one attention window of the vision tower.

  Raises:
    ConfigError: if the number of prompts does not divide over the mesh.
  """
  check_rows(batch.prefix.token_RT.shape[0], "prompts of an update (config.rollout.prompts)", mesh)
  row: Any = rows(mesh)
  by_row = jax.tree.map(lambda _: row, batch._replace(vision=None))
  vision = _vision_shardings(batch.vision, window, mesh)
  return by_row._replace(forbidden_V=replicated(mesh), vision=vision)


def packed_batch_shardings(batch: PackedBatch, window: int, mesh: Mesh) -> PackedBatch:
  """Shardings of packed rows, as in `train_batch_shardings`.

  Raises:
    ConfigError: if the number of rows does not divide over the mesh.
  """
  check_rows(batch.rows.trained_RT.shape[0], "rows of demonstrations", mesh)
  row: Any = rows(mesh)
  by_row = jax.tree.map(lambda _: row, batch._replace(vision=None))
  vision = _vision_shardings(batch.vision, window, mesh)
  return by_row._replace(forbidden_V=replicated(mesh), vision=vision)


def place_packed_batch(batch: PackedBatch, window: int, mesh: Mesh) -> PackedBatch:
  """A NumPy batch of packed rows as global arrays on the train mesh."""
  shardings = packed_batch_shardings(batch, window, mesh)
  return jax.tree.map(lambda s, x: jax.device_put(np.asarray(x), s), shardings, batch)


def _vision_shardings(vision: VisionBatch | FeatureBatch, window: int, mesh: Mesh) -> Any:
  """Patches by whole windows, frames and features over the data axes; replicated if they do not."""
  row: Any = rows(mesh)
  everywhere: Any = replicated(mesh)

  def spread(count: int, unit: int) -> Any:
    return row if count % (unit * row_devices(mesh)) == 0 else everywhere

  if isinstance(vision, FeatureBatch):
    return FeatureBatch(spread(vision.features_MYD.shape[0], 1))
  patch = spread(vision.window_P.shape[0], window)
  frame = spread(vision.frame_NS.shape[0], 1)
  return jax.tree.map(lambda _: patch, vision)._replace(frame_NS=frame)


def place_train_batch(batch: TrainBatch, window: int, mesh: Mesh) -> TrainBatch:
  """A NumPy batch as global arrays on the train mesh.

  With several processes, each process passes its own rows and its own windows, the same number in
  every process. Indices into patches, frames and features must then count over all processes.
  """
  shardings = train_batch_shardings(batch, window, mesh)
  _check_prefixes(batch, row_devices(mesh) // island_mesh(mesh).shape["island"])

  def put(sharding: NamedSharding, x: Array) -> jax.Array:
    return jax.make_array_from_process_local_data(sharding, np.asarray(x))

  return jax.tree.map(put, shardings, batch)


def _check_prefixes(batch: TrainBatch, devices: int) -> None:
  """Checks that each device of this process has the same number of rows, after its own prefixes."""
  prefix_R = np.asarray(batch.rows.prefix_R)
  prompts = batch.prefix.token_RT.shape[0] // devices
  device_R = np.arange(len(prefix_R)) * devices // len(prefix_R)
  if len(prefix_R) % devices or (prefix_R // prompts % devices != device_R).any():
    raise ValueError(
      f"{len(prefix_R)} rows of an update do not divide over {devices} devices together with their "
      "prefixes; give every device the same number of groups and of rows"
    )
