"""Every jitted function of a run: `train` runs them, `aot` compiles the same ones.

    decode_params   train parameters -> rollout mesh, unstacked     once per step
    rollout         encode, start, sample, observe                  on the rollout mesh
    update          TrainState x TrainBatch -> TrainState, metrics  on the train mesh, state donated

Shardings are stated where data enters and leaves a program; inside, the compiler follows them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from spatial_jax import sharding
from spatial_jax.data.vision import VisionBuckets
from spatial_jax.learn.batch import BatchConfig
from spatial_jax.learn.loss import LossConfig, Metrics
from spatial_jax.learn.update import policy_update, score_batch, sft_update
from spatial_jax.policy.config import VisionConfig
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout import sampler
from spatial_jax.rollout.engine import RolloutConfig, RolloutPrograms
from spatial_jax.rollout.sampler import ObservationBatch, PromptBatch, SampleState, Sampling
from spatial_jax.types import Array, Params, TrainBatch, TrainState, VisionBatch

# The TPU attention kernel reads sequences in blocks.
TPU_SEQUENCE = 128


@dataclasses.dataclass(frozen=True, eq=False)
class LearnPrograms:
  """The jitted update side; batches are NumPy or placed (`sharding.place_train_batch`).

  Attributes:
    update: (state donated, batch, ref_logp_RT or None) -> (state, metrics): GRPO / AP-GRPO.
    sft: (state donated, batch) -> (state, metrics).
    score: (params, batch) -> logp_RT, of reference or old policy.
  """

  update: Callable[[TrainState, TrainBatch, Array | None], tuple[TrainState, Metrics]]
  sft: Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]
  score: Callable[[Params, TrainBatch], jax.Array]


# --- running -----------------------------------------------------------------------------------


def train_mesh(policy: Policy) -> Mesh:
  """The mesh a policy is compiled for; one device when it names none."""
  return policy.mesh or sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])


def window_patches(cfg: VisionConfig) -> int:
  """Patches in one attention window of the vision tower."""
  return (cfg.window_blocks * cfg.merge_size) ** 2


def init_state(
  policy: Policy, optimizer: optax.GradientTransformation, params: Params, mesh: Mesh
) -> TrainState:
  """A state around placed parameters; the optimizer's moments are born sharded like them."""
  abstract = jax.eval_shape(optimizer.init, params)
  opt_state = jax.jit(optimizer.init, out_shardings=sharding.param_shardings(abstract, mesh))(
    params
  )
  step = jax.device_put(np.int32(0), sharding.replicated(mesh))
  return TrainState(params, opt_state, step)


