"""SpatialLadder-26k, and SPBench of the same authors: question types of VSI-Bench in words."""

from types import MappingProxyType
from typing import Any

from spatial_jax.data.formats.answers import answer_fields, final_answer
from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.fields import Fields
from spatial_jax.data.formats.media import images_of, scene_of, videos_of, without_marks
from spatial_jax.data.formats.tables import parse_options
from spatial_jax.data.formats.vsi import UNITS
from spatial_jax.data.rows import RowProblem

# Question types with a number, in the words of SpatialLadder.
_UNITS = MappingProxyType(
  {
    "object count": "count",
    "object counting": "count",
    "absolute distance": "m",
    "object size": "cm",
    "room size": "m^2",
    **UNITS,
  }
)


class SpatialLadder26k(Format):
  """SpatialLadder-26k (hongxingli/SpatialLadder-26k)."""

  name = "spatialladder26k"
  needs = (
    ("question", "question_type", "answer", "image|images", "options"),
    ("question", "question_type", "answer", "video", "options"),
  )

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    return _convert(row)


class SPBench(Format):
  """SPBench-SI and SPBench-MV (hongxingli/SPBench): single images and several views."""

  name = "spbench"
  needs = (
    ("question", "question_type", "candidates|options", "image_path", "answer|ground_truth"),
  )
  held_out = True

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    return _convert(row) | {"benchmark": "spbench"}


def _convert(row: Fields) -> dict[str, Any]:
  question = without_marks(row.text("question"))
  question_type = row.text("question_type")
  images = images_of(row.value("image", "images", "image_path"), "image")
  videos = videos_of(row.value("video"), "video")
  if not images and not videos:
    raise RowProblem("image", "is missing, and the row has no video")
  options = parse_options(row.value("options", "candidates"), "options")
  answer = row.scalar("answer", "ground_truth")
  if isinstance(answer, str):
    answer = final_answer(answer)
  unit = _UNITS.get(question_type)
  if unit is None and not options:
    raise RowProblem("options", f"is missing, but the question type is {question_type}")
  return {
    "question": question,
    **answer_fields(answer, None if unit else options, "number", unit),
    "images": images,
    "videos": videos,
    "type": question_type,
    "scene": row.label("scene_name", "scene_id") or scene_of([*images, *videos]),
    "extra": row.extra(),
  }
