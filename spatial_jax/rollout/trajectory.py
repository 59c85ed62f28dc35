"""Invariants of trajectories, and JSON + PNG files that restore a trajectory bit for bit.

    folder/any-name.json             ids, masks, log-probabilities, turns; images by content hash
    folder/images/<hash>.png, .npz   each image once: its pixels, and its patches with their grid

The report, replays and bug reports read these files.
"""

import dataclasses
import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from PIL import Image

from spatial_jax.config import ConfigError, build
from spatial_jax.data.vision_packing import distinct
from spatial_jax.errors import DataError
from spatial_jax.grammar import VILASR, Grammar
from spatial_jax.types import Operation, OperationError, PatchedImage, Rollouts, Trajectory, Turn

LOGP_SLACK = 1e-4  # by how much rounding may lift a float32 log-probability above 0, nats

_ARRAYS = {
  "token_ids_T": np.int32,
  "position_TA": np.int32,
  "trained_T": np.bool_,
  "logp_T": np.float32,
  "policy_step_T": np.int32,
}


def check(trajectory: Trajectory, pad_ids: Collection[int]) -> None:
  """Raises if a trajectory breaks an invariant; arguments as in `violation`.

  Raises:
    ValueError: with the message of `violation`.
  """
  if message := violation(trajectory, pad_ids):
    raise ValueError(message)


def violation(trajectory: Trajectory, pad_ids: Collection[int]) -> str | None:
  """Describes in one line every invariant that a trajectory breaks.

      tokens   | prompt | turn | observation | turn |     turns are trained, nothing else is
      pads     | . #### . ......... ### .......... |      image i: grid_i / 4 pads at image_start[i]

  Args:
    trajectory: of any content; only the types of its fields must be right.
    pad_ids: ids of the image pad and the video pad.

  Returns:
    A message that names task, sample and, if there is one, turn or image; None if all hold.
  """
  problems = _length_problems(trajectory)
  if not problems:
    pad_T = np.any([trajectory.token_ids_T == pad_id for pad_id in pad_ids], axis=0)
    problems = [
      *_token_problems(trajectory),
      *_turn_problems(trajectory),
      *_image_problems(trajectory, pad_T),
      *_position_problems(trajectory),
    ]
  if not problems:
    return None
  return f"task {trajectory.task_id} sample {trajectory.sample}: {'; '.join(problems)}"


def _length_problems(trajectory: Trajectory) -> list[str]:
  count = len(trajectory.token_ids_T)
  shapes = dict.fromkeys(_ARRAYS, (count,)) | {"position_TA": (count, 3)}
  problems = []
  for name, dtype in _ARRAYS.items():
    array = vars(trajectory)[name]
    if array.shape != shapes[name] or array.dtype != dtype:
      expected = f"{np.dtype(dtype)}{list(shapes[name])}"
      problems.append(f"{name}: expected {expected}, got {array.dtype}{list(array.shape)}")
  if not 0 < trajectory.prompt_length <= count:
    problems.append(f"prompt_length {trajectory.prompt_length} of {count} tokens")
  if not 0 <= trajectory.prompt_images <= len(trajectory.images):
    problems.append(f"prompt_images {trajectory.prompt_images} of {len(trajectory.images)} images")
  if len(trajectory.image_start) != len(trajectory.images):
    problems.append(f"{len(trajectory.image_start)} starts of {len(trajectory.images)} images")
  return problems


def _token_problems(trajectory: Trajectory) -> list[str]:
  trained_T, logp_T = trajectory.trained_T, trajectory.logp_T
  problems = []
  if trained_T[: trajectory.prompt_length].any():
    problems.append(f"prompt token {np.argmax(trained_T)} is trained")
  wrong_T = trained_T & ~((logp_T <= LOGP_SLACK) & np.isfinite(logp_T))
  if wrong_T.any():
    t = int(np.argmax(wrong_T))
    problems.append(f"{_place(trajectory, t)} has log-probability {logp_T[t]}")
  if (logp_T[~trained_T] != 0).any():
    t = int(np.argmax(~trained_T & (logp_T != 0)))
    problems.append(f"token {t} is not trained and has log-probability {logp_T[t]}")
  wrong_T = trained_T != (trajectory.policy_step_T >= 0)
  if wrong_T.any():
    t = int(np.argmax(wrong_T))
    problems.append(f"{_place(trajectory, t)} has policy step {trajectory.policy_step_T[t]}")
  forbidden, ids = set(trajectory.forbidden_ids), trajectory.token_ids_T.tolist()
  wrong = [t for t in np.flatnonzero(trained_T).tolist() if ids[t] in forbidden]
  if wrong:
    problems.append(f"{_place(trajectory, wrong[0])} is forbidden id {ids[wrong[0]]}")
  return problems


