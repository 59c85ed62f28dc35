"""Where arrays live: the meshes, one table from parameter path to spec, and the specs of batches.

    train mesh     data x fsdp x tensor        rows over (data, fsdp); matrices over fsdp and tensor
    island mesh    island x data x tensor      the same devices; one island is what a process owns
    rollout mesh   data x tensor               one island alone: sampling runs here on its own

The only importer of PartitionSpec. Parameters carry no sharding of their own; the table below is
matched against their path, first match wins, and a leaf no line matches is an error.
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
from spatial_jax.types import Array, FeatureBatch, Params, PrefixBatch, TrainBatch, VisionBatch


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


# (path regex, spec of the last axes). An axis before them, the layers of a stacked parameter, is
# never sharded, so that one line serves stacked and unstacked parameters.
PARAM_RULES: tuple[tuple[str, P], ...] = (
  (r"decoder/(embed|head)/embedding$", P("tensor", "fsdp")),  # V, D
  (r"decoder/layers/.*[qkv]/kernel$", P("fsdp", "tensor", None)),  # D, H, C
  (r"decoder/layers/.*[qkv]/bias$", P("tensor", None)),  # H, C
  (r"decoder/layers/.*o/kernel$", P("tensor", None, "fsdp")),  # H, C, D
  (r"vision/blocks/qkv/kernel$", P("fsdp", None, "tensor", None)),  # E, 3, H, C
  (r"vision/blocks/qkv/bias$", P(None, "tensor", None)),  # 3, H, C
  (r"vision/blocks/proj/kernel$", P("tensor", None, "fsdp")),  # H, C, E
  (r"mlp/(gate|up)/kernel$", P("fsdp", "tensor")),  # D or E, F; in the mergers 4E, 4E
  (r"mlp/down/kernel$", P("tensor", "fsdp")),  # F, D or E; 4E, D
  (r"mlp/(gate|up)/bias$", P("tensor")),  # F, in the mergers 4E
  (r"(o|proj|down)/kernel_lora_a$", P("tensor", None)),  # H*C or F, rank of the adapter
  (r"(o|proj|down)/kernel_lora_b$", P(None, "fsdp")),
  (r"kernel_lora_a$", P("fsdp", None)),  # D or E, rank
  (r"kernel_lora_b$", P(None, "tensor")),  # rank, H*C or F
  (r"vision/patch/kernel$", P(None, "fsdp")),  # X = 3 * 2 * 14 * 14 divides by 8 only; E
  (r"vision/position/embedding$", P(None, "fsdp")),  # table of learned positions, E
  (r"(scale|bias)$", P()),  # norms, and biases of sums over `tensor`: replicated
  (r"heads/\w+/kernel$", P()),  # the temporary heads of pretraining
)


# --- meshes ------------------------------------------------------------------------------------


def make_mesh(
  cfg: MeshConfig,
  devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]  (a type made at import)
) -> Mesh:
  """The train mesh, the devices of a process next to one another.

  Raises:
    ConfigError: on the host, naming both sides, when the sizes do not fit the devices.
  """
  fixed = cfg.fsdp * cfg.tensor
  data = len(devices) // fixed if cfg.data == -1 else cfg.data
  if data < 1 or data * fixed != len(devices):
    raise ConfigError(
      f"mesh data={cfg.data} x fsdp={cfg.fsdp} x tensor={cfg.tensor} does not fit "
      f"{len(devices)} devices; set config.mesh so that the product is {len(devices)}"
    )
  by_process = sorted(devices, key=lambda device: device.process_index)
  return Mesh(
    np.asarray(by_process).reshape(data, cfg.fsdp, cfg.tensor), ("data", "fsdp", "tensor")
  )


def island_mesh(train_mesh: Mesh) -> Mesh:
  """All devices of the train mesh, in its order, as island x data x tensor.

  Raises:
    ConfigError: on the host, when `tensor` does not divide the devices of a process.
  """
  devices, tensor = train_mesh.devices.reshape(-1), train_mesh.shape["tensor"]
  islands = len({device.process_index for device in devices})
  if len(devices) // islands % tensor:
    raise ConfigError(
      f"mesh tensor={tensor} does not divide the {len(devices) // islands} devices of a process, "
      "which sample on their own; set config.mesh.tensor to a divisor"
    )
  return Mesh(devices.reshape(islands, -1, tensor), ("island", "data", "tensor"))


def rollout_mesh(train_mesh: Mesh) -> Mesh:
  """This process' island as data x tensor."""
  islands = island_mesh(train_mesh)
  owners = [island.flat[0].process_index for island in islands.devices]
  return Mesh(islands.devices[owners.index(jax.process_index())], ("data", "tensor"))


def row_devices(mesh: Mesh) -> int:
  """Over how many devices rows lie."""
  return math.prod(mesh.shape[axis] for axis in _row_axes(mesh))


def _row_axes(mesh: Mesh) -> tuple[str, ...]:
  return tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
  """Leading axis over all data axes of the mesh."""
  return NamedSharding(mesh, P(_row_axes(mesh)))


def attention_specs(mesh: Mesh, rows: int, kv_heads: int) -> tuple[P, P]:
  """Specs of [R, K, ...] and [R, ...] arrays for a kernel that runs per device.

  Rows lie over the data axes and heads over `tensor`, each only where it divides; else every device
  computes all of them.
  """
  row = _row_axes(mesh) if rows % row_devices(mesh) == 0 else None
  head = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
  return P(row, head), P(row)


