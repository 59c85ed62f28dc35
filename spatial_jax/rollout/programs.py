"""The compiled programs of rollouts: one class with one method per program.

    empty_state ─► prefill ─► start_rows ─► decode ─► append ─► decode ...
    empty_feature_buffer ─► encode_images

`RolloutFunctions` holds the pure functions, with the shardings of the rollout mesh;
`RolloutPrograms` jits them. Nothing is compiled before a program is called.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from spatial_jax import sharding
from spatial_jax.policy.cache import rollout_shardings
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout import device
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.device import ObservationBatch, PromptBatch, SampleState
from spatial_jax.rollout.sampling import SamplingArrays, TokenMasks
from spatial_jax.types import Array, Params, VisionBatch


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutFunctions:
  """The functions that `RolloutPrograms` jits, before jit.

  Attributes:
    policy: on the rollout mesh, without adapters.
    cfg: shapes.
    masks: forbidden ids and stop ids.
    mesh: the rollout mesh.
  """

  policy: Policy
  cfg: RolloutConfig
  masks: TokenMasks
  mesh: jax.sharding.Mesh

  def empty_state(self, prefix_size: int) -> SampleState:
    """See `RolloutPrograms.empty_state`."""
    cfg = self.cfg
    sizes = (prefix_size, cfg.suffix_block_sizes)
    return device.empty_state(self.policy, cfg.slots, cfg.group, cfg.row_count, *sizes)

  def empty_feature_buffer(self) -> jax.Array:
    """See `RolloutPrograms.empty_feature_buffer`."""
    cfg = self.policy.cfg
    shape = (self.cfg.feature_buffer_tokens, cfg.vision.streams, cfg.decoder.width)
    return jnp.zeros(shape, self.policy.compute_dtype)

  def encode_images(
    self, params: Params, feature_buffer_MYD: Array, vision: VisionBatch, buffer_row_M: Array
  ) -> tuple[jax.Array, jax.Array]:
    """See `RolloutPrograms.encode_images`."""
    features_MYD = self.policy.encode(params, vision)
    buffer_MYD = jnp.asarray(feature_buffer_MYD).at[buffer_row_M].set(features_MYD, mode="drop")
    return buffer_MYD, buffer_MYD[0, 0, 0]

  def prefill(
    self, params: Params, state: SampleState, feature_buffer_MYD: Array, prompts: PromptBatch
  ) -> tuple[SampleState, jax.Array]:
    """See `RolloutPrograms.prefill`."""
    state, prompts = self._shard(state), self._shard(prompts)
    state = device.prefill(self.policy, params, state, feature_buffer_MYD, prompts)
    assert state.start is not None
    return state, state.start.hidden_BD[0, 0]

  def start_rows(
    self,
    state: SampleState,
    starts_R: Array,
    rollout_R: Array,
    row_BG: Array,
    sampling: SamplingArrays,
  ) -> SampleState:
    """See `RolloutPrograms.start_rows`."""
    rows = self._shard((starts_R, rollout_R, row_BG, sampling))
    return device.start_rows(self._shard(state), *rows)

  def decode(
    self, params: Params, state: SampleState, halt_R: Array, row_R: Array | None, truncate: bool
  ) -> tuple[SampleState, jax.Array, jax.Array]:
    """See `RolloutPrograms.decode`."""
    state = self._shard(state._replace(active_R=state.active_R & ~halt_R))
    steps = self.cfg.decode_steps
    rows = state if row_R is None else self._shard(device.gather_rows(state, row_R, steps))
    rows, token_RT, logp_RT = device.decode_steps_loop(
      self.policy, params, rows, self.masks, steps=steps, truncate=truncate
    )
    state = rows if row_R is None else device.scatter_rows(state, rows, row_R, steps)
    return state, token_RT, logp_RT

  def append(
    self,
    params: Params,
    state: SampleState,
    feature_buffer_MYD: Array,
    observations: ObservationBatch,
  ) -> tuple[SampleState, jax.Array]:
    """See `RolloutPrograms.append`."""
    state, observations = self._shard(state), self._shard(observations)
    state = device.append(self.policy, params, state, feature_buffer_MYD, observations)
    return state, state.hidden_RD[0, 0]

  def _shard(self, tree: Any) -> Any:
    """The tree with prompts and rows sharded over the rollout mesh."""
    tree = jax.tree.map(jnp.asarray, tree)
    return jax.lax.with_sharding_constraint(tree, rollout_shardings(tree, self.mesh))


class RolloutPrograms:
  """The jitted programs of rollouts on one rollout mesh; each method runs one program.

  `<name>_jit` is the jitted function of a method, for callers that lower and compile it.

  Several programs also return a ready token: a scalar result that no later program is given, so
  that the host can wait for the program by waiting for the token.
  """

  def __init__(self, functions: RolloutFunctions):
    """Jits the functions.

    Args:
      functions: what the programs compute, and the mesh they run on.
    """
    mesh = functions.mesh
    state = rollout_shardings(jax.eval_shape(lambda: functions.empty_state(1)), mesh)
    # Tokens gather features by index from any image, so every device has the whole buffer.
    whole = sharding.replicated(mesh)
    self.empty_state_jit = jax.jit(functions.empty_state, static_argnums=0, out_shardings=state)
    self.empty_feature_buffer_jit = jax.jit(functions.empty_feature_buffer, out_shardings=whole)
    self.encode_images_jit = jax.jit(functions.encode_images, donate_argnums=1, out_shardings=whole)
    self.prefill_jit = jax.jit(functions.prefill, donate_argnums=1, out_shardings=(state, whole))
    self.start_rows_jit = jax.jit(functions.start_rows, donate_argnums=0, out_shardings=state)
    self.decode_jit = jax.jit(
      functions.decode,
      static_argnums=4,
      donate_argnums=1,
      out_shardings=(state, whole, whole),
    )
    self.append_jit = jax.jit(functions.append, donate_argnums=1, out_shardings=(state, whole))

  def empty_state(self, prefix_size: int) -> SampleState:
    """Returns the state of all slots and rows before any prompt.

    Args:
      prefix_size: tokens that the prefix cache stores per prompt; static.
    """
    return self.empty_state_jit(prefix_size)

  def empty_feature_buffer(self) -> Array:
    """Returns the feature buffer [M, Y, D] before any image, in the compute dtype."""
    return self.empty_feature_buffer_jit()

  def encode_images(
    self, params: Params, feature_buffer_MYD: Array, vision: VisionBatch, buffer_row_M: Array
  ) -> tuple[Array, Array]:
    """Runs the vision tower and writes the features into the buffer.

    Args:
      params: decode parameters.
      feature_buffer_MYD: donated.
      vision: patches of the images.
      buffer_row_M: int32, buffer row of each feature; rows beyond the end are dropped.

    Returns:
      The buffer and a ready token.
    """
    return self.encode_images_jit(params, feature_buffer_MYD, vision, buffer_row_M)

  def prefill(
    self, params: Params, state: SampleState, feature_buffer_MYD: Array, prompts: PromptBatch
  ) -> tuple[SampleState, Array]:
    """Prefills prompts into slots of the prefix cache, see `device.prefill`.

    Args:
      params: decode parameters.
      state: donated.
      feature_buffer_MYD: features of the images of the prompts.
      prompts: tokens and their slots.

    Returns:
      The state and a ready token.
    """
    return self.prefill_jit(params, state, feature_buffer_MYD, prompts)

  def start_rows(
    self,
    state: SampleState,
    starts_R: Array,
    rollout_R: Array,
    row_BG: Array,
    sampling: SamplingArrays,
  ) -> SampleState:
    """Starts rollouts in rows, at the end of their prompts; arguments as in `device.start_rows`.

    `state` is donated.
    """
    return self.start_rows_jit(state, starts_R, rollout_R, row_BG, sampling)

  def decode(
    self, params: Params, state: SampleState, halt_R: Array, row_R: Array | None, truncate: bool
  ) -> tuple[SampleState, Array, Array]:
    """Samples up to `decode_steps` tokens in each active row.

    Args:
      params: decode parameters.
      state: donated.
      halt_R: bool, rows that stop sampling before this call.
      row_R: int32, the rows that are gathered and decoded, padded with R; None: all rows.
      truncate: top-k, top-p or min-p is applied; static.

    Returns:
      The state, tokens int32 [rows, decode_steps] (-1: not sampled), log-probabilities float32.
    """
    return self.decode_jit(params, state, halt_R, row_R, truncate)

  def append(
    self,
    params: Params,
    state: SampleState,
    feature_buffer_MYD: Array,
    observations: ObservationBatch,
  ) -> tuple[SampleState, Array]:
    """Appends observations to rows, which sample again afterwards, see `device.append`.

    Args:
      params: decode parameters.
      state: donated.
      feature_buffer_MYD: features of the images of the observations.
      observations: tokens and their rows.

    Returns:
      The state and a ready token.
    """
    return self.append_jit(params, state, feature_buffer_MYD, observations)
