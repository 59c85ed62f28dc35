"""The work directory of a run: its path, its lock and its config.

workdir/lock           locked by the process that writes here; names it
workdir/config.json    the resolved config; a resumed run must agree with it
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

import jax

from spatial_jax.config import ConfigError
from spatial_jax.errors import CheckpointError, UserError, system_error

PathLike: TypeAlias = str | os.PathLike[str]

CONFIG, LOCK = "config.json", "lock"
_ROOT = pathlib.Path(__file__).resolve().parents[1]  # the folder that holds the package
_LOCKED: dict[pathlib.Path, int] = {}  # lock file -> descriptor, open until the process ends


def to_path(path: PathLike) -> pathlib.Path:
  """The local path of a folder or file that a flag or config names.

  Raises:
    UserError: if the path is remote ("gs://bucket/run") or empty.
  """
  text = os.fspath(path)
  if not text:
    raise UserError("an empty path was given; give a folder")
  if "://" in text:
    raise UserError(f"{text} is remote, which is not supported yet; give a local path")
  return pathlib.Path(text)


def find_path(path: PathLike) -> pathlib.Path:
  """`to_path` of something to read: if it does not exist here, it is looked up beside the package.

  So "spatial_jax/assets/tiny" works in every current directory. Errors as in `to_path`.
  """
  local = to_path(path)
  packaged = _ROOT / local
  return packaged if not local.exists() and packaged.exists() else local


def stage_folders(workdir: pathlib.Path) -> list[pathlib.Path]:
  """The folders of the stages of a run, in order; a run of one stage is its own folder."""
  stages = (path for path in workdir.glob("[0-9]_*") if path.is_dir())
  return sorted(stages, key=lambda path: path.name) or [workdir]


def final_folder(workdir: pathlib.Path) -> pathlib.Path:
  """The folder with the checkpoint of a run: that of its last stage."""
  return stage_folders(workdir)[-1]


def write_text(path: PathLike, text: str) -> None:
  """Replaces a file in one rename, so that it is never half written.

  Raises:
    UserError: I/O, in one line that names the file, e.g. if the disk is full.
  """
  target = pathlib.Path(path)
  partial = target.with_name(f"{target.name}.partial")
  with one_line_errors(target):
    try:
      partial.write_text(text, encoding="utf-8")
      partial.replace(target)
    except OSError:
      with contextlib.suppress(OSError):
        partial.unlink()
      raise


@contextlib.contextmanager
def one_line_errors(path: PathLike) -> Iterator[None]:
  """Turns system errors that the user can fix (disk full, no permission) into a UserError."""
  try:
    yield
  except OSError as error:
    line = system_error(error, path)
    if line is None:
      raise
    raise line from error


def lock_workdir(workdir: PathLike) -> None:
  """Creates the work directory and locks it for this process until the process ends.

  The kernel releases the lock with the process, so the lock file of a dead process does not matter.

  Raises:
    CheckpointError: I/O, if another process holds the lock, or if the folder cannot be written.
  """
  path = pathlib.Path(workdir).resolve() / LOCK
  if path in _LOCKED or jax.process_index() != 0:
    return
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  except OSError as error:
    is_file = pathlib.Path(workdir).is_file()
    problem = "is a file" if is_file else f"cannot be written ({os.strerror(error.errno or 0)})"
    raise CheckpointError(
      f"--workdir={os.fspath(workdir)} {problem}; choose another folder"
    ) from error
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
    os.close(descriptor)
    raise CheckpointError(
      f"--workdir={os.fspath(workdir)} is in use by {owner}; stop it or choose another folder"
    ) from error
  except OSError as error:  # some network file systems have no locks
    print(f"warning: {path} cannot be locked ({error}): start no second run", file=sys.stderr)
  _LOCKED[path] = descriptor
  with one_line_errors(path):
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def bind_workdir(workdir: PathLike, config: Mapping[str, Any], may_differ: Collection[str]) -> None:
  """Locks the work directory and binds it to `config`; a resumed run must have the same config.

  Args:
    workdir: created if it does not exist; `config.json` is written into it.
    config: the resolved config, JSON values.
    may_differ: keys ("loop.steps") and groups of keys ("loop") that a resumed run may change.

  Raises:
    ConfigError: naming every other key that differs; nothing is written.
    CheckpointError: I/O, if another process runs here, the folder cannot be written, or its
      `config.json` cannot be read.
  """
  lock_workdir(workdir)
  path = pathlib.Path(workdir) / CONFIG
  text = json.dumps(config, indent=2, sort_keys=True) + "\n"
  if path.exists():
    _check_same(json.loads(text), _read_config(path), may_differ)
  if jax.process_index() == 0:
    write_text(path, text)


def recorded_config(workdir: PathLike) -> dict[str, Any]:
  """Returns the config that the run of a work directory recorded; {} without a run."""
  path = pathlib.Path(workdir) / CONFIG
  return _read_config(path) if path.exists() else {}


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    with one_line_errors(path):
      config = json.loads(path.read_text(encoding="utf-8"))
  except UserError:
    raise
  except ValueError as error:
    raise CheckpointError(f"{path} is not JSON ({error}); use a new --workdir") from error
  if not isinstance(config, dict):
    raise CheckpointError(f"{path} is not the config of a run; use a new --workdir")
  return config


def _check_same(
  here: Mapping[str, Any], saved: Mapping[str, Any], may_differ: Collection[str]
) -> None:
  ours, theirs = dict(_flat(here)), dict(_flat(saved))
  differing = [
    f"config.{key} is {_show(ours, key)}, workdir has {_show(theirs, key)}"
    for key in sorted(ours.keys() | theirs.keys())
    if not _same(ours, theirs, key) and not _covered(key, may_differ)
  ]
  if differing:
    raise ConfigError(
      f"work directory of another config: {'; '.join(differing)}; use a new --workdir"
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """("advantage.alpha", 1.0), ...; an empty group is a value of its own."""
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _same(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> bool:
  return key in ours and key in theirs and ours[key] == theirs[key]


def _show(flat: Mapping[str, Any], key: str) -> str:
  return json.dumps(flat[key], sort_keys=True) if key in flat else "not set"


def _covered(key: str, may_differ: Collection[str]) -> bool:
  """Whether `may_differ` has `key` or a group that holds it."""
  parts = key.split(".")
  return any(".".join(parts[:length]) in may_differ for length in range(1, len(parts) + 1))
