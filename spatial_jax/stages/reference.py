"""The reference policy of the KL term.

    StartWithAdapters   the policy without its adapters: nothing is copied
    StartCopy           a copy of the start, on the devices or on the host
    MovingAverage       the moving average of the trained parameters, in the optimizer state

A copy has only the trained parameters, in the compute dtype: the policy itself has the frozen ones,
and every use rounds to that dtype. On the host it is moved to the devices for one program a step.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from spatial_jax.learn.optimizer import moving_average
from spatial_jax.policy import param_tree
from spatial_jax.stages.updates import UpdatePrograms
from spatial_jax.types import Array, Params, TrainBatch, TrainState

Place = Literal["device", "host"]

# Memory of a host that a device reads without a copy in between, and the kind that every one has.
HOST_MEMORY = ("pinned_host", "unpinned_host")


@dataclasses.dataclass(frozen=True, eq=False)
class StartCopy:
  """The trained parameters of the start, in the compute dtype."""

  params: Params  # on the devices or on the host
  shardings: Params  # on the devices
  frozen: tuple[str, ...]  # regexes of the parameters that the policy and its reference share

  def on_devices(self, params: Params) -> Params:
    """All parameters of the reference; the frozen ones are those of the policy, `params`."""
    shared, _ = param_tree.partition(params, self.frozen)
    return param_tree.merge(shared, jax.device_put(self.params, self.shardings))

  def logprobs(self, programs: UpdatePrograms, state: TrainState, batch: TrainBatch) -> Array:
    """See `stages.updates.Reference`."""
    return programs.logprobs(self.on_devices(state.params), batch)


@dataclasses.dataclass(frozen=True)
class StartWithAdapters:
  """The start of a run that trains adapters."""

  def logprobs(self, programs: UpdatePrograms, state: TrainState, batch: TrainBatch) -> Array:
    """See `stages.updates.Reference`."""
    return programs.logprobs(state.params, batch)  # leaves the adapters out


@dataclasses.dataclass(frozen=True)
class MovingAverage:
  """The moving average of the trained parameters."""

  frozen: tuple[str, ...]  # regexes of the parameters that are not trained

  def logprobs(self, programs: UpdatePrograms, state: TrainState, batch: TrainBatch) -> Array:
    """See `stages.updates.Reference`."""
    average = moving_average(state.opt_state, state.params, self.frozen)
    return programs.policy_logprobs(average, batch)


def make_reference(
  start: Params, frozen: tuple[str, ...], dtype: jnp.dtype, place: Place
) -> StartCopy:
  """Copies the start, one parameter after the other; `start` may be donated afterwards.

  Args:
    start: on the devices.
    frozen: regexes of the parameters that are not trained.
    dtype: the compute dtype.
  """
  _, trained = param_tree.partition(start, frozen)

  def copy(x: jax.Array) -> jax.Array:
    x = jnp.array(x, dtype, copy=True)
    if place == "device":
      return x
    kind = host_memory(next(iter(x.sharding.device_set)))
    return jax.block_until_ready(jax.device_put(x, x.sharding.with_memory_kind(kind)))

  shardings = jax.tree.map(lambda x: x.sharding, trained)
  return StartCopy(jax.tree.map(copy, trained), shardings, frozen)


def host_memory(device: jax.Device) -> str:  # pyright: ignore[reportInvalidTypeForm]
  """Returns the kind of host memory of a device that is copied from fastest."""
  kinds: Sequence[str] = [memory.kind for memory in device.addressable_memories()]
  return next(kind for kind in HOST_MEMORY if kind in kinds)
