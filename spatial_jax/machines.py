"""The devices that a run is prepared for: those of this machine, or absent ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from spatial_jax.config import ConfigError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Machine:
  """Devices of one process."""

  platform: str  # of JAX: "gpu" or "tpu"
  count: int
  usable: int  # bytes per device that arrays and programs may take


# Bytes of a TPU device that programs may take, by device kind: what the compiler (libtpu 0.0.52)
# says when a program is too large. Topologies of v4 and 7x have two devices per chip.
USABLE = {
  "TPU v4": int(15.25 * GIB),
  "TPU v5 lite": int(15.75 * GIB),
  "TPU v5": int(95.73 * GIB),
  "TPU v6 lite": int(31.24 * GIB),
  "TPU7x": int(94.74 * GIB),
}
# A card of 80 GB has 79.6 to 80 GiB; JAX takes three quarters of it unless
# XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 is set.
MACHINES = {
  "gpu-80gb": Machine("gpu", 1, int(0.95 * 79.6 * GIB)),
  "v5e-8": Machine("tpu", 8, USABLE["TPU v5 lite"]),
  "v6e-8": Machine("tpu", 8, USABLE["TPU v6 lite"]),
  "v5p-8": Machine("tpu", 4, USABLE["TPU v5"]),  # named by its eight cores
}


@dataclasses.dataclass(frozen=True)
class AbsentDevice:
  """What a mesh and a plan ask of a device."""

  id: int
  platform: str
  process_index: int


class Devices(NamedTuple):
  """The devices that a run is prepared for; they may be absent."""

  all: Sequence[Any]
  local: int  # of one process
  usable: int | None  # bytes of one; None: of this machine


def this_machine() -> Devices:
  """Returns the devices of this run."""
  return Devices(jax.devices(), len(jax.local_devices()), None)


def devices_of(machine: str) -> Devices:
  """Returns the devices of a name in MACHINES, which may be absent, or of this machine.

  Raises:
    ConfigError: if the name is unknown.
  """
  if not machine:
    return this_machine()
  if machine not in MACHINES:
    raise ConfigError(f"--devices={machine} is unknown; use one of {', '.join(MACHINES)}")
  found = MACHINES[machine]
  return Devices(absent_devices(found), found.count, found.usable)


def absent_devices(machine: Machine) -> list[AbsentDevice]:
  """Returns devices that a mesh can be made of; nothing can run on them."""
  return [AbsentDevice(number, machine.platform, 0) for number in range(machine.count)]
