"""Bytes on each device during rollouts and during the update: the plan, and whether it fits."""

import math
import os
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from spatial_jax.config import ConfigError
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.rollout.config import RolloutConfig

MIB = 1 << 20


class MemoryPlan(NamedTuple):
  """Bytes on each device; rollouts and update follow each other and free their arrays."""

  resident: int  # arrays of others that exist all the time: the train state, other policies
  weights: int  # decode parameters: merged, in the compute dtype or in 8 bits
  prefix_cache: int  # keys and values of the prompts of all slots
  suffix_cache: int  # keys and values of what each row appends to its prompt
  gathered_rows: int  # copy of the suffix cache of the most rows that are gathered
  feature_buffer: int  # features of images
  gradients: int  # of the trainable parameters, float32; 0 without an update
  update_scratch: int  # temporaries of the update besides the gradients; 0 without an update
  cfg: RolloutConfig  # shapes of the caches
  data_devices: int  # number of devices that the slots divide over
  device: int  # bytes of one device

  @property
  def caches(self) -> int:
    """Bytes of all key/value caches."""
    return self.prefix_cache + self.suffix_cache + self.gathered_rows

  @property
  def rollouts(self) -> int:
    """Bytes during rollouts, without the scratch of the programs."""
    return self.resident + self.weights + self.caches + self.feature_buffer

  @property
  def update(self) -> int:
    """Bytes during the update."""
    return self.resident + self.gradients + self.update_scratch

  @property
  def total(self) -> int:
    """Bytes during the larger of the two phases."""
    return max(self.rollouts, self.update if self.gradients else 0)

  def __str__(self) -> str:
    rollouts = {
      "resident": self.resident,
      "weights": self.weights,
      "prompt cache": self.prefix_cache,
      "suffix cache": self.suffix_cache,
      "gathered rows": self.gathered_rows,
      "feature buffer": self.feature_buffer,
    }
    text = (
      f"memory per device: rollouts {self.rollouts / MIB:,.0f} of {self.device / MIB:,.0f} MiB "
      f"({_parts(rollouts)})"
    )
    if not self.gradients:
      return text
    update = {
      "resident": self.resident,
      "gradients": self.gradients,
      "estimated scratch": self.update_scratch,
    }
    return f"{text}; update {self.update / MIB:,.0f} MiB ({_parts(update)})"


def check(plan: MemoryPlan, slots_key: str) -> None:
  """Checks that a plan fits the device.

  Args:
    slots_key: config key of `plan.cfg.slots`, to be lowered if the caches do not fit.

  Raises:
    ConfigError: if it does not fit; the message names the number of slots that would.
  """
  if plan.rollouts > plan.device:
    raise ConfigError(f"{plan}: the rollouts do not fit; {_how_rollouts_fit(plan, slots_key)}")
  if plan.total > plan.device:
    raise ConfigError(
      f"{plan}: the update does not fit; lower config.learn.micro.rows, freeze parameters "
      "(config.learn.optimizer.frozen) or train adapters (config.lora), or raise config.mesh.fsdp "
      "or .tensor"
    )


def _how_rollouts_fit(plan: MemoryPlan, slots_key: str) -> str:
  """What to change in the config so that the rollouts fit."""
  cfg = plan.cfg
  left = plan.device - plan.resident - plan.weights - plan.feature_buffer
  rows = plan.suffix_cache + plan.gathered_rows
  if cfg.rows:  # their number does not depend on the slots
    slots = (left - rows) * cfg.slots // plan.prefix_cache
  else:
    slots = left * cfg.slots // plan.caches
  slots = slots // plan.data_devices * plan.data_devices
  if slots * cfg.group >= max(cfg.rows, 1):
    return f"lower {slots_key} to {slots}"
  return (
    f"lower {slots_key}, or config.rollout: rows, feature_buffer_tokens, stop.max_response_tokens, "
    "prompt_buckets; or raise config.mesh.fsdp or .tensor"
  )


def _parts(sizes: dict[str, int]) -> str:
  return ", ".join(f"{name} {size / MIB:,.0f}" for name, size in sizes.items())


# --- the update ----------------------------------------------------------------------------------


class UpdateShapes(NamedTuple):
  """Sizes of the update on one device."""

  # prompts, prefix_tokens: prefixes and their padded length.
  prompts: int
  prefix_tokens: int
  # rows, tokens: rows of one microbatch and their padded length.
  rows: int
  tokens: int
  logprob_tokens: int  # tokens per row whose logits exist at once
  patches: int  # of the vision batch; 0 if the vision tower is frozen
  tensor: int  # devices over which heads, MLP and vocabulary are sharded
  itemsize: int  # bytes of the compute dtype


def estimate_update_scratch(cfg: QwenVLConfig, shapes: UpdateShapes, gradients: int) -> int:
  """Estimates the temporaries of the update, without compiling it.

  With remat, only the inputs of the layers are stored, besides the activations of one layer. The
  prefixes of all prompts stay in memory while the microbatches run one after the other; then one
  layer of all prefixes is differentiated at a time. Attention scores are never stored.

  Args:
    gradients: bytes of the gradients; those of one microbatch are added to their sum.

  Returns:
    Bytes.
  """
  decoder, vision, itemsize = cfg.decoder, cfg.vision, shapes.itemsize
  kv = 2 * decoder.kv_heads * decoder.head_dim // shapes.tensor  # keys and values of a token
  wide = 2 * decoder.heads * decoder.head_dim + 3 * decoder.mlp_width
  # Activations of a token in one layer, and their cotangents.
  layer = 2 * itemsize * (4 * decoder.width + wide // shapes.tensor + kv)
  inputs = decoder.layers * decoder.width * itemsize  # of all layers, per token
  cached = decoder.layers * kv * itemsize  # keys and values in all layers, per token
  summed = decoder.layers * kv * 4  # their cotangents, summed in float32
  prefix_tokens = shapes.prompts * shapes.prefix_tokens
  logits = 2 * 4 * shapes.rows * shapes.logprob_tokens * decoder.vocabulary // shapes.tensor
  microbatch = (
    shapes.rows * shapes.tokens * (inputs + layer)
    + 2 * shapes.rows * shapes.prefix_tokens * cached  # the prefix of each row, and its cotangent
    + logits
  )
  tower = shapes.patches * itemsize * vision.width * (vision.layers + 8)
  stored = prefix_tokens * (inputs + cached + summed)
  return gradients + tower + stored + max(microbatch, prefix_tokens * layer)


# --- sizes ---------------------------------------------------------------------------------------


def bytes_of(*trees: Any) -> int:
  """Returns the bytes of trees of arrays, or of shapes with shardings, on each device."""
  return sum(tree_bytes(tree, jax.tree.map(lambda x: x.sharding, tree)) for tree in trees)


def device_bytes(mesh: Mesh) -> int:
  """Returns the bytes that one device of this process has; CPU devices share the machine's."""
  device = mesh.local_devices[0]
  statistics = device.memory_stats() or {}
  if "bytes_limit" in statistics:
    return int(statistics["bytes_limit"])
  machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return machine // len(mesh.local_devices)


def tree_bytes(tree: Any, shardings: Any) -> int:
  """Returns the bytes of one device's shards of a tree of arrays or shapes."""
  sizes = jax.tree.map(
    lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings
  )
  return sum(jax.tree.leaves(sizes))
