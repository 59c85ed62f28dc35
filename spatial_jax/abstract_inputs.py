"""Abstract inputs of the programs of a run: shapes, dtypes and shardings, enough to compile.

Every size is the last of its list of buckets, so the programs are compiled at their largest.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spatial_jax import compiled, sharding
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.learn.losses import LossConfig
from spatial_jax.learn.train_batch import BatchConfig, Microbatches, kept_rows
from spatial_jax.policy.cache import rollout_shardings
from spatial_jax.policy.config import VisionConfig
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.device import SampleState
from spatial_jax.rollout.device_inputs import ObservationBatch, PromptBatch, SamplingArrays
from spatial_jax.types import (
  FeatureBatch,
  Params,
  TokenArrays,
  TrainBatch,
  TrainRows,
  TrainState,
  VisionBatch,
)


@dataclasses.dataclass(frozen=True, eq=False)
class ProgramInputs:
  """The largest inputs of the programs of a step: trees of ShapeDtypeStruct with shardings.

  Attributes:
    train_state, train_batch: of the update, on the train mesh.
    weights: decode parameters; this and all others are on the rollout mesh.
    vision: images of one call of the vision tower, and the buffer row of each feature.
    feature_buffer_MYD: features of images.
    prompts: of one call of prefill.
    starts: starts_R, rollout_R, row_BG and SamplingArrays of start_rows.
    state: SampleState with the whole cache.
    halt_R: rows that stop.
    observations: of one call of append.
    gathered_R: the most rows that are gathered to be decoded; None if rows are never gathered.
  """

  train_state: TrainState
  train_batch: TrainBatch
  weights: Params
  vision: tuple[VisionBatch, Any]
  feature_buffer_MYD: Any
  prompts: PromptBatch
  starts: tuple[Any, Any, Any, SamplingArrays]
  state: SampleState
  halt_R: Any
  observations: ObservationBatch
  gathered_R: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """A jitted function and one call of it.

  Attributes:
    name: of the program.
    function: jitted.
    arguments: trees of ShapeDtypeStruct with shardings, and static values.
    resident: trees that are in memory while the program runs and are not arguments.
  """

  name: str
  function: jax.stages.Wrapped
  arguments: tuple[Any, ...]
  resident: tuple[Any, ...]


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

  Args:
    policy: on the train mesh, whose devices need not exist.
    island: the policy on the devices of one process; `policy` itself if there is one process.
    optimizer, loss, micro: of the update.
    rollout, batch: shapes; the last of each list of buckets is used.
    keep_fraction: fraction of the rollouts that the update uses.
  """
  run = compiled.rollout_programs(island, rollout, (), (0,))
  learn = compiled.LearnPrograms(policy, optimizer, loss, micro)
  reshard = compiled.reshard(policy, compiled.train_mesh(policy), rollout.weights)
  x = largest_inputs(policy, island, optimizer, rollout, batch, keep_fraction)
  train, weights, state, buffer = x.train_state, x.weights, x.state, x.feature_buffer_MYD
  truncates = rollout.sampling.truncates
  decode = (weights, state, x.halt_R, None, truncates)
  gathered = (weights, state, x.halt_R, x.gathered_R, truncates)
  programs = [
    Program("decode_params", reshard, (train.params,), (train.opt_state,)),
    Program("encode_images", run.encode_images, (weights, buffer, *x.vision), (train, state)),
    Program("prefill", run.prefill, (weights, state, buffer, x.prompts), (train,)),
    Program("start_rows", run.start_rows, (state, *x.starts), (train, weights, buffer)),
    Program("decode", run.decode, decode, (train, buffer)),
    Program("decode_gathered", run.decode, gathered, (train, buffer)),
    Program("append", run.append, (weights, state, buffer, x.observations), (train,)),
    Program("update", learn.update, (train, x.train_batch, None), ()),
  ]
  return [p for p in programs if p.name != "decode_gathered" or x.gathered_R is not None]


def largest_inputs(
  policy: Policy,
  island: Policy,
  optimizer: optax.GradientTransformation,
  rollout: RolloutConfig,
  batch: BatchConfig,
  keep_fraction: float,
) -> ProgramInputs:
  """Returns the largest inputs of the programs; arguments as in `all_programs`."""
  mesh, cfg = compiled.train_mesh(policy), policy.cfg
  local = sharding.rollout_mesh(compiled.train_mesh(island))
  everywhere, gathered = sharding.replicated(local), rollout.decode_row_counts[:-1]
  train_state = compiled.abstract_state(policy, optimizer, mesh)
  weights = jax.eval_shape(compiled.reshard(policy, mesh, rollout.weights), train_state.params)
  weights = compiled.placed(weights, sharding.param_shardings(weights, local))
  run = compiled.rollout_programs(island, rollout, (), (0,))
  state = jax.eval_shape(lambda: run.empty_state(rollout.prompt_buckets[-1]))
  prompts = rollout.prompts * sharding.island_mesh(mesh).shape["island"]
  count = kept_rows(prompts * rollout.group, keep_fraction, sharding.row_devices(mesh))
  learned = train_batch(cfg.vision, prompts, count, batch)
  if not policy.vision_trainable:
    learned = learned._replace(vision=FeatureBatch(_features(policy, batch.vision)))
  window = cfg.vision.window_patches
  tokens = rollout.vision.windows[-1] * cfg.vision.window_blocks**2
  vision = (_vision(cfg.vision, rollout.vision), _struct((tokens,), jnp.int32))
  gathered_R = _struct((gathered[-1],), jnp.int32) if gathered else None
  return ProgramInputs(
    train_state=train_state,
    train_batch=compiled.placed(learned, sharding.train_batch_shardings(learned, window, mesh)),
    weights=weights,
    vision=_everywhere(vision, everywhere),
    feature_buffer_MYD=_everywhere(jax.eval_shape(run.empty_feature_buffer), everywhere),
    prompts=_everywhere(_prompts(rollout), everywhere),
    starts=_everywhere(_starts(rollout, state.sampling), everywhere),
    state=compiled.placed(state, rollout_shardings(state, local)),
    halt_R=_everywhere(_struct(state.active_R.shape, jnp.bool_), everywhere),
    observations=_everywhere(_observations(rollout), everywhere),
    gathered_R=_everywhere(gathered_R, everywhere),
  )


def train_batch(vision: VisionConfig, prompts: int, count: int, cfg: BatchConfig) -> TrainBatch:
  """Returns a TrainBatch of ShapeDtypeStruct at its largest buckets.

  Args:
    vision: shape of the vision tower.
    prompts: number of prefixes.
    count: number of rows.
    cfg: buckets.
  """
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
      role_R=index_R,
      weight_R=each_R,
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


def _everywhere(tree: Any, place: jax.sharding.Sharding) -> Any:
  return compiled.placed(tree, jax.tree.map(lambda _: place, tree))


def _vision(cfg: VisionConfig, buckets: VisionBuckets) -> VisionBatch:
  patches = buckets.windows[-1] * cfg.window_patches
  frames = (buckets.frames[-1], buckets.patches[-1])
  return VisionBatch.build(_struct, patches, cfg.patch_values, *frames)


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
