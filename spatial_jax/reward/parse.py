"""Text of an answer -> number or option, strictly: what is not surely one answer is none.

Runs on the host, once per rollout. A number is a phrase of this grammar and nothing else:

    [about | approximately | the answer is | ~ ...] quantity [smaller quantity ...] [.]
    quantity  =  number [unit]        2.35 m     1,200 cm²     3 1/2 feet     5 ft 3 in     twelve

Two numbers ("2 or 3"), ranges ("2-3"), bounds ("at least 2"), units that do not fit the question,
unknown words, NaN and infinity are failures; a failure is rewarded 0 and counted.
"""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spatial_jax.types import Task

MAX_CHARS = 100  # a longer answer is prose, and bounds the work of the patterns below

COUNT = "count"  # the expected unit of "how many": none may be stated

_WORDS = [
  "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
  "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
  "nineteen", "twenty",
]  # fmt: skip

_METRES = {"km": 1e3, "m": 1.0, "cm": 1e-2, "mm": 1e-3, "ft": 0.3048, "in": 0.0254}
_LENGTH = (
  r"(?:(?P<km>km|kilomet(?:er|re)s?)|(?P<cm>cm|centimet(?:er|re)s?)|(?P<mm>mm|millimet(?:er|re)s?)"
  r"|(?P<m>m|met(?:er|re)s?)|(?P<ft>ft|foot|feet)|(?P<in>in|inch(?:es)?))"
)
_UNIT = rf"(?:(?P<square>square|sq\.?)\s*)?{_LENGTH}(?P<power>\^?2)?(?![a-z0-9^])\.?"
_FEET_INCHES = r"(?P<inch_mark>''|\")|(?P<foot_mark>')"
_NUMBER = (
  r"(?P<sign>[+-]?)(?:(?:(?P<whole>\d+)\s+)?(?P<numerator>\d+)/(?P<denominator>\d+)"
  r"|(?P<decimal>[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)"
  r"(?:e(?P<e>[+-]?\d+)|\s*x\s*10\^(?P<ten>[+-]?\d+))?"
  rf"|(?P<word>{'|'.join(sorted(_WORDS, key=len, reverse=True))})\b)"
)
_QUANTITY = re.compile(rf"{_NUMBER}\s*(?:{_UNIT}|{_FEET_INCHES})?\s*", re.ASCII)
_LEAD = re.compile(
  r"(?:(?:(?:the|final|answer|is|it's|it|there|are|about|approximately|approx|around|roughly)\b\.?"
  r"|[:=~≈])\s*)*"
)
_UNIT_ONLY = re.compile(_UNIT, re.ASCII)
_ASKED = re.compile(rf"\b(?:in|how many)\s+(?P<unit>{_UNIT})", re.ASCII)

_OPTION = re.compile(r"\(?(?P<letter>[A-Za-z])(?:[.):]+\s*(?P<text>.*))?", re.DOTALL)
_CHOICE_LEAD = re.compile(
  r"(?:(?:(?:the|my|final|correct)\s+)*(?:answer|option|choice)\s*(?:is\b)?\s*:?\s*)+",
  re.IGNORECASE,
)


class Unit(NamedTuple):
  """A length (power 1) or an area (power 2): how many metres to the `power` it is."""

  metres: float
  power: int


class Reading(NamedTuple):
  """One answer as numbers, ready for the jitted rewards.

  Attributes:
    value: the number in the unit asked for, or the index of the option; 0 where not parsed.
    parsed: whether there is exactly one reading.
  """

  value: float
  parsed: bool


def parse_number(text: str, expected_unit: str | None = None) -> float | None:
  """Reads the one number of a phrase.

  Args:
    text: at most 100 characters.
    expected_unit: what the question asks for ("m", "centimeters", "square meters", ...): another
      unit of that dimension is converted, one of another dimension fails. `COUNT` allows no unit.
      None leaves the number as it is stated.

  Returns:
    A float that is finite in float32, or None.

  Raises:
    ValueError: on the host, when `expected_unit` is not a unit known here.
  """
  text = text.strip(" \n*`")
  if len(text) > MAX_CHARS:
    return None
  text = _plain(text).strip().lower().removesuffix(".")
  position = _end(_LEAD.match(text))
  quantities: list[tuple[float, Unit | None]] = []
  while position < len(text):
    match = _QUANTITY.match(text, position)
    if match is None or float(match["denominator"] or 1) == 0:
      return None
    quantities.append((_value(match), _unit(match)))
    position = match.end()
  value = _total(quantities, expected_unit)
  if value is None or not abs(value) <= float(np.finfo(np.float32).max):
    return None
  return value


def asked_unit(question: str) -> str | None:
  """The unit a question asks for: "... (in meters)?" -> "meters", "How many ..." -> `COUNT`."""
  question = question.lower()
  if match := _ASKED.search(question):
    return match["unit"]
  return COUNT if re.search(r"\bhow many\b", question) else None


