"""One row of a data file -> Task, checked field by field; see docs/data.md for the fields.

    {"question": "How far is the chair?", "answer": 2.4, "unit": "m", "images": ["a.jpg"]}

A JSON schema checks names and types. The rest is checked here. Every problem names its field.
"""

import functools
import hashlib
import importlib.util
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jsonschema
import numpy as np

from spatial_jax.config import suggestion
from spatial_jax.data.media import image_size
from spatial_jax.data.records import check_file
from spatial_jax.data.video import NEEDS_PYAV
from spatial_jax.errors import DataError
from spatial_jax.types import (
  IMAGE_MARK,
  VIDEO_MARK,
  AnswerKind,
  DemonstratedTurn,
  ImageRef,
  Mark,
  Media,
  Task,
  VideoRef,
)

SCHEMA_FILE = pathlib.Path(__file__).with_name("row.schema.json")
_LETTERED = re.compile(r"[(\[]?([A-Za-z])[.):\]]\s*(.*)", re.DOTALL)
_MARKS = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}")
_MAX_SHOWN = 60  # characters of a value in a message


class RowProblem(ValueError):
  """Why a row cannot be used: its field, and the reason."""

  def __init__(self, field: str, reason: str):
    super().__init__(f"{field}: {reason}")
    self.field, self.reason = field, reason


class RowInfo(NamedTuple):
  """The fields of a row that splits, the order of tasks, and checks across files need."""

  scene: str
  split: str  # "train", "held_out", or "" for a row that does not say
  question_type: str
  difficulty: float  # `extra.difficulty`; 0 without one
  benchmark: str | None  # name of the benchmark that the row belongs to
  task_id: str  # unique in all files of a run


@functools.cache
def row_schema() -> dict[str, Any]:
  """Returns the JSON schema of a row."""
  return json.loads(SCHEMA_FILE.read_text())


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
  return jsonschema.Draft202012Validator(row_schema())


def parse_line(line: bytes) -> Any:
  """Returns the JSON value of one line.

  Raises:
    RowProblem: if the line is not JSON in UTF-8, or has half of a character (\\ud800).
  """
  try:
    row = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
  except (ValueError, RecursionError) as error:
    raise RowProblem("row", f"is not JSON ({str(error)[:_MAX_SHOWN]})") from error
  if b"\\ud" in line.lower():
    _check_characters(row)
  return row


def _check_characters(row: Any) -> None:
  """Refuses halves of surrogate pairs, which have no UTF-8 form."""
  for field, value in row.items() if isinstance(row, dict) else ():
    try:
      json.dumps([field, value], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
      half = f"{error.object[error.start]!a}".strip("'")
      raise RowProblem(ascii(field).strip("'"), f"has half of a character, {half}") from error


def _refuse_constant(name: str) -> float:
  raise ValueError(f"{name} is not a number of JSON")


def task_of_row(row: Any, default_id: str, source: str, folder: pathlib.Path) -> Task:
  """Returns the task of a row.

  Args:
    row: parsed JSON. Images may also be bytes, the contents of a file, or pixels.
    default_id: id of a row without one.
    source: name of the data, for `Task.source`.
    folder: that paths are relative to.

  Raises:
    RowProblem: for the first field that cannot be used.
  """
  check_schema(row)
  media = tuple(_media(row, folder))
  question, options = row["question"], row.get("options") or None
  task_id = row.get("id") or default_id
  _check_marks(question, media)
  kind = _kind(row)
  lettered = _with_letters(options) if options else None
  answer = _answer(row["answer"], kind, lettered)
  if row.get("unit") and kind != "number":
    raise RowProblem("unit", f"is {row['unit']!r}, but the answer is of kind {kind}")
  return Task(
    task_id=task_id,
    question_type=row.get("type") or kind,
    question=question,
    options=lettered,
    answer=answer,
    answer_kind=kind,
    unit=row.get("unit") or None,
    media=media,
    source=source,
    scene_id=row.get("scene") or (_scene(media[0], folder) if media else task_id),
    benchmark=row.get("benchmark") or None,
    boxes=(),
    extra=row.get("extra") or {},
    turns=_turns(row, "turns", folder),
    rejected=_turns(row, "rejected", folder),
  )


def row_info(row: Mapping[str, Any], task: Task) -> RowInfo:
  """Returns the info of a row that `task_of_row` accepted; raises RowProblem."""
  difficulty = (row.get("extra") or {}).get("difficulty", 0.0)
  if isinstance(difficulty, bool) or not isinstance(difficulty, int | float):
    raise RowProblem("extra.difficulty", f"must be a number, got {_shown(difficulty)}")
  split = row.get("split") or ""
  described = (task.scene_id, split, task.question_type, float(difficulty), task.benchmark)
  return RowInfo(*described, task.task_id)


def check_media(task: Task) -> None:
  """Checks that all media files exist, and reads the headers of images.

  Raises:
    RowProblem: for the first that is missing, damaged or too large, or a video file without PyAV.
  """
  for name, turns in (("turns", task.turns), ("rejected", task.rejected)):
    for number, turn in enumerate(turns):
      for i, ref in enumerate(turn.images or ()):
        _check_image(ref, f"{name}[{number}].images[{i}]")
  images = videos = 0
  for ref in task.media:
    if isinstance(ref, ImageRef):
      _check_image(ref, f"images[{images}]")
      images += 1
      continue
    if isinstance(ref.data, tuple):
      for number, frame in enumerate(ref.data):
        _check_image(frame, f"videos[{videos}].frames[{number}]")
    else:
      _check_video(ref.data, f"videos[{videos}]")
    videos += 1


def _check_image(ref: ImageRef, field: str) -> None:
  try:
    image_size(ref)
  except DataError as error:
    raise RowProblem(field, str(error)) from error


def _check_video(data: str | bytes, field: str) -> None:
  if importlib.util.find_spec("av") is None:
    raise RowProblem(field, NEEDS_PYAV)
  if isinstance(data, str):
    try:
      check_file(pathlib.Path(data))
    except DataError as error:
      raise RowProblem(field, str(error)) from error


# --- fields --------------------------------------------------------------------------------------


def check_schema(row: Any) -> None:
  """Checks names and types of all fields; raises RowProblem for the first that is wrong."""
  if not isinstance(row, dict):
    raise RowProblem("row", f"must be an object, got {_shown(row)}")
  known = row_schema()["properties"]
  unknown = [name for name in row if name not in known]
  missing = [name for name in row_schema()["required"] if row.get(name) is None]
  if missing:
    given = ", ".join(row) or "no field"
    raise RowProblem(missing[0], f"is missing; the row has {given}")
  if unknown:
    advice = suggestion(unknown[0], known)
    raise RowProblem(unknown[0], f"is an unknown field ({advice}); put it into extra")
  plain = {name: _without_bytes(value) for name, value in row.items() if value is not None}
  error = next(iter(_validator().iter_errors(plain)), None)
  if error is not None:
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path)
    raise RowProblem(path.lstrip(".") or "row", _message(error))


