"""MindCube: id, category, type, meta_info, question with its options, images, gt_answer."""

import re
from typing import Any

from spatial_jax.data.formats.answers import embedded_fields
from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.fields import Fields
from spatial_jax.data.formats.media import images_of, scene_of, without_marks
from spatial_jax.data.rows import RowProblem

_SETTING = re.compile(r"(among|around|rotation)")


class MindCube(Format):
  """MindCube (MLL-Lab/MindCube): raw rows of the training set and of the benchmark (tinybench)."""

  name = "mindcube"
  needs = (("id", "question", "images", "gt_answer"),)

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    identity, images = row.text("id"), images_of(row.required("images"), "images")
    question = without_marks(row.text("question"))
    fields = embedded_fields(question, row.text("gt_answer"), field="gt_answer")
    if fields["kind"] != "choice":
      raise RowProblem("question", "has no options that fit the answer")
    setting, published = _SETTING.match(identity), row.label("type")
    is_benchmark = "bench" in row.file.lower()
    return {
      **fields,
      "images": images,
      "id": f"mindcube/{identity}",
      "type": setting[1] if setting else published,
      "scene": scene_of(images),
      "benchmark": "mindcube" if is_benchmark else None,
      "split": "held_out" if is_benchmark else None,
      "extra": row.extra("type"),
    }
