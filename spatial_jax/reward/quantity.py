"""Text -> one number in the unit that a question asks for, and that unit of the question.

Grammar and spellings are described in `parse`.
"""

import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from spatial_jax.reward.plain_text import plain, plain_signs

MAX_CHARS = 100  # a longer answer is prose; bounds the work of the patterns below

COUNT = "count"  # the unit of "how many": the answer has no unit of length or area

# "zero" is 0, "one" is 1, ...
NUMBER_WORDS = [
  "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
  "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
  "nineteen", "twenty",
]  # fmt: skip
# Words after a count that change its value or leave it open: such a count is not read.
_NO_NOUNS = {
  *NUMBER_WORDS, "thirty", "forty", "fifty", "hundred", "thousand", "million", "dozen", "dozens",
  "pair", "pairs", "half", "halves", "quarter", "quarters", "percent", "or", "to", "and", "than",
  "more", "less", "fewer", "plus", "minus", "times", "by", "point", "not", "at", "least", "most",
  "if", "but", "maybe", "perhaps", "per", "each", "minimum", "maximum", "squared", "cubed", "kg",
  "yards", "degrees", "seconds", "minutes", "hours",
}  # fmt: skip

_METRES = {"km": 1e3, "m": 1.0, "cm": 1e-2, "mm": 1e-3, "ft": 0.3048, "in": 0.0254}
_LENGTH = (
  r"(?:(?P<km>km|kilomet(?:er|re)s?)|(?P<cm>cm|centimet(?:er|re)s?)|(?P<mm>mm|millimet(?:er|re)s?)"
  r"|(?P<m>m|met(?:er|re)s?)|(?P<ft>ft|foot|feet)|(?P<in>in|inch(?:es)?))"
)
_UNIT = (
  rf"(?:(?P<square>square|sq\.?)\s*)?{_LENGTH}(?P<power>\s?\^2|2|[\s-]squared)?"
  r"(?![a-z0-9^])(?!\s*(?:/|per\b|cubed\b))\.?"
)
_FEET_INCHES = r"(?P<inch_mark>''|\")|(?P<foot_mark>')"
_NUMBER = (
  r"(?P<sign>[+-]?)(?:(?:(?P<whole>\d+)\s+)?(?P<numerator>\d+)/(?P<denominator>\d+)"
  r"|(?P<decimal>[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)"
  r"(?:e(?P<e>[+-]?\d+)|\s*x\s*10\^(?P<ten>[+-]?\d+))?"
  rf"|(?P<word>{'|'.join(sorted(NUMBER_WORDS, key=len, reverse=True))})\b)"
)
_QUANTITY = re.compile(rf"{_NUMBER}\s*(?:{_UNIT}|{_FEET_INCHES})?\s*", re.ASCII)
_LEAD = re.compile(
  r"(?:(?:(?:the|my|final|correct|answer|is|it's|it|there|are|about|approximately|approx|around"
  r"|roughly|exactly)\b\.?|[:=~])\s*)*"
)
# Spellings of units that are neither length nor area.
_SPELLINGS = (
  ("degrees", "degree", "deg", "\u00b0", "^\\circ"),
  ("seconds", "second", "sec", "s"),
  ("minutes", "minute", "mins", "min"),
  ("kilograms", "kilogram", "kg"),
  ("percent", "%"),
)
_REPEATED = re.compile(r"([^()]+)\(([^()]+)\)")
_UNIT_ONLY = re.compile(_UNIT, re.ASCII)
_ASKED = (
  re.compile(rf"\b(?:in|how many)\s+(?P<unit>{_UNIT})", re.ASCII),
  re.compile(rf"[(\[]\s*(?P<unit>{_UNIT})\s*[)\]]", re.ASCII),
)
_COUNTED = re.compile(
  r"\bhow many\s+(?P<noun>[^?.,;:!\n]{1,80}?)\s*"
  r"(?:\s(?:are|is|were|was|do|does|did|can|could|will|would|have|has|had|there|in|on|at|near"
  r"|inside|within|appear|appears|you|we|visible|exist)(?![\w(])|[?.,;:!\n]|$)"
)


class Unit(NamedTuple):
  """A length (power 1) or an area (power 2): its size in metres to the `power`."""

  metres: float
  power: int


def parse_number(
  text: str, expected_unit: str | None = None, noun: str | None = None
) -> float | None:
  """Reads the one number of a phrase.

  Args:
    text: at most 100 characters.
    expected_unit: the unit that the question asks for ("m", "centimeters", "m²", ...). Another unit
      of its dimension is converted, one of another dimension fails. `COUNT` allows no unit. None
      leaves the number as it is stated.
    noun: the noun that may follow a count ("chair(s)"); None allows any noun.

  Returns:
    A float that is finite in float32; None if the phrase has no single reading.

  Raises:
    ValueError: if `expected_unit` is not a unit of length or area.
  """
  wanted = None if expected_unit is None or expected_unit == COUNT else _unit_of(expected_unit)
  text = text.strip()
  if len(text) > MAX_CHARS:
    return None
  text = plain(text).lower()
  value = _number(text, expected_unit == COUNT, wanted, noun)
  if value is None and (match := _REPEATED.fullmatch(text)):  # "4 (four)", "2 m (200 cm)"
    first, second = (_number(part, expected_unit == COUNT, wanted, noun) for part in match.groups())
    agree = first is not None and second is not None and math.isclose(first, second, rel_tol=1e-6)
    value = first if agree else None
  if value is None or not abs(value) <= float(np.finfo(np.float32).max):
    return None
  return value


