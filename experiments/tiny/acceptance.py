"""Checks that a run of configs/tiny.py learned: python -m experiments.tiny.acceptance runs/tiny

Reads results.json of the work directory, prints one line per requirement, and exits with 1 if one
is not met.
"""

import dataclasses
import pathlib
import sys

from spatial_jax.errors import DataError, UserError
from spatial_jax.evaluate.results import Paired, ResultTable, read_results


@dataclasses.dataclass(frozen=True)
class Requirement:
  """A lower bound on one paired difference.

  Attributes:
    label: of the difference in the result table.
    mean: lower bound of the mean, None without one.
    low: the lower end of the 95 % interval must be above it.
  """

  label: str
  mean: float | None
  low: float

  def is_met(self, paired: Paired) -> bool:
    """Whether the difference fulfils both bounds."""
    return paired.low > self.low and (self.mean is None or paired.mean >= self.mean)


REQUIREMENTS = (
  Requirement("greedy score, end - start", 0.08, 0.0),
  Requirement("greedy score, end - median answer", None, 0.0),
  Requirement("greedy score, end - end on other images", None, 0.0),
)


def check(table: ResultTable) -> list[tuple[bool, str]]:
  """(met, line) for each requirement.

  Raises:
    DataError: if the table does not have a required difference.
  """
  by_label = {paired.label: paired for paired in table.paired}
  lines = []
  for requirement in REQUIREMENTS:
    paired = by_label.get(requirement.label)
    if paired is None:
      raise DataError(f"the result table has no difference {requirement.label!r}")
    met = requirement.is_met(paired)
    bound = f"interval above {requirement.low:g}"
    if requirement.mean is not None:
      bound = f"at least {requirement.mean:g}, {bound}"
    value = f"{paired.mean:+.3f} [{paired.low:+.3f}, {paired.high:+.3f}]"
    lines.append((met, f"{'met' if met else 'NOT MET'}: {requirement.label} {value} ({bound})"))
  return lines


def main(workdir: str) -> int:
  """Prints the requirements; 0 if all are met, 1 if not, 2 without a result table."""
  try:
    table = read_results(pathlib.Path(workdir))
    if table is None:
      raise DataError(f"{workdir} has no results.json; run ./launch/local.sh first")
    lines = check(table)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  for _, line in lines:
    print(line)
  return 0 if all(met for met, _ in lines) else 1


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit("usage: python -m experiments.tiny.acceptance WORKDIR")
  sys.exit(main(sys.argv[1]))