def learn_programs(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  loss: LossConfig,
  micro_rows: int,
) -> LearnPrograms:
  """Update programs of one run, on the policy's mesh; the state comes out where it went in.

  Raises:
    ConfigError: on the host, when a microbatch does not divide over the mesh.
  """
  mesh = train_mesh(policy)
  sharding.check_rows(micro_rows, "config.learn.micro_rows", mesh)
  state = abstract_state(policy, optimizer, mesh)
  out = (jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh))
  window = window_patches(policy.cfg.vision)

  def lay(batch: TrainBatch) -> TrainBatch:
    shardings = sharding.train_batch_shardings(batch, window, mesh)
    return jax.lax.with_sharding_constraint(jax.tree.map(jnp.asarray, batch), shardings)

  def update(
    state: TrainState, batch: TrainBatch, ref_logp_RT: Array | None
  ) -> tuple[TrainState, Metrics]:
    return policy_update(policy, optimizer, loss, micro_rows, state, lay(batch), ref_logp_RT)

  def sft(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
    return sft_update(policy, optimizer, micro_rows, state, lay(batch))

  def score(params: Params, batch: TrainBatch) -> jax.Array:
    return score_batch(policy, params, lay(batch))

  return LearnPrograms(
    update=jax.jit(update, donate_argnums=0, out_shardings=out),
    sft=jax.jit(sft, donate_argnums=0, out_shardings=out),
    score=jax.jit(score, out_shardings=sharding.rows(mesh)),
  )


def rollout_programs(policy: Policy, cfg: RolloutConfig, stop_id: int) -> RolloutPrograms:
  """Rollout programs of a policy, on the rollout mesh that belongs to its train mesh."""
  mesh = sharding.rollout_mesh(train_mesh(policy))
  policy = dataclasses.replace(policy, mesh=mesh)

  def lay(tree: Any) -> Any:
    tree = jax.tree.map(jnp.asarray, tree)
    return jax.lax.with_sharding_constraint(tree, sharding.rollout_shardings(tree, mesh))

  def start(
    params: Params, features_MD: Array, prompts: PromptBatch, active_B: Array
  ) -> SampleState:
    prompts, active_B = lay((prompts, active_B))
    return lay(
      sampler.start(
        policy,
        params,
        features_MD,
        prompts,
        active_B,
        group=cfg.group,
        own_size=cfg.stop.tokens,
      )
    )

  def sample(
    params: Params, state: SampleState, sampling: Sampling, greedy: bool, truncate: bool
  ) -> tuple[SampleState, Array, Array]:
    state, token_RK, logp_RK = sampler.decode_chunk(
      policy,
      params,
      lay(state),
      sampling,
      steps=cfg.chunk,
      greedy=greedy,
      truncate=truncate,
      stop_id=stop_id,
    )
    return lay(state), token_RK, logp_RK

  def observe(
    params: Params, state: SampleState, features_MD: Array, rows: ObservationBatch
  ) -> SampleState:
    return lay(sampler.observe(policy, params, lay(state), features_MD, lay(rows)))

  return RolloutPrograms(
    # Prompts gather features by index, from any image: every device holds them all.
    encode=jax.jit(policy.encode, out_shardings=sharding.replicated(mesh)),
    start=jax.jit(start),
    sample=jax.jit(sample, static_argnums=(3, 4), donate_argnums=1),
    observe=jax.jit(observe, donate_argnums=1),
  )


def reshard(policy: Policy, mesh: Mesh) -> jax.stages.Wrapped:
  """Jitted: train parameters -> island mesh, in the compute dtype, a tuple entry per layer.

  Every use casts to the compute dtype anyway, so that doing it once changes no bit.
  """

  def convert(params: Params) -> Params:
    return policy.unstack(jax.tree.map(lambda x: x.astype(policy.compute_dtype), params))

  abstract = jax.eval_shape(convert, jax.eval_shape(policy.init, jax.random.key(0)))
  islands = sharding.island_mesh(mesh)
  return jax.jit(convert, out_shardings=sharding.param_shardings(abstract, islands))


def decode_params(policy: Policy, mesh: Mesh) -> Callable[[Params], Params]:
  """Train parameters -> this process' rollout mesh: one resharding per step."""
  convert, local = reshard(policy, mesh), sharding.rollout_mesh(mesh)
  return lambda params: sharding.local_view(convert(params), local)


def sequence_buckets(
  rollout: RolloutConfig, batch: BatchConfig, platform: str
) -> tuple[RolloutConfig, BatchConfig]:
  """The buckets a platform's attention kernel can read: on TPU, lengths become multiples of 128."""
  if platform != "tpu":
    return rollout, batch

  def up(buckets: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({-(-size // TPU_SEQUENCE) * TPU_SEQUENCE for size in buckets}))

  def frames(vision: VisionBuckets) -> VisionBuckets:
    return dataclasses.replace(vision, patches=up(vision.patches))

  return (
    dataclasses.replace(
      rollout, prompt_buckets=up(rollout.prompt_buckets), vision=frames(rollout.vision)
    ),
    dataclasses.replace(batch, token_buckets=up(batch.token_buckets), vision=frames(batch.vision)),
  )


# --- compiling ahead of time -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
  """What the programs of a step are called with at their largest: trees of ShapeDtypeStruct.

  Attributes:
    state, batch: of the update, on the train mesh.
    weights: decode parameters; like all that follows, on the rollout mesh.
    vision, features_MD: of the prompts' images, or of drawn ones.
    prompts: PromptBatch, active_B.
    rows: SampleState with the whole cache.
    sampling, observations: of one call.
  """

  state: TrainState
  batch: TrainBatch
  weights: Params
  vision: VisionBatch
  features_MD: Any
  prompts: tuple[PromptBatch, Any]
  rows: SampleState
  sampling: Sampling
  observations: ObservationBatch


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
  optimizer: optax.GradientTransformation,
  loss: LossConfig,
  micro_rows: int,
  rollout: RolloutConfig,
  batch: BatchConfig,
) -> list[Program]:
  """Every program of a reinforcement-learning step, in order, with its largest abstract inputs.

  Args:
    policy: its mesh may be of devices that are not there.
    optimizer, loss, micro_rows: of the update.
    rollout, batch: shapes; the last of each list of buckets is taken.
  """
  run = rollout_programs(policy, rollout, stop_id=0)
  learn = learn_programs(policy, optimizer, loss, micro_rows)
  x = abstract_inputs(policy, optimizer, rollout, batch)
  state, weights, rows = x.state, x.weights, x.rows
  calls = [
    ("decode_params", reshard(policy, train_mesh(policy)), (state.params,), (state.opt_state,)),
    ("encode", run.encode, (weights, x.vision), (state, rows)),
    ("start", run.start, (weights, x.features_MD, *x.prompts), (state,)),
    ("sample", run.sample, (weights, rows, x.sampling, False, rollout.top_p < 1), (state,)),
    ("observe", run.observe, (weights, rows, x.features_MD, x.observations), (state,)),
    ("update", learn.update, (state, x.batch, None), (weights,)),
  ]
  return [
    Program(name, cast(jax.stages.Wrapped, function), arguments, beside)
    for name, function, arguments, beside in calls
  ]


def abstract_state(
  policy: Policy, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """A TrainState of ShapeDtypeStruct with its shardings: to compile, or to restore into."""
  params = jax.eval_shape(policy.init, jax.random.key(0))
  step = jax.ShapeDtypeStruct((), jnp.int32)
  state = TrainState(params, jax.eval_shape(optimizer.init, params), cast(jax.Array, step))
  return _placed(state, sharding.param_shardings(cast(Any, state), mesh))


def abstract_inputs(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  rollout: RolloutConfig,
  batch: BatchConfig,
) -> Inputs:
  """See `Inputs`; arguments as in `all_programs`."""
  mesh, cfg = train_mesh(policy), policy.cfg
  local = sharding.rollout_mesh(mesh)
  everywhere = sharding.replicated(local)
  state = abstract_state(policy, optimizer, mesh)
  weights = jax.eval_shape(reshard(policy, mesh), state.params)
  weights = _placed(weights, sharding.param_shardings(weights, local))
  vision = _everywhere(_vision(cfg.vision, rollout.vision), everywhere)
  tokens = vision.valid_P.shape[0] // cfg.vision.merge_size**2
  features_MD = _struct((tokens, cfg.decoder.width), policy.compute_dtype)
  prompts = _prompts(rollout)
  run = rollout_programs(policy, rollout, stop_id=0)
  rows = jax.eval_shape(run.start, weights, features_MD, *prompts)
  islands = sharding.island_mesh(mesh).shape["island"]
  learned = abstract_batch(cfg.vision, rollout.prompts * rollout.group * islands, batch)
  window = window_patches(cfg.vision)
  return Inputs(
    state=state,
    batch=_placed(learned, sharding.train_batch_shardings(learned, window, mesh)),
    weights=weights,
    vision=vision,
    features_MD=_everywhere(features_MD, everywhere),
    prompts=_everywhere(prompts, everywhere),
    rows=_placed(rows, sharding.rollout_shardings(rows, local)),
    sampling=_everywhere(_sampling(rollout, cfg.decoder.vocabulary), everywhere),
    observations=_everywhere(_observations(rollout), everywhere),
  )


def abstract_batch(vision: VisionConfig, count: int, cfg: BatchConfig) -> TrainBatch:
  """A TrainBatch of ShapeDtypeStruct: `count` rows, the last of each list of buckets."""
  size = cfg.token_buckets[-1]
  return TrainBatch(
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


def _placed(tree: Any, shardings: Any) -> Any:
  def one(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  return jax.tree.map(one, tree, shardings)


def _everywhere(tree: Any, place: jax.sharding.Sharding) -> Any:
  return _placed(tree, jax.tree.map(lambda _: place, tree))


def _vision(cfg: VisionConfig, buckets: VisionBuckets) -> VisionBatch:
  patches = buckets.windows[-1] * window_patches(cfg)
  return VisionBatch(
    patches_PX=_struct((patches, cfg.patch_values), jnp.float32),
    position_P2=_struct((patches, 2), jnp.int32),
    valid_P=_struct((patches,), jnp.bool_),
    frame_NS=_struct((buckets.frames[-1], buckets.patches[-1]), jnp.int32),
    slot_P=_struct((patches,), jnp.int32),
  )


def _prompts(cfg: RolloutConfig) -> tuple[PromptBatch, Any]:
  count, size = cfg.prompts, cfg.prompt_buckets[-1]
  batch = PromptBatch(
    token_BT=_struct((count, size), jnp.int32),
    position_BTA=_struct((count, size, 3), jnp.int32),
    valid_BT=_struct((count, size), jnp.bool_),
    feature_BT=_struct((count, size), jnp.int32),
    next_position_B=_struct((count,), jnp.int32),
  )
  return batch, _struct((count,), jnp.bool_)


def _observations(cfg: RolloutConfig) -> ObservationBatch:
  count, size = cfg.prompts * cfg.group, cfg.observation_buckets[-1]
  return ObservationBatch(
    slot_R=_struct((count,), jnp.int32),
    token_RT=_struct((count, size), jnp.int32),
    position_RTA=_struct((count, size, 3), jnp.int32),
    valid_RT=_struct((count, size), jnp.bool_),
    feature_RT=_struct((count, size), jnp.int32),
    next_position_R=_struct((count,), jnp.int32),
  )


def _sampling(cfg: RolloutConfig, vocabulary: int) -> Sampling:
  count = cfg.prompts * cfg.group
  return Sampling(
    key_R=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count)),
    temperature=_struct((), jnp.float32),
    top_p=_struct((), jnp.float32),
    limit_R=_struct((count,), jnp.int32),
    forbidden_V=_struct((vocabulary,), jnp.bool_),
  )
