"""Examples of a data file for its page: media as small JPEG images, question, options, answer."""

import base64
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from spatial_jax.data.media import read_clip, read_pixels
from spatial_jax.data.task_order import interleave
from spatial_jax.data.video import VideoConfig
from spatial_jax.errors import DataError
from spatial_jax.report.data_facts import RowFacts
from spatial_jax.report.drawings import ImageView
from spatial_jax.reward.parse import expected_of
from spatial_jax.reward.quantity import COUNT
from spatial_jax.types import IMAGE_MARK, VIDEO_MARK, ImageRef, Media, Task, VideoRef

_MAX_PX, _QUALITY = 320, 80  # longer side of an image of the page; of JPEG
_FRAMES = 8  # at most, of one video
# More frames per second than any video has, so that the number of frames is `_FRAMES`.
_VIDEO = VideoConfig(True, 1000.0, 2, _FRAMES, 1, 1)
_PLACES = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")


class MediaView(NamedTuple):
  """An image, or the frames of a video."""

  name: str  # "image 1", "video 2"
  note: str  # "640 x 480", "8 of 240 frames"
  images: list[tuple[ImageView, str]]  # with their captions
  problem: str  # why it cannot be read, "" if it can


class TaskView(NamedTuple):
  """One row."""

  task: Task
  split: str  # in words
  scene: str
  unit: str  # of a number, "" without one and for a count
  pieces: list[tuple[str, bool]]  # of the question: text, or the name of a medium and True
  options: list[tuple[str, bool]]  # with whether it is the answer
  media: list[MediaView]

  @property
  def problems(self) -> list[str]:
    """Why media cannot be read."""
    return [one.problem for one in self.media if one.problem]


def choose_examples(rows: Sequence[RowFacts], count: int) -> list[int]:
  """Indices of up to `count` rows, types in turn; sorted by type, then by place in the file."""
  order = np.random.default_rng(0).permutation(len(rows))
  types = [rows[i].task.question_type for i in order]
  chosen = [int(order[k]) for k in interleave(types)[:count]]
  return sorted(chosen, key=lambda i: (rows[i].task.question_type, i))


def task_view(task: Task, held_out: bool) -> TaskView:
  """What the page shows of a row; reads and decodes its media."""
  names = media_names(task.media)
  unit = expected_of(task).unit if task.answer_kind == "number" else None
  return TaskView(
    task=task,
    split="held-out" if held_out else "training",
    scene=task.scene_id,
    unit="" if unit is None or unit == COUNT else unit,
    pieces=question_pieces(task.question, names),
    options=[(option, option[0] == task.answer) for option in task.options or ()],
    media=[_media_view(one, name) for one, name in zip(task.media, names, strict=True)],
  )


def media_names(media: Sequence[Media]) -> list[str]:
  """The names of media: "image 1", "image 2", "video 1", ..."""
  kinds = ["image" if isinstance(one, ImageRef) else "video" for one in media]
  return [f"{kind} {kinds[: i + 1].count(kind)}" for i, kind in enumerate(kinds)]


def question_pieces(question: str, names: Sequence[str]) -> list[tuple[str, bool]]:
  """The text of a question and, marked by True, the names of its media in their places.

  Without marks all media come first.
  """
  parts = _PLACES.split(question)
  if len(parts) == 1:
    return [*((name, True) for name in names), (f" {question}", False)]
  waiting, pieces = iter(names), []
  for number, text in enumerate(parts):
    pieces.append((next(waiting), True) if number % 2 else (text, False))
  return [(text, is_place) for text, is_place in pieces if text.strip()]


def _media_view(one: Media, name: str) -> MediaView:
  try:
    if isinstance(one, ImageRef):
      pixels = read_pixels(one)
      note = f"{pixels.shape[1]} x {pixels.shape[0]}"
      return MediaView(name, note, [(_thumbnail(pixels), f"{name}, {note}")], "")
    frames, times_s = _frames(one)
  except DataError as error:
    return MediaView(name, "", [], str(error))
  captions = [f"{time_s:.1f} s" for time_s in times_s] or [str(i + 1) for i in range(len(frames))]
  total = f" of {len(one.data)}" if isinstance(one.data, tuple) else ""
  note = f"{len(frames)}{total} frames"
  views = zip(map(_thumbnail, frames), captions, strict=True)
  return MediaView(name, note, list(views), "")


def _frames(video: VideoRef) -> tuple[Sequence[np.ndarray], Sequence[float]]:
  """Up to `_FRAMES` frames, from the first to the last, and their times, if they are known."""
  if not isinstance(video.data, tuple):
    clip = read_clip(video, _VIDEO, even_grid=True)
    return clip.frames, clip.times_s
  count = min(_FRAMES, len(video.data))
  chosen = np.linspace(0, len(video.data) - 1, count).round().astype(int)
  frames = [read_pixels(video.data[i]) for i in chosen]
  return frames, [video.times_s[i] for i in chosen] if video.times_s else ()


def _thumbnail(pixels: np.ndarray) -> ImageView:
  image = Image.fromarray(pixels)
  image.thumbnail((_MAX_PX, _MAX_PX))
  buffer = io.BytesIO()
  image.save(buffer, format="jpeg", quality=_QUALITY)
  uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
  return ImageView(0, uri, image.width, image.height, [])
