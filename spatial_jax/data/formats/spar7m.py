"""SPAR-7M: conversations on images with coloured points and boxes that are drawn when it is read.

{"id", "conversations": [human, gpt], "image": [paths], "type", "depth": [paths],
 "red_point": [[x, y]], "blue_bbox": [[x1, y1, x2, y2]], "point_img_idx": [[0, 2]], ...}

Coordinates are in thousandths of the width and height of the image. `*_img_idx` has the image of
each mark; the order of its colours depends on the question type.
"""

import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from spatial_jax.data.formats.answers import (
  embedded_fields,
  final_answer,
  number_in,
  split_options,
  without,
)
from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.conversation import last_question, read_conversation
from spatial_jax.data.formats.fields import Fields, as_list, shown
from spatial_jax.data.formats.media import images_of, scene_of, with_matching_marks
from spatial_jax.data.rows import RowProblem

_COLORS = ("red", "blue", "green", "yellow")  # the order of `*_img_idx` for most types
_GREEN_FIRST = ("green", "blue", "red", "yellow")
_ORDERS = MappingProxyType({
  "distance_infer_center_oo_mv": ("red", "green", "blue", "yellow"),
  "spatial_imagination_oc_mv": _GREEN_FIRST,
  "spatial_imagination_oo_mv": _GREEN_FIRST,
})  # fmt: skip
_ONE_IMAGE = ("obj_spatial_relation_oc_mv",)  # all marks are in the first image of `*_img_idx`
# The published images of these types also have names drawn beside the marks.
_WITH_NAMES = (
  "spatial_imagination_map_mv", "distance_infer_center_oo_video", "spatial_imagination_oo_video",
  "spatial_imagination_oc_video",
)  # fmt: skip
_METERS = re.compile(r"(?:depth|distance)_prediction_o[co](?:_mv|_video)?")
_INSTRUCTIONS = (
  "Your answer can only include one of options A, B, C or D.",
  "Answer using a single number and nothing else.",
)


class Spar7m(Format):
  """SPAR-7M (jasonzhango/SPAR-7M), the forms fill, select, judge and sentence."""

  name = "spar7m"
  needs = (("conversations", "image", "type"),)

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    question_type = row.text("type")
    if question_type in _WITH_NAMES:
      reason = f"{question_type} needs names drawn beside the marks, which is not supported"
      raise RowProblem("type", reason)
    turns = read_conversation(row.required("conversations"), "conversations")
    question, answer = last_question(turns, "conversations")
    images = images_of(row.required("image"), "image")
    question = without(with_matching_marks(question, len(images), 0), _INSTRUCTIONS)
    unit = {"obj_count": "count", "room_size": "m^2"}.get(question_type)
    if _METERS.fullmatch(question_type):
      unit = "m"
    answer = final_answer(answer)
    if unit and not split_options(question):
      answer = number_in(answer, "conversations")
    marks = _marks(row, question_type, len(images))
    return {
      **embedded_fields(question, answer, None, unit, "conversations", True),
      "images": [
        {"path": image, "thousandths": found} if found else image
        for image, found in zip(images, marks, strict=True)
      ],
      "type": question_type,
      "scene": scene_of(images),
      "extra": row.extra(),
    }


def _marks(row: Fields, question_type: str, count: int) -> list[list[dict[str, Any]]]:
  """The marks of each image."""
  found: list[list[dict[str, Any]]] = [[] for _ in range(count)]
  for shape, name, length in (("point", "point", 2), ("box", "bbox", 4)):
    order = _ORDERS.get(question_type, _COLORS)
    colors = [color for color in order if row.value(f"{color}_{name}") is not None]
    images = _image_numbers(row.value(f"{name}_img_idx"), f"{name}_img_idx", count)
    for rank, color in enumerate(colors):
      field = f"{color}_{name}"
      points = _numbers(_first(row.value(field), field), field, length)
      where = 0 if images is None or question_type in _ONE_IMAGE else rank
      if images is not None and where >= len(images):
        raise RowProblem(f"{name}_img_idx", f"has {len(images)} images for {len(colors)} marks")
      number = 0 if images is None else images[where]
      found[number].append({"shape": shape, "points": points, "color": color})
  return found


def _image_numbers(value: Any, field: str, count: int) -> list[int] | None:
  if value is None:
    return None
  numbers = as_list(_first(value, field), field)
  for number in numbers:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
      raise RowProblem(field, f"has {shown(number)}, which is not the number of an image")
  if not numbers:
    raise RowProblem(field, "is empty")
  return numbers


def _first(value: Any, field: str) -> Any:
  """Points, boxes and numbers are in a list of one."""
  items = as_list(value, field)
  return items[0] if len(items) == 1 and isinstance(items[0], list) else items


def _numbers(value: Sequence[Any], field: str, length: int) -> list[float]:
  fits = isinstance(value, list) and len(value) == length
  if not fits or not all(isinstance(x, int | float) and 0 <= x <= 1000 for x in value):
    raise RowProblem(field, f"must be {length} numbers from 0 to 1000, got {shown(value)}")
  return [float(x) for x in value]
