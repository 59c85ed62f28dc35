"""Builds frozen dataclasses from a ConfigDict and checks every key, type and value."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from spatial_jax.checks import FLOAT32_LARGEST, FLOAT32_SMALLEST, is_finite, is_whole
from spatial_jax.errors import UserError

T = TypeVar("T")


class ConfigError(UserError):
  """The config cannot be used; the message names every wrong key and the fix."""


class FieldError(ConfigError):
  """A field of one dataclass has a value outside its range; the message starts with its name.

  `build` puts the name of the mapping before it, so that the message names the full key.
  """


def check_field(config: object, name: str, valid: bool, rule: str) -> None:
  """Checks one field of a dataclass in its `__post_init__`.

  Args:
    config: the dataclass.
    name: the field.
    valid: whether its value can be used.
    rule: the allowed range, after "must": "be at least 1".

  Raises:
    FieldError: if not `valid`: "width_px is 0 and must be at least 1".
  """
  if not valid:
    raise FieldError(f"{name} is {vars(config)[name]!r} and must {rule}")


def check_whole(config: object, *names: str, at_least: int, at_most: int | None = None) -> None:
  """Checks that fields are whole numbers in [at_least, at_most]; raises FieldError."""
  rule = f"be a whole number, at least {at_least}"
  rule += "" if at_most is None else f" and at most {at_most}"
  for name in names:
    check_field(config, name, is_whole(vars(config)[name], at_least, at_most), rule)


def check_number(
  config: object,
  *names: str,
  above: float = -math.inf,
  at_least: float = -math.inf,
  below: float = math.inf,
  at_most: float = math.inf,
) -> None:
  """Checks that fields are finite numbers within the bounds; raises FieldError."""
  bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
  rules = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
  rules += ["finite"] if min(below, at_most) == math.inf else []
  for name in names:
    value = vars(config)[name]
    valid = is_finite(value) and above < value < below and at_least <= value <= at_most
    check_field(config, name, valid, f"be {' and '.join(rules)}")


def check_choice(config: object, *names: str) -> None:
  """Checks that fields have a value of their annotation, a Literal; raises FieldError."""
  hints = typing.get_type_hints(type(config))
  for name in names:
    choices = typing.get_args(hints[name])
    check_field(config, name, vars(config)[name] in choices, f"be one of {', '.join(choices)}")


def build(cls: type[T], config: Mapping[str, Any], name: str = "config") -> T:
  """Builds the dataclass `cls` from a mapping whose keys are exactly its fields.

  Nested dataclasses are built from nested mappings, lists become tuples, integers become floats
  if the field is a float. NaN and numbers beyond float32 are refused.

  Args:
    cls: a dataclass without defaults.
    config: ConfigDict or dict.
    name: how error messages call this mapping ("config.advantage").

  Raises:
    ConfigError: listing all missing, unknown and mistyped keys at once.
  """
  problems: list[str] = []
  value = _build(cls, config, name, problems)
  if problems:
    raise ConfigError("; ".join(problems))
  return value


def suggestion(key: str, keys: Iterable[str]) -> str:
  """The key that `key` may be a misspelling of, else all keys."""
  keys = list(keys)
  close = difflib.get_close_matches(key, keys, 1)
  return f"did you mean {close[0]}?" if close else f"keys: {', '.join(keys)}"


def _build(cls: Any, config: Mapping[str, Any], name: str, problems: list[str]) -> Any:
  hints = typing.get_type_hints(cls)
  fields = [field.name for field in dataclasses.fields(cls)]
  before = len(problems)
  problems += [f"{name}.{key} is missing" for key in fields if key not in config]
  problems += [
    f"{name}.{key} is unknown ({suggestion(key, fields)})" for key in config if key not in fields
  ]
  values = {
    key: _convert(hints[key], config[key], f"{name}.{key}", problems)
    for key in fields
    if key in config
  }
  if len(problems) > before:
    return None
  try:
    return cls(**values)
  except FieldError as error:
    problems.append(f"{name}.{error}")
    return None


def _convert(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
  """`value` as an instance of the annotation `hint`, or a line in `problems`."""
  if dataclasses.is_dataclass(hint):
    if isinstance(value, Mapping) or hasattr(value, "items"):
      return _build(hint, value, name, problems)
    problems.append(f"{name} must be a mapping, got {value!r}")
    return None
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None and type(None) in arguments:
      return None
    return _convert(next(a for a in arguments if a is not type(None)), value, name, problems)
  if origin is typing.Literal:
    if not any(value == a and type(value) is type(a) for a in arguments):  # True is not 1
      problems.append(f"{name} must be one of {', '.join(map(str, arguments))}, got {value!r}")
    return value
  if origin is tuple:
    if not isinstance(value, list | tuple):
      problems.append(f"{name} must be a list, got {value!r}")
      return None
    inner = arguments[:-1] if arguments[-1] is Ellipsis else arguments
    if arguments[-1] is not Ellipsis and len(value) != len(inner):
      problems.append(f"{name} must have {len(inner)} items, got {len(value)}")
      return None
    kinds = inner * len(value) if arguments[-1] is Ellipsis else inner
    return tuple(
      _convert(k, v, f"{name}[{i}]", problems)
      for i, (k, v) in enumerate(zip(kinds, value, strict=True))
    )
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value) if abs(value) < 2**1023 else math.inf
  if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
    problems.append(f"{name} must be {hint.__name__}, got {value!r}")
  elif isinstance(value, float) and not is_finite(value):
    range_ = f"{FLOAT32_SMALLEST:g} to {FLOAT32_LARGEST:g}"
    problems.append(f"{name} must be a finite number of float32 (0, {range_}), got {value!r}")
  return value
