"""Entry point: python -m spatial_jax.aot --config=configs/NAME.py --topology=v5e:8x8

Compiles the rollouts and updates of all stages of a run for TPUs that this machine does not have,
and prints the memory of a chip that each needs. Exit code 0: all fit; 1: one does not; 2: the
config is wrong.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import config_flags

from spatial_jax import abstract_inputs, compiled, sharding
from spatial_jax.abstract_inputs import Program
from spatial_jax.cli import CONFIG_HELP, launch, no_arguments
from spatial_jax.config import ConfigError
from spatial_jax.dry_run import fit_to_prompts, training_of
from spatial_jax.machines import GIB, USABLE, Devices
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.prepare import Prepared, for_stage, prepare, settings_as_json
from spatial_jax.rollout.memory import bytes_of
from spatial_jax.stages.start import reference_shapes
from spatial_jax.train_config import StageName, TrainConfig, has_start_copy, training_parts

# Read when libtpu is loaded: no request to the metadata server, several processes may compile.
LIBTPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
  """A compiled program and its memory: bytes per chip."""

  name: str
  seconds: float  # to lower and compile
  arguments: int
  temporaries: int  # scratch memory
  program_total: int  # arguments, results, scratch and code
  resident: int  # other arrays that are in memory meanwhile
  text: str  # the optimised program
  error: str | None  # why it did not compile; the sizes are then 0

  def fits(self, usable: int) -> bool:
    """Whether it compiled and fits into `usable` bytes together with the resident arrays."""
    return self.error is None and self.program_total + self.resident <= usable


def topology_mesh(topology: str, mesh: sharding.MeshConfig) -> Mesh:
  """Returns the train mesh over a TPU topology ("v5e:8x8").

  Raises:
    ConfigError: if libtpu is not installed, the topology does not exist, or the mesh does not fit.
  """
  return sharding.make_mesh(mesh, _devices(topology))


def host_mesh(topology: str, mesh: Mesh) -> Mesh:
  """Returns the mesh of one process of the train mesh, as a slice of its own: four chips.

  The compiler does not accept a part of a slice.
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
  except Exception as error:  # the plugin raises several types
    if "libtpu" in str(error).lower():
      raise ConfigError("libtpu is not installed: pip install 'spatial_jax[tpu]'") from error
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise ConfigError(
      f"--topology={topology} is not a TPU topology ({reason}); use one such as v5e:2x2, v5e:8x8 "
      "or v5p:2x2x1"
    ) from error


def programs_to_compile(
  cfg: TrainConfig, shape: QwenVLConfig, mesh: Mesh, host: Mesh
) -> list[Program]:
  """Returns the programs of a GRPO step at their largest shapes, rounded up for the platform.

  The rollout programs are those of `host`, the mesh of one process.

  Raises:
    ConfigError: if training would refuse the config with this policy and train mesh.
  """
  parts, learn = training_parts(cfg, shape, mesh), cfg.learn
  island = dataclasses.replace(parts.policy, mesh=host)
  rollout = compiled.rollout_buckets(cfg.rollout, mesh)
  programs = abstract_inputs.all_programs(
    parts.policy,
    island,
    parts.optimizer,
    learn.loss,
    learn.micro,
    rollout,
    parts.shapes,
    learn.keep_fraction,
  )
  if learn.reference == "host" or not has_start_copy(cfg):
    return programs
  reference = reference_shapes(parts.policy)
  return [dataclasses.replace(one, resident=(*one.resident, reference)) for one in programs]


def stage_programs(ready: Prepared, name: StageName, mesh: Mesh, host: Mesh) -> list[Program]:
  """Returns the programs of one stage. A "grpo" stage has the rollout programs of all stages.

  Supervised stages get demonstrations about the largest prompts, as in a dry run.
  """
  if name == "grpo":
    return programs_to_compile(ready.cfg, ready.shape, mesh, host)
  one = for_stage(ready, name)
  fitted, parts, loss = fit_to_prompts(one, name), one.parts, one.cfg.dpo.loss
  kind = "dpo" if name == "dpo" else "sft"
  sequences = training_of(one.cfg, name).batch * (2 if name == "dpo" else 1)
  shared = parts.policy, parts.optimizer, fitted.micro, fitted.shapes, loss, sequences
  programs = [
    dataclasses.replace(program, name=program.name.replace(kind, name))
    for program in abstract_inputs.packed_programs(kind, *shared)
  ]
  samples = name == "reject" or (name == "dpo" and one.cfg.dpo.pairs == "samples")
  if samples and "grpo" not in ready.cfg.stages:
    rollouts = programs_to_compile(one.cfg, ready.shape, mesh, host)
    programs = [*(program for program in rollouts if program.name != "update"), *programs]
  return programs


