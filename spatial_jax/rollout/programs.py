"""The compiled programs of rollouts on one rollout mesh; `engine.RolloutPrograms` explains them."""

from typing import Any

import jax
import jax.numpy as jnp

from spatial_jax import sharding
from spatial_jax.policy.cache import rollout_shardings
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout import device
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.device import SampleState
from spatial_jax.rollout.device_inputs import ObservationBatch, PromptBatch, SamplingArrays
from spatial_jax.rollout.sampling import TokenMasks
from spatial_jax.types import Array, Params, VisionBatch


class JittedPrograms:
  """The functions of `device` with the shardings of the rollout mesh, jitted."""

  def __init__(
    self, policy: Policy, cfg: RolloutConfig, masks: TokenMasks, mesh: jax.sharding.Mesh
  ):
    """Jits the programs; nothing is compiled before a program is called.

    Args:
      policy: on the rollout mesh, without adapters.
    """
    self._policy, self._cfg, self._masks, self._mesh = policy, cfg, masks, mesh
    state = rollout_shardings(jax.eval_shape(lambda: self._empty_state(1)), mesh)
    # Tokens gather features by index from any image, so every device has the whole buffer.
    whole = sharding.replicated(mesh)
    self.empty_state = jax.jit(self._empty_state, static_argnums=0, out_shardings=state)
    self.empty_feature_buffer = jax.jit(self._empty_feature_buffer, out_shardings=whole)
    self.encode_images = jax.jit(self._encode_images, donate_argnums=1, out_shardings=whole)
    self.prefill = jax.jit(self._prefill, donate_argnums=1, out_shardings=(state, whole))
    self.start_rows = jax.jit(self._start_rows, donate_argnums=0, out_shardings=state)
    self.decode = jax.jit(
      self._decode, static_argnums=4, donate_argnums=1, out_shardings=(state, whole, whole)
    )
    self.append = jax.jit(self._append, donate_argnums=1, out_shardings=(state, whole))

  def _empty_state(self, prefix_size: int) -> SampleState:
    cfg = self._cfg
    sizes = (prefix_size, cfg.suffix_block_sizes)
    return device.empty_state(self._policy, cfg.slots, cfg.group, cfg.row_count, *sizes)

  def _empty_feature_buffer(self) -> jax.Array:
    cfg = self._policy.cfg
    shape = (self._cfg.feature_buffer_tokens, cfg.vision.streams, cfg.decoder.width)
    return jnp.zeros(shape, self._policy.compute_dtype)

  def _encode_images(
    self, params: Params, feature_buffer_MYD: Array, vision: VisionBatch, buffer_row_M: Array
  ) -> tuple[jax.Array, jax.Array]:
    features_MYD = self._policy.encode(params, vision)
    buffer_MYD = jnp.asarray(feature_buffer_MYD).at[buffer_row_M].set(features_MYD, mode="drop")
    return buffer_MYD, buffer_MYD[0, 0, 0]

  def _prefill(
    self, params: Params, state: SampleState, feature_buffer_MYD: Array, prompts: PromptBatch
  ) -> tuple[SampleState, jax.Array]:
    state, prompts = self._shard(state), self._shard(prompts)
    state = device.prefill(self._policy, params, state, feature_buffer_MYD, prompts)
    assert state.start is not None
    return state, state.start.hidden_BD[0, 0]

  def _start_rows(
    self,
    state: SampleState,
    starts_R: Array,
    rollout_R: Array,
    row_BG: Array,
    sampling: SamplingArrays,
  ) -> SampleState:
    rows = self._shard((starts_R, rollout_R, row_BG, sampling))
    return device.start_rows(self._shard(state), *rows)

  def _decode(
    self, params: Params, state: SampleState, halt_R: Array, row_R: Array | None, truncate: bool
  ) -> tuple[SampleState, jax.Array, jax.Array]:
    state = self._shard(state._replace(active_R=state.active_R & ~halt_R))
    steps = self._cfg.decode_steps
    rows = state if row_R is None else self._shard(device.gather_rows(state, row_R, steps))
    rows, token_RT, logp_RT = device.decode_steps_loop(
      self._policy, params, rows, self._masks, steps=steps, truncate=truncate
    )
    state = rows if row_R is None else device.scatter_rows(state, rows, row_R, steps)
    return state, token_RT, logp_RT

  def _append(
    self,
    params: Params,
    state: SampleState,
    feature_buffer_MYD: Array,
    observations: ObservationBatch,
  ) -> tuple[SampleState, jax.Array]:
    state, observations = self._shard(state), self._shard(observations)
    state = device.append(self._policy, params, state, feature_buffer_MYD, observations)
    return state, state.hidden_RD[0, 0]

  def _shard(self, tree: Any) -> Any:
    """The tree with prompts and rows sharded over the rollout mesh."""
    tree = jax.tree.map(jnp.asarray, tree)
    return jax.lax.with_sharding_constraint(tree, rollout_shardings(tree, self._mesh))
