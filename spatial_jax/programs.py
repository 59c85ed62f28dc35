"""Every jitted function of a run: `train` runs them, `aot` compiles the same ones.

    decode_params   train parameters -> rollout mesh, unstacked     once per step
    rollout         encode, start, sample, observe                  on the rollout mesh
    update          TrainState x TrainBatch -> TrainState, metrics   on the train mesh, state donated
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh

from spatial_jax import sharding
from spatial_jax.learn.loss import LossConfig, Metrics
from spatial_jax.learn.update import policy_update, score_batch, sft_update
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout import sampler
from spatial_jax.rollout.engine import RolloutConfig, RolloutPrograms
from spatial_jax.types import Array, Params, TrainBatch, TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class LearnPrograms:
  """The jitted update side.

  Attributes:
    update: (state donated, batch, ref_logp_RT or None) -> (state, metrics): GRPO / AP-GRPO.
    sft: (state donated, batch) -> (state, metrics).
    score: (params, batch) -> logp_RT, of reference or old policy.
  """

  update: Callable[[TrainState, TrainBatch, Array | None], tuple[TrainState, Metrics]]
  sft: Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]
  score: Callable[[Params, TrainBatch], jax.Array]


def init_state(
  policy: Policy, optimizer: optax.GradientTransformation, params: Params, mesh: Mesh
) -> TrainState:
  """A state around placed parameters; the optimizer's moments are born sharded like them."""
  abstract = jax.eval_shape(optimizer.init, params)
  opt_state = jax.jit(optimizer.init, out_shardings=sharding.param_shardings(abstract, mesh))(params)
  step = jax.device_put(jax.numpy.int32(0), sharding.replicated(mesh))
  return TrainState(params, opt_state, step)


def learn_programs(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  loss: LossConfig,
  micro_rows: int,
) -> LearnPrograms:
  """Update programs of one run; shardings follow the arrays they are given."""
  return LearnPrograms(
    update=jax.jit(
      functools.partial(policy_update, policy, optimizer, loss, micro_rows), donate_argnums=0
    ),
    sft=jax.jit(functools.partial(sft_update, policy, optimizer, micro_rows), donate_argnums=0),
    score=jax.jit(functools.partial(score_batch, policy)),
  )


def rollout_programs(policy: Policy, cfg: RolloutConfig, stop_id: int) -> RolloutPrograms:
  """Rollout programs; shardings follow the parameters and rows they are given."""
  sample = functools.partial(sampler.decode_chunk, policy, steps=cfg.chunk, stop_id=stop_id)
  start = functools.partial(
    sampler.start, policy, group=cfg.group, own_size=cfg.stop.tokens
  )
  return RolloutPrograms(
    encode=jax.jit(policy.encode),
    start=jax.jit(start),
    sample=jax.jit(
      lambda params, state, sampling, greedy, truncate: sample(
        params, state, sampling, greedy=greedy, truncate=truncate
      ),
      static_argnums=(3, 4),
      donate_argnums=1,
    ),
    observe=jax.jit(functools.partial(sampler.observe, policy), donate_argnums=1),
  )


def decode_params(policy: Policy, mesh: Mesh) -> Callable[[Params], Params]:
  """Train parameters -> the rollout mesh, one tuple entry per layer: one resharding per step."""
  unstack = jax.jit(policy.unstack)

  def convert(params: Params) -> Params:
    placed = jax.device_put(params, sharding.param_shardings(params, sharding.rollout_mesh(mesh)))
    return unstack(placed)

  return convert
