"""What the programs of a run are called with: shapes, dtypes and shardings, enough to compile.

Every size is the last of its list of buckets: what is compiled is the largest that can occur.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from spatial_jax import compiled, sharding
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.learn.gradient import Microbatches
from spatial_jax.learn.losses import LossConfig
from spatial_jax.learn.train_batch import BatchConfig, kept_rows
from spatial_jax.policy.config import VisionConfig
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.device import ObservationBatch, PromptBatch, SampleState
from spatial_jax.rollout.sampling import SamplingArrays
from spatial_jax.types import FeatureBatch, Params, PrefixBatch, TrainBatch, TrainState, VisionBatch


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
  """What the programs of a step are called with at their largest: trees of ShapeDtypeStruct.

  Attributes:
    state, batch: of the update, on the train mesh.
    weights: decode parameters; like all that follows, on the rollout mesh.
    vision: images of one call of the tower, and the row of the pool of each feature.
    feature_buffer_MYD: features of images.
    prompts: of one call.
    begins: begins_R, rollout_R, row_BG, Sampling.
    rows: SampleState with the whole cache.
    halt_R, observations: of one call.
    few_R: the most rows that are decoded by themselves; None: never any.
  """

  state: TrainState
  batch: TrainBatch
  weights: Params
  vision: tuple[VisionBatch, Any]
  feature_buffer_MYD: Any
  prompts: PromptBatch
  begins: tuple[Any, Any, Any, SamplingArrays]
  rows: SampleState
  halt_R: Any
  observations: ObservationBatch
  few_R: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """A jitted function and one call of it.

  Attributes:
    name: of the step of a run.
    function: jitted.
    arguments: trees of ShapeDtypeStruct with shardings, and static values.
    beside: trees that lie on the same chips meanwhile and are none of the arguments.
  """

  name: str
  function: jax.stages.Wrapped
  arguments: tuple[Any, ...]
  beside: tuple[Any, ...]


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
  """The programs of a reinforcement-learning step, in order, with their largest abstract inputs.

  The decode program of few rows (`config.rollout.gather_fractions`) is compiled at its widest.

  Args:
    policy: its mesh may be of devices that are not there.
    island: the same on the devices of one process; `policy` itself where there is one process.
    optimizer, loss, micro: of the update.
    rollout, batch: shapes; the last of each list of buckets is taken.
    keep_fraction: of the rollouts that the update learns from.
  """
  run = compiled.rollout_programs(island, rollout, (), (0,))
  learn = compiled.learn_programs(policy, optimizer, loss, micro)
  x = largest_inputs(policy, island, optimizer, rollout, batch, keep_fraction)
  state, weights, rows, pool = x.state, x.weights, x.rows, x.feature_buffer_MYD
  truncates = rollout.sampling.truncates
  calls = [
    (
      "decode_params",
      compiled.reshard(policy, compiled.train_mesh(policy), rollout.weights),
      (state.params,),
      (state.opt_state,),
    ),
    ("encode_images", run.encode_images, (weights, pool, *x.vision), (state, rows)),
    ("admit", run.prefill, (weights, rows, pool, x.prompts), (state,)),
    ("begin", run.start_rows, (rows, *x.begins), (state, weights, pool)),
    ("sample", run.sample, (weights, rows, x.halt_R, None, truncates), (state, pool)),
    ("sample_few", run.sample, (weights, rows, x.halt_R, x.few_R, truncates), (state, pool)),
    ("observe", run.append, (weights, rows, pool, x.observations), (state,)),
    ("update", learn.update, (state, x.batch, None), (weights,)),
  ]
  return [
    Program(name, cast(jax.stages.Wrapped, function), arguments, beside)
    for name, function, arguments, beside in calls
    if name != "sample_few" or x.few_R is not None
  ]


def largest_inputs(
  policy: Policy,
  island: Policy,
  optimizer: optax.GradientTransformation,
  rollout: RolloutConfig,
  batch: BatchConfig,
  keep_fraction: float,
) -> Inputs:
  """See `Inputs`; arguments as in `all_programs`."""
  mesh, cfg = compiled.train_mesh(policy), policy.cfg
  local = sharding.rollout_mesh(compiled.train_mesh(island))
  everywhere, few = sharding.replicated(local), rollout.decode_row_counts[:-1]
  state = compiled.abstract_state(policy, optimizer, mesh)
  weights = jax.eval_shape(compiled.reshard(policy, mesh, rollout.weights), state.params)
  weights = compiled.placed(weights, sharding.param_shardings(weights, local))
  run = compiled.rollout_programs(island, rollout, (), (0,))
  rows = jax.eval_shape(lambda: run.empty(rollout.prompt_buckets[-1]))
  asked = rollout.prompts * sharding.island_mesh(mesh).shape["island"]
  count = kept_rows(asked * rollout.group, keep_fraction, sharding.row_devices(mesh))
  learned = train_batch(cfg.vision, asked, count, batch)
  if not policy.vision_trainable:
    learned = learned._replace(vision=FeatureBatch(_features(policy, batch.vision)))
  window = compiled.window_patches(cfg.vision)
  tokens = rollout.vision.windows[-1] * cfg.vision.window_blocks**2
  vision = (_vision(cfg.vision, rollout.vision), _struct((tokens,), jnp.int32))
  return Inputs(
    state=state,
    batch=compiled.placed(learned, sharding.train_batch_shardings(learned, window, mesh)),
    weights=weights,
    vision=_everywhere(vision, everywhere),
    feature_buffer_MYD=_everywhere(jax.eval_shape(run.feature_buffer), everywhere),
    prompts=_everywhere(_prompts(rollout), everywhere),
    begins=_everywhere(_begins(rollout, rows.sampling), everywhere),
    rows=compiled.placed(rows, sharding.rollout_shardings(rows, local)),
    halt_R=_everywhere(_struct(rows.active_R.shape, jnp.bool_), everywhere),
    observations=_everywhere(_observations(rollout), everywhere),
    few_R=_everywhere(_struct((few[-1],), jnp.int32), everywhere) if few else None,
  )


def train_batch(vision: VisionConfig, prompts: int, count: int, cfg: BatchConfig) -> TrainBatch:
  """`count` rows behind `prompts` prefixes, ShapeDtypeStruct: the last of each list of buckets."""
  size, prefix_size = cfg.tokens, cfg.prefix_buckets[-1]
  return TrainBatch(
    prefix=PrefixBatch(
      token_BT=_struct((prompts, prefix_size), jnp.int32),
      position_BTA=_struct((prompts, prefix_size, 3), jnp.int32),
      valid_BT=_struct((prompts, prefix_size), jnp.bool_),
      feature_BT=_struct((prompts, prefix_size), jnp.int32),
    ),
    prompt_R=_struct((count,), jnp.int32),
    token_RT=_struct((count, size), jnp.int32),
    position_RTA=_struct((count, size, 3), jnp.int32),
    valid_RT=_struct((count, size), jnp.bool_),
    trained_RT=_struct((count, size), jnp.bool_),
    old_logp_RT=_struct((count, size), jnp.float32),
    advantage_R=_struct((count,), jnp.float32),
    feature_RT=_struct((count, size), jnp.int32),
    temperature_R=_struct((count,), jnp.float32),
    forbidden_V=_struct((cfg.vocabulary,), jnp.bool_),
    vision=_vision(vision, cfg.vision),
  )


def _struct(shape: tuple[int, ...], dtype: Any) -> Any:
  return jax.ShapeDtypeStruct(shape, dtype)


def _everywhere(tree: Any, place: jax.sharding.Sharding) -> Any:
  return compiled.placed(tree, jax.tree.map(lambda _: place, tree))


def _vision(cfg: VisionConfig, buckets: VisionBuckets) -> VisionBatch:
  patches = buckets.windows[-1] * compiled.window_patches(cfg)
  return VisionBatch(
    patches_PX=_struct((patches, cfg.patch_values), jnp.float32),
    position_P4=_struct((patches, 4), jnp.int32),
    window_P=_struct((patches,), jnp.int32),
    frame_P=_struct((patches,), jnp.int32),
    frame_NS=_struct((buckets.frames[-1], buckets.patches[-1]), jnp.int32),
    slot_P=_struct((patches,), jnp.int32),
  )


def _features(policy: Policy, buckets: VisionBuckets) -> Any:
  """features_MYD of the largest vision batch."""
  cfg = policy.cfg
  tokens = buckets.windows[-1] * cfg.vision.window_blocks**2
  return _struct((tokens, cfg.vision.streams, cfg.decoder.width), policy.compute_dtype)


def _prompts(cfg: RolloutConfig) -> PromptBatch:
  count, size = cfg.prefill[-1], cfg.prompt_buckets[-1]
  return PromptBatch(
    slot_B=_struct((count,), jnp.int32),
    token_BT=_struct((count, size), jnp.int32),
    position_BTA=_struct((count, size, 3), jnp.int32),
    valid_BT=_struct((count, size), jnp.bool_),
    feature_BT=_struct((count, size), jnp.int32),
    next_position_B=_struct((count,), jnp.int32),
  )


def _begins(cfg: RolloutConfig, sampling: SamplingArrays) -> tuple[Any, Any, Any, SamplingArrays]:
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
    token_RT=_struct((count, size), jnp.int32),
    position_RTA=_struct((count, size, 3), jnp.int32),
    valid_RT=_struct((count, size), jnp.bool_),
    feature_RT=_struct((count, size), jnp.int32),
    next_position_R=each_R,
  )
