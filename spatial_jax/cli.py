"""What the entry points share: flags, the compilation cache, and one-line errors."""

import contextlib
import importlib.util
import inspect
import json
import logging as python_logging
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from spatial_jax.config import ConfigError, suggestion
from spatial_jax.errors import UserError, system_error
from spatial_jax.preemption import EXIT_CODE, Terminated, raise_on_sigterm
from spatial_jax.workdir import to_path

CONFIG_HELP = (
  "config file, configs/tiny.py for one; any value may be set: "
  "--config.learn.optimizer.learning_rate=1e-4. All keys: configs/common.py"
)
CHECKPOINT_HELP = "Hugging Face folder, or work directory of a run"
_ROOT = pathlib.Path(__file__).resolve().parents[1]  # the folder that holds the package
_PARENTHESES = re.compile(r"\((.*?),?\s*\)")  # of a tuple, "(1, 2)" or "(1,)"
_INTERRUPTED = 130  # exit code of a command that Ctrl-C ended
_TYPES = {bool: "true or false", int: "an integer", float: "a number", tuple: "a list, '(1, 2)'"}


def enable_compilation_cache() -> None:
  """Keeps compiled programs on disk; JAX_COMPILATION_CACHE_DIR, if set, says where."""
  if jax.config.values["jax_compilation_cache_dir"] is None:
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache/spatial_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def one_line_exits(interrupted: str) -> Iterator[None]:
  """Ends the program with one line instead of a traceback if that is all a user needs.

  Exit codes: 2 for a mistake of the user or a full disk, 130 for Ctrl-C, 143 for SIGTERM.

  Args:
    interrupted: the line for Ctrl-C and, before the training loop, for SIGTERM.
  """
  line, code = "", 0
  try:
    raise_on_sigterm(interrupted)
    yield
  except UserError as error:
    line, code = f"error: {error}", 2
  except OSError as error:
    explained = system_error(error)
    if explained is None:
      raise
    line, code = f"error: {explained}", 2
  except KeyboardInterrupt:
    line, code = f"\n{interrupted}", _INTERRUPTED
  except Terminated as terminated:
    line, code = f"\n{terminated}", EXIT_CODE
  if code:
    print(line, file=sys.stderr)
    sys.exit(code)


def parse_flags(argv: list[str]) -> list[str]:
  """Reads a command line with a --config; a mistake in it is one line and exit code 2.

  It is a `flags_parser` of `absl.app.run`: it returns the arguments that are not flags.
  """
  config = None
  try:
    path = _config_path(argv)
    if path is not None:
      _register_parsers()
      config = _read_config(path)
      _check_overrides(config, argv)
    return flags.FLAGS(argv)
  except UserError as error:
    line = str(error)
  except flags.Error as error:
    line = _explain(str(error), config, argv)
  print(f"error: {' '.join(line.split())}", file=sys.stderr)
  sys.exit(2)


def launch(
  command: Callable[[Sequence[str]], None],
  interrupted: str,
  read: Callable[[list[str]], list[str]] = parse_flags,
) -> None:
  """Runs an entry point with `one_line_exits`; `command` gets the arguments that are not flags."""

  def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(_is_not_orbax)
    sys.unraisablehook = _drop_closed_loops
    with one_line_exits(interrupted):
      command(argv[1:])

  app.run(main, flags_parser=read)


def no_arguments(arguments: Sequence[str]) -> None:
  """Refuses arguments that are not flags."""
  if arguments:
    raise UserError(f"unknown arguments: {' '.join(arguments)}; flags begin with --")


def _is_not_orbax(record: python_logging.LogRecord) -> bool:
  """Orbax logs a failed save with many tracebacks, and raises it too."""
  return "orbax" not in record.pathname


def _drop_closed_loops(unraisable: Any) -> None:
  """Drops what TensorStore prints if other files of a failed save are still being written."""
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


# --- the config file -----------------------------------------------------------------------------


class _NumberOrNone(flags.ArgumentParser):
  """A number, or None for a key that may be None."""

  def __init__(self, number: flags.ArgumentParser):
    self._number = number

  def parse(self, argument: Any) -> Any:
    return None if argument == "None" else self._number.parse(argument)


