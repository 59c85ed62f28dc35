"""Checkpoints of a run: TrainState, and where in data and schedule it stands.

    workdir/config.json              the resolved config; a resumed run must agree with it
    workdir/checkpoints/120/         one step: TrainState (Orbax) and its Progress (JSON)

A step is written beside its place and renamed when it is complete, so a run killed at any time
leaves the last complete step.
"""

import dataclasses
import json
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from spatial_jax.config import ConfigError
from spatial_jax.errors import CheckpointError
from spatial_jax.types import Params, TrainState

PathLike: TypeAlias = str | os.PathLike[str]

FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Progress:
  """Where a run stands, next to its TrainState.

  Attributes:
    step: updates done over all stages of the run, so the number of the next one.
    schedule_step: updates done under the current schedule (sharpness, learning rate).
    data: position in the data, as the loader gives and takes it; JSON values.
    benchmark: whose rooms it was trained on ("vsi-bench"), None when on nobody's.
    config: the resolved config, so that evaluation can rebuild the policy.
  """

  step: int
  schedule_step: int
  data: dict[str, Any]
  benchmark: str | None
  config: dict[str, Any]


class Saver:
  """Writes checkpoints in the background and keeps the last few; close it, or use it in `with`."""

  def __init__(self, workdir: PathLike, keep: int):
    """Opens (and makes) the checkpoint folder, clearing what an interrupted save left there.

    Args:
      workdir: of the run.
      keep: number of checkpoints that stay, >= 1.
    """
    # Orbax's own annotations of its policies disagree with each other, hence Any.
    last: Any = ocp.training.preservation_policies.LatestN(keep)
    self._checkpointer = ocp.training.Checkpointer(
      epath.Path(workdir).resolve() / FOLDER,  # Orbax refuses a relative path, in the background
      preservation_policy=last,
      cleanup_tmp_directories=True,
    )

  def save(self, state: TrainState, progress: Progress) -> None:
    """Copies the state to the host and returns; the files are written meanwhile.

    A save that is still under way is waited for.

    Args:
      state: may be donated to the next update as soon as this returns.
      progress: `progress.step` names the checkpoint.

    Raises:
      CheckpointError: on the host, when this step is there already.
    """
    if any(found.step == progress.step for found in self._checkpointer.checkpoints):
      folder = self._checkpointer.directory / str(progress.step)
      raise CheckpointError(f"{folder} exists; resume from it instead of saving it again")
    self._checkpointer.save_async(
      progress.step, state, force=True, custom_metadata=dataclasses.asdict(progress)
    )

  def close(self) -> None:
    """Waits until the last checkpoint is complete."""
    self._checkpointer.close()

  def __enter__(self) -> "Saver":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def latest(path: PathLike) -> epath.Path | None:
  """The newest complete checkpoint.

  Args:
    path: a work directory, its `checkpoints` folder, or one checkpoint.

  Returns:
    The folder of that step, None when there is none.
  """
  root = epath.Path(path).resolve()
  if _is_complete(root):
    return root
  folder = root / FOLDER if (root / FOLDER).is_dir() else root
  complete = [step for step in folder.glob("*") if _is_complete(step)]
  return max(complete, key=lambda step: int(step.name), default=None)


def find(path: PathLike) -> epath.Path:
  """`latest`, where a checkpoint has to be.

  Raises:
    CheckpointError: on the host, naming the path.
  """
  found = latest(path)
  if found is None:
    what = "holds no complete checkpoint" if epath.Path(path).exists() else "does not exist"
    raise CheckpointError(
      f"checkpoint {os.fspath(path)} {what}; give the --workdir of a run that has saved one"
    )
  return found


def read_progress(checkpoint: PathLike) -> Progress:
  """What was saved beside the TrainState.

  Args:
    checkpoint: a folder that `find` returned.

  Raises:
    CheckpointError: on the host, when another program wrote the checkpoint.
  """
  saved = ocp.metadata(epath.Path(checkpoint)).custom_metadata
  names = {field.name for field in dataclasses.fields(Progress)}
  if not isinstance(saved, dict) or saved.keys() != names:
    raise CheckpointError(
      f"{os.fspath(checkpoint)} has no record of its progress; give a checkpoint of this program"
    )
  return Progress(**saved)  # pyright: ignore[reportArgumentType]: JSON, written from a Progress


