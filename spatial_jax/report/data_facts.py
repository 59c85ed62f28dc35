"""What a summary of a data file needs of each good row, collected while the file is checked.

rows ──FactCollector.check──► RowFacts of each good row, without its media
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from spatial_jax.data.rows import RowProblem, check_media
from spatial_jax.reward.parse import check_truth, expected_of
from spatial_jax.types import IMAGE_MARK, VIDEO_MARK, ImageRef, Media, Task, VideoRef

_MARKS = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}")


class MediaCounts(NamedTuple):
  """The media of one row, or of all rows."""

  images: int
  videos: int  # video files
  frame_lists: int  # videos that are lists of frames
  frames: int  # in all lists


class RowFacts(NamedTuple):
  """One good row."""

  task: Task  # without its media, which may be pixels
  value: float  # of a number, in the unit of `unit`
  unit: str | None  # of a number, None without one
  words: int  # of the question, without the marks of media
  media: MediaCounts
  key: bytes  # rows with equal keys have the same question, options and media


class FactCollector:
  """Checks tasks one after the other, and keeps the facts of those that can be used."""

  def __init__(self):
    self.rows: list[RowFacts] = []
    self.files: set[str] = set()  # media files of the good rows
    self.missing: set[str] = set()  # media files that do not exist

  def check(self, task: Task) -> None:
    """Collects the facts of a task; it is the `check` of `open_file`.

    Raises:
      DataError: if no reward can score the task.
      RowProblem: if its media cannot be used.
    """
    problem = None
    try:
      check_media(task)
    except RowProblem as error:
      problem = error
      self.missing |= {path for path in _paths(task.media) if not os.path.exists(path)}
    truth = check_truth(task)
    if problem is not None:
      raise problem
    self.files.update(_paths(task.media))
    self.rows.append(row_facts(task, truth.value))


def row_facts(task: Task, value: float) -> RowFacts:
  """Returns the facts of a task; `value` is that of `check_truth`."""
  unit = expected_of(task).unit if task.answer_kind == "number" else None
  without_media = dataclasses.replace(task, media=())
  words = len(_MARKS.sub(" ", task.question).split())
  return RowFacts(without_media, value, unit, words, media_counts(task.media), _key(task))


def media_counts(media: Sequence[Media]) -> MediaCounts:
  """Returns how many images, videos and frames there are."""
  videos = [one for one in media if not isinstance(one, ImageRef)]
  lists = [video.data for video in videos if isinstance(video.data, tuple)]
  images = len(media) - len(videos)
  return MediaCounts(images, len(videos) - len(lists), len(lists), sum(map(len, lists)))


def _paths(media: Sequence[Media]) -> Iterator[str]:
  """The files of media, frames included."""
  for one in media:
    if isinstance(one.data, str):
      yield one.data
    elif isinstance(one.data, tuple):
      yield from _paths(one.data)


def _key(task: Task) -> bytes:
  parts: list[object] = [" ".join(task.question.casefold().split())]
  parts.append(sorted(option[3:].casefold() for option in task.options or ()))
  parts += map(_identity, task.media)
  return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).digest()[:16]


def _identity(one: Media) -> object:
  """What equal media have in common: the path or a digest of the contents, and the marks."""
  if isinstance(one.data, tuple):
    return one.times_s if isinstance(one, VideoRef) else (), [*map(_identity, one.data)]
  data: object = one.data
  if isinstance(one.data, np.ndarray):
    data = one.data.shape, hashlib.sha256(one.data.tobytes()).digest()
  elif isinstance(one.data, bytes):
    data = hashlib.sha256(one.data).digest()
  return data, one.marks if isinstance(one, ImageRef) else ()
