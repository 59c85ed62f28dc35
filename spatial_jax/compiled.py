"""Every jitted function of a run: `train` runs them, `aot` compiles the same ones.

    decode_params   train parameters -> rollout mesh, unstacked     once per step
    rollout         empty, pool, see, admit, begin, sample, observe on the rollout mesh
    update          TrainState x TrainBatch -> TrainState, metrics  on the train mesh, state donated

Shardings are stated where data enters and leaves a program; inside, the compiler follows them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from spatial_jax import sharding
from spatial_jax.learn.gradient import Microbatches, score_batch
from spatial_jax.learn.losses import LossConfig, Metrics
from spatial_jax.learn.train_batch import BatchConfig
from spatial_jax.learn.update import policy_update, sft_update
from spatial_jax.policy import int8, lora, param_tree
from spatial_jax.policy.config import VisionConfig
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout import device
from spatial_jax.rollout.config import RolloutConfig, WeightForm
from spatial_jax.rollout.device import ObservationBatch, PromptBatch, SampleState
from spatial_jax.rollout.engine import RolloutPrograms
from spatial_jax.rollout.sampling import SamplingArrays, Vocabulary
from spatial_jax.types import Array, Params, TrainBatch, TrainState, VisionBatch

# The TPU attention kernel reads sequences in blocks.
TPU_SEQUENCE = 128


@dataclasses.dataclass(frozen=True, eq=False)
class LearnPrograms:
  """The jitted update side.

  Attributes:
    place: NumPy batch -> global arrays, rows over the mesh; once per step, for all that follow.
    update: (state donated, batch, ref_logp_RT or None) -> (state, metrics): GRPO / AP-GRPO.
    sft: (state donated, batch) -> (state, metrics).
    score: (params, batch) -> logp_RT, of reference or old policy; adapters are off.
    blocks: devices that the rows of one process lie on.
  """

  place: Callable[[TrainBatch], TrainBatch]
  update: Callable[[TrainState, TrainBatch, Array | None], tuple[TrainState, Metrics]]
  sft: Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]
  score: Callable[[Params, TrainBatch], jax.Array]
  blocks: int


def train_mesh(policy: Policy) -> Mesh:
  """The mesh a policy is compiled for; one device when it names none."""
  return policy.mesh or sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])


def compute_dtype(mesh: Mesh) -> jnp.dtype:
  """bfloat16, but float32 on CPU, where XLA multiplies it four to eight times faster."""
  return jnp.dtype(jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16)


def window_patches(cfg: VisionConfig) -> int:
  """Patches in one attention window of the vision tower."""
  return (cfg.window_blocks * cfg.merge_size) ** 2


def init_state(
  policy: Policy, optimizer: optax.GradientTransformation, params: Params, mesh: Mesh
) -> TrainState:
  """A state around placed parameters; the optimizer's moments are born sharded like them."""
  shardings = sharding.param_shardings(jax.eval_shape(optimizer.init, params), mesh)
  opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
  step = jax.device_put(np.int32(0), sharding.replicated(mesh))
  return TrainState(params, opt_state, step)


def init_adapters(policy: Policy, key: jax.Array, mesh: Mesh) -> Params:
  """Fresh adapters of a policy, born sharded; {} where it has none."""

  def init(key: jax.Array) -> Params:
    return lora.split(policy.init(key))[1]

  shardings = sharding.param_shardings(jax.eval_shape(init, key), mesh)
  return jax.jit(init, out_shardings=shardings)(key)


def merge_adapters(policy: Policy, params: Params, mesh: Mesh) -> Params:
  """Parameters of `policy.without_adapters` that compute the same; those given are donated."""

  def merge(base: Params, adapters: Params) -> Params:
    return lora.merged(param_tree.merge(base, adapters), policy.lora)

  base, adapters = lora.split(params)
  out = sharding.param_shardings(base, mesh)
  return jax.jit(merge, donate_argnums=0, out_shardings=out)(base, adapters)


