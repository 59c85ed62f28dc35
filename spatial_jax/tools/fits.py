"""Computes the memory plan of a training run for devices that this machine does not have.

python -m spatial_jax.tools.fits --config=configs/NAME.py --devices=v5e-8 [--config.KEY=VALUE]

Needs the config.json of the policy, not its weights. Exit code 0: the plan fits; 1: it does not; 2:
the config is wrong. `spatial_jax.aot` compiles the programs as well, which takes minutes.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from spatial_jax import sharding
from spatial_jax.cli import CONFIG_HELP, launch, no_arguments
from spatial_jax.config import ConfigError, build
from spatial_jax.machines import MACHINES, AbsentDevice, Machine
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.rollout import memory
from spatial_jax.rollout.memory import MemoryPlan
from spatial_jax.stages.load import read_shape
from spatial_jax.train_config import TrainConfig, training_parts, whole_plan


def absent_mesh(machine: Machine, cfg: sharding.MeshConfig) -> jax.sharding.Mesh:
  """Returns the train mesh over devices that need not exist; nothing can run on it."""
  devices = [AbsentDevice(number, machine.platform, 0) for number in range(machine.count)]
  return sharding.make_mesh(cfg, devices)


def plan_for(cfg: TrainConfig, shape: QwenVLConfig, machine: Machine) -> MemoryPlan:
  """Returns the memory plan of a training run on absent devices; no array is allocated.

  Raises:
    ConfigError: if training would refuse the config with this policy and mesh.
  """
  parts = training_parts(cfg, shape, absent_mesh(machine, cfg.mesh))
  return whole_plan(cfg, parts, machine.usable)


def run(config: Mapping[str, Any], name: str) -> int:
  """Prints the plan of a training config; returns the exit code."""
  if name not in MACHINES:
    raise ConfigError(f"--devices={name} is unknown; use one of {', '.join(MACHINES)}")
  cfg = build(TrainConfig, dict(config))
  plan = plan_for(cfg, read_shape(cfg.init), MACHINES[name])
  print(plan)
  try:
    memory.check(plan, "config.rollout.slots")
  except ConfigError as error:
    print(str(error).removeprefix(f"{plan}: "))
    return 1
  print("fits")
  return 0


def main(arguments: Sequence[str]) -> None:
  """Prints the plan and exits with the code of `run`."""
  no_arguments(arguments)
  jax.config.update("jax_platforms", "cpu")  # shapes alone; nothing runs
  assert DEVICES.value is not None  # the flag is required
  sys.exit(run(CONFIG.value, DEVICES.value))


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
  DEVICES = flags.DEFINE_string("devices", None, f"one of {', '.join(MACHINES)}")
  flags.mark_flags_as_required(["config", "devices"])
  launch(main, "stopped")
