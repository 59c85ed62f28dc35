"""EasyR1 and verl: parquet files of GRPO runs.

EasyR1: problem, answer, images, videos; <image> in the problem is the place of an image.
verl: prompt is a list of messages, the answer is reward_model.ground_truth.
"""

from collections.abc import Mapping
from typing import Any

from spatial_jax.data.formats.answers import embedded_fields, final_answer
from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.conversation import last_user_text, read_conversation
from spatial_jax.data.formats.fields import Fields, as_text, shown
from spatial_jax.data.formats.media import images_of, videos_of
from spatial_jax.data.rows import RowProblem


class EasyR1(Format):
  """EasyR1 (hiyouga/EasyR1) and verl (verl-project/verl)."""

  name = "easyr1"
  needs = (("problem|prompt", "answer"), ("problem|prompt", "reward_model"))
  general = True

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    question, kept = _question(row)
    images, videos = (
      images_of(row.value("images"), "images"),
      videos_of(row.value("videos"), "videos"),
    )
    answer = _answer(row)
    if isinstance(answer, str):
      answer = final_answer(answer)
    return {
      **embedded_fields(question, answer),
      "images": images,
      "videos": videos,
      "extra": row.extra(*kept),
    }


def _question(row: Fields) -> tuple[str, tuple[str, ...]]:
  """The question, and the fields to keep in `extra`: messages in front of it."""
  value = row.required("problem", "prompt")
  if isinstance(value, list):
    turns = read_conversation(value, "prompt")
    return last_user_text(turns, "prompt"), ("prompt",) if len(turns) > 1 else ()
  return as_text(value, "problem"), ()


def _answer(row: Fields) -> str | int | float:
  model = row.value("reward_model")
  if model is None:
    return row.scalar("answer")
  if not isinstance(model, Mapping):
    raise RowProblem("reward_model", f"must be an object, got {shown(model)}")
  truth = Fields({"reward_model.ground_truth": model.get("ground_truth")}, row.file)
  return truth.scalar("reward_model.ground_truth")
