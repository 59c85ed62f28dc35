"""Predicates for `config.check_field`; they are False for values of another type, None and NaN."""

import math
from typing import TypeGuard


def is_whole(value: object, at_least: int, at_most: int | None = None) -> bool:
  """Returns whether the value is an int (no bool) in [at_least, at_most]."""
  return type(value) is int and value >= at_least and (at_most is None or value <= at_most)


def is_finite(value: object) -> TypeGuard[float]:
  """Returns whether the value is an int or a float (no bool) and finite."""
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_ascending(values: object, at_least: int) -> bool:
  """Returns whether the value is a tuple of ascending ints, one or more, from `at_least` on."""
  if not isinstance(values, tuple) or not all(is_whole(value, at_least) for value in values):
    return False
  return len(values) > 0 and list(values) == sorted(set(values))
