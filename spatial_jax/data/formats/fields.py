"""The fields of one row of a foreign data set, read with checks; the unread ones go to `extra`."""

import datetime
import math
from collections.abc import Mapping
from typing import Any

from spatial_jax.data.rows import RowProblem

_MAX_DEPTH = 20  # of lists and objects in `extra`
_MAX_SHOWN = 60  # characters of a value in a message


class Fields:
  """A foreign row. A field that is null, an empty text or an empty list counts as missing."""

  def __init__(self, row: Any, file: str):
    """Keeps the row.

    Args:
      row: parsed JSON, or a row of a table as Python values.
      file: name of the file of the row, for data sets whose files differ.

    Raises:
      RowProblem: if `row` is not an object with named fields.
    """
    if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
      raise RowProblem("row", f"must be an object, got {shown(row)}")
    self.file = file
    self._row = {name: value for name, value in row.items() if not _is_missing(value)}
    self._read: set[str] = set()

  def value(self, *names: str) -> Any:
    """The first of the named fields that is there; None if none is."""
    for name in names:
      if name in self._row:
        self._read.add(name)
        return self._row[name]
    return None

  def required(self, *names: str) -> Any:
    """As `value`, but raises RowProblem if none is there."""
    found = self.value(*names)
    if found is None:
      given = ", ".join(self._row) or "no field"
      raise RowProblem(names[0], f"is missing; the row has {given}")
    return found

  def text(self, *names: str) -> str:
    """A required text, without white space around it."""
    self.required(*names)
    return self.text_or_none(*names) or ""

  def text_or_none(self, *names: str) -> str | None:
    """A text, without white space around it; None if none of the fields is there."""
    found = self.value(*names)
    name = next((name for name in names if name in self._row), names[0])
    return None if found is None else as_text(found, name)

  def label(self, *names: str) -> str | None:
    """A short text, such as a question type; whole numbers and lists of texts become texts."""
    found = self.value(*names)
    if isinstance(found, int) and not isinstance(found, bool):
      return str(found)
    if isinstance(found, list):
      return ", ".join(as_text(item, names[0]) for item in found)
    return None if found is None else as_text(found, names[0])

  def scalar(self, *names: str) -> str | int | float:
    """A required text or number."""
    found = self.required(*names)
    if isinstance(found, int | float) and not isinstance(found, bool):
      return found
    return as_text(found, names[0])

  def extra(self, *kept: str) -> dict[str, Any]:
    """The fields that were not read, and those of `kept`, as JSON values."""
    names = [name for name in self._row if name not in self._read or name in kept]
    return {name: _as_json(self._row[name], 0) for name in names}


def as_text(value: Any, field: str) -> str:
  """A text that is not blank, without white space around it.

  Raises:
    RowProblem: naming `field`, for any other value.
  """
  if not isinstance(value, str):
    raise RowProblem(field, f"must be a text, got {shown(value)}")
  if not value.strip():
    raise RowProblem(field, "is blank")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise RowProblem(field, f"has characters that are not Unicode ({shown(value)})") from error
  return value.strip()


def as_list(value: Any, field: str) -> list[Any]:
  """A list; raises RowProblem for any other value."""
  if not isinstance(value, list):
    raise RowProblem(field, f"must be a list, got {shown(value)}")
  return value


def shown(value: Any) -> str:
  """The beginning of a value, for a message."""
  text = repr(value[:_MAX_SHOWN] if isinstance(value, str | bytes | list) else value)
  return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _is_missing(value: Any) -> bool:
  if isinstance(value, str | list | dict):
    return not value if not isinstance(value, str) else not value.strip()
  return value is None or (isinstance(value, float) and math.isnan(value))


def _as_json(value: Any, depth: int) -> Any:
  """The value in JSON; what JSON cannot express becomes a text or null."""
  if isinstance(value, str):
    return value.encode("utf-8", "replace").decode("utf-8")
  if isinstance(value, bytes):
    return f"{len(value)} bytes"
  if isinstance(value, bool | int) or value is None:
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if depth >= _MAX_DEPTH:
    return "too deep"
  if isinstance(value, list | tuple):
    return [_as_json(item, depth + 1) for item in value]
  if isinstance(value, Mapping):
    return {str(_as_json(str(k), 0)): _as_json(item, depth + 1) for k, item in value.items()}
  return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)