def restore(checkpoint: PathLike, abstract: TrainState) -> TrainState:
  """Reads a TrainState straight into the given shardings.

  Args:
    checkpoint: a folder that `find` returned.
    abstract: jax.ShapeDtypeStruct with shape, dtype and sharding at every leaf.

  Returns:
    The state; the mesh may differ from the one it was saved on.

  Raises:
    CheckpointError: on the host, listing every missing, unknown or differently shaped leaf.
  """
  _check_leaves(checkpoint, abstract, _saved_leaves(checkpoint))
  return ocp.load(epath.Path(checkpoint), abstract)


def restore_params(checkpoint: PathLike, abstract: Params) -> Params:
  """Reads the parameters alone, for sampling; arguments and errors as in `restore`."""
  saved = {name: leaf for name, leaf in _saved_leaves(checkpoint).items() if _is_param(name)}
  _check_leaves(checkpoint, {"params": abstract}, saved)
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  with context:
    return ocp.load(epath.Path(checkpoint), {"params": abstract})["params"]


def bind_workdir(workdir: PathLike, config: Mapping[str, Any], may_differ: Collection[str]) -> None:
  """Makes the work directory that of `config`, or refuses it.

  Args:
    workdir: made when it is not there; `config.json` is written into it.
    config: the resolved config, JSON values.
    may_differ: keys ("steps") and groups of keys ("log") that a resumed run may change.

  Raises:
    ConfigError: on the host, naming every other key that differs; nothing is written.
    CheckpointError: I/O, when the `config.json` that is there cannot be read.
  """
  path = epath.Path(workdir) / "config.json"
  text = json.dumps(config, indent=2, sort_keys=True) + "\n"
  if path.exists():
    try:
      there = dict(_flat(json.loads(path.read_text())))
    except ValueError as error:
      raise CheckpointError(f"{path} is not JSON ({error}); use a new --workdir") from error
    here = dict(_flat(json.loads(text)))
    differing = [
      f"config.{key} is {_show(here, key)}, workdir has {_show(there, key)}"
      for key in sorted(here.keys() | there.keys())
      if not _same(here, there, key) and not _covered(key, may_differ)
    ]
    if differing:
      raise ConfigError(
        f"work directory of another config: {'; '.join(differing)}; use a new --workdir"
      )
  if jax.process_index() == 0:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("config.json.partial")
    partial.write_text(text)
    partial.replace(path)


def _is_complete(path: epath.Path) -> bool:
  """Whether this is the folder of one step, with the file that Orbax writes last."""
  return path.name.isdecimal() and (path / "commit_success.txt").exists()


def _saved_leaves(checkpoint: PathLike) -> dict[str, Any]:
  """Name -> array metadata. The TrainState's fields and tuples come back as dicts and lists."""
  return _leaves(ocp.metadata(epath.Path(checkpoint)).metadata)


def _leaves(tree: Any) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _is_param(name: str) -> bool:
  return name.startswith("params/")


def _check_leaves(checkpoint: PathLike, abstract: Any, saved: Mapping[str, Any]) -> None:
  expected = _leaves(abstract)
  problems = [f"{name} is missing" for name in expected if name not in saved]
  problems += [f"{name} is unknown to this model" for name in saved if name not in expected]
  problems += [
    f"{name}: expected {_form(leaf)}, checkpoint has {_form(saved[name])}"
    for name, leaf in expected.items()
    if name in saved and _form(leaf) != _form(saved[name])
  ]
  if problems:
    raise CheckpointError(
      f"{os.fspath(checkpoint)} does not fit the model: {'; '.join(problems)}; "
      "use the config it was trained with"
    )


def _form(leaf: Any) -> str:
  return f"{leaf.dtype}{list(leaf.shape)}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """("advantage.alpha", 1.0), ...; an empty group is a value of its own."""
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _same(here: Mapping[str, Any], there: Mapping[str, Any], key: str) -> bool:
  return key in here and key in there and here[key] == there[key]


def _show(flat: Mapping[str, Any], key: str) -> str:
  return json.dumps(flat[key], sort_keys=True) if key in flat else "not set"


def _covered(key: str, may_differ: Collection[str]) -> bool:
  """Whether `key` or a group that holds it may differ."""
  parts = key.split(".")
  return any(".".join(parts[:length]) in may_differ for length in range(1, len(parts) + 1))
