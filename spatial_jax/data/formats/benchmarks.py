"""Small sets of choices: SAT, which has a training set too, BLINK, MMSI-Bench, ViewSpatial."""

import re
from typing import Any

from spatial_jax.data.formats.answers import answer_fields, embedded_fields, letter_of, with_letters
from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.fields import Fields, as_list
from spatial_jax.data.formats.media import images_of, scene_of, without_marks
from spatial_jax.data.formats.tables import parse_options
from spatial_jax.data.rows import RowProblem

_BLINK_IMAGES = tuple(f"image_{number}" for number in range(1, 5))


class SAT(Format):
  """SAT (array/SAT): parquet with image_bytes, answers and the text of the correct answer."""

  name = "sat"
  needs = (("question", "answers", "correct_answer", "image_bytes|images"),)

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    options = with_letters(as_list(row.required("answers"), "answers"))
    answer = row.text("correct_answer")  # a text, also where it looks like a letter
    right = [option[0] for option in options if option[3:] == answer]
    letter = right[0] if len(right) == 1 else letter_of(answer, options, "correct_answer")
    return {
      "question": without_marks(row.text("question")),
      "kind": "choice",
      "options": options,
      "answer": letter,
      "images": images_of(row.required("image_bytes", "images"), "image_bytes"),
      "type": row.label("question_type"),
      "extra": row.extra(),
    }


class Blink(Format):
  """BLINK (BLINK-Benchmark/BLINK): up to four images, choices, the answer "(A)"."""

  name = "blink"
  needs = (("sub_task", "question", "choices", "answer", "image_1"),)
  held_out = True

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    sub_task, answer = row.text("sub_task"), row.text("answer")
    if answer == "hidden":
      raise RowProblem("answer", "is hidden; use the validation split")
    options = as_list(row.required("choices"), "choices")
    images = [
      image
      for name in _BLINK_IMAGES
      if (value := row.value(name)) is not None
      for image in images_of(value, name)
    ]
    identity = row.label("idx")
    return {
      "question": without_marks(row.text("question")),
      **answer_fields(answer, options),
      "images": images,
      "id": f"blink/{identity}" if identity else None,
      "type": sub_task,
      "benchmark": "blink",
      "extra": row.extra(),
    }


class MMSI(Format):
  """MMSI-Bench (RunsenXu/MMSI-Bench): images as bytes, the options in the question."""

  name = "mmsi"
  needs = (("id", "images", "question_type", "question", "answer"),)
  held_out = True

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    fields = embedded_fields(without_marks(row.text("question")), row.text("answer"))
    if fields["kind"] != "choice":
      raise RowProblem("question", "has no options that fit the answer")
    return {
      **fields,
      "images": images_of(row.required("images"), "images"),
      "id": f"mmsi-bench/{row.label('id')}",
      "type": row.text("question_type"),
      "benchmark": "mmsi-bench",
      "extra": row.extra(),
    }


class ViewSpatial(Format):
  """ViewSpatial-Bench (lidingm/ViewSpatial-Bench): the answer is a letter with its text."""

  name = "viewspatial"
  needs = (("question", "choices", "answer", "question_type", "image_path|images"),)
  held_out = True

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    options = with_letters(parse_options(row.required("choices"), "choices"))
    images = images_of(row.required("image_path", "images"), "image_path")
    letter = re.match(r"([A-Z])[.:)]", answer := row.text("answer"))
    return {
      "question": without_marks(row.text("question")),
      "kind": "choice",
      "options": options,
      "answer": letter_of(letter[1] if letter else answer, options),
      "images": images,
      "type": row.text("question_type"),
      "scene": scene_of(images),
      "benchmark": "viewspatial",
      "extra": row.extra(),
    }
