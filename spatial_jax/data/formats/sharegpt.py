"""LLaMA-Factory: conversations with images, for supervised training.

{"conversations": [{"from": "human", "value": "<image>..."}, {"from": "gpt", "value": "..."}],
 "images": ["a.jpg"], "videos": [...], "system": "..."}; or messages: [{"role", "content"}].
"""

from typing import Any

from spatial_jax.data.formats.answers import embedded_fields, final_answer
from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.conversation import last_question, read_conversation
from spatial_jax.data.formats.fields import Fields
from spatial_jax.data.formats.media import images_of, videos_of, with_matching_marks
from spatial_jax.data.rows import RowProblem
from spatial_jax.types import IMAGE_MARK, VIDEO_MARK


class ShareGPT(Format):
  """ShareGPT and OpenAI conversations as LLaMA-Factory reads them.

  The last question of the user becomes the task. Media of earlier turns come in front of it.
  """

  name = "sharegpt"
  needs = (("conversations|messages",),)
  general = True

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    field = "conversations" if row.value("conversations") is not None else "messages"
    turns = read_conversation(row.required("conversations", "messages"), field)
    question, answer = last_question(turns, field)
    images, videos = (
      images_of(row.value("images"), "images"),
      videos_of(row.value("videos"), "videos"),
    )
    for mark, count, name in (
      (IMAGE_MARK, len(images), "images"),
      (VIDEO_MARK, len(videos), "videos"),
    ):
      marks = sum(turn.text.count(mark) for turn in turns)
      if marks not in (0, count):
        raise RowProblem(field, f"has {marks} marks {mark} for {count} {name}")
    question = with_matching_marks(question, len(images), len(videos))
    return {
      **embedded_fields(question, final_answer(answer), field=field),
      "images": images,
      "videos": videos,
      "extra": row.extra(field),
    }
