"""Reads JSON as models write it: mends what has one obvious meaning, and evaluates nothing.

Mended: Python literals and quotes, tuples, curly quotes, bare keys, comments, commas too few or too
many, brackets that were not closed (at the end, or before an outer one closes), several values
behind one another. Everything else is rejected as a whole. A valid JSON document reads as
`json.loads` reads it, with every number a float.
"""

import re
from typing import Any

from spatial_jax.types import OperationError

# A comma is as good as a space: this alone mends missing, doubled and trailing ones.
GAP = re.compile(r"(?:[\s,]+|//[^\n]*|#[^\n]*|/\*.*?\*/)*", re.DOTALL)
STRAY = re.compile(r"(?:[\s,\]})]+|//[^\n]*|#[^\n]*|/\*.*?\*/)*", re.DOTALL)
COLON = re.compile(r"\s*:")
NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
WORD = re.compile(r"[-+]?[A-Za-z_][A-Za-z0-9_]*")
HEX = re.compile(r"[0-9a-fA-F]{4}")
SURROGATE = re.compile("[\ud800-\udfff]")

NAN, INFINITY = float("nan"), float("inf")
CONSTANTS = {
  "true": True, "false": False, "null": None, "none": None, "nan": NAN, "-nan": NAN,
  "inf": INFINITY, "infinity": INFINITY, "+inf": INFINITY, "+infinity": INFINITY,
  "-inf": -INFINITY, "-infinity": -INFINITY,
}  # fmt: skip
QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class Rejected(ValueError):
  """A piece of model output that cannot be used; `error` says why."""

  def __init__(self, code: str, detail: str):
    super().__init__(f"{code}: {detail}")
    self.error = OperationError(code, detail)


def read_items(text: str, depth: int) -> list[Any]:
  """The items of one block: those of its lists, or the values that stand in no list.

      [{..}, {..}]      {..}      {..} {..}      [{..}] [{..}]      [{.., {..

  Args:
    text: what stands between the fences, of any length and content.
    depth: how many brackets may be open at once.

  Returns:
    dict, list, str, float, bool or None, each.

  Raises:
    Rejected: "bad_json" when the text has no one obvious reading, "too_deep".
  """
  reader = _Reader(text, depth)
  reader.take(GAP)
  items: list[Any] = []
  if reader.ended:
    raise Rejected("bad_json", "the block is empty")
  while not reader.ended:
    value = reader.value(0)
    items += value if isinstance(value, list) else [value]
    reader.take(STRAY)
  return items


class _Reader:
  """Recursive descent over one text; `position` moves on, but for one step back in `_array`."""

  def __init__(self, text: str, depth: int):
    self.text, self.depth, self.position = text, depth, 0

  @property
  def ended(self) -> bool:
    return self.position >= len(self.text)

  def take(self, pattern: re.Pattern[str]) -> str:
    """Moves over the pattern; "" and no move when it does not match here."""
    match = pattern.match(self.text, self.position)
    if match is None:
      return ""
    self.position = match.end()
    return match[0]

  def value(self, depth: int) -> Any:
    self.take(GAP)
    char = self._peek()
    if char in ("{", "[", "("):
      if depth >= self.depth:
        raise Rejected("too_deep", f"more than {self.depth} brackets are open")
      self.position += 1
      return self._object(depth + 1) if char == "{" else self._array(depth + 1)
    if char in QUOTES:
      return self._string()
    number = self.take(NUMBER)
    if number:
      return float(number)
    word = self.take(WORD).lower()
    if word in CONSTANTS:
      return CONSTANTS[word]
    raise self._unexpected("a value")

  def _object(self, depth: int) -> dict[str, Any]:
    members: dict[str, Any] = {}
    while True:
      self.take(GAP)
      char = self._peek()
      if char in ("", "]", ")", "{"):  # its brace was forgotten
        return members
      if char == "}":
        self.position += 1
        return members
      quoted = char in QUOTES
      key = self._string() if quoted else self.take(WORD)
      if not (quoted or key) or not self.take(COLON):
        raise self._unexpected("a key and a colon")
      members[key] = self.value(depth)

  def _array(self, depth: int) -> list[Any]:
    items: list[Any] = []
    while True:
      self.take(GAP)
      char = self._peek()
      if char in ("", "}"):  # its bracket was forgotten
        return items
      if char in ("]", ")"):
        self.position += 1
        return items
      start = self.position
      item = self.value(depth)
      if isinstance(item, str) and COLON.match(self.text, self.position):
        self.position = start  # a key: the bracket was forgotten before it
        return items
      items.append(item)

  def _string(self) -> str:
    close = QUOTES[self.text[self.position]]
    chars: list[str] = []
    self.position += 1
    while not self.ended:
      char = self.text[self.position]
      self.position += 1
      if char == "\\":
        chars.append(self._escape())
      elif char == close and not self._apostrophe(char):
        return _whole("".join(chars))
      else:
        chars.append(char)
    raise Rejected("bad_json", "a string is not closed")

  def _escape(self) -> str:
    char = self._peek()
    self.position += 1
    code = HEX.match(self.text, self.position) if char == "u" else None
    if code is None:
      return ESCAPES.get(char, char)
    self.position = code.end()
    return chr(int(code[0], 16))

  def _apostrophe(self, char: str) -> bool:
    """Whether a single quote stands within a word ('the chair's leg') and so closes nothing."""
    before, after = self.text[self.position - 2], self._peek()
    return char in "'\u2019" and before.isalnum() and after.isalnum()

  def _peek(self) -> str:
    return self.text[self.position : self.position + 1]

  def _unexpected(self, wanted: str) -> Rejected:
    found = repr(self._peek()) if not self.ended else "the end"
    return Rejected("bad_json", f"expected {wanted} at character {self.position}, found {found}")


def _whole(text: str) -> str:
  """Joins surrogate pairs; a lone half becomes U+FFFD, so that the text can be stored."""
  if SURROGATE.search(text) is None:
    return text
  return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
