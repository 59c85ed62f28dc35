r"""Quantities of physics in text: a number and its unit, their dimension, and other units of it.

    "36.1 kg"   "3.0 \times 10^{8} m/s"   "4.7 \mathrm{~m}"   "12 N*m"   "25 °C"

`quantity` reads lengths and areas more strictly; this module reads everything that pint knows.
"""

import functools
import re
from typing import Any, NamedTuple

from spatial_jax.reward.plain_text import plain

_MAX_CHARS = 200
_MAX_VALUE = 1e38  # of float32, in which rewards are computed
_NUMBER = re.compile(
  r"(?P<sign>[+-]?)\s*(?P<value>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
  r"(?:\s*(?:x|\*)\s*10\s*\^\s*\(?\{?(?P<power>[+-]?\d+)\}?\)?|[eE](?P<e>[+-]?\d+))?"
)
_LEAD = re.compile(
  r"^(?:(?:the\s+)?(?:final\s+)?(?:answer|result)\s*(?:is|:)?|about|approximately"
  r"|[a-z]\w{0,3}\s*=)\s*",
  re.IGNORECASE,
)
# Spellings that pint reads otherwise or not at all.
_SPELLINGS = (
  (re.compile(r"°\s*C\b|\bdegrees? celsius\b", re.IGNORECASE), "degC"),
  (re.compile(r"°\s*F\b|\bdegrees? fahrenheit\b", re.IGNORECASE), "degF"),
  (re.compile(r"°|\bdeg(?:rees?)?\b", re.IGNORECASE), "degree"),
  (re.compile(r"[Ωω]|\\Omega\b"), "ohm"),
  (re.compile(r"[µμ]|\\mu\s*"), "u"),
  (re.compile(r"Å"), "angstrom"),
  (re.compile(r"[·⋅]"), "*"),
  (re.compile(r"~"), " "),
)
_EXPONENTS = (
  (re.compile(r"(?<=[A-Za-z])\s*\^\s*\{?\(?([+-]?\d+)\)?\}?"), r"**\1"),
  (re.compile(r"(?<=[A-Za-z])([23])(?![\d.])"), r"**\1"),
)


class Measure(NamedTuple):
  """A number and its unit as pint names it; "" for a pure number."""

  value: float
  unit: str


@functools.cache
def _registry() -> Any:
  import pint

  return pint.UnitRegistry(autoconvert_offset_to_baseunit=True, cache_folder=None)


def read_measure(text: str) -> Measure | None:
  """Reads one number and its unit; None if the text is anything else.

  Args:
    text: an answer, of any content; longer than 200 characters gives None.
  """
  if len(text) > _MAX_CHARS:
    return None
  text = plain(_spelled(text))
  text = _LEAD.sub("", text.strip()).strip()
  match = _NUMBER.match(text)
  if match is None:
    return None
  exponent = match["power"] or match["e"] or "0"
  try:
    value = float(f"{match['sign']}{match['value'].replace(',', '')}e{exponent}")
  except ValueError:
    return None
  unit = text[match.end() :].strip(" .*")
  if not abs(value) < _MAX_VALUE or (unit and _parsed(unit) is None):
    return None
  return Measure(value, unit)


def dimension(unit: str) -> str | None:
  """Returns the dimension of a unit, "[length] / [time]"; "" for none; None if it is unknown."""
  if not unit:
    return ""
  parsed = _parsed(_spelled(unit))
  if parsed is None:
    return None
  return "" if parsed.dimensionless else str(parsed.dimensionality)


def value_in(measure: Measure, unit: str) -> float | None:
  """Returns the value in another unit; a pure number is taken to be in it.

  None if the units have other dimensions, one of them is unknown, or the value is beyond float32.
  """
  if not measure.unit:
    return measure.value
  given, wanted = _parsed(measure.unit), _parsed(_spelled(unit)) if unit else None
  if given is None or wanted is None or given.dimensionality != wanted.dimensionality:
    return None
  try:
    converted = float(_registry().Quantity(measure.value, given).to(wanted).magnitude)
  except Exception:  # pint raises several types: "30 degree degC", m^999
    return None
  return converted if abs(converted) < _MAX_VALUE else None


def _spelled(text: str) -> str:
  for pattern, form in _SPELLINGS:
    text = pattern.sub(form, text)
  return text


@functools.lru_cache(maxsize=4096)
def _parsed(unit: str) -> Any:
  """The unit of pint, None if it does not know it."""
  for pattern, form in _EXPONENTS:
    unit = pattern.sub(form, unit)
  if not re.fullmatch(r"[A-Za-z][A-Za-z0-9 */()+_-]{0,40}", unit):
    return None
  words = re.sub(r"(?<=[A-Za-z0-9])\s+(?=[A-Za-z])", "*", unit.strip())
  try:
    return _registry().Unit(words)
  except Exception:
    return None