def parse_other_unit(text: str, unit: str) -> float | None:
  """Reads a number with a unit that is neither length nor area: "90", "90 degrees", "2.5kg".

  The unit may follow the number, in any case; some units have several spellings ("deg", "\u00b0").
  Units are not converted: a number with another unit is not read.

  Args:
    text: the answer.
    unit: any text.

  Returns:
    As `parse_number`.
  """
  value = parse_number(text, COUNT, "")
  if value is not None or len(text.strip()) > MAX_CHARS:
    return value
  text, unit = plain(text).lower(), _plain_unit(unit)
  spellings = next((group for group in _SPELLINGS if unit in group), (unit,))
  rest = {text.removesuffix(name) for name in spellings if name and text.endswith(name)}
  values = {parse_number(one, COUNT, "") for one in rest} - {None}
  return values.pop() if len(values) == 1 else None


def _plain_unit(unit: str) -> str:
  return plain_signs(unit).strip().lower().rstrip(".")


def is_metric(unit: str) -> bool:
  """Whether `parse_number` can expect this unit: a length, an area, or `COUNT`."""
  return unit == COUNT or _UNIT_ONLY.fullmatch(plain_signs(unit).strip().lower()) is not None


def check_unit(unit: str | None) -> None:
  """Raises ValueError if `parse_number` cannot expect this unit."""
  if unit is not None and unit != COUNT:
    _unit_of(unit)


def has_lead(text: str) -> bool:
  """Whether words stand before the number of a phrase: "about 3 m", "the answer is 4"."""
  match = _LEAD.match(plain(text[:MAX_CHARS]).lower())
  return match is not None and match.end() > 0


def asked_unit(question: str) -> str | None:
  """Returns the unit that a question asks for.

  "... (in meters)?" -> "meters", "... in m²?" -> "m^2", "How many chairs ..." -> `COUNT`.
  """
  question = plain_signs(question).lower()
  for pattern in _ASKED:
    if match := pattern.search(question):
      return match["unit"].removesuffix(".")
  return COUNT if re.search(r"\bhow many\b", question) else None


def counted_noun(question: str) -> str | None:
  """Returns the noun of "how many": "How many chair(s) are in this room?" -> "chair(s)"."""
  match = _COUNTED.search(plain_signs(question).lower())
  return match["noun"] if match else None


def _number(text: str, count: bool, wanted: Unit | None, noun: str | None) -> float | None:
  """The number of a plain phrase: in the wanted unit, or a count, or as it is stated."""
  if lead := _LEAD.match(text):
    text = plain(text[lead.end() :])
  position = 0
  quantities: list[tuple[float, Unit | None]] = []
  while position < len(text):
    match = _QUANTITY.match(text, position)
    if match is None:
      if count and len(quantities) == 1 and _is_noun(text[position:], noun):
        break
      return None
    if float(match["denominator"] or 1) == 0:
      return None
    quantities.append((_value(match), _unit(match)))
    position = match.end()
  if not quantities or (len(quantities) > 1 and not _descending(quantities)):
    return None
  value, unit = quantities[0]
  if count:
    return value if unit is None else None
  if unit is None or (wanted is None and len(quantities) == 1):
    return value
  wanted = wanted or unit
  if unit.power != wanted.power:
    return None
  return sum(value * unit.metres for value, unit in quantities if unit) / wanted.metres


def _is_noun(text: str, noun: str | None) -> bool:
  """Whether the text after a count is the counted noun, in singular or plural."""
  words = text.replace("(s)", "").replace("(es)", "").split()
  if noun is None:
    plain_words = all(re.fullmatch(r"[^\W\d_]+(?:-[^\W\d_]+)*", word) for word in words)
    return 0 < len(words) <= 3 and plain_words and not _NO_NOUNS.intersection(words)
  counted = noun.replace("(s)", "").replace("(es)", "").split()
  if not words or not counted or words[:-1] != counted[len(counted) - len(words) : -1]:
    return False
  return bool(_singulars(words[-1]) & _singulars(counted[-1]))


def _singulars(word: str) -> set[str]:
  """The word and every singular that it can be the plural of."""
  endings = {"s": ("",), "es": ("",), "ies": ("y",), "ves": ("f", "fe")}
  return {word} | {
    word.removesuffix(ending) + singular
    for ending, singulars in endings.items()
    for singular in singulars
    if word.endswith(ending) and len(word) > len(ending) + 1
  }


def _value(match: re.Match[str]) -> float:
  """The number of one quantity; inf if it overflows."""
  if match["word"]:
    value = float(NUMBER_WORDS.index(match["word"]))
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


def _unit_of(name: str) -> Unit:
  """The unit of a name. Raises ValueError if it is not a length or an area."""
  match = _UNIT_ONLY.fullmatch(plain_signs(name).strip().lower())
  unit = _unit(match) if match else None
  if unit is None:
    raise ValueError(f"expected_unit {name!r} is not a unit; use m, cm, ft, square meters, ...")
  return unit


def _descending(quantities: list[tuple[float, Unit | None]]) -> bool:
  """Whether several quantities are one length: "5 ft 3 in", "1 m 20 cm"."""
  lengths = [unit.metres for _, unit in quantities if unit and unit.power == 1]
  ordered = all(a > b for a, b in itertools.pairwise(lengths))
  positive = all(value >= 0 for value, _ in quantities)
  return len(lengths) == len(quantities) and ordered and positive
