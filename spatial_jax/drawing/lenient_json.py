"""Reads JSON as models write it: repairs mistakes with one obvious meaning, and evaluates nothing.

Repaired: Python literals and quotes, tuples, curly quotes, bare keys, comments, missing and extra
commas, brackets that were not closed (at the end, or before an outer one closes), several values
in a row. Any other text is rejected as a whole. A valid JSON document reads as `json.loads` reads
it, with every number a float.
"""

import re
from typing import Any

from spatial_jax.types import OperationError

# Commas count as spaces, which repairs missing, doubled and trailing commas.
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
  """Returns the items of one block: the items of its lists, and its values outside of lists.

      [{..}, {..}]      {..}      {..} {..}      [{..}] [{..}]      [{.., {..

  Args:
    text: text between the fences, of any length and content.
    depth: number of brackets that may be open at once.

  Returns:
    Each item is a dict, list, str, float, bool or None.

  Raises:
    Rejected: "bad_json" if the text has no single obvious reading, "too_deep".
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
  """Recursive descent over one text; `position` only grows, except for one case in `_array`."""

  def __init__(self, text: str, depth: int):
    self.text, self.depth, self.position = text, depth, 0

  @property
  def ended(self) -> bool:
    return self.position >= len(self.text)

  def take(self, pattern: re.Pattern[str]) -> str:
    """Consumes the pattern; returns "" if it does not match at the position."""
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
      if char in ("", "]", ")", "{"):  # the closing brace is missing
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
      if char in ("", "}"):  # the closing bracket is missing
        return items
      if char in ("]", ")"):
        self.position += 1
        return items
      start = self.position
      item = self.value(depth)
      if isinstance(item, str) and COLON.match(self.text, self.position):
        self.position = start  # a key: the closing bracket is missing before it
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
        return _joined_surrogates("".join(chars))
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
    """Whether a single quote is inside a word ('the chair's leg') and so closes no string."""
    before, after = self.text[self.position - 2], self._peek()
    return char in "'\u2019" and before.isalnum() and after.isalnum()

  def _peek(self) -> str:
    return self.text[self.position : self.position + 1]

  def _unexpected(self, wanted: str) -> Rejected:
    found = repr(self._peek()) if not self.ended else "the end"
    return Rejected("bad_json", f"expected {wanted} at character {self.position}, found {found}")


def _joined_surrogates(text: str) -> str:
  """Joins surrogate pairs; a lone surrogate becomes U+FFFD, so that the text can be stored."""
  if SURROGATE.search(text) is None:
    return text
  return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
