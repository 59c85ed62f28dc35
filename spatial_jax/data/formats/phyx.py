"""PhyX: problems of physics with an image, as multiple choice or with an open answer.

default rows    question, question_description, options, answer, image, category, subfield, ...
mc, oe, TSV     index, question with its options, image (base64), answer, category
with steps      further a solution, which SFT imitates
"""

import re
from collections.abc import Mapping
from typing import Any

from spatial_jax.data.formats.answers import answer_fields, embedded_fields, is_quantity
from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.fields import Fields
from spatial_jax.data.formats.media import image_of, images_of_base64
from spatial_jax.data.formats.tables import parse_options
from spatial_jax.data.rows import RowProblem

# A number and one unit: "36.1 kg", "9.8 m/s^2".
_MEASURE = re.compile(
  r"(?P<value>[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)\s*(?P<unit>[^\W\d_][\w/^*.°-]{0,15})"
)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{120,}={0,2}\s*")  # longer than most paths


class PhyX(Format):
  """PhyX (Cloudriver/PhyX): default rows, phyx_mc and phyx_oe, and the TSV of VLMEvalKit."""

  name = "phyx"
  needs = (
    ("question", "answer", "image", "category", "id|index"),
    ("question", "answer", "image", "subfield"),
  )

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    question = row.text("question")
    description = row.text_or_none("question_description", "description")
    if description and description not in question:
      question = f"{description}\n{question}"
    options = parse_options(row.value("options"), "options") or _columns(row)
    answer = row.scalar("answer")
    if options:
      fields = {"question": question, **answer_fields(answer, options)}
    elif measure := _MEASURE.fullmatch(str(answer).strip()):
      fields = {
        "question": question,
        "answer": float(measure["value"].replace(",", "")),
        "unit": measure["unit"],
        "kind": "number",
      }
    else:
      kind = "number" if is_quantity(answer) else None
      fields = embedded_fields(question, answer, kind)
    identity = row.label("id", "index")
    solution = row.text_or_none("solution", "steps", "answer_with_steps")
    return {
      **fields,
      "images": _images(row),
      "id": f"phyx/{identity}" if identity else None,
      "type": row.label("category", "subfield"),
      "benchmark": "phyx",
      "extra": row.extra()
      | {"category": row.label("category"), "key": str(answer)}
      | ({"solution": solution} if solution else {}),
    }


def _columns(row: Fields) -> list[str]:
  """The options of VLMEvalKit's tables: columns A, B, C, D."""
  named = {letter: row.label(letter) for letter in "ABCD"}
  return parse_options(named, "options") if named["A"] and named["B"] else []


def _images(row: Fields) -> list[str | bytes]:
  image = row.required("image")
  if isinstance(image, Mapping | bytes):
    return [image_of(image, "image")]
  if not isinstance(image, str):
    raise RowProblem("image", "must be base64, a path, or an object with bytes")
  is_table = row.file.endswith(".tsv")
  if image.startswith("[") or is_table or _BASE64.fullmatch(image):
    return list(images_of_base64(image, "image"))
  return [image_of(image, "image")]
