"""SpaceR-151k and Video-R1: problem, options, solution "<answer>B</answer>", path, data_type."""

from typing import Any, Literal

from spatial_jax.data.formats.answers import answer_fields, final_answer
from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.fields import Fields
from spatial_jax.data.formats.media import images_of, scene_of, videos_of, without_marks
from spatial_jax.data.formats.tables import parse_options
from spatial_jax.data.rows import RowProblem

_NUMBERS = ("numerical", "regression")
_WORDS = ("free-form", "OCR")


class Spacer151k(Format):
  """SpaceR-151k and SR-91k (RUBBISHLIKE/SpaceR-151k); the file of maps is not a file of rows."""

  name = "spacer151k"
  needs = (("problem", "solution", "path", "data_type", "problem_type", "data_source"),)

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    return _convert(row)


class VideoR1(Format):
  """Video-R1-260k and Video-R1-COT-165k (Video-R1/Video-R1-data): images and videos."""

  name = "video_r1"
  needs = (("problem", "solution", "path", "data_type", "problem_type"),)

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    return _convert(row)


def _convert(row: Fields) -> dict[str, Any]:
  question = without_marks(row.text("problem"))
  problem_type, data_type = row.text("problem_type"), row.text("data_type")
  if data_type not in ("image", "video"):
    raise RowProblem("data_type", f"is {data_type} and must be image or video")
  path = row.required("path")
  images = images_of(path, "path") if data_type == "image" else []
  videos = videos_of(path, "path") if data_type == "video" else []
  answer = row.scalar("solution")
  if isinstance(answer, str):
    answer = final_answer(answer)
  options, kind = None, _kind(problem_type)
  if problem_type == "multiple choice":
    options = parse_options(row.required("options"), "options")
  return {
    "question": question,
    **answer_fields(answer, options, kind, field="solution"),
    "images": images,
    "videos": videos,
    "type": row.label("question_type") or problem_type,
    "scene": scene_of([*images, *videos]),
    "extra": row.extra(),
  }


def _kind(problem_type: str) -> Literal["number", "words"] | None:
  if problem_type in _NUMBERS:
    return "number"
  return "words" if problem_type in _WORDS else None
