"""Entry point: python -m spatial_jax.aot --config=configs/NAME.py --topology=v5e:8x8

Compiles every program of a run for TPUs that are not there, and says what each needs of a chip's
memory. Exit code 0: all fit; 1: something does not; 2: the configuration cannot be used.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import config_flags

from spatial_jax import abstract_inputs, compiled, sharding
from spatial_jax.abstract_inputs import Program
from spatial_jax.cli import CONFIG_HELP, launch, no_arguments
from spatial_jax.config import ConfigError, build
from spatial_jax.hf import weights
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.policy import lora
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.stages.grpo import GrpoConfig, batch_config

# Memory of one chip in GiB, by device kind. Source: the Cloud TPU documentation.
HBM_GIB = {
  "TPU v4": 32.0,
  "TPU v5 lite": 16.0,
  "TPU v5": 95.0,
  "TPU v6 lite": 32.0,
  "TPU7x": 192.0,
}
GIB = 1 << 30

# Read when libtpu is loaded: ask no metadata server, let several processes compile, print nothing.
LIBTPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """One program compiled.

  Attributes:
    name: of the program.
    seconds: to lower and compile.
    arguments, temporaries, program_total, beside: bytes per chip: of arguments; of scratch; of all
      the program needs (arguments, results in memory of their own, scratch, code); of what lies
      there besides.
    text: the optimised program.
    error: why it did not compile, else None; the numbers are then 0.
  """

  name: str
  seconds: float
  arguments: int
  temporaries: int
  program_total: int
  beside: int
  text: str
  error: str | None

  def fits(self, hbm: int) -> bool:
    """Whether it compiled and `hbm` bytes hold it and what lies beside it."""
    return self.error is None and self.program_total + self.beside <= hbm


def topology_mesh(topology: str, mesh: sharding.MeshConfig) -> Mesh:
  """The train mesh over a TPU topology ("v5e:8x8").

  Raises:
    ConfigError: on the host, without libtpu, or when name or mesh do not fit.
  """
  return sharding.make_mesh(mesh, _devices(topology))


def host_mesh(topology: str, mesh: Mesh) -> Mesh:
  """The mesh of one process of a topology as a slice of its own: four chips, 2x2 or 2x2x1.

  The compiler takes no part of a slice; one process' devices are therefore a slice themselves.

  Args:
    topology: of the whole.
    mesh: train mesh over it.
  """
  if len({device.process_index for device in mesh.devices.flat}) == 1:
    return mesh
  generation, _, sides = topology.partition(":")
  host = f"{generation}:{'2x2x1' if sides.count('x') == 2 else '2x2'}"
  return sharding.make_mesh(sharding.MeshConfig(-1, 1, mesh.shape["tensor"]), _devices(host))


def _devices(topology: str) -> Sequence[Any]:
  os.environ.update(LIBTPU_ENVIRONMENT)
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  except Exception as error:
    if "libtpu" in str(error).lower():
      raise ConfigError("libtpu is not installed: pip install 'spatial_jax[tpu]'") from error
    raise ConfigError(f"topology {topology!r}: {str(error).splitlines()[0]}") from error


def compile_all(
  policy_cfg: QwenVLConfig,
  learn: GrpoConfig,
  rollout: RolloutConfig,
  adapters: LoraConfig,
  mesh: Mesh,
  host: Mesh,
  remat: bool,
) -> list[Compiled]:
  """Compiles the programs of a reinforcement-learning step at their largest shapes.

  Args:
    policy_cfg: of the policy.
    learn, rollout: optimizer, loss and shapes; buckets are fitted to the platform.
    adapters: of the policy.
    mesh: train mesh.
    host: mesh of one process' devices, for the rollout programs.
    remat: recompute layers in the backward pass.
  """
  frozen = lora.frozen_paths(adapters, learn.optimizer.frozen)
  optimizer = make_optimizer(dataclasses.replace(learn.optimizer, frozen=frozen))
  policy = make_policy(policy_cfg, compiled.compute_dtype(mesh), mesh, remat)
  policy = dataclasses.replace(policy, frozen=frozen, lora=adapters)
  island = dataclasses.replace(policy, mesh=host)
  batch = compiled.batch_buckets(batch_config(learn, policy_cfg), mesh)
  rollout = compiled.rollout_buckets(rollout, mesh)
  found = abstract_inputs.all_programs(
    policy, island, optimizer, learn.loss, learn.micro, rollout, batch, learn.keep_fraction
  )
  return [compile_program(program) for program in found]


def compile_program(program: Program) -> Compiled:
  """Compiles one program; what the compiler refuses (memory, above all) is part of the answer."""
  begin = time.monotonic()
  beside = sum(bytes_per_chip(tree) for tree in program.beside)
  try:
    with _no_compilation_cache():
      compiled = program.function.lower(*program.arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0]
    return Compiled(program.name, time.monotonic() - begin, 0, 0, 0, beside, "", reason)
  memory: Any = compiled.memory_analysis()
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  total = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
  return Compiled(
    name=program.name,
    seconds=time.monotonic() - begin,
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    program_total=total + memory.generated_code_size_in_bytes,
    beside=beside,
    text=compiled.as_text() or "",
    error=None,
  )


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
  """A program for absent devices can be written to JAX's persistent cache, but not read back."""
  before = jax.config.values["jax_enable_compilation_cache"]
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def bytes_per_chip(tree: Any) -> int:
  """Bytes of one device's shards of a tree of ShapeDtypeStruct with shardings."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def table(compiled: Sequence[Compiled], hbm: int) -> str:
  """The result as text, one line per program."""
  lines = [
    f"{'program':<14} {'seconds':>8} {'arguments':>10} {'scratch':>9} {'program':>9} "
    f"{'beside':>9} {'total':>9}  of {hbm / GIB:.0f} GiB per chip"
  ]
  for one in compiled:
    sizes = (one.arguments, one.temporaries, one.program_total, one.beside)
    total = one.program_total + one.beside
    cells = " ".join(f"{size / GIB:9.3f}" for size in (*sizes[1:], total))
    verdict = "fits" if one.fits(hbm) else one.error or "DOES NOT FIT"
    lines.append(f"{one.name:<14} {one.seconds:8.1f} {sizes[0] / GIB:10.3f} {cells}  {verdict}")
  return "\n".join(lines)


def run(config: Any, topology: Any) -> int:
  """Compiles what a config describes, prints the table; returns the exit code."""
  if config.stage != "grpo":
    raise ConfigError(f"only stage grpo is compiled ahead of time, config.stage is {config.stage}")
  rollout = build(RolloutConfig, config.rollout, "config.rollout")
  learn = build(GrpoConfig, config.learn, "config.learn")
  adapters = build(LoraConfig, config.lora, "config.lora")
  mesh = topology_mesh(topology, build(sharding.MeshConfig, config.mesh, "config.mesh"))
  policy_cfg = weights.read_config(pathlib.Path(config.init))
  kind = mesh.devices.flat[0].device_kind
  if kind not in HBM_GIB:
    raise ConfigError(f"memory of a {kind!r} chip is unknown; add it to HBM_GIB")
  print(f"{topology}: {mesh.size} x {kind}, mesh {dict(mesh.shape)}; bfloat16; largest buckets,")
  print(f"sequences rounded up to multiples of {compiled.TPU_SEQUENCE}; GiB per chip")
  host = host_mesh(topology, mesh)
  programs = compile_all(policy_cfg, learn, rollout, adapters, mesh, host, config.remat)
  hbm = int(HBM_GIB[kind] * GIB)
  print(table(programs, hbm))
  return 0 if all(one.fits(hbm) for one in programs) else 1


def main(arguments: Sequence[str]) -> None:
  """Compiles and exits with 1 where something does not fit."""
  no_arguments(arguments)
  jax.config.update("jax_platforms", "cpu")  # the host traces; nothing runs
  sys.exit(run(CONFIG.value, TOPOLOGY.value))


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
  TOPOLOGY = flags.DEFINE_string("topology", None, "TPU topology, v5e:2x2 or v5p:8x8x8 ...")
  flags.mark_flags_as_required(["config", "topology"])
  launch(main, "stopped")