def _message(error: jsonschema.ValidationError) -> str:
  """Why a value does not fit the schema; a description in the schema says what would."""
  expected = error.schema.get("description") if isinstance(error.schema, dict) else None
  if expected:
    return f"must be {expected}, got {_shown(error.instance)}"
  return error.message[: 2 * _MAX_SHOWN]


def _without_bytes(value: Any) -> Any:
  if isinstance(value, list):
    return [_without_bytes(item) for item in value]
  if isinstance(value, dict):
    return {name: _without_bytes(item) for name, item in value.items()}
  return "<bytes>" if isinstance(value, bytes | np.ndarray) else value


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _kind(row: Mapping[str, Any]) -> AnswerKind:
  kind, options = row.get("kind"), row.get("options")
  if kind == "choice" and not options:
    raise RowProblem("options", "is missing, but the answer is of kind choice")
  if options and kind not in (None, "choice"):
    raise RowProblem("kind", f"is {kind}, but the row has options; use choice, or leave it out")
  if kind:
    return kind
  if options:
    return "choice"
  if _number(row["answer"]) is not None:
    return "number"
  if not isinstance(row["answer"], str):
    raise RowProblem("answer", f"is {_shown(row['answer'])} and must be a finite number")
  if re.search(r"\d", str(row["answer"])):
    reason = "write a number and its unit, or set kind to words"
    raise RowProblem("answer", f"is {_shown(row['answer'])}, a text with a number; {reason}")
  return "words"


def _number(answer: Any) -> float | None:
  """A finite number, also as text; None for anything else."""
  if isinstance(answer, str) and not re.fullmatch(r"\s*[+-]?[\d.,]+(?:[eE][+-]?\d+)?\s*", answer):
    return None
  try:
    value = float(answer)
  except (ValueError, OverflowError):
    return None
  return value if math.isfinite(value) else None


def _answer(answer: Any, kind: AnswerKind, options: tuple[str, ...] | None) -> str:
  if kind == "choice":
    return _letter(str(answer), options or ())
  if kind == "number":
    value = _number(answer)
    if value is None:
      raise RowProblem("answer", f"is {_shown(answer)} and must be a number")
    return answer.strip() if isinstance(answer, str) else f"{answer}"
  if isinstance(answer, float | np.floating) and not math.isfinite(answer):
    raise RowProblem("answer", f"is {_shown(answer)} and must be a finite number")
  text = str(answer).strip()
  if not text:
    raise RowProblem("answer", "is empty")
  return text


def _with_letters(options: Sequence[str]) -> tuple[str, ...]:
  """The options as "A. sofa", "B. lamp", ...; letters that are there are kept."""
  matches = [_LETTERED.fullmatch(option.strip()) for option in options]
  letters = [match[1].upper() for match in matches if match]
  alphabet = [chr(ord("A") + i) for i in range(len(options))]
  if letters == alphabet:
    return tuple(f"{a}. {match[2]}" for a, match in zip(alphabet, matches, strict=True) if match)
  return tuple(f"{a}. {option.strip()}" for a, option in zip(alphabet, options, strict=True))


