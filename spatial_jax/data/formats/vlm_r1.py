"""VLM-R1: {"id", "image": path or paths, "conversations": [human, gpt], "accu_reward_method"}."""

from typing import Any

from spatial_jax.data.formats.answers import embedded_fields, final_answer
from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.conversation import last_question, read_conversation
from spatial_jax.data.formats.fields import Fields
from spatial_jax.data.formats.media import images_of, scene_of, with_matching_marks


class VlmR1(Format):
  """VLM-R1 (om-ai-lab/VLM-R1); its trainer places all images in front of the text."""

  name = "vlm_r1"
  needs = (("image", "conversations"),)
  general = True

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    images = images_of(row.required("image"), "image")
    turns = read_conversation(row.required("conversations"), "conversations")
    question, answer = last_question(turns, "conversations")
    question = with_matching_marks(question, len(images), 0)
    return {
      **embedded_fields(question, final_answer(answer), field="conversations"),
      "images": images,
      "scene": scene_of(images),
      "extra": row.extra(*(("conversations",) if len(turns) > 2 else ())),
    }
