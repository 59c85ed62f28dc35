"""Lists that tables without list columns write as one text: options, choices, candidates."""

import json
import re
from typing import Any

from spatial_jax.data.formats.fields import as_text, shown
from spatial_jax.data.rows import RowProblem

# The items of a Python list of texts: 'a', "b's".
_ITEM = re.compile(r"""\s*(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")\s*(,|$)""", re.DOTALL)
_LINE = re.compile(r"\s*[(\[]?[A-Z][.):\]]")
_NAMED = re.compile(r"(?:^|,)\s*([A-Z])\s*:\s*")


def parse_options(value: Any, field: str) -> list[Any]:
  """The options of a choice, with letters or without.

      ["sofa", "lamp"]          {"A": "sofa", "B": "lamp"}
      '["A. sofa", "B. lamp"]'  "A. sofa\\nB. lamp"   'A:"sofa", B:"lamp"'

  Args:
    value: a list, an object, one of the texts above, or None.

  Returns:
    [] if `value` is None or a text that says so.

  Raises:
    RowProblem: naming `field`, if it is none of them.
  """
  if isinstance(value, dict):
    present = {str(letter): text for letter, text in value.items() if text is not None}
    return [f"{letter}. {text}" for letter, text in sorted(present.items())]
  if value is None or isinstance(value, list):
    return [_plain(option) for option in value or []]
  text = as_text(value, field)
  if text.lower() in ("none", "nan", "null", "[]"):
    return []
  if text.startswith("["):
    return _list(text, field)
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if len(lines) > 1 and all(_LINE.match(line) for line in lines):
    return lines
  marks = list(_NAMED.finditer(text))
  if len(marks) > 1:
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    pairs = zip(marks, ends, strict=True)
    return [f"{mark[1]}. {_unquoted(text[mark.end() : end])}" for mark, end in pairs]
  raise RowProblem(field, f"is {shown(text)}, which is not a list of options")


def _list(text: str, field: str) -> list[Any]:
  """A list in JSON, or in Python's spelling."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    pass
  inside, position, items = text[1:-1], 0, []
  if not text.endswith("]"):
    raise RowProblem(field, f"is {shown(text)}, which is not a list of options")
  while position < len(inside):
    match = _ITEM.match(inside, position)
    if match is None:
      raise RowProblem(field, f"is {shown(text)}, which is not a list of options")
    items.append(re.sub(r"\\(.)", r"\1", match[1] if match[1] is not None else match[2]))
    position = match.end()
  return items


def _plain(option: Any) -> Any:
  """'A: "sofa"' -> "A. sofa"; other options stay."""
  match = _NAMED.match(option) if isinstance(option, str) else None
  return option if match is None else f"{match[1]}. {_unquoted(option[match.end() :])}"


def _unquoted(text: str) -> str:
  text = text.strip().strip(",").strip()
  quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
  return text[1:-1] if quoted else text
