"""Conversations of foreign rows: {from, value} of ShareGPT, {role, content} of OpenAI."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spatial_jax.data.formats.fields import as_list, as_text, shown
from spatial_jax.data.rows import RowProblem
from spatial_jax.types import IMAGE_MARK, VIDEO_MARK

_USER, _ASSISTANT = ("human", "user"), ("gpt", "assistant")
_MARK_OF = {"image": IMAGE_MARK, "image_url": IMAGE_MARK, "video": VIDEO_MARK}


class Message(NamedTuple):
  """One turn."""

  role: str  # "user", "assistant", or the name that the source gives to another role
  text: str


def read_conversation(value: Any, field: str) -> list[Message]:
  """The turns of a conversation.

  Raises:
    RowProblem: if it is not a list of turns with a role and a text.
  """
  turns = as_list(value, field)
  return [_message(turn, f"{field}[{i}]") for i, turn in enumerate(turns)]


def last_question(turns: Sequence[Message], field: str) -> tuple[str, str]:
  """The last text of the user, and the text of the assistant after it.

  Raises:
    RowProblem: if there is no such pair.
  """
  for i in range(len(turns) - 1, 0, -1):
    if turns[i].role == "assistant" and turns[i - 1].role == "user":
      return turns[i - 1].text, turns[i].text
  raise RowProblem(field, "has no text of the user that the assistant answers")


def last_user_text(turns: Sequence[Message], field: str) -> str:
  """The last text of the user; raises RowProblem if there is none."""
  for turn in reversed(turns):
    if turn.role == "user":
      return turn.text
  raise RowProblem(field, "has no text of the user")


def _message(turn: Any, field: str) -> Message:
  if not isinstance(turn, Mapping):
    raise RowProblem(field, f"must be an object, got {shown(turn)}")
  role = turn.get("from") or turn.get("role")
  content = turn.get("value") if turn.get("value") is not None else turn.get("content")
  if not isinstance(role, str):
    raise RowProblem(field, f"has no role: {shown(dict(turn))}")
  if role.lower() in _USER:
    role = "user"
  elif role.lower() in _ASSISTANT:
    role = "assistant"
  return Message(role, _text(content, field))


def _text(content: Any, field: str) -> str:
  """The text of a turn; the parts of a list are joined, media as marks."""
  if isinstance(content, list):
    return "".join(_part(part, field) for part in content).strip()
  return as_text(content, field)


def _part(part: Any, field: str) -> str:
  if isinstance(part, Mapping):
    kind = part.get("type")
    if isinstance(kind, str) and kind in _MARK_OF:
      return _MARK_OF[kind]
    part = part.get("text")
  if not isinstance(part, str):
    raise RowProblem(field, f"has a part that is neither text nor media: {shown(part)}")
  return part
