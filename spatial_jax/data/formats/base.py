"""What a foreign format is: its name, its columns, and the conversion of one row."""

import abc
from collections.abc import Collection
from typing import Any, ClassVar

from spatial_jax.data.formats.fields import Fields


class Format(abc.ABC):
  """A format of one published data set or training framework.

      row ──Fields──► convert ──► row of docs/data.md

  A converted row may differ from docs/data.md in two ways that the writer of files removes:
  an image may be bytes, the contents of its file, and the points of marks under `thousandths`
  are in thousandths of the width and height of the image.
  """

  name: ClassVar[str]  # --format
  # Column sets, one for each form in which the data is published. "a|b": one of the two.
  needs: ClassVar[tuple[tuple[str, ...], ...]]
  held_out: ClassVar[bool] = False  # a benchmark alone: no row may be trained on
  general: ClassVar[bool] = False  # of a training framework, for many data sets

  @abc.abstractmethod
  def convert(self, row: Fields) -> dict[str, Any]:
    """One row of docs/data.md; fields that are None or empty are left out later.

    Raises:
      RowProblem: for the first field that cannot be used.
    """

  def fits(self, columns: Collection[str]) -> int:
    """The number of columns of the largest set of `needs` that `columns` has; 0 if it has none."""
    sizes = [
      len(needed)
      for needed in self.needs
      if all(any(name in columns for name in one.split("|")) for one in needed)
    ]
    return max(sizes, default=0)

  def needed(self) -> str:
    """The column sets, for a message."""
    sets = (", ".join(one.replace("|", " or ") for one in needed) for needed in self.needs)
    return "; or ".join(sets)
