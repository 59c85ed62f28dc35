"""R1-V and Open-R1-multimodal: image, problem, solution "<answer> 3 </answer>"."""

from typing import Any

from spatial_jax.data.formats.answers import embedded_fields, final_answer
from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.fields import Fields
from spatial_jax.data.formats.media import images_of, with_matching_marks


class R1V(Format):
  """R1-V (leonardPKU/clevr_cogen_a_train) and Open-R1-multimodal (multimodal-open-r1-8k)."""

  name = "r1v"
  needs = (("image|images", "problem", "solution"),)
  general = True

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    images = images_of(row.required("image", "images"), "image")
    question = with_matching_marks(row.text("problem"), len(images), 0)
    answer = row.scalar("solution")
    if isinstance(answer, str):
      answer = final_answer(answer)
    return {
      **embedded_fields(question, answer, field="solution"),
      "images": images,
      "extra": row.extra(),
    }