def _turn_problems(trajectory: Trajectory) -> list[str]:
  covered_T = np.zeros(len(trajectory.token_ids_T), bool)
  problems, before = [], trajectory.prompt_length
  for number, turn in enumerate(trajectory.turns, 1):
    if not before <= turn.start <= turn.end <= len(covered_T):
      problems.append(f"turn {number} spans tokens {turn.start} to {turn.end}, after {before}")
      continue
    covered_T[turn.start : turn.end] = True
    before = turn.end
  differing_T = covered_T != trajectory.trained_T
  if not problems and differing_T.any():
    t = int(np.argmax(differing_T))
    state = "trained" if trajectory.trained_T[t] else "not trained"
    problems.append(f"{_place(trajectory, t)} is {state}")
  drawn = [image.content_hash for image in trajectory.images[trajectory.prompt_images :]]
  produced = [name for turn in trajectory.turns for name in turn.produced]
  if drawn != produced:
    problems.append(f"turns produced {len(produced)} images, the trajectory has {len(drawn)}")
  return problems


def _image_problems(trajectory: Trajectory, pad_T: np.ndarray) -> list[str]:
  expected_T = np.zeros(len(trajectory.token_ids_T), bool)
  problems = []
  for number, (image, start) in enumerate(
    zip(trajectory.images, trajectory.image_start, strict=True), 1
  ):
    in_prompt = number <= trajectory.prompt_images
    first = 0 if in_prompt else trajectory.prompt_length
    last = trajectory.prompt_length if in_prompt else len(expected_T)
    if not first <= start <= start + image.tokens <= last:
      problems.append(f"image {number} spans tokens {start} to {start + image.tokens}")
      continue
    expected_T[start : start + image.tokens] = True
  differing_T = expected_T != pad_T
  if differing_T.any():
    t = int(np.argmax(differing_T))
    grids = sum(image.tokens for image in trajectory.images)
    problems.append(
      f"{pad_T.sum()} image tokens, {grids} from the grids; they first differ at token {t}"
    )
  return problems


def _position_problems(trajectory: Trajectory) -> list[str]:
  """Positions of text rise by one; an image, and the text after it, begin one above the largest."""
  image_T = np.full(len(trajectory.token_ids_T), -1)
  for number, (image, start) in enumerate(
    zip(trajectory.images, trajectory.image_start, strict=True)
  ):
    image_T[max(start, 0) : start + image.tokens] = number
  bounds = np.flatnonzero(np.diff(image_T)) + 1
  expected = 0
  for start, position_TA in zip(
    [0, *bounds], np.split(trajectory.position_TA, bounds), strict=True
  ):
    continues = position_TA.min() == expected
    if image_T[start] < 0:
      continues = (position_TA == expected + np.arange(len(position_TA))[:, None]).all()
    if not continues:
      return [f"positions do not continue at {expected} from token {start}"]
    expected = int(position_TA.max()) + 1
  return []


def _place(trajectory: Trajectory, token: int) -> str:
  """Names a token: "turn 2 token 31", or "token 31" outside every turn."""
  for number, turn in enumerate(trajectory.turns, 1):
    if turn.start <= token < turn.end:
      return f"turn {number} token {token}"
  return f"token {token}"


def as_fault(trajectory: Trajectory) -> Trajectory:
  """Returns the prompt of a trajectory as a fault, which statistics and update leave out."""
  length, images = trajectory.prompt_length, trajectory.prompt_images
  arrays = {name: vars(trajectory)[name][:length] for name in _ARRAYS}
  return dataclasses.replace(
    trajectory,
    **arrays,
    images=trajectory.images[:images],
    image_start=trajectory.image_start[:images],
    turns=(),
    end_reason="fault",
  )


