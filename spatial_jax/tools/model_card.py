"""The README.md of an exported policy: what it was trained from, how, and with what result."""

from collections.abc import Mapping, Sequence
from typing import Any

from spatial_jax.evaluate.results import ResultTable, headline

_TEMPLATE = """---
library_name: transformers
pipeline_tag: image-text-to-text
---

# Policy trained with spatial_jax

A {family} model. It loads in transformers (`AutoModelForImageTextToText`). The license of the base
policy applies.

| | |
| --- | --- |
{facts}

## Held-out evaluation

{results}
"""


def model_card(
  config: Mapping[str, Any],
  step: int,
  family: str,
  parameters: int,
  results: ResultTable | None,
  command: str,
) -> str:
  """Writes the model card of a run as Markdown.

  `config` is the resolved config of the run, `step` the number of updates of the checkpoint,
  `parameters` a number, `results` the evaluation of this checkpoint, if there is one.
  """
  stages = ", ".join(config.get("stages", ())) or "unknown"
  facts = {
    "base policy": config.get("init", "unknown"),
    "stages": stages,
    "steps": step,
    "seed": config.get("seed", "unknown"),
    "parameters": f"{parameters:,}",
    "config": "every key is in `training_config.json`",
    "written by": f"`{command}`",
  }
  return _TEMPLATE.format(
    family=family,
    facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
    results=_results(results) if results else "This checkpoint was not evaluated.",
  )


def _results(results: ResultTable) -> str:
  """The headline and the mean score of each column."""
  rows: Sequence[str] = [
    f"| {column.label} | {cell.mean:.3f} | {cell.low:.3f} to {cell.high:.3f} |"
    for column in results.columns
    if (cell := results.overall.get(column.key))
  ]
  return "\n".join(
    [
      headline(results) or "Mean score on held-out questions.",
      "",
      "| | score | 95 % interval |",
      "| --- | --- | --- |",
      *rows,
      *(["", *results.notes] if results.notes else []),
    ]
  )