def parse_choice(text: str, options: Sequence[str]) -> str | None:
  """Reads the one option that is meant.

  Accepts the letter ("B", "b.", "(B)"), the option ("B. chair", "(B) chair"), its text ("chair",
  "the chair") and each of them after "the answer is". A letter beside another option's text, two
  letters, or a text that several options share are ambiguous.

  Args:
    text: the answer.
    options: "A. table", "B. chair", ...; without letters they are A, B, C in order.

  Returns:
    A capital letter, or None.
  """
  text = text.strip()
  text = text[_end(_CHOICE_LEAD.match(text)) :].strip(" \n*`")
  texts = {}
  for index, option in enumerate(options):
    match = _OPTION.fullmatch(option.strip())
    if match and match["text"] is not None:
      texts[match["letter"].upper()] = _words(match["text"])
    else:
      texts[chr(ord("A") + index)] = _words(option)
  readings = {letter for letter, words in texts.items() if words and words == _words(text)}
  if match := _OPTION.fullmatch(text):
    letter, words = match["letter"].upper(), _words(match["text"] or "")
    if letter in texts and words in ("", texts[letter]):
      readings.add(letter)
  return readings.pop() if len(readings) == 1 else None


def read(text: str | None, task: Task) -> Reading:
  """Reads an answer as its task asks for it; None (no answer was given) is not parsed."""
  value = None
  if text is not None and task.answer_kind == "number":
    value = parse_number(text, asked_unit(task.question))
  elif text is not None:
    letter = parse_choice(text, task.options or ())
    value = None if letter is None else float(ord(letter) - ord("A"))
  return Reading(0.0 if value is None else value, value is not None)


def _plain(text: str) -> str:
  """ASCII forms of typographic digits and signs; m² becomes m^2, and 3½ becomes 3 1/2."""
  marks = {"<super>": "^", "<fraction>": " ", "<wide>": ""}
  plain = "".join(
    marks[kind] + unicodedata.normalize("NFKC", char)
    if (kind := unicodedata.decomposition(char).split(" ")[0]) in marks
    else char
    for char in text
  )
  return plain.translate(str.maketrans("−⁄′’″×", "-/''\"x"))  # noqa: RUF001


def _end(match: re.Match[str] | None) -> int:
  return match.end() if match else 0


def _value(match: re.Match[str]) -> float:
  """The number of one quantity; inf where it overflows."""
  if match["word"]:
    value = float(_WORDS.index(match["word"]))
  elif match["decimal"]:
    exponent = match["e"] or match["ten"] or "0"
    value = float(f"{match['decimal'].replace(',', '')}e{exponent}")
  else:
    value = float(match["whole"] or 0) + float(match["numerator"]) / float(match["denominator"])
  return -value if match["sign"] == "-" else value


def _unit(match: re.Match[str]) -> Unit | None:
  """The unit that a match of `_UNIT` (or of a foot or inch mark) names."""
  groups = match.groupdict()
  if groups.get("foot_mark") or groups.get("inch_mark"):
    return Unit(_METRES["ft" if groups["foot_mark"] else "in"], 1)
  name = next((name for name in _METRES if match[name]), None)
  if name is None:
    return None
  power = 2 if match["square"] or match["power"] else 1
  return Unit(_METRES[name] ** power, power)


def _total(quantities: list[tuple[float, Unit | None]], expected: str | None) -> float | None:
  """One number from "5 ft 3 in" or from a single quantity, in the expected unit."""
  if not quantities:
    return None
  units = [unit for _, unit in quantities]
  if len(quantities) > 1 and not _descending(quantities):
    return None
  if expected == COUNT:
    return quantities[0][0] if units[0] is None else None
  wanted = units[0]
  if expected is not None:
    match = _UNIT_ONLY.fullmatch(expected.lower())
    wanted = _unit(match) if match else None
    if wanted is None:
      raise ValueError(
        f"expected_unit {expected!r} is not a unit; use m, cm, ft, square meters, ..."
      )
  if wanted is None or units[0] is None:
    return quantities[0][0]
  if units[0].power != wanted.power:
    return None
  return sum(value * unit.metres for value, unit in quantities if unit) / wanted.metres


def _descending(quantities: list[tuple[float, Unit | None]]) -> bool:
  """Whether several quantities are one length: "5 ft 3 in", "1 m 20 cm"."""
  lengths = [unit.metres for _, unit in quantities if unit and unit.power == 1]
  ordered = all(a > b for a, b in itertools.pairwise(lengths))
  positive = all(value >= 0 for value, _ in quantities)
  return len(lengths) == len(quantities) and ordered and positive


def _words(text: str) -> str:
  """An option's text for comparison: lower case, without article, punctuation and extra blanks."""
  text = re.sub(r"^(?:a|an|the)\s+", "", text.strip().lower())
  return " ".join(re.sub(r"[^\w\s-]", " ", text).split())