def abstract_state(
  policy: Policy, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """A TrainState of ShapeDtypeStruct with its shardings: to compile, or to restore into."""
  params = jax.eval_shape(policy.init, jax.random.key(0))
  step = jax.ShapeDtypeStruct((), jnp.int32)
  state = TrainState(params, jax.eval_shape(optimizer.init, params), cast(jax.Array, step))
  return placed(state, sharding.param_shardings(cast(Any, state), mesh))


def placed(tree: Any, shardings: Any) -> Any:
  """A tree of arrays or shapes as ShapeDtypeStruct, with a tree of shardings."""

  def one(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  return jax.tree.map(one, tree, shardings)


def learn_programs(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  loss: LossConfig,
  micro: Microbatches,
) -> LearnPrograms:
  """Update programs of one run, on the policy's mesh; the state comes out where it went in."""
  mesh = train_mesh(policy)
  micro = micro_buckets(micro, mesh)
  state = abstract_state(policy, optimizer, mesh)
  out = (jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh))
  window = window_patches(policy.cfg.vision)

  def lay(batch: TrainBatch) -> TrainBatch:
    shardings = sharding.train_batch_shardings(batch, window, mesh)
    return jax.lax.with_sharding_constraint(jax.tree.map(jnp.asarray, batch), shardings)

  def update(
    state: TrainState, batch: TrainBatch, ref_logp_RT: Array | None
  ) -> tuple[TrainState, Metrics]:
    return policy_update(policy, optimizer, loss, micro, state, lay(batch), ref_logp_RT)

  def sft(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
    return sft_update(policy, optimizer, micro, state, lay(batch))

  def score(params: Params, batch: TrainBatch) -> jax.Array:
    return score_batch(policy.without_adapters, micro, lora.split(params)[0], lay(batch))

  return LearnPrograms(
    place=lambda batch: sharding.place_train_batch(batch, window, mesh),
    update=jax.jit(update, donate_argnums=0, out_shardings=out),
    sft=jax.jit(sft, donate_argnums=0, out_shardings=out),
    score=jax.jit(score, out_shardings=sharding.rows(mesh)),
    blocks=sharding.row_devices(mesh) // sharding.island_mesh(mesh).shape["island"],
  )


def rollout_programs(
  policy: Policy, cfg: RolloutConfig, forbidden_ids: Sequence[int], stop_ids: Sequence[int]
) -> RolloutPrograms:
  """Rollout programs of a policy, on the rollout mesh that belongs to its train mesh.

  Args:
    policy: on its train mesh.
    cfg: shapes.
    forbidden_ids, stop_ids: tokens that are never sampled, and that end a turn.
  """
  mesh = sharding.rollout_mesh(train_mesh(policy))
  ids = np.arange(policy.cfg.decoder.vocabulary)
  words = Vocabulary(np.isin(ids, list(forbidden_ids)), np.isin(ids, list(stop_ids)))
  side = _RolloutFunctions(
    dataclasses.replace(policy.without_adapters, mesh=mesh), cfg, words, mesh
  )
  state = sharding.rollout_shardings(jax.eval_shape(lambda: side.empty(1)), mesh)
  everywhere = sharding.replicated(mesh)  # tokens gather features by index, from any image
  return RolloutPrograms(
    empty=jax.jit(side.empty, static_argnums=0, out_shardings=state),
    feature_buffer=jax.jit(side.feature_buffer, out_shardings=everywhere),
    encode_images=jax.jit(side.encode_images, donate_argnums=1, out_shardings=everywhere),
    prefill=jax.jit(side.prefill, donate_argnums=1, out_shardings=(state, everywhere)),
    start_rows=jax.jit(side.start_rows, donate_argnums=0, out_shardings=state),
    sample=jax.jit(
      side.sample,
      static_argnums=4,
      donate_argnums=1,
      out_shardings=(state, everywhere, everywhere),
    ),
    append=jax.jit(side.append, donate_argnums=1, out_shardings=(state, everywhere)),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _RolloutFunctions:
  """The functions behind `RolloutPrograms`, `policy` on the rollout mesh."""

  policy: Policy
  cfg: RolloutConfig
  words: Vocabulary
  mesh: Mesh

  def lay(self, tree: Any) -> Any:
    """The tree with its rows where the mesh has them."""
    tree = jax.tree.map(jnp.asarray, tree)
    return jax.lax.with_sharding_constraint(tree, sharding.rollout_shardings(tree, self.mesh))

  def empty(self, prefix_size: int) -> SampleState:
    cfg = self.cfg
    sizes = (prefix_size, cfg.suffix_block_sizes)
    return device.empty(self.policy, cfg.slots, cfg.group, cfg.row_count, *sizes)

  def feature_buffer(self) -> jax.Array:
    cfg = self.policy.cfg
    shape = (self.cfg.feature_buffer_tokens, cfg.vision.streams, cfg.decoder.width)
    return jnp.zeros(shape, self.policy.compute_dtype)

  def encode_images(
    self, params: Params, feature_buffer_MYD: Array, vision: VisionBatch, place_M: Array
  ) -> tuple[jax.Array, jax.Array]:
    features_MYD = self.policy.encode(params, vision)
    feature_buffer_MYD = jnp.asarray(feature_buffer_MYD).at[place_M].set(features_MYD, mode="drop")
    return feature_buffer_MYD, feature_buffer_MYD[0, 0, 0]

  def prefill(
    self,
    params: Params,
    state: SampleState,
    feature_buffer_MYD: Array,
    prompts: PromptBatch,
  ) -> tuple[SampleState, jax.Array]:
    state = device.prefill(
      self.policy, params, self.lay(state), feature_buffer_MYD, self.lay(prompts)
    )
    assert state.start is not None
    return state, state.start.hidden_BD[0, 0]

  def start_rows(
    self,
    state: SampleState,
    begins_R: Array,
    rollout_R: Array,
    row_BG: Array,
    sampling: SamplingArrays,
  ) -> SampleState:
    rows = self.lay((begins_R, rollout_R, row_BG, sampling))
    return device.start_rows(self.lay(state), *rows)

  def sample(
    self, params: Params, state: SampleState, halt_R: Array, row_R: Array | None, truncate: bool
  ) -> tuple[SampleState, jax.Array, jax.Array]:
    state = self.lay(state._replace(active_R=state.active_R & ~halt_R))
    steps = self.cfg.decode_steps
    few = state if row_R is None else self.lay(device.gather_rows(state, row_R, steps))
    few, token_RT, logp_RT = device.decode_steps_loop(
      self.policy, params, few, self.words, steps=steps, truncate=truncate
    )
    state = few if row_R is None else device.scatter_rows(state, few, row_R, steps)
    return state, token_RT, logp_RT

  def append(
    self, params: Params, state: SampleState, feature_buffer_MYD: Array, rows: ObservationBatch
  ) -> tuple[SampleState, jax.Array]:
    state = device.append(self.policy, params, self.lay(state), feature_buffer_MYD, self.lay(rows))
    return state, state.hidden_RD[0, 0]


def reshard(policy: Policy, mesh: Mesh, weights: WeightForm) -> jax.stages.Wrapped:
  """Jitted: train parameters -> island mesh, in the compute dtype, a tuple entry per layer.

  Every use casts to the compute dtype anyway, so that doing it once changes no bit. Adapters, where
  there are any, are merged, so that decoding does not pay for them; then kernels are rounded to 8
  bits where that is asked for.
  """

  def convert(params: Params) -> Params:
    params = lora.merged(params, policy.lora)
    params = policy.unstack(jax.tree.map(lambda x: x.astype(policy.compute_dtype), params))
    return int8.quantized(params) if weights == "int8" else params

  abstract = jax.eval_shape(convert, jax.eval_shape(policy.init, jax.random.key(0)))
  islands = sharding.island_mesh(mesh)
  return jax.jit(convert, out_shardings=sharding.param_shardings(abstract, islands))


def decode_params(policy: Policy, mesh: Mesh, weights: WeightForm) -> Callable[[Params], Params]:
  """Train parameters -> this process' rollout mesh: one resharding per step."""
  convert, local = reshard(policy, mesh, weights), sharding.rollout_mesh(mesh)
  return lambda params: sharding.local_view(convert(params), local)


def rollout_buckets(cfg: RolloutConfig, mesh: Mesh) -> RolloutConfig:
  """Slots and rows that divide over a process' devices; on TPU lengths in multiples of 128."""
  devices = sharding.island_mesh(mesh).shape["data"]
  slots = -(-cfg.slots // devices) * devices
  rows = min(-(-cfg.rows // devices) * devices, slots * cfg.group)
  cfg = dataclasses.replace(cfg, slots=slots, rows=rows)
  widths = {-(-width // devices) * devices for width in cfg.decode_row_counts}
  shares = tuple(width / cfg.row_count for width in sorted(widths) if width < cfg.row_count)
  cfg = dataclasses.replace(cfg, gather_fractions=shares)
  if not _is_tpu(mesh):
    return cfg
  vision = dataclasses.replace(cfg.vision, patches=_blocks(cfg.vision.patches))
  return dataclasses.replace(cfg, prompt_buckets=_blocks(cfg.prompt_buckets), vision=vision)


def batch_buckets(cfg: BatchConfig, mesh: Mesh) -> BatchConfig:
  """Lengths of the update, likewise."""
  if not _is_tpu(mesh):
    return cfg
  return dataclasses.replace(
    cfg,
    prefix_buckets=_blocks(cfg.prefix_buckets),
    tokens=_blocks((cfg.tokens,))[0],
    vision=dataclasses.replace(cfg.vision, patches=_blocks(cfg.vision.patches)),
  )


def micro_buckets(micro: Microbatches, mesh: Mesh) -> Microbatches:
  """Lengths of microbatches, likewise."""
  if not _is_tpu(mesh):
    return micro
  return dataclasses.replace(micro, lengths=_blocks(micro.lengths))


def _is_tpu(mesh: Mesh) -> bool:
  return mesh.devices.flat[0].platform == "tpu"


def _blocks(buckets: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(sorted({-(-size // TPU_SEQUENCE) * TPU_SEQUENCE for size in buckets}))
