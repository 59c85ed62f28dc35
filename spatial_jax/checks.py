"""Predicates for `config.check_field`, False for values of another type, None and NaN; and the
comparison of named parameters with what is expected.
"""

import re
from collections.abc import Mapping
from typing import TypeGuard

MAX_SEED = 2**32 - 1
# Other numbers become 0 or infinity in float32, the dtype of every value on a device.
FLOAT32_SMALLEST, FLOAT32_LARGEST = 1.2e-38, 3.4e38


def is_whole(value: object, at_least: int, at_most: int | None = None) -> bool:
  """Returns whether the value is an int (no bool) in [at_least, at_most]."""
  return type(value) is int and value >= at_least and (at_most is None or value <= at_most)


def is_finite(value: object) -> TypeGuard[float]:
  """Returns whether the value is an int or a float (no bool) that float32 can hold."""
  if not isinstance(value, int | float) or isinstance(value, bool):
    return False
  return value == 0 or FLOAT32_SMALLEST <= abs(value) <= FLOAT32_LARGEST


def is_ascending(values: object, at_least: int) -> bool:
  """Returns whether the value is a tuple of ascending ints, one or more, from `at_least` on."""
  if not isinstance(values, tuple) or not all(is_whole(value, at_least) for value in values):
    return False
  return len(values) > 0 and list(values) == sorted(set(values))


def is_regex(value: object) -> bool:
  """Returns whether the value is the text of a regular expression."""
  try:
    return isinstance(value, str) and bool(re.compile(value))
  except re.error:
    return False


def mismatches(
  expected: Mapping[str, object], found: Mapping[str, object], place: str
) -> list[str]:
  """One line for each name that is missing, unknown or of another form (shape, dtype).

  `place` is where the found ones are: "q: expected [2, 3], file has [3, 2]".
  """
  problems = [f"{name} is unknown to this model" for name in found if name not in expected]
  problems += [f"{name} is missing" for name in expected if name not in found]
  problems += [
    f"{name}: expected {form}, {place} has {found[name]}"
    for name, form in expected.items()
    if name in found and found[name] != form
  ]
  return problems
