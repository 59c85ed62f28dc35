"""What the entry points share: flags, kept compilations, one line for what the user can mend."""

import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, logging

from spatial_jax.config import parse_flags
from spatial_jax.errors import UserError

CONFIG_HELP = (
  "config file, configs/tiny.py for one; any value may be set: "
  "--config.learn.optimizer.learning_rate=1e-4. All keys: configs/common.py"
)
CHECKPOINT_HELP = "Hugging Face folder, or work directory of a run"
_INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended


def enable_compilation_cache() -> None:
  """Programs that took long to compile are there for the next run."""
  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache/spatial_jax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def launch(
  command: Callable[[Sequence[str]], None],
  interrupted: str,
  read: Callable[[list[str]], list[str]] = parse_flags,
) -> None:
  """Runs an entry point; a user's mistake is one line and exit code 2, Ctrl-C one line and 130.

  Args:
    command: given the arguments that are no flags.
    interrupted: the line for Ctrl-C.
    read: reads the flags, as `absl.app.run` wants it.
  """

  def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    try:
      command(argv[1:])
    except UserError as error:
      print(f"error: {error}", file=sys.stderr)
      sys.exit(2)
    except KeyboardInterrupt:
      print(f"\n{interrupted}", file=sys.stderr)
      sys.exit(_INTERRUPTED)

  app.run(main, flags_parser=read)


def no_arguments(arguments: Sequence[str]) -> None:
  """Refuses what is no flag."""
  if arguments:
    raise UserError(f"unknown arguments: {' '.join(arguments)}; flags begin with --")
