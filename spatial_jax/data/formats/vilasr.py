"""ViLaSR: three forms of rows.

cold start and reflection  conversations [{role, content}], images: the drawn images come last
RL                         question, answer, image_path, question_type, options, data_type
evaluation                 the same with problem_type and original_question_type
"""

import re
from typing import Any, Literal

from spatial_jax.data.formats.answers import answer_fields, embedded_fields, final_answer
from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.conversation import Message, read_conversation
from spatial_jax.data.formats.fields import Fields, as_list
from spatial_jax.data.formats.media import images_of, scene_of, without_marks
from spatial_jax.data.rows import RowProblem
from spatial_jax.types import IMAGE_MARK

# The question stands between these lines of the prompt, after an introduction of the frames.
_QUESTION = re.compile(r"### Question:\s*(.*?)\s*Begin your reasoning\.", re.DOTALL)
_FRAMES = re.compile(r"^These are frames from a video.*?with appropriate tools:\s*", re.DOTALL)
_INDEX = re.compile(r"The index of the given image is \d+(?: \(width: \d+, height: \d+\))?\.")
_SUFFIXES = (
  "Answer with the option's letter from the given choices directly.",
  "Please answer the question using a single word or phrase (e.g., 42 or 3.14).",
)


class ViLaSR(Format):
  """ViLaSR-ColdStart-33k, -RRS-8k, -RL-40k (AntResearchNLP) and its evaluation files."""

  name = "vilasr"
  needs = (
    ("conversations", "images"),
    ("question", "answer", "image_path", "question_type", "data_type"),
    ("question", "answer", "image_path", "problem_type"),
  )
  general = True

  def convert(self, row: Fields) -> dict[str, Any]:
    """See `Format.convert`."""
    if row.value("conversations") is not None:
      return _demonstration(row)
    images = images_of(row.required("image_path"), "image_path")
    kind = row.text("question_type", "problem_type").lower()
    options = row.value("options") if kind == "multiple choice" else None
    if kind == "multiple choice":
      options = as_list(row.required("options"), "options")
    answers: dict[str, Literal["number", "words"]] = {"regression": "number", "numerical": "number"}
    fields = answer_fields(row.scalar("answer"), options, answers.get(kind, "words"))
    return {
      "question": without_marks(row.text("question")),
      **fields,
      "images": images,
      "type": row.label("original_question_type", "data_type") or kind,
      "scene": scene_of(images),
      "extra": row.extra("data_type") | {"question_type": kind},
    }


def _demonstration(row: Fields) -> dict[str, Any]:
  """The question of the first turn and the answer of the last one."""
  turns = read_conversation(row.required("conversations"), "conversations")
  users = [turn.text for turn in turns if turn.role == "user"]
  if not users:
    raise RowProblem("conversations", "has no text of the user")
  everything = images_of(row.required("images"), "images")
  images = everything[: users[0].count(IMAGE_MARK)]
  if not images:
    raise RowProblem("conversations", f"has no mark {IMAGE_MARK} in the question")
  question = without_marks(_question(users[0]))
  return {
    **embedded_fields(question, _answer(turns), field="conversations"),
    "images": images,
    "scene": scene_of(images),
    "turns": _turns(turns, everything, len(images)),
    "extra": row.extra("conversations", "images"),
  }


def _turns(messages: list[Message], images: list[Any], shown: int) -> list[Any]:
  """The texts of the assistant, each with the drawn images and the message after it.

  Args:
    messages: of the conversation.
    images: of the conversation, in the order of their marks.
    shown: number of the images of the question.
  """
  first = next(i for i, message in enumerate(messages) if message.role == "assistant")
  turns: list[Any] = []
  for message in messages[first:]:
    if message.role == "assistant":
      turns.append({"text": message.text})
      continue
    count = message.text.count(IMAGE_MARK)
    drawn = images[shown : shown + count]
    if not count or len(drawn) != count or not turns:
      raise RowProblem("images", f"has {len(images)} images, fewer than the marks {IMAGE_MARK}")
    turns[-1] |= {"images": drawn, "observation": message.text}
    shown += count
  return turns


def _question(prompt: str) -> str:
  match = _QUESTION.search(prompt)
  question = _FRAMES.sub("", match[1] if match else prompt)
  question = _INDEX.sub("", question)
  for suffix in _SUFFIXES:
    question = question.replace(suffix, "")
  return question.strip()


def _answer(turns: list[Message]) -> str:
  if not turns or turns[-1].role != "assistant" or "<answer>" not in turns[-1].text:
    raise RowProblem("conversations", "does not end with <answer>...</answer> of the assistant")
  return final_answer(turns[-1].text)