# --- parameters --------------------------------------------------------------------------------


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """The spec of one parameter: its line of the table, without axes the mesh cannot give.

  Args:
    path: "decoder/layers/attn/q/kernel"; what stands before is ignored.
    shape: of the parameter.
    mesh: any of the three; an axis it lacks, or that does not divide, is left out.

  Raises:
    ValueError: on the host, when no line matches.
  """
  for pattern, spec in PARAM_RULES:
    if re.search(pattern, path) and len(spec) <= len(shape):
      break
  else:
    raise ValueError(f"no sharding rule matches parameter {path} {shape}; add it to PARAM_RULES")

  def kept(axis: Any, size: int) -> Any:
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None

  padded = (None,) * (len(shape) - len(spec)) + tuple(spec)
  return P(*(kept(axis, size) for axis, size in zip(padded, shape, strict=True)))


def param_shardings(params: Params, mesh: Mesh) -> Params:
  """The shardings of a parameter tree (arrays or abstract) or of anything shaped like one inside.

  A TrainState or an optimizer state holds copies of the tree; their paths end like the parameters'
  own, and scalars are replicated. Of a kernel in 8 bits, the values lie like the kernel, and its
  few scales everywhere.
  """

  def one(path: Any, leaf: Any) -> NamedSharding:
    if len(leaf.shape) == 0:
      return replicated(mesh)
    name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/qvalue")
    return NamedSharding(mesh, param_spec(name, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(one, params)


def local_view(tree: Params, mesh: Mesh) -> Params:
  """Arrays of the island mesh as arrays of this process' rollout mesh: the same buffers."""

  def one(x: jax.Array) -> jax.Array:
    assert isinstance(x.sharding, NamedSharding)
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(
      x.shape, NamedSharding(mesh, x.sharding.spec), shards
    )

  return jax.tree.map(one, tree)


# --- batches -----------------------------------------------------------------------------------


def check_rows(count: int, name: str, mesh: Mesh) -> None:
  """Raises ConfigError (trace or host) when `count` rows do not divide over the mesh."""
  if count % row_devices(mesh):
    raise ConfigError(
      f"{name} is {count}: not a multiple of data x fsdp = {row_devices(mesh)} devices"
    )


def train_batch_shardings(batch: TrainBatch, window: int, mesh: Mesh) -> TrainBatch:
  """Rows and prefixes over data and fsdp; patches (by whole windows), frames and features likewise.

  Args:
    batch: arrays or abstract.
    window: patches in one attention window of the vision tower.
    mesh: train mesh.

  Raises:
    ConfigError: at trace or on the host, when the prompts do not divide over the mesh.
  """
  check_rows(batch.prefix.token_BT.shape[0], "prompts of an update (config.rollout.prompts)", mesh)
  shards = row_devices(mesh)
  row: Any = rows(mesh)
  everywhere: Any = replicated(mesh)

  def spread(count: int, unit: int) -> Any:
    return row if count % (unit * shards) == 0 else everywhere

  if isinstance(batch.vision, FeatureBatch):
    vision = FeatureBatch(spread(batch.vision.features_MYD.shape[0], 1))
  else:
    patch = spread(batch.vision.window_P.shape[0], window)
    frame = spread(batch.vision.frame_NS.shape[0], 1)
    vision = VisionBatch(
      patches_PX=patch,
      position_P4=patch,
      window_P=patch,
      frame_P=patch,
      frame_NS=frame,
      slot_P=patch,
    )
  return TrainBatch(
    prefix=PrefixBatch(token_BT=row, position_BTA=row, valid_BT=row, feature_BT=row),
    prompt_R=row,
    token_RT=row,
    position_RTA=row,
    valid_RT=row,
    trained_RT=row,
    old_logp_RT=row,
    advantage_R=row,
    feature_RT=row,
    temperature_R=row,
    forbidden_V=everywhere,
    vision=vision,
  )


def place_train_batch(batch: TrainBatch, window: int, mesh: Mesh) -> TrainBatch:
  """NumPy rows on the host -> global arrays on the train mesh.

  With several processes each gives its own rows and its own windows, equally many; indices into
  patches, frames and features must then count over all processes.

  Args:
    batch: NumPy.
    window, mesh: as in `train_batch_shardings`.
  """
  shardings = train_batch_shardings(batch, window, mesh)

  def put(sharding: NamedSharding, x: Array) -> jax.Array:
    return jax.make_array_from_process_local_data(sharding, np.asarray(x))

  return jax.tree.map(put, shardings, batch)


def rollout_shardings(tree: Any, mesh: Mesh) -> Any:
  """Prompts and rows over `data`, KV heads of caches [R, K, S, C] over `tensor`, where they divide.

  Args:
    tree: arrays or abstract, each with prompts or rows in front.
    mesh: rollout mesh.
  """

  def one(leaf: Any) -> NamedSharding:
    if leaf.ndim == 4:
      return NamedSharding(mesh, attention_specs(mesh, leaf.shape[0], leaf.shape[1])[0])
    return NamedSharding(mesh, attention_specs(mesh, leaf.shape[0], 1)[1])

  return jax.tree.map(one, tree)
