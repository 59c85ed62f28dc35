"""Tasks that cannot be used and were replaced by others: counted, and named once."""

from collections.abc import Sequence


class ReplacedTasks:
  """Counts the tasks of a run that were replaced; prints why, each reason once."""

  def __init__(self):
    self._named: set[str] = set()

  def count(self, reasons: Sequence[str]) -> int:
    """Returns the number of replaced tasks.

    Args:
      reasons: one line for each, from `PromptBatch.replaced`.
    """
    for reason in reasons:
      if reason not in self._named:
        print(f"warning: replaced by another task: {reason}")
        self._named.add(reason)
    return len(reasons)
