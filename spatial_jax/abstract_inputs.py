"""Abstract inputs of the programs of a run: shapes, dtypes and shardings, enough to compile.

Every size is the last of its list of buckets, so the programs are compiled at their largest.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from spatial_jax import compiled, sharding
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.learn.dpo import DpoLossConfig
from spatial_jax.learn.gradient import NO_OTHERS
from spatial_jax.learn.losses import LossConfig
from spatial_jax.learn.packing import PackConfig
from spatial_jax.learn.train_batch import BatchConfig, Microbatches, kept_rows
from spatial_jax.policy.cache import rollout_shardings
from spatial_jax.policy.config import VisionConfig
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.device_inputs import ObservationBatch, PromptBatch, SamplingArrays
from spatial_jax.types import (
  FeatureBatch,
  PackedBatch,
  PackedRows,
  TokenArrays,
  TrainBatch,
  TrainRows,
  VisionBatch,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """A jitted function and one call of it."""

  name: str
  function: jax.stages.Wrapped
  arguments: tuple[Any, ...]  # trees of ShapeDtypeStruct with shardings, and static values
  resident: tuple[Any, ...]  # trees that are in memory meanwhile and are not arguments


def all_programs(
  policy: Policy,
  island: Policy,
  optimizer: optax.GradientTransformation,
  loss: LossConfig,
  micro: Microbatches,
  rollout: RolloutConfig,
  batch: BatchConfig,
  keep_fraction: float,
) -> list[Program]:
  """Returns the programs of a GRPO step in order, with their largest inputs.

  "decode_gathered" decodes the most rows that are gathered (`config.rollout.gather_fractions`).
  `policy` is on the train mesh, whose devices need not exist; `island` is on those of one process.
  """
  mesh = compiled.train_mesh(policy)
  local = sharding.rollout_mesh(compiled.train_mesh(island))

  def everywhere(tree: Any) -> Any:
    return compiled.placed(tree, jax.tree.map(lambda _: sharding.replicated(local), tree))

  run = compiled.rollout_programs(island, rollout, (), (0,))
  learn = compiled.LearnPrograms(policy, optimizer, loss, micro)
  reshard = compiled.reshard(policy, mesh, rollout.weights)
  train = compiled.abstract_state(policy, optimizer, mesh)
  weights = jax.eval_shape(reshard, train.params)
  weights = compiled.placed(weights, sharding.param_shardings(weights, local))
  state = jax.eval_shape(lambda: run.empty_state(rollout.prompt_buckets[-1]))
  halt_R = _struct(state.active_R.shape, jnp.bool_)
  starts, halt_R = everywhere((_starts(rollout, state.sampling), halt_R))
  state = compiled.placed(state, rollout_shardings(state, local))
  buffer = everywhere(jax.eval_shape(run.empty_feature_buffer))
  calls = _vision_call(policy.cfg.vision, rollout.vision), _prompts(rollout), _observations(rollout)
  vision, prompts, observations = everywhere(calls)
  learned = _placed_train_batch(policy, rollout, batch, keep_fraction)
  truncates = rollout.sampling.truncates
  programs = [
    Program("decode_params", reshard, (train.params,), (train.opt_state,)),
    Program("encode_images", run.encode_images, (weights, buffer, *vision), (train, state)),
    Program("prefill", run.prefill, (weights, state, buffer, prompts), (train,)),
    Program("start_rows", run.start_rows, (state, *starts), (train, weights, buffer)),
    Program("decode", run.decode, (weights, state, halt_R, None, truncates), (train, buffer)),
    Program("append", run.append, (weights, state, buffer, observations), (train,)),
    Program("update", learn.update, (train, learned, NO_OTHERS), ()),
  ]
  if gathered := rollout.decode_row_counts[:-1]:
    row_R = everywhere(_struct((gathered[-1],), jnp.int32))
    arguments = (weights, state, halt_R, row_R, truncates)
    programs.insert(5, Program("decode_gathered", run.decode, arguments, (train, buffer)))
  return programs


def _placed_train_batch(
  policy: Policy, rollout: RolloutConfig, batch: BatchConfig, keep_fraction: float
) -> TrainBatch:
  """The largest batch of all processes, with its shardings."""
  mesh, vision = compiled.train_mesh(policy), policy.cfg.vision
  prompts = rollout.prompts * sharding.island_mesh(mesh).shape["island"]
  count = kept_rows(prompts * rollout.group, keep_fraction, sharding.row_devices(mesh))
  learned = train_batch(vision, prompts, count, batch)
  if not policy.vision_trainable:
    learned = learned._replace(vision=FeatureBatch(_features(policy, batch.vision)))
  window = vision.window_patches
  return compiled.placed(learned, sharding.train_batch_shardings(learned, window, mesh))


def train_batch(vision: VisionConfig, prompts: int, count: int, cfg: BatchConfig) -> TrainBatch:
  """Returns a TrainBatch of ShapeDtypeStruct at its largest buckets: `count` rows."""
  each_R = _struct((count,), jnp.float32)
  index_R = _struct((count,), jnp.int32)
  return TrainBatch(
    prefix=_tokens(prompts, cfg.prefix_buckets[-1]),
    rows=TrainRows(
      tokens=_tokens(count, cfg.tokens),
      trained_RT=_struct((count, cfg.tokens), jnp.bool_),
      old_logp_RT=_struct((count, cfg.tokens), jnp.float32),
      advantage_R=each_R,
      temperature_R=each_R,
      prefix_R=index_R,
      group_R=index_R,
      weight_R=each_R,
    ),
    forbidden_V=_struct((cfg.vocabulary,), jnp.bool_),
    vision=_vision(vision, cfg.vision),
  )


def packed_programs(
  name: Literal["sft", "dpo"],
  policy: Policy,
  optimizer: optax.GradientTransformation,
  micro: Microbatches,
  shapes: PackConfig,
  loss: DpoLossConfig,
  sequences: int,
) -> list[Program]:
  """Returns the update of SFT or DPO with the largest batch of packed rows, and DPO's reference.

  Args:
    loss: of DPO.
    sequences: of a batch.
  """
  mesh = compiled.train_mesh(policy)
  programs = compiled.PackedPrograms(policy, optimizer, micro, loss)
  train = compiled.abstract_state(policy, optimizer, mesh)
  batch = packed_batch(policy.cfg.vision, shapes)
  window = policy.cfg.vision.window_patches
  batch = compiled.placed(batch, sharding.packed_batch_shardings(batch, window, mesh))
  if name == "sft":
    return [Program("sft update", programs.sft, (train, batch), ())]
  ref_logp_N = compiled.placed(_struct((sequences,), jnp.float32), sharding.replicated(mesh))
  reference = programs.sequence_logprobs, (train.params, batch, sequences), (train.opt_state,)
  return [
    Program("dpo reference", *reference),
    Program("dpo update", programs.dpo, (train, batch, ref_logp_N), ()),
  ]


def packed_batch(vision: VisionConfig, cfg: PackConfig) -> PackedBatch:
  """Returns a PackedBatch of ShapeDtypeStruct at its largest buckets."""
  shape = cfg.rows[-1], cfg.tokens
  return PackedBatch(
    rows=PackedRows(
      tokens=_tokens(*shape)._replace(valid_RT=_struct(shape, jnp.int32)),
      trained_RT=_struct(shape, jnp.bool_),
      sequence_RT=_struct(shape, jnp.int32),
      weight_RT=_struct(shape, jnp.float32),
    ),
    forbidden_V=_struct((cfg.vocabulary,), jnp.bool_),
    vision=_vision(vision, cfg.vision),
  )


def _tokens(rows: int, size: int) -> TokenArrays:
  return TokenArrays(
    token_RT=_struct((rows, size), jnp.int32),
    position_RTA=_struct((rows, size, 3), jnp.int32),
    valid_RT=_struct((rows, size), jnp.bool_),
    feature_RT=_struct((rows, size), jnp.int32),
  )


def _struct(shape: tuple[int, ...], dtype: Any) -> Any:
  return jax.ShapeDtypeStruct(shape, dtype)


def _vision(cfg: VisionConfig, buckets: VisionBuckets) -> VisionBatch:
  patches = buckets.windows[-1] * cfg.window_patches
  frames = (buckets.frames[-1], buckets.patches[-1])
  return VisionBatch.build(_struct, patches, cfg.patch_values, *frames)


def _vision_call(cfg: VisionConfig, buckets: VisionBuckets) -> tuple[VisionBatch, Any]:
  """Images of one call of the vision tower, and the buffer row of each feature."""
  tokens = buckets.windows[-1] * cfg.window_blocks**2
  return _vision(cfg, buckets), _struct((tokens,), jnp.int32)


def _features(policy: Policy, buckets: VisionBuckets) -> Any:
  """Features [M, Y, D] of the largest vision batch."""
  cfg = policy.cfg
  tokens = buckets.windows[-1] * cfg.vision.window_blocks**2
  return _struct((tokens, cfg.vision.streams, cfg.decoder.width), policy.compute_dtype)


def _prompts(cfg: RolloutConfig) -> PromptBatch:
  count, size = cfg.prefill[-1], cfg.prompt_buckets[-1]
  return PromptBatch(
    slot_B=_struct((count,), jnp.int32),
    tokens=_tokens(count, size),
    next_position_B=_struct((count,), jnp.int32),
  )


def _starts(cfg: RolloutConfig, sampling: SamplingArrays) -> tuple[Any, Any, Any, SamplingArrays]:
  count = (cfg.row_count,)
  row_BG = _struct((cfg.slots, cfg.group), jnp.int32)
  return _struct(count, jnp.bool_), _struct(count, jnp.int32), row_BG, sampling


def _observations(cfg: RolloutConfig) -> ObservationBatch:
  count, size = cfg.append[-1], cfg.observation_buckets[-1]
  each_R = _struct((count,), jnp.int32)
  return ObservationBatch(
    row_R=each_R,
    start_R=each_R,
    count_R=each_R,
    limit_R=each_R,
    tokens=_tokens(count, size),
    next_position_R=each_R,
  )