class _JsonOrText(flags.ArgumentParser):
  """The value of a key that is None in the config file: JSON, else the text itself."""

  def parse(self, argument: Any) -> Any:
    if argument is None or argument == "None":
      return None
    try:
      return json.loads(_PARENTHESES.sub(r"[\1]", argument))
    except ValueError:
      return argument


def _register_parsers() -> None:
  config_flags.register_flag_parser_for_type(int, _NumberOrNone(flags.IntegerParser()))
  config_flags.register_flag_parser_for_type(float, _NumberOrNone(flags.FloatParser()))
  config_flags.register_flag_parser_for_type(type(None), _JsonOrText())


def _config_path(argv: Sequence[str]) -> str | None:
  """The last value of --config, None without one."""
  path = None
  for argument, following in zip(argv, [*argv[1:], None], strict=True):
    name, has_value, value = argument.partition("=")
    if name in ("--config", "-config"):
      path = value if has_value else following
  return path


def _read_config(path: str) -> Any:
  """The config that ml_collections is going to read; its mistakes are found here first.

  Raises:
    UserError: if there is no such local file or variant, or the file raises a ValueError.
  """
  to_path(path)  # refuses a remote one
  name, *variant = path.split(":", 1)
  file = pathlib.Path(name)
  if not file.is_file():
    packaged = _ROOT / file
    advice = f"; did you mean --config={packaged}?" if packaged.is_file() else ""
    problem = "is a folder" if file.is_dir() else "does not exist"
    raise UserError(f"--config={path}: {file} {problem}{advice}")
  _add_to_path(file)
  spec = importlib.util.spec_from_file_location("config_file", file)
  if spec is None or spec.loader is None:
    raise UserError(f"--config={path}: {file} is not a Python file")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if "get_config" not in vars(module):
    raise UserError(f"--config={path}: {file} has no function get_config()")
  get_config = vars(module)["get_config"]
  try:
    inspect.signature(get_config).bind(*variant)
  except TypeError as error:
    advice = "has no variants" if variant else f"needs a variant, --config={file}:NAME"
    raise UserError(f"--config={path}: {file} {advice}") from error
  try:
    return get_config(*variant)
  except ValueError as error:
    raise UserError(f"--config={path}: {error}") from error


def _add_to_path(file: pathlib.Path) -> None:
  """Lets `from configs import common` in a config file work in every current directory."""
  for folder in (*file.resolve().parents, _ROOT):
    if (folder / "configs" / "common.py").is_file():
      if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
      return


def _check_overrides(config: Any, argv: Sequence[str]) -> None:
  """Refuses --config.KEY flags with keys that the config does not have.

  Raises:
    ConfigError: naming all of them.
  """
  problems = []
  for argument in argv:
    match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    problem = match and _unknown_key(config, match[1].split("."))
    if problem:
      problems.append(f"{argument}: {problem}")
  if problems:
    raise ConfigError("; ".join(problems))


def _unknown_key(config: Any, keys: Sequence[str]) -> str | None:
  group, value = "config", config
  for key in keys:
    name = key.partition("[")[0]
    if not _is_group(value):
      return f"{group} is a value without keys"
    if name not in value:
      return f"{group} has no key {name!r} ({suggestion(name, value)})"
    if name != key:
      return None  # an index into a list: ml_collections checks the rest
    group, value = f"{group}.{name}", value[name]
  return None


def _is_group(value: Any) -> bool:
  return isinstance(value, Mapping) or hasattr(value, "items")


def _explain(message: str, config: Any, argv: Sequence[str]) -> str:
  """One plain line for an error of absl."""
  missing = re.match(r"flag --(\w+)=None: Flag --\w+ must have a value other than None", message)
  if missing:
    return f"--{missing[1]} is missing: {flags.FLAGS[missing[1]].help}"
  wrong = re.match(r"flag --config\.([\w.]+)=", message)
  if wrong is None or config is None:
    return message
  value = config
  for key in wrong[1].split("."):
    value = value[key]
  if _is_group(value):
    return f"--config.{wrong[1]} is a group of keys; set them one by one: {', '.join(value)}"
  given = next(a for a in argv if a.lstrip("-").startswith(f"config.{wrong[1]}"))
  return f"{given} must be {_TYPES.get(type(value), 'another value')}"
