"""Entry point: python -m spatial_jax.train --config=configs/NAME.py --workdir=DIR [--config.KEY=V]

  stages       sft ─► reject ─► dpo ─► grpo, each from the checkpoint of the one before
  conditions   the same config with some changes, each from the same start

A run of one stage writes DIR/metrics.jsonl, DIR/checkpoints/, DIR/config.json, DIR/results.json and
DIR/report.html. Several stages or conditions have a folder each, and one table. The same command
resumes a run that was stopped.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from spatial_jax import dry_run as dry_run_lib
from spatial_jax import sharding, study
from spatial_jax.cli import CONFIG_HELP, enable_compilation_cache, launch, no_arguments
from spatial_jax.errors import UserError
from spatial_jax.machines import MACHINES, devices_of, this_machine
from spatial_jax.prepare import (
  after_stage,
  check_values,
  conditions_of,
  for_stage,
  prepare,
)
from spatial_jax.rollout import memory
from spatial_jax.run_stage import check_stage, is_finished, run_stage
from spatial_jax.workdir import to_path


def main(arguments: Sequence[str]) -> None:
  """Trains, evaluates and writes the report."""
  no_arguments(arguments)
  if DRY_RUN.value:
    dry_run(CONFIG.value, DEVICES.value)
    return
  if WORKDIR.value is None:
    raise UserError(f"--workdir is missing: {flags.FLAGS['workdir'].help}")
  enable_compilation_cache()
  run(CONFIG.value, to_path(WORKDIR.value))


def dry_run(config: Any, machine: str) -> None:
  """Prints stages, prompts, memory and programs of a run; needs no weights and allocates nothing.

  Raises:
    UserError: if the run would be refused, or does not fit.
  """
  if machine:
    jax.config.update("jax_platforms", "cpu")  # shapes alone; nothing runs
  conditions = conditions_of(config)
  seen: set[str] = set()
  for name, settings in conditions.items():
    settings = settings | {"init": config.init}  # "@NAME" has the shape of the first start
    ready = prepare(settings, None, devices_of(machine), needs_weights=False)
    if not seen:
      print("\n".join(dry_run_lib.head(ready)))
    stages = dry_run_lib.describe(ready)
    if name:
      print(f"condition {name}: {', '.join(ready.cfg.stages)}")
    for stage in stages:
      if stage.lines[0] not in seen:
        print("\n".join(stage.lines))
      seen.add(stage.lines[0])
      memory.check(stage.plan, stage.key)
  print("fits")


def run(config: Any, workdir: pathlib.Path) -> None:
  """Runs the conditions one after the other; an existing run is resumed.

  The values of all conditions are checked first, and all stages of a condition before its first.

  Raises:
    UserError: if config (a ConfigDict), policy or work directory cannot be used; the work directory
      is then not bound to the config.
  """
  sharding.refuse_several_processes()
  conditions = conditions_of(config)
  for settings in conditions.values():
    check_values(settings)
  for name, settings in conditions.items():
    if len(conditions) > 1:
      print(f"condition {name}")
    start = study.start_of(settings["init"], workdir)
    run_condition(settings | {"init": start}, workdir / name if name else workdir)
  if len(conditions) > 1:
    study.show_conditions(workdir, list(conditions))


def run_condition(settings: dict[str, Any], workdir: pathlib.Path) -> None:
  """Checks all stages of one condition, then runs them, each from the checkpoint before it."""
  stages = settings["stages"]
  folders = [study.stage_folder(workdir, stages, number) for number in range(len(stages))]
  ready = prepare(settings, folders[0] if folders else None, this_machine(), needs_weights=True)
  for name, folder in zip(stages[1:], folders[1:], strict=True):  # the first checks itself
    later = for_stage(ready, name)
    if not is_finished(later.cfg, folder):
      check_stage(later, name)
  for number, (name, folder) in enumerate(zip(stages, folders, strict=True)):
    if len(stages) > 1:
      print(f"stage {number + 1} of {len(stages)}: {name}")
    one = after_stage(ready, folders[number - 1]) if number else ready
    run_stage(for_stage(one, name), name, folder)
  if len(stages) > 1:
    study.show_stages(workdir, stages)


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
  WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder that the run is written to; an existing run is resumed"
  )
  DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "print stages, tokens, memory and programs, without weights, and exit"
  )
  DEVICES = flags.DEFINE_string(
    "devices", "", f"of --dry_run: {', '.join(MACHINES)}; default: this machine"
  )
  flags.mark_flag_as_required("config")
  launch(main, "stopped; the same command goes on from the last checkpoint")
