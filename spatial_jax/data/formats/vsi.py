"""VSI-Bench and the training sets whose question types are those of VSI-Bench.

vsi_bench  id, dataset, scene_name, question_type, question, ground_truth, options
vsi100k    questions on ScanNet without options, of vsGRPO
vsi590k    conversations on videos and images, of Cambrian-S
"""

import re
from types import MappingProxyType
from typing import Any, Literal

from spatial_jax.data.formats.answers import (
  answer_fields,
  embedded_fields,
  final_answer,
  without,
)
from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.conversation import last_question, read_conversation
from spatial_jax.data.formats.fields import Fields, as_text
from spatial_jax.data.formats.media import images_of, path_of, scene_of, without_marks
from spatial_jax.data.formats.tables import parse_options
from spatial_jax.data.rows import RowProblem

# Question types with a number, and the unit of the answer.
UNITS = MappingProxyType({
  "object_counting": "count",
  "object_abs_distance": "m",
  "object_size_estimation": "cm",
  "room_size_estimation": "m^2",
})  # fmt: skip
_CHOICES = (
  "object_rel_distance", "object_rel_direction_easy", "object_rel_direction_medium",
  "object_rel_direction_hard", "route_planning", "obj_appearance_order",
)  # fmt: skip
_INSTRUCTIONS = (
  "These are frames of a video.",
  "Answer with the option's letter from the given choices directly.",
  "Please answer the question using a single word or phrase.",
  "Please answer the question using a number.",
  "Answer briefly and directly in one float number.",
)
# What a question of VSI-100k asks, if its row does not say: the templates of its paper.
_TEMPLATES = (
  (re.compile(r"\bhow many\b", re.I), "object_counting"),
  (re.compile(r"\blongest dimension\b", re.I), "object_size_estimation"),
  (re.compile(r"\bsize of (?:this|the) room\b", re.I), "room_size_estimation"),
  (re.compile(r"\bclosest to\b", re.I), "object_rel_distance"),
  (re.compile(r"\bstanding by\b.*\bfacing\b", re.I | re.DOTALL), "object_rel_direction"),
  (re.compile(r"\bdistance between\b", re.I), "object_abs_distance"),
)


class VsiBench(Format):
  """VSI-Bench (nyu-visionx/VSI-Bench), full or debiased: parquet, JSON lines, VLMEvalKit's TSV."""

  name = "vsi_bench"
  needs = (
    ("dataset", "scene_name", "question_type", "question", "ground_truth"),
    ("video", "question_type", "question", "answer", "candidates"),
  )
  held_out = True

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    question_type = row.text("question_type")
    options = parse_options(row.value("options", "candidates"), "options")
    if question_type in _CHOICES and not options:
      raise RowProblem("options", f"is missing, but the question type is {question_type}")
    if question_type not in (*_CHOICES, *UNITS):
      raise RowProblem("question_type", f"{question_type} is not one of VSI-Bench")
    answer = row.scalar("ground_truth", "answer")
    number = question_type in UNITS
    fields = answer_fields(
      answer, None if number else options, "number", UNITS.get(question_type), "ground_truth"
    )
    video, dataset = _video(row)
    identity = row.label("id", "index")
    return {
      "question": row.text("question"),
      **fields,
      "videos": [video],
      "id": f"vsi-bench/{identity}" if identity else None,
      "type": question_type,
      "scene": scene_of([video]),
      "benchmark": "vsi-bench",
      "extra": row.extra() | ({"dataset": dataset} if dataset else {}),
    }


def _video(row: Fields) -> tuple[str, str | None]:
  """The path of the video, and the data set that it is from."""
  video = row.text_or_none("video")
  if video is not None:
    return path_of(video, "video"), row.label("dataset")
  dataset, scene = row.text("dataset"), row.text("scene_name")
  return path_of(f"{dataset}/{scene}.mp4", "scene_name"), dataset


class Vsi100k(Format):
  """VSI-100k (OPPOer/VSI-100k) of vsGRPO: the answer is a number or a word."""

  name = "vsi100k"
  needs = (("question|problem", "answer|ground_truth|solution", "scene_name|scene_id|video|path"),)

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    question = without_marks(row.text("question", "problem"))
    video = row.text_or_none("video", "path")
    scene = row.label("scene_name", "scene_id")
    if video is None and scene is None:
      raise RowProblem("scene_name", "is missing, and the row has no video")
    video = path_of(video or f"{scene}.mp4", "video" if video else "scene_name")
    question_type = row.label("question_type", "type", "problem_type") or _type_of(question)
    answer = row.scalar("answer", "ground_truth", "solution")
    if isinstance(answer, str):
      answer = final_answer(answer)
    kind: Literal["number", "words"] = "words"
    if question_type in UNITS:
      kind = "number"
    return {
      "question": question,
      **answer_fields(answer, None, kind, UNITS.get(question_type)),
      "videos": [video],
      "type": question_type,
      "scene": scene or scene_of([video]),
      "extra": row.extra(),
    }


def _type_of(question: str) -> str:
  for pattern, name in _TEMPLATES:
    if pattern.search(question):
      return name
  raise RowProblem("question_type", "is missing, and the question fits no template of VSI-100k")


class Vsi590k(Format):
  """VSI-590K (nyu-visionx/VSI-590K): <image> stands for the video too; options in the question."""

  name = "vsi590k"
  needs = (
    ("video", "conversations", "question_type"),
    ("image", "conversations", "question_type"),
  )

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    turns = read_conversation(row.required("conversations"), "conversations")
    question, answer = last_question(turns, "conversations")
    question = without(without_marks(question), _INSTRUCTIONS)
    question_type = row.text("question_type")
    video = row.value("video")
    images = [] if video is not None else images_of(row.required("image"), "image")
    videos = [] if video is None else [path_of(as_text(video, "video"), "video")]
    unit = UNITS.get(question_type)
    return {
      **embedded_fields(question, final_answer(answer), None, unit, "conversations", True),
      "images": images,
      "videos": videos,
      "type": question_type,
      "scene": scene_of([*images, *videos]),
      "extra": row.extra(*(("conversations",) if len(turns) > 2 else ())),
    }
