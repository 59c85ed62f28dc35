"""Rollouts -> rows of a data file: what rejection sampling and preference pairs keep.

prompts ─► rollouts ─► scores ─► kept rollouts ─► rows.jsonl, images/
                                        └──► yield.json: counts by question type and test
"""

import dataclasses
import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from spatial_jax.data.media import read_pixels
from spatial_jax.data.pipeline import PromptBatch
from spatial_jax.errors import UserError
from spatial_jax.reward.compose import score
from spatial_jax.reward.config import RewardConfig
from spatial_jax.reward.snra import sharpness
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.types import (
  ImageRef,
  Params,
  Prompt,
  Prompts,
  Rollouts,
  Scores,
  Task,
  Trajectory,
  VideoRef,
)
from spatial_jax.workdir import write_text

ROWS, YIELD = "rows.jsonl", "yield.json"
Row = dict[str, Any]
# (prompts, rollouts, scores, folder) -> rows, and counts by (question type, test)
Keep = Callable[[Prompts, Rollouts, Scores, pathlib.Path], tuple[list[Row], Counter]]


@dataclasses.dataclass(frozen=True, eq=False)
class Collector:
  """Samples a number of chunks of prompts and keeps what passes."""

  engine: Engine
  batch_of: Callable[[int], PromptBatch[Prompt]]  # chunk -> its prompts
  reward: RewardConfig
  keep: Keep
  chunks: int
  seed: int
  folder: pathlib.Path

  def run(self, weights_of: Callable[[], Params]) -> pathlib.Path:
    """Samples, writes and returns the data file; chunks that are there already are not repeated.

    Args:
      weights_of: makes the decode parameters; called if a chunk is missing.

    Raises:
      UserError: if nothing was kept.
    """
    self.folder.mkdir(parents=True, exist_ok=True)
    parts = [self.folder / f"chunk_{number:05d}.json" for number in range(self.chunks)]
    missing = [number for number, part in enumerate(parts) if not part.exists()]
    weights = weights_of() if missing else {}
    with Progress(console=Console(stderr=True), transient=True) as bar:
      for number in bar.track(missing, description="sampling demonstrations"):
        batch = self.batch_of(number)
        rows, counts = self._chunk(weights, batch.prompts, number)
        counted = [[*key, count] for key, count in counts.items()]
        record = {"rows": rows, "counts": counted, "replaced": len(batch.replaced)}
        write_text(parts[number], json.dumps(record))
    return self._join(parts)

  def _chunk(self, weights: Params, prompts: Prompts, number: int) -> tuple[list[Row], Counter]:
    cfg = self.engine.cfg
    job = RolloutJob(prompts, self.seed, number, [cfg.sampling] * cfg.group)
    rollouts = generate_rollouts(self.engine, weights, job)
    k = float(sharpness(1.0, self.reward.schedule))
    scores = score(rollouts, [prompt.task for prompt in prompts], self.reward, k)
    return self.keep(prompts, rollouts, scores, self.folder)

  def _join(self, parts: Sequence[pathlib.Path]) -> pathlib.Path:
    records = [json.loads(part.read_text()) for part in parts]
    rows = unique_ids([row for record in records for row in record["rows"]])
    totals: Counter = Counter()
    for record in records:
      for name, test, count in record["counts"]:
        totals[name, test] += count
    by_type: dict[str, dict[str, int]] = {}
    for (name, test), count in totals.items():
      by_type.setdefault(name, {})[test] = count
    report = {"replaced_tasks": sum(r["replaced"] for r in records), "by_type": by_type}
    write_text(self.folder / YIELD, json.dumps(report, indent=2) + "\n")
    if not rows:
      raise UserError(
        f"nothing was kept of {sum(c.get('sampled', 0) for c in by_type.values())} rollouts "
        f"({json.dumps(by_type)}); lower min_score or min_turns, switch off reflective, or begin "
        "with a better cold start"
      )
    write_text(self.folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
    return self.folder / ROWS


def unique_ids(rows: Sequence[Row]) -> list[Row]:
  """The rows with unique ids, which a data file must have: "a#1", and "a#1@2" of a second pass.

  A task comes again in the next pass over the data, with other rollouts.
  """
  passes: Counter = Counter()
  found = []
  for row in rows:
    passes[row["id"]] += 1
    number = passes[row["id"]]
    found.append(row | {"id": f"{row['id']}@{number}"} if number > 1 else row)
  return found


def row_of(task: Task, name: str, folder: pathlib.Path, responses: Mapping[str, Trajectory]) -> Row:
  """A row of a data file with one or two responses of the policy.

  Args:
    task: its images are written to the folder, unless they are files.
    name: id of the row.
    responses: "turns", and "rejected" for a pair.
  """
  row: Row = {
    "id": name,
    "question": task.question,
    "answer": task.answer,
    "kind": task.answer_kind,
    "type": task.question_type,
    "scene": task.scene_id,
    "split": "train",
    "extra": dict(task.extra),
    "images": [_image(ref, folder) for ref in task.media if isinstance(ref, ImageRef)],
    "videos": [_video(ref, folder) for ref in task.media if isinstance(ref, VideoRef)],
  }
  row |= {key: _turns(trajectory, folder) for key, trajectory in responses.items()}
  if task.options:
    row["options"] = list(task.options)
  if task.unit and task.answer_kind == "number":
    row["unit"] = task.unit
  if task.benchmark:
    row["benchmark"] = task.benchmark
  return {key: value for key, value in row.items() if value not in ([], {})}


def _turns(trajectory: Trajectory, folder: pathlib.Path) -> list[Row | str]:
  """The turns of a response with the images that the policy saw after them."""
  images = {image.content_hash: image.pixels for image in trajectory.images}
  turns: list[Row | str] = []
  for turn in trajectory.turns:
    text = turn.text
    drawn = [_save(images[name], folder) for name in turn.produced]
    turns.append({"text": text, "images": drawn} if drawn else text)
  return turns


def _image(ref: ImageRef, folder: pathlib.Path) -> Any:
  if isinstance(ref.data, str):
    path = str(pathlib.Path(ref.data).resolve())
    marks = [dataclasses.asdict(mark) for mark in ref.marks]
    return {"path": path, "marks": marks} if marks else path
  return _save(read_pixels(ref), folder)  # marks are in the pixels


def _video(ref: VideoRef, folder: pathlib.Path) -> Any:
  if isinstance(ref.data, str):
    return str(pathlib.Path(ref.data).resolve())
  if isinstance(ref.data, bytes):
    path = folder / "images" / f"{hashlib.sha256(ref.data).hexdigest()[:24]}.mp4"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(ref.data)
    return str(path.relative_to(folder))
  frames = [_image(frame, folder) for frame in ref.data]
  return {"frames": frames} | ({"times_s": list(ref.times_s)} if ref.times_s else {})


def _save(pixels: np.ndarray, folder: pathlib.Path) -> str:
  """Writes an image once and returns its path relative to the folder."""
  name = hashlib.sha256(pixels.tobytes() + str(pixels.shape).encode()).hexdigest()[:24]
  path = folder / "images" / f"{name}.png"
  if not path.exists():
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    Image.fromarray(pixels).save(partial, format="png")
    partial.replace(path)
  return str(path.relative_to(folder))