def _letter(answer: str, options: Sequence[str]) -> str:
  """The letter of the right option, given as a letter, as its text, or as both."""
  answer = answer.strip()
  letters = {option[0]: option[3:].casefold() for option in options}
  match = re.fullmatch(r"[(\[]?([A-Za-z])[.):\]]*", answer)
  if match and match[1].upper() in letters:
    return match[1].upper()
  text = answer.casefold()
  found = [a for a, words in letters.items() if text in (words, f"{a}. {words}".casefold())]
  if len(found) == 1:
    return found[0]
  problem = "several options" if found else "none of the options"
  raise RowProblem("answer", f"is {_shown(answer)}, which is {problem} {', '.join(options)}")


def _scene(first: Media, folder: pathlib.Path) -> str:
  """The default scene of a row: the path of its first image or video, as the row gives it.

  The path does not include the folder of the file, so moving the data does not change the held-out
  split. The scene of bytes or pixels is their hash.
  """
  data = first.data
  while isinstance(data, tuple):
    data = data[0].data
  if isinstance(data, str):
    return data.removeprefix(str(folder / "_")[:-1])
  return hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).hexdigest()[:16]


# --- media ---------------------------------------------------------------------------------------


def _media(row: Mapping[str, Any], folder: pathlib.Path) -> Iterator[Media]:
  """Images and videos in the order of their marks; without marks images first, then videos."""
  images = [_image(item, folder, f"images[{i}]") for i, item in enumerate(row.get("images") or ())]
  videos = [_video(item, folder, f"videos[{i}]") for i, item in enumerate(row.get("videos") or ())]
  marks = _MARKS.findall(row["question"])
  if (marks.count(IMAGE_MARK), marks.count(VIDEO_MARK)) != (len(images), len(videos)):
    yield from (*images, *videos)
    return
  waiting = {IMAGE_MARK: iter(images), VIDEO_MARK: iter(videos)}
  for mark in marks:
    yield next(waiting[mark])


def _check_marks(question: str, media: Sequence[Media]) -> None:
  """A question has a mark for each image and video, or none."""
  for mark, kind, name in ((IMAGE_MARK, ImageRef, "images"), (VIDEO_MARK, VideoRef, "videos")):
    count, given = question.count(mark), sum(isinstance(one, kind) for one in media)
    if _MARKS.search(question) and count != given:
      raise RowProblem("question", f"has {count} marks {mark} for {given} {name}")


def _turns(row: Mapping[str, Any], name: str, folder: pathlib.Path) -> tuple[DemonstratedTurn, ...]:
  """The turns of a demonstrated response."""
  turns = []
  for number, item in enumerate(row.get(name) or ()):
    item = {"text": item} if isinstance(item, str) else item
    field = f"{name}[{number}].images"
    given = item.get("images")
    images = given and tuple(_image(one, folder, f"{field}[{i}]") for i, one in enumerate(given))
    turns.append(DemonstratedTurn(item["text"], images or None, item.get("observation")))
  return tuple(turns)


def _path(name: str, folder: pathlib.Path, field: str) -> str:
  if not name.strip() or "\0" in name:
    raise RowProblem(field, f"is {_shown(name)} and must be a path")
  return str(folder / name)


def _image(item: Any, folder: pathlib.Path, field: str) -> ImageRef:
  if isinstance(item, bytes | np.ndarray):
    return ImageRef(item)
  if isinstance(item, str):
    return ImageRef(_path(item, folder, field))
  marks = []
  for number, mark in enumerate(item.get("marks") or ()):
    count = 4 if mark["shape"] == "box" else 2
    if len(mark["points"]) != count:
      where = f"{field}.marks[{number}].points"
      raise RowProblem(where, f"has {len(mark['points'])} numbers; a {mark['shape']} has {count}")
    marks.append(Mark(mark["shape"], tuple(map(float, mark["points"])), mark["color"]))
  path = item["path"]
  data = path if isinstance(path, bytes) else _path(path, folder, f"{field}.path")
  return ImageRef(data, tuple(marks))


def _video(item: Any, folder: pathlib.Path, field: str) -> VideoRef:
  if isinstance(item, bytes):
    return VideoRef(item)
  if isinstance(item, str):
    return VideoRef(_path(item, folder, field))
  if "path" in item:
    return VideoRef(_path(item["path"], folder, f"{field}.path"))
  frames = tuple(
    _image(frame, folder, f"{field}.frames[{i}]") for i, frame in enumerate(item["frames"])
  )
  times_s = tuple(map(float, item.get("times_s") or ()))
  if not times_s and item.get("fps"):
    times_s = tuple(i / item["fps"] for i in range(len(frames)))
  if times_s and (len(times_s) != len(frames) or list(times_s) != sorted(set(times_s))):
    raise RowProblem(f"{field}.times_s", f"must be {len(frames)} ascending times, one per frame")
  return VideoRef(frames, times_s)
