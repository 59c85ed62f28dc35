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
  reference: int  # KL reference on the devices while it is used; 0 if resident, or without one
  weights: int  # decode parameters: merged, in the compute dtype or in 8 bits
  weights_scratch: int  # temporaries while they are made, before the caches
  prefix_cache: int  # keys and values of the prompts of all slots
  suffix_cache: int  # keys and values of what each row appends to its prompt
  gathered_rows: int  # copy of the suffix cache of the most rows that are gathered
  feature_buffer: int  # features of images
  gradients: int  # sum of the gradients of the trained parameters; 0 without an update
  update_scratch: int  # temporaries of the update besides that sum; 0 without an update
  logprob_scratch: int  # temporaries of the log-probabilities of the reference
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
  def resharding(self) -> int:
    """Bytes while the decode parameters are made from the train parameters."""
    return self.resident + self.weights + self.weights_scratch

  @property
  def reference_logprobs(self) -> int:
    """Bytes during the log-probabilities of the KL reference, before the update."""
    return self.resident + self.reference + self.logprob_scratch

  @property
  def total(self) -> int:
    """Bytes during the largest phase."""
    update = max(self.update, self.reference_logprobs) if self.gradients else 0
    return max(self.rollouts, self.resharding, update)

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
    text = f"{text}; update {self.update / MIB:,.0f} MiB ({_parts(update)})"
    if not self.reference:
      return text
    reference = {
      "resident": self.resident,
      "reference": self.reference,
      "estimated scratch": self.logprob_scratch,
    }
    size = self.reference_logprobs / MIB
    return f"{text}; reference log-probabilities {size:,.0f} MiB ({_parts(reference)})"


def check(plan: MemoryPlan, slots_key: str) -> None:
  """Checks that a plan fits the device.

  Args:
    slots_key: config key of `plan.cfg.slots`, to be lowered if the caches do not fit.

  Raises:
    ConfigError: if it does not fit; the message names the number of slots that would.
  """
  if plan.rollouts > plan.device:
    raise ConfigError(f"{plan}: the rollouts do not fit; {_how_rollouts_fit(plan, slots_key)}")
  if plan.resharding > plan.device:
    raise ConfigError(
      f"{plan}: the weights for sampling and {plan.weights_scratch / MIB:,.0f} MiB to make them do "
      "not fit; raise config.mesh.tensor"
    )
  if plan.total > plan.device:
    raise ConfigError(
      f"{plan}: the update does not fit; lower config.learn.micro.rows, set "
      "config.learn.reference to host, or config.learn.optimizer.mu_dtype and .gradient_dtype to "
      "bfloat16, freeze parameters (config.learn.optimizer.frozen) or train adapters "
      "(config.lora), or raise config.mesh.fsdp or .tensor"
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
  features: int  # image features in the batch, merged tokens
  tensor: int  # devices over which heads, MLP and vocabulary are sharded
  # Bytes of the table of the vocabulary, and of its gradient in float32, on every device that
  # shares them: gathered where parameters are sharded over fsdp. The matrices of one layer are
  # small beside them.
  table: int
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
  sizes = _token_sizes(cfg, shapes)
  prefix_tokens = shapes.prompts * shapes.prefix_tokens
  microbatch = (
    shapes.rows * shapes.tokens * (sizes.inputs + sizes.layer)
    # The prefix of each row, and its cotangent.
    + 2 * shapes.rows * shapes.prefix_tokens * sizes.cached
    + sizes.logits
  )
  tower = shapes.patches * shapes.itemsize * cfg.vision.width * (cfg.vision.layers + 8)
  # In float32; with a trained tower also their cotangents, of a microbatch and their sum.
  copies = 3 if shapes.patches else 1
  features = copies * 4 * shapes.features * cfg.vision.streams * cfg.decoder.width
  stored = prefix_tokens * (sizes.inputs + sizes.cached + sizes.summed)
  shared = gradients + shapes.table + tower + features + stored
  return shared + max(microbatch, prefix_tokens * sizes.layer)


def estimate_logprob_scratch(cfg: QwenVLConfig, shapes: UpdateShapes) -> int:
  """Estimates the temporaries of log-probabilities without a gradient, in bytes.

  The keys and values of all prefixes stay, and one layer of the prefixes or of a microbatch.
  """
  sizes = _token_sizes(cfg, shapes)
  prefix_tokens = shapes.prompts * shapes.prefix_tokens
  microbatch = (
    shapes.rows * shapes.tokens * sizes.layer // 2
    + shapes.rows * shapes.prefix_tokens * sizes.cached
    + sizes.logits
  )
  tower = shapes.patches * shapes.itemsize * cfg.vision.width * 8
  return (
    shapes.table
    + tower
    + prefix_tokens * sizes.cached
    + max(microbatch, prefix_tokens * sizes.layer // 2)
  )


class _TokenSizes(NamedTuple):
  """Bytes of one token on one device."""

  layer: int  # activations in one layer, and their cotangents
  inputs: int  # inputs of all layers
  cached: int  # keys and values in all layers
  summed: int  # their cotangents, summed in float32
  logits: int  # of one chunk of a microbatch, and their cotangents


def _token_sizes(cfg: QwenVLConfig, shapes: UpdateShapes) -> _TokenSizes:
  decoder, itemsize = cfg.decoder, shapes.itemsize
  kv = 2 * decoder.kv_heads * decoder.head_dim // shapes.tensor  # keys and values of a token
  wide = 2 * decoder.heads * decoder.head_dim + 3 * decoder.mlp_width
  return _TokenSizes(
    layer=2 * itemsize * (4 * decoder.width + wide // shapes.tensor + kv),
    inputs=decoder.layers * decoder.width * itemsize,
    cached=decoder.layers * kv * itemsize,
    summed=decoder.layers * kv * 4,
    logits=2 * 4 * shapes.rows * shapes.logprob_tokens * decoder.vocabulary // shapes.tensor,
  )


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
