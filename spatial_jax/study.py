"""Tables over several runs: the stages of one config, or its conditions.

DIR/1_sft, DIR/2_reject, DIR/3_grpo     ─► DIR/stages.json, table on the console
DIR/base, DIR/sft, DIR/accuracy, ...    ─► DIR/conditions.json, table on the console
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from spatial_jax.errors import DataError
from spatial_jax.evaluate.benchmarks.phyx import grouped_scores
from spatial_jax.evaluate.console import make_console
from spatial_jax.evaluate.results import END_GREEDY, FILE, PREDICTIONS, START_GREEDY
from spatial_jax.workdir import final_folder, stage_folders, write_text

# Statistics of the answers that the tables show, beside the score.
BEHAVIOUR = ("turns", "boxes", "lines", "reflections", "drawing_share", "parsed_share", "tokens")
Line = dict[str, float]


def stage_folder(workdir: pathlib.Path, stages: Sequence[str], number: int) -> pathlib.Path:
  """The folder of a stage; a single stage has the work directory itself."""
  return workdir if len(stages) == 1 else workdir / f"{number + 1}_{stages[number]}"


def start_of(init: str, workdir: pathlib.Path) -> str:
  """The policy that a condition starts from; "@NAME" is the end of another condition."""
  return str(final_folder(workdir / init[1:])) if init.startswith("@") else init


def show_stages(workdir: pathlib.Path, stages: Sequence[str]) -> None:
  """Prints the table of the stages and writes it to stages.json."""
  folders = [stage_folder(workdir, stages, number) for number in range(len(stages))]
  lines = {"start": line_of(folders[0], START_GREEDY)}
  for name, folder in zip(stages, folders, strict=True):
    lines[f"after {name}"] = line_of(folder, END_GREEDY)
  _show(lines, workdir / "stages.json", make_console())


def show_conditions(workdir: pathlib.Path, names: Sequence[str]) -> None:
  """Prints the table of the conditions and writes it to conditions.json."""
  folders = [final_folder(workdir / name) for name in names]
  lines = {"base": line_of(stage_folders(workdir / names[0])[0], START_GREEDY)}
  lines |= {name: line_of(folder, END_GREEDY) for name, folder in zip(names, folders, strict=True)}
  _show(lines, workdir / "conditions.json", make_console())


def line_of(folder: pathlib.Path, column: str) -> Line:
  """Scores and behaviour of one policy of an evaluation; {} without an evaluation.

  Raises:
    DataError: if results.json or predictions.jsonl cannot be read.
  """
  path = folder / FILE
  if not path.exists():
    return {}
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
    line = {"score": record["overall"][column]["mean"]}
    line |= {
      f"score: {row['question_type']}": row["cells"][column]["mean"] for row in record["rows"]
    }
    behaviour = record.get("behaviour", {}).get(column, {})
    line |= {name: behaviour[name] for name in BEHAVIOUR if name in behaviour}
    line |= record.get("pass_at", {}) if column == END_GREEDY else {}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise DataError(f"{path} is not an evaluation ({error}); delete it") from error
  return line | grouped_scores(folder / PREDICTIONS, column)


def _show(lines: Mapping[str, Line], path: pathlib.Path, console: Console) -> None:
  write_text(path, json.dumps(lines, indent=2) + "\n")
  names = dict.fromkeys(name for line in lines.values() for name in line)
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column("greedy answers to held-out questions", no_wrap=True)
  for name in lines:
    table.add_column(name.replace("_", " "), justify="right")
  for name in names:
    values = (f"{line[name]:.3f}" if name in line else "" for line in lines.values())
    table.add_row(name.replace("_", " "), *values)
  console.print(table)
  console.print(f"wrote {path}", markup=False)