def compile_program(program: Program) -> CompiledProgram:
  """Compiles one program; if the compiler refuses it, for memory above all, `error` says why."""
  begin = time.monotonic()
  resident = bytes_of(*program.resident)
  try:
    with _no_compilation_cache():
      result = program.function.lower(*program.arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    reason, seconds = str(error).splitlines()[0], time.monotonic() - begin
    return CompiledProgram(program.name, seconds, 0, 0, 0, resident, "", reason)
  memory: Any = result.memory_analysis()
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  total = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
  return CompiledProgram(
    name=program.name,
    seconds=time.monotonic() - begin,
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    program_total=total + memory.generated_code_size_in_bytes,
    resident=resident,
    text=result.as_text() or "",
    error=None,
  )


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
  """Turns the persistent cache off: it can write a program for absent devices, but not read it."""
  before = jax.config.values["jax_enable_compilation_cache"]
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def table(programs: Sequence[CompiledProgram], usable: int) -> str:
  """Returns the result as text, one line per program; `usable`: bytes of a chip."""
  lines = [
    f"{'program':<15} {'seconds':>8} {'arguments':>10} {'scratch':>9} {'program':>9} "
    f"{'resident':>9} {'total':>9}  of {usable / GIB:.2f} usable GiB per device"
  ]
  for one in programs:
    total = one.program_total + one.resident
    sizes = (one.temporaries, one.program_total, one.resident, total)
    cells = " ".join(f"{size / GIB:9.3f}" for size in sizes)
    verdict = "fits" if one.fits(usable) else one.error or "DOES NOT FIT"
    arguments = f"{one.arguments / GIB:10.3f}"
    lines.append(f"{one.name:<15} {one.seconds:8.1f} {arguments} {cells}  {verdict}")
  return "\n".join(lines)


def run(config: Any, topology: str) -> int:
  """Compiles the programs of a training config (ConfigDict) and prints progress and table.

  Returns the exit code: 0 if all programs fit, else 1. Raises UserError if training would refuse
  the config, or the topology ("v5e:2x2") cannot be used.
  """
  devices = _devices(topology)
  kind = devices[0].device_kind
  if kind not in USABLE:
    raise ConfigError(f"memory of a {kind!r} device is unknown; add it to machines.USABLE")
  local = sum(device.process_index == devices[0].process_index for device in devices)
  usable = USABLE[kind]
  ready = prepare(
    settings_as_json(config), None, Devices(devices, local, usable), needs_weights=False
  )
  mesh = compiled.train_mesh(ready.parts.policy)
  print(f"{topology}: {mesh.size} x {kind}, mesh {dict(mesh.shape)}; bfloat16; largest buckets,")
  print(f"sequences rounded up to multiples of {compiled.TPU_SEQUENCE}; GiB per device")
  host = host_mesh(topology, mesh)
  programs = [
    program for name in ready.cfg.stages for program in stage_programs(ready, name, mesh, host)
  ]
  done = []
  for number, program in enumerate(programs, 1):
    print(f"[{number}/{len(programs)}] {program.name} ...", end="", flush=True)
    done.append(compile_program(program))
    print(f" {done[-1].seconds:.1f} s", flush=True)
  print(table(done, usable))
  return 0 if all(one.fits(usable) for one in done) else 1


def main(arguments: Sequence[str]) -> None:
  """Compiles and exits with the code of `run`."""
  no_arguments(arguments)
  jax.config.update("jax_platforms", "cpu")  # the host traces; nothing runs
  assert TOPOLOGY.value is not None  # the flag is required
  sys.exit(run(CONFIG.value, TOPOLOGY.value))


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
  TOPOLOGY = flags.DEFINE_string("topology", None, "TPU topology, v5e:2x2 or v5p:8x8x8 ...")
  flags.mark_flags_as_required(["config", "topology"])
  launch(main, "stopped")
