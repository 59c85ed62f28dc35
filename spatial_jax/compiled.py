"""Every jitted function of a run: training runs them, `aot` compiles the same ones.

    decode_params     train parameters -> rollout mesh, unstacked     once per step
    JittedPrograms    see `rollout.engine`                            on the rollout mesh
    LearnPrograms     TrainState x TrainBatch -> TrainState, metrics  on the train mesh

Shardings are stated where data enters and leaves a program; inside, the compiler propagates them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from spatial_jax import sharding
from spatial_jax.learn.attention import batch_attention
from spatial_jax.learn.dpo import DpoLossConfig
from spatial_jax.learn.gradient import batch_logprobs
from spatial_jax.learn.losses import LossConfig, Metrics
from spatial_jax.learn.packed_update import (
  by_sequence,
  packed_dpo_update,
  packed_logprobs,
  packed_sft_update,
)
from spatial_jax.learn.train_batch import BatchConfig, Microbatches
from spatial_jax.learn.update import policy_update
from spatial_jax.policy import int8, lora, param_tree
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.reward.config import AttentionConfig
from spatial_jax.rollout.config import RolloutConfig, WeightForm
from spatial_jax.rollout.memory import UpdateShapes
from spatial_jax.rollout.programs import JittedPrograms
from spatial_jax.rollout.sampling import TokenMasks
from spatial_jax.types import Array, OtherLogprobs, PackedBatch, Params, TrainBatch, TrainState

# The TPU attention kernel reads sequences in blocks of this length.
TPU_SEQUENCE = 128

FrozenDtype = Literal["float32", "compute", "bfloat16"]


class PackedPrograms:
  """The jitted programs of SFT and DPO on packed rows, on the train mesh.

  Attributes:
    sft: (state, batch) -> the next state and scalar metrics; the state is donated.
    dpo: (state, batch, ref_logp_N) -> the same.
    sequence_logprobs: (params, batch, count) -> log-probability [N] of each of `count` sequences
      under a policy without adapters; `count` is static.
  """

  def __init__(
    self,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    micro: Microbatches,
    dpo: DpoLossConfig | None = None,
  ):
    """Jits the programs; nothing is compiled before a program is called."""
    self._policy, self._optimizer, self._dpo_cfg = policy, optimizer, dpo
    self._mesh = train_mesh(policy)
    self._micro = micro_buckets(micro, self._mesh)
    self._window = policy.cfg.vision.window_patches
    state = abstract_state(policy, optimizer, self._mesh)
    out = (jax.tree.map(lambda x: x.sharding, state), sharding.replicated(self._mesh))
    self.sft = jax.jit(self._sft, donate_argnums=0, out_shardings=out)
    self.dpo = jax.jit(self._dpo, donate_argnums=0, out_shardings=out)
    self.sequence_logprobs = jax.jit(
      self._sequence_logprobs,
      static_argnums=2,
      out_shardings=sharding.replicated(self._mesh),
    )

  def place(self, batch: PackedBatch) -> PackedBatch:
    """Moves a NumPy batch to the mesh as global arrays."""
    return sharding.place_packed_batch(batch, self._window, self._mesh)

  def _sft(self, state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]:
    return packed_sft_update(self._policy, self._optimizer, self._micro, state, self._shard(batch))

  def _dpo(
    self, state: TrainState, batch: PackedBatch, ref_logp_N: Array
  ) -> tuple[TrainState, Metrics]:
    assert self._dpo_cfg is not None  # no other stage calls it
    fixed = (self._policy, self._optimizer, self._micro, self._dpo_cfg)
    return packed_dpo_update(*fixed, state, self._shard(batch), ref_logp_N)

  def _sequence_logprobs(self, params: Params, batch: PackedBatch, count: int) -> jax.Array:
    base, _ = lora.split(params)
    batch = self._shard(batch)
    logp_RT = packed_logprobs(self._policy.without_adapters, self._micro, base, batch)
    return by_sequence(logp_RT, batch.rows, count)

  def _shard(self, batch: PackedBatch) -> PackedBatch:
    """The batch with its rows sharded over the mesh."""
    shardings = sharding.packed_batch_shardings(batch, self._window, self._mesh)
    return jax.lax.with_sharding_constraint(jax.tree.map(jnp.asarray, batch), shardings)


class LearnPrograms:
  """The jitted programs of the update on the train mesh.

  Attributes:
    update: (state, batch, others) -> the next state and scalar metrics, see `policy_update`. The
      state is donated.
    logprobs: (params, batch) -> log-probabilities [R, T] under a policy without adapters.
    policy_logprobs: (params, batch) -> the same with the adapters.
    attention: (params, batch) -> attention reward [R] of the policy, see `batch_attention`.
    local_row_shards: number of devices over which the rows of one process are sharded.
  """

  def __init__(
    self,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    micro: Microbatches,
    attention: AttentionConfig | None = None,
  ):
    """Jits the programs; nothing is compiled before a program is called.

    Args:
      micro: microbatches; lengths are rounded up for the platform.
      attention: of the attention reward; None if it is not measured.
    """
    self._attention_cfg = attention
    self._policy, self._optimizer, self._loss = policy, optimizer, loss
    self._mesh = train_mesh(policy)
    self._micro = micro_buckets(micro, self._mesh)
    self._window = policy.cfg.vision.window_patches
    state = abstract_state(policy, optimizer, self._mesh)
    # The state keeps its shardings.
    out = (jax.tree.map(lambda x: x.sharding, state), sharding.replicated(self._mesh))
    self.update = jax.jit(self._update, donate_argnums=0, out_shardings=out)
    rows = sharding.rows(self._mesh)
    self.logprobs = jax.jit(self._logprobs, out_shardings=rows)
    self.policy_logprobs = jax.jit(self._policy_logprobs, out_shardings=rows)
    self.attention = jax.jit(self._attention, out_shardings=rows)
    islands = sharding.island_mesh(self._mesh).shape["island"]
    self.local_row_shards = sharding.row_devices(self._mesh) // islands

  def place(self, batch: TrainBatch) -> TrainBatch:
    """Moves a NumPy batch to the mesh as global arrays, once per step, for all programs."""
    return sharding.place_train_batch(batch, self._window, self._mesh)

  def _update(
    self, state: TrainState, batch: TrainBatch, others: OtherLogprobs
  ) -> tuple[TrainState, Metrics]:
    fixed = (self._policy, self._optimizer, self._loss, self._micro)
    return policy_update(*fixed, state, self._shard(batch), others)

  def _logprobs(self, params: Params, batch: TrainBatch) -> jax.Array:
    base, _ = lora.split(params)
    return batch_logprobs(self._policy.without_adapters, self._micro, base, self._shard(batch))

  def _policy_logprobs(self, params: Params, batch: TrainBatch) -> jax.Array:
    return batch_logprobs(self._policy, self._micro, params, self._shard(batch))

  def _attention(self, params: Params, batch: TrainBatch) -> jax.Array:
    assert self._attention_cfg is not None  # no other run calls it
    fixed = (self._policy, self._micro, self._attention_cfg)
    return batch_attention(*fixed, params, self._shard(batch))

  def _shard(self, batch: TrainBatch) -> TrainBatch:
    """The batch with its rows sharded over the mesh."""
    shardings = sharding.train_batch_shardings(batch, self._window, self._mesh)
    return jax.lax.with_sharding_constraint(jax.tree.map(jnp.asarray, batch), shardings)


def train_mesh(policy: Policy) -> Mesh:
  """Returns the mesh that a policy is compiled for; one device if it has none."""
  return policy.mesh or sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])


def frozen_dtype(mesh: Mesh, name: FrozenDtype) -> jnp.dtype:
  """Returns the dtype in which parameters that are not trained are stored."""
  return compute_dtype(mesh) if name == "compute" else jnp.dtype(name)


def compute_dtype(mesh: Mesh) -> jnp.dtype:
  """Returns bfloat16, on CPU float32, which XLA multiplies four to eight times faster there."""
  return jnp.dtype(jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16)


def init_state(
  policy: Policy, optimizer: optax.GradientTransformation, params: Params, mesh: Mesh
) -> TrainState:
  """Returns a state at step 0; the moments are created with the shardings of the parameters."""
  shardings = sharding.param_shardings(jax.eval_shape(optimizer.init, params), mesh)
  opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
  step = jax.device_put(np.int32(0), sharding.replicated(mesh))
  return TrainState(params, opt_state, step)


def init_adapters(policy: Policy, key: jax.Array, mesh: Mesh) -> Params:
  """Returns new adapters of a policy, created with their shardings; {} if it has none."""

  def init(key: jax.Array) -> Params:
    return lora.split(policy.init(key))[1]

  shardings = sharding.param_shardings(jax.eval_shape(init, key), mesh)
  return jax.jit(init, out_shardings=shardings)(key)


def merge_adapters(policy: Policy, params: Params, mesh: Mesh) -> Params:
  """Merges adapters into the parameters, which are donated.

  Returns:
    Parameters of `policy.without_adapters` that compute the same function, in the dtypes of the
    given ones.
  """

  def merge(base: Params, adapters: Params) -> Params:
    params = lora.merged(param_tree.merge(base, adapters), policy.lora)
    return jax.tree.map(lambda x, kernel: x.astype(kernel.dtype), params, base)

  base, adapters = lora.split(params)
  out = sharding.param_shardings(base, mesh)
  return jax.jit(merge, donate_argnums=0, out_shardings=out)(base, adapters)


def abstract_state(
  policy: Policy, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """Returns a TrainState of ShapeDtypeStruct with shardings, to compile or to restore into."""
  params = policy.abstract_params()
  step = jax.ShapeDtypeStruct((), jnp.int32)
  state = TrainState(params, jax.eval_shape(optimizer.init, params), cast(jax.Array, step))
  return placed(state, sharding.param_shardings(cast(Any, state), mesh))


def placed(tree: Any, shardings: Any) -> Any:
  """Returns a tree of arrays or shapes as ShapeDtypeStruct with the given shardings."""

  def one(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  return jax.tree.map(one, tree, shardings)


def rollout_programs(
  policy: Policy, cfg: RolloutConfig, forbidden_ids: Sequence[int], stop_ids: Sequence[int]
) -> JittedPrograms:
  """Returns the rollout programs of a policy, on the rollout mesh of its train mesh.

  Args:
    forbidden_ids, stop_ids: tokens that are never sampled, and tokens that end a turn.
  """
  mesh = sharding.rollout_mesh(train_mesh(policy))
  ids = np.arange(policy.cfg.decoder.vocabulary)
  masks = TokenMasks(np.isin(ids, list(forbidden_ids)), np.isin(ids, list(stop_ids)))
  local = dataclasses.replace(policy.without_adapters, mesh=mesh)
  return JittedPrograms(local, cfg, masks, mesh)


def reshard(policy: Policy, mesh: Mesh, weights: WeightForm) -> jax.stages.Wrapped:
  """Returns a jitted function: train parameters -> island mesh, one tuple entry per layer.

  Parameters are cast to the compute dtype, which every use does anyway, so no bit changes. Adapters
  are merged, so that decoding does not compute them. With "int8" kernels are rounded to 8 bits.
  """

  def convert(params: Params) -> Params:
    params = policy.unstack(params)
    # One layer after the other: the float32 products of all layers would need twice the memory of
    # the result.
    decoder, vision = params["decoder"], lora.merged(params["vision"], policy.lora)
    layers = tuple(lora.merged(layer, policy.lora) for layer in decoder["layers"])
    params = {**params, "decoder": {**decoder, "layers": layers}, "vision": vision}
    params = jax.tree.map(lambda x: x.astype(policy.compute_dtype), params)
    return int8.quantized(params) if weights == "int8" else params

  abstract = jax.eval_shape(convert, policy.abstract_params())
  islands = sharding.island_mesh(mesh)
  return jax.jit(convert, out_shardings=sharding.param_shardings(abstract, islands))


def decode_params(policy: Policy, mesh: Mesh, weights: WeightForm) -> Callable[[Params], Params]:
  """Returns a function: train parameters -> rollout mesh of this process, once per step."""
  convert, local = reshard(policy, mesh, weights), sharding.rollout_mesh(mesh)
  return lambda params: sharding.local_view(convert(params), local)


def rollout_buckets(cfg: RolloutConfig, mesh: Mesh) -> RolloutConfig:
  """Rounds shapes up: slots and rows to multiples of the devices, on TPU lengths to 128.

  Returns:
    The config with which programs are compiled.
  """
  devices = sharding.island_mesh(mesh).shape["data"]
  slots = -(-cfg.slots // devices) * devices
  rows = min(-(-cfg.rows // devices) * devices, slots * cfg.group)
  cfg = dataclasses.replace(cfg, slots=slots, rows=rows)
  counts = {-(-count // devices) * devices for count in cfg.decode_row_counts}
  fractions = tuple(count / cfg.row_count for count in sorted(counts) if count < cfg.row_count)
  cfg = dataclasses.replace(cfg, gather_fractions=fractions)
  if not _is_tpu(mesh):
    return cfg
  vision = dataclasses.replace(cfg.vision, patches=_round_up(cfg.vision.patches))
  return dataclasses.replace(cfg, prompt_buckets=_round_up(cfg.prompt_buckets), vision=vision)


def batch_buckets(cfg: BatchConfig, mesh: Mesh) -> BatchConfig:
  """Rounds the lengths of the update up for the platform, like `rollout_buckets`."""
  if not _is_tpu(mesh):
    return cfg
  return dataclasses.replace(
    cfg,
    prefix_buckets=_round_up(cfg.prefix_buckets),
    tokens=_round_up((cfg.tokens,))[0],
    vision=dataclasses.replace(cfg.vision, patches=_round_up(cfg.vision.patches)),
  )


def micro_buckets(micro: Microbatches, mesh: Mesh) -> Microbatches:
  """Rounds the lengths of microbatches up for the platform, like `rollout_buckets`."""
  if not _is_tpu(mesh):
    return micro
  return dataclasses.replace(micro, lengths=_round_up(micro.lengths))


def update_shapes(
  policy: Policy, micro: Microbatches, batch: BatchConfig, prompts: int
) -> UpdateShapes:
  """Returns the largest sizes of the update on one device, for the memory plan.

  Args:
    micro, batch: shapes of the update, before they are rounded up.
    prompts: prompts of a step, of all processes.
  """
  mesh = train_mesh(policy)
  micro, batch = micro_buckets(micro, mesh), batch_buckets(batch, mesh)
  devices = sharding.row_devices(mesh)
  patches = batch.vision.windows[-1] * policy.cfg.vision.window_patches
  decoder, tensor = policy.cfg.decoder, mesh.shape["tensor"]
  path = "decoder/embed/embedding" if decoder.tied else "decoder/head/embedding"
  gradient = 0 if param_tree.matches(path, policy.frozen) else 4
  table = decoder.vocabulary * decoder.width // tensor * (policy.compute_dtype.itemsize + gradient)
  return UpdateShapes(
    prompts=-(-prompts // devices),
    prefix_tokens=batch.prefix_buckets[-1],
    rows=micro.rows,
    tokens=micro.lengths[-1],
    logprob_tokens=min(policy.logprob_chunk, micro.lengths[-1]),
    patches=-(-patches // devices) if policy.vision_trainable else 0,
    features=-(-patches // (devices * policy.cfg.vision.merge_size**2)),
    tensor=tensor,
    table=table if mesh.shape["fsdp"] > 1 else 0,
    itemsize=policy.compute_dtype.itemsize,
  )


def _is_tpu(mesh: Mesh) -> bool:
  return mesh.devices.flat[0].platform == "tpu"


def _round_up(buckets: tuple[int, ...]) -> tuple[int, ...]:
  """Buckets as multiples of TPU_SEQUENCE."""
  return tuple(sorted({-(-size // TPU_SEQUENCE) * TPU_SEQUENCE for size in buckets}))
