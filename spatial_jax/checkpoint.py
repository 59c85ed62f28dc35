"""Checkpoints of a run: its TrainState and its progress, written by Orbax.

    workdir/checkpoints/120/state/        TrainState
    workdir/checkpoints/120/progress/     Progress as JSON
    workdir/checkpoints/120/files.json    size and CRC-32 of every file above

A step is written to a temporary folder and renamed when it is complete, so a run that is killed at
any time keeps its last complete step. A step with files that differ from files.json is damaged; it
is named in one line, and the step before it is used.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from spatial_jax import sharding
from spatial_jax.checks import mismatches
from spatial_jax.errors import CheckpointError, system_error
from spatial_jax.types import Params, TrainState
from spatial_jax.workdir import PathLike, find_path, to_path

FOLDER = "checkpoints"
STATE, PROGRESS, FILES = "state", "progress", "files.json"
_CHUNK = 1 << 24  # bytes read at once
_REMOVALS = 30  # attempts to remove the folder of a failed save, 0.1 s apart


@dataclasses.dataclass(frozen=True)
class Progress:
  """The progress of a run, saved with its TrainState."""

  step: int  # number of updates done, and the number of the next one
  benchmark: str | None  # whose rooms the policy was trained on ("vsi-bench"); None without one
  config: dict[str, Any]  # the resolved config, from which evaluation builds the policy again


class Saver:
  """Writes checkpoints in the background and keeps the last few; close it, or use it in `with`."""

  def __init__(self, workdir: PathLike, keep: int):
    """Opens the checkpoint folder and removes the rest of an interrupted save.

    Args:
      workdir: of the run; created if missing.
      keep: number of checkpoints to keep, >= 1.
    """
    self._folder = epath.Path(to_path(workdir).resolve() / FOLDER)
    self._whole: set[int] = set()  # steps that were verified or saved here
    self._step: int | None = None  # of the last save
    self._failed = False  # after a save that could not be written
    options = ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.LatestN(keep),
      cleanup_tmp_directories=True,
      lightweight_initialize=True,
      # Runs before the rename, so that a complete step always has its list of files.
      async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
    )
    with self._one_line_errors():
      self._manager = ocp.CheckpointManager(self._folder, options=options)

  def save(self, state: TrainState, progress: Progress) -> None:
    """Copies the state to the host and returns; the files are written in the background.

    Waits for the save before it. The first save removes damaged checkpoints.

    Args:
      state: may be donated to the next update as soon as this returns.
      progress: `progress.step` names the checkpoint.

    Raises:
      CheckpointError: if a whole checkpoint of this or a later step exists, or if this save or the
        one before it cannot be written, e.g. because the disk is full.
    """
    with self._one_line_errors():
      self._manager.wait_until_finished()
      self._check_existing(progress.step)
      self._step = progress.step
      self._manager.save(
        progress.step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
        ),
        force=True,
      )
      self._whole.add(progress.step)

  def close(self) -> None:
    """Waits until the last checkpoint is complete; errors as in `save`."""
    if self._failed:  # reported by the call that failed
      with contextlib.suppress(Exception):
        self._manager.close()
      self._remove_partial()
      return
    with self._one_line_errors():
      self._manager.close()

  def __enter__(self) -> "Saver":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _check_existing(self, step: int) -> None:
    """Removes damaged checkpoints, which must not count as kept; refuses whole ones from `step`."""
    for other in self._manager.all_steps():
      folder = self._folder / str(other)
      if other not in self._whole and _damage(folder) is not None:
        self._manager.delete(other)
        continue
      self._whole.add(other)
      if other >= step:
        raise CheckpointError(f"{folder} exists; resume from it instead of saving it again")

  def _list_files(self) -> None:
    """Writes files.json into the temporary folder of the step that is being saved."""
    for temporary in ocp.utils.tmp_checkpoints(self._folder):
      folder = pathlib.Path(temporary.get())
      paths = [p for item in (STATE, PROGRESS) for p in (folder / item).rglob("*") if p.is_file()]
      names = [path.relative_to(folder).as_posix() for path in paths]
      files = dict(zip(names, _checksums(paths), strict=True))
      (folder / FILES).write_text(json.dumps(files))

  def _remove_partial(self) -> None:
    """Removes the folder of a failed save; threads may still write other arrays for a moment."""
    self._failed = True
    for _ in range(_REMOVALS):
      partial = list(self._folder.glob("*.orbax-checkpoint-tmp*"))
      for folder in partial:
        shutil.rmtree(folder, ignore_errors=True)
      if not partial:
        return
      time.sleep(0.1)

  @contextlib.contextmanager
  def _one_line_errors(self) -> Iterator[None]:
    """After a failed save, removes its partial folder and raises one line."""
    try:
      yield
    except CheckpointError:
      raise
    except Exception as error:
      self._remove_partial()
      reason = _reason(error)
      if reason is None:
        raise
      name = "checkpoints" if self._step is None else f"checkpoint {self._step}"
      raise CheckpointError(
        f"{name} cannot be written to {self._folder}: {reason}; older checkpoints are kept"
      ) from error


def latest(path: PathLike) -> epath.Path | None:
  """The newest whole checkpoint; damaged ones after it are named on standard error.

  Args:
    path: a work directory, its `checkpoints` folder, or one checkpoint.

  Returns:
    The folder of that step, None if there is none.

  Raises:
    CheckpointError: if every checkpoint is damaged.
  """
  steps = _steps(find_path(path).resolve())
  damaged = []
  for step in steps:
    problem = _damage(step)
    if problem is None:
      for line in damaged:
        print(f"warning: {line}; using {step}", file=sys.stderr)
      return step
    damaged.append(f"checkpoint {step} is damaged: {problem}")
  if damaged:
    raise CheckpointError(_advice(damaged, steps))
  return None


def exists(path: PathLike) -> bool:
  """Whether there is any checkpoint, whole or damaged: `latest` then returns one or raises."""
  return bool(_steps(find_path(path).resolve()))


def find(path: PathLike) -> epath.Path:
  """`latest`, for a path that must have a checkpoint.

  Raises:
    CheckpointError: naming the path, if it has no checkpoint or only damaged ones.
  """
  found = latest(path)
  if found is None:
    what = "has no complete checkpoint" if find_path(path).exists() else "does not exist"
    raise CheckpointError(
      f"{os.fspath(path)} {what}; give a Hugging Face folder, or the --workdir of a run that has"
      " saved a checkpoint"
    )
  return found


def read_progress(checkpoint: PathLike) -> Progress:
  """The Progress saved with a TrainState.

  Args:
    checkpoint: a folder that `find` returned.

  Raises:
    CheckpointError: if another version of this program wrote the checkpoint.
  """
  restored = _reader().restore(
    epath.Path(checkpoint), args=ocp.args.Composite(progress=ocp.args.JsonRestore())
  )
  saved = restored[PROGRESS]
  names = {field.name for field in dataclasses.fields(Progress)}
  if not isinstance(saved, dict) or saved.keys() != names:
    raise CheckpointError(
      f"{os.fspath(checkpoint)} was written by another version of this program; use another one"
    )
  return Progress(**saved)


def restore(checkpoint: PathLike, abstract: TrainState) -> TrainState:
  """Reads a TrainState straight into the given shardings.

  Args:
    checkpoint: a folder that `find` returned.
    abstract: jax.ShapeDtypeStruct with shape, dtype and sharding at every leaf.

  Returns:
    The state; the mesh may differ from the one it was saved on.

  Raises:
    CheckpointError: listing every missing, unknown or differently shaped leaf.
  """
  _check_leaves(checkpoint, abstract, _saved_leaves(checkpoint))
  return _restore_tree(checkpoint, abstract)


def restore_params(checkpoint: PathLike, abstract: Params) -> Params:
  """Reads the parameters alone; arguments and errors as in `restore`.

  Their dtypes may differ from the saved ones: values are rounded as they are read.
  """
  saved = _saved_leaves(checkpoint)
  params = {name: leaf for name, leaf in saved.items() if name.startswith("params/")}
  _check_leaves(checkpoint, {"params": abstract}, params, dtypes=False)
  return _restore_tree(checkpoint, {"params": abstract})["params"]


def _restore_tree(checkpoint: PathLike, abstract: Any) -> Any:
  """The leaves of `abstract`; the checkpoint may have more."""
  arguments = ocp.args.PyTreeRestore(
    item=abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
    partial_restore=True,
  )
  restored = _reader().restore(epath.Path(checkpoint), args=ocp.args.Composite(state=arguments))
  return restored[STATE]


def _reader() -> ocp.Checkpointer:
  handlers = {STATE: ocp.PyTreeCheckpointHandler(), PROGRESS: ocp.JsonCheckpointHandler()}
  return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def _steps(root: pathlib.Path) -> list[epath.Path]:
  """The folders of all steps, newest first; temporary ones are left out."""
  folder = root / FOLDER if (root / FOLDER).is_dir() else root
  if folder.name == FOLDER and folder.is_dir():
    found = ocp.path.step.standard_name_format().find_all(folder)
    steps = sorted(found, key=lambda step: step.step, reverse=True)
    return [step.path for step in steps if step.path.is_dir()]
  single = root.name.isdecimal() and any((root / name).exists() for name in (STATE, FILES))
  return [epath.Path(root)] if single else []


def _advice(damaged: list[str], steps: list[epath.Path]) -> str:
  """One line for a path that has only damaged checkpoints."""
  step = steps[0]
  if step.parent.name != FOLDER:
    return f"{damaged[0]}; use another one"
  others = [other for other in _steps(pathlib.Path(step.parent)) if other not in steps]
  whole = next((other for other in others if _damage(other) is None), None)
  if whole is not None:
    return f"{damaged[0]}; use {whole}"
  more = f"; damaged too: {', '.join(other.name for other in steps[1:])}" if steps[1:] else ""
  return f"{damaged[0]}{more}; delete {step.parent} to start again"


def _damage(step: epath.Path) -> str | None:
  """The first difference between the files of a step and files.json, None if there is none."""
  folder = pathlib.Path(step)
  try:
    files = json.loads((folder / FILES).read_text())
    expected = {folder / name: [int(size), int(crc)] for name, (size, crc) in files.items()}
  except FileNotFoundError:
    return f"{FILES} is missing"
  except (OSError, ValueError, TypeError, AttributeError):
    return f"{FILES} cannot be read"
  for path, (size, _) in expected.items():
    if not path.is_file():
      return f"{path.relative_to(folder)} is missing"
    if path.stat().st_size != size:
      return f"{path.relative_to(folder)} has {path.stat().st_size:,} of {size:,} bytes"
  try:
    found = dict(zip(expected, _checksums(list(expected)), strict=True))
  except OSError as error:
    return f"a file cannot be read ({error})"
  changed = [path.relative_to(folder) for path in expected if found[path] != expected[path]]
  return f"{changed[0]} has other bytes than were written" if changed else None


def _checksums(paths: Sequence[pathlib.Path]) -> list[list[int]]:
  """[size, CRC-32] of every file."""
  with concurrent.futures.ThreadPoolExecutor() as threads:
    return list(threads.map(_checksum, paths))


def _checksum(path: pathlib.Path) -> list[int]:
  size = crc = 0
  with path.open("rb") as file:
    while block := file.read(_CHUNK):
      size, crc = size + len(block), zlib.crc32(block, crc)
  return [size, crc]


def _reason(error: Exception) -> str | None:
  """Why the file system refused, as one line; None if it is not the cause of `error`."""
  if not isinstance(error, OSError):  # TensorStore raises a ValueError with the code in its text
    code = re.search(r"os_error_code='(\d+)'", str(error))
    error = OSError(int(code[1]) if code else 0, "")
  line = system_error(error)
  return None if line is None else str(line)


def _saved_leaves(checkpoint: PathLike) -> dict[str, Any]:
  """Name -> array metadata. Tuples and fields come back as lists and dicts."""
  items = _reader().metadata(epath.Path(checkpoint)).item_metadata
  assert items is not None
  return _leaves(items[STATE].tree)


def _leaves(tree: Any) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {sharding.path_name(path): leaf for path, leaf in leaves}


def _check_leaves(
  checkpoint: PathLike, abstract: Any, saved: Mapping[str, Any], dtypes: bool = True
) -> None:
  expected, found = (
    {name: f"{leaf.dtype if dtypes else ''}{list(leaf.shape)}" for name, leaf in leaves.items()}
    for leaves in (_leaves(abstract), saved)
  )
  if problems := mismatches(expected, found, "checkpoint"):
    raise CheckpointError(
      f"{os.fspath(checkpoint)} does not fit the model: {'; '.join(problems)}; "
      "use the config it was trained with"
    )