def limit_images(
  rollouts: Rollouts, fits: Callable[[Sequence[PatchedImage]], bool]
) -> tuple[Rollouts, int]:
  """Returns rollouts whose distinct images fit together.

  While they do not, the rollout that drew most becomes a fault: the shapes of the update are made
  for usual numbers of drawings.

  Args:
    fits: whether the update holds some distinct images.

  Returns:
    The rollouts, and how many became faults.
  """
  kept = [list(group) for group in rollouts]
  faults = 0
  while not fits(images_of(kept)):
    places = [(b, g) for b, group in enumerate(kept) for g in range(len(group))]
    b, g = max(places, key=lambda place: _drawn_tokens(kept[place[0]][place[1]]))
    if not _drawn_tokens(kept[b][g]):
      break  # the prompts alone have more; packing names the bucket
    kept[b][g] = as_fault(kept[b][g])
    faults += 1
  return kept, faults


def _drawn_tokens(trajectory: Trajectory) -> int:
  return sum(image.tokens for image in trajectory.images[trajectory.prompt_images :])


def images_of(rollouts: Rollouts) -> list[PatchedImage]:
  """The distinct images of rollouts."""
  return list(distinct([t.images for group in rollouts for t in group]).values())


# --- files -------------------------------------------------------------------------------------


def save(trajectory: Trajectory, path: pathlib.Path) -> None:
  """Writes one trajectory.

  Args:
    trajectory: of any content, even if it breaks invariants.
    path: the JSON file. Images are written to the folder `images/` next to it, which the
      trajectories of one folder share.
  """
  folder = path.parent / "images"
  folder.mkdir(parents=True, exist_ok=True)
  for image in trajectory.images:
    _save_image(image, folder)
  record = vars(trajectory) | {name: vars(trajectory)[name].tolist() for name in _ARRAYS}
  record["images"] = [image.content_hash for image in trajectory.images]
  record["turns"] = [dataclasses.asdict(turn) for turn in trajectory.turns]
  record["grammar"] = dataclasses.asdict(trajectory.grammar)
  path.write_text(json.dumps(record), encoding="utf-8")


def load(path: pathlib.Path) -> Trajectory:
  """Reads a trajectory that `save` wrote; a file of a version without grammars has ViLaSR's.

  Raises:
    DataError: if a file is missing or cannot be read; the message names it.
  """
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
    arrays = {name: np.array(record[name], dtype) for name, dtype in _ARRAYS.items()}
    arrays["position_TA"] = arrays["position_TA"].reshape(-1, 3)
    names = set(record["images"])
    images = {name: _load_image(name, path.parent / "images") for name in names}
    return Trajectory(
      **record
      | arrays
      | {name: tuple(record[name]) for name in ("seed_path", "forbidden_ids", "image_start")}
      | {"images": tuple(images[name] for name in record["images"])}
      | {"turns": tuple(map(_turn, record["turns"]))}
      | {"grammar": build(Grammar, record["grammar"]) if "grammar" in record else VILASR}
    )
  except (OSError, ValueError, KeyError, TypeError, ConfigError, zipfile.BadZipFile) as error:
    raise DataError(f"rollout {path} cannot be read ({error}); write it again") from error


def _turn(record: dict[str, Any]) -> Turn:
  operations = tuple(
    Operation(**item | {"points_4": tuple(item["points_4"])}) for item in record["operations"]
  )
  errors = tuple(OperationError(**item) for item in record["errors"])
  return Turn(
    **record | {"operations": operations, "errors": errors, "produced": tuple(record["produced"])}
  )


def _save_image(image: PatchedImage, folder: pathlib.Path) -> None:
  """Writes an image unless it exists; the PNG is written last, so it marks both as complete."""
  png, npz = _image_paths(image.content_hash, folder)
  if png.exists():
    return
  partial = folder / f"{image.content_hash}.partial"
  with partial.open("wb") as file:
    np.savez_compressed(file, patches_PX=image.patches_PX, grid_3=np.array(image.grid_3))
  partial.replace(npz)
  Image.fromarray(image.pixels).save(partial, format="png")
  partial.replace(png)


def _load_image(content_hash: str, folder: pathlib.Path) -> PatchedImage:
  png, npz = _image_paths(content_hash, folder)
  with np.load(npz, allow_pickle=False) as arrays, Image.open(png) as image:
    t, h, w = arrays["grid_3"].tolist()
    return PatchedImage(content_hash, arrays["patches_PX"], (t, h, w), np.asarray(image))


def _image_paths(content_hash: str, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  if not re.fullmatch("[0-9a-f]+", content_hash):  # it becomes a file name
    raise ValueError(f"content hash {content_hash!r} is not a hex digest")
  return folder / f"{content_hash}.png", folder / f"{content_hash}.npz"
