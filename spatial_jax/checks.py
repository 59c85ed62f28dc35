"""Predicates for `config.check_field`; they are False for values of another type, None and NaN."""

import math
from typing import TypeGuard


def is_whole(value: object, at_least: int, at_most: int | None = None) -> bool:
  """Returns whether the value is an int (no bool) in [at_least, at_most]."""
  return type(value) is int and value >= at_least and (at_most is None or value <= at_most)


def is_finite(value: object) -> TypeGuard[float]:
  """Returns whether the value is an int or a float (no bool) and finite."""
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
