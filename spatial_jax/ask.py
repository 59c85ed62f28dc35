"""Entry point: python -m spatial_jax.ask --checkpoint=A --image=a.jpg "How far is the chair?"

Puts a question about pictures to a policy (a Hugging Face folder or the work directory of a run),
prints what it says while it says it, and leaves the pictures that it drew and report.html, the
conversation on one page, in the work directory.

A run knows which words and limits its policy was taught with. For a Hugging Face folder they are
those of --config, by default configs/ask.py: ViLaSR's conversation, for policies of full size. The
embedded policy wants --config=configs/tiny.py.
"""

import json
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from spatial_jax.cli import CHECKPOINT_HELP, keep_compilations, launch
from spatial_jax.config import parse_flags
from spatial_jax.data.records import read_picture
from spatial_jax.errors import UserError
from spatial_jax.evaluate.ask import Asking, ask, overlay, settings_of
from spatial_jax.reward.format import final_answer
from spatial_jax.rollout.likeliest import mean_logp
from spatial_jax.stages.load import recorded_settings
from spatial_jax.types import Task

_DEFAULT = pathlib.Path(__file__).parents[1] / "configs" / "ask.py"

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "words and limits (default: those of the run, else configs/ask.py)"
)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP, required=True)
IMAGE = flags.DEFINE_multi_string("image", [], "picture; several in the order they are shown")
OPTION = flags.DEFINE_multi_string("option", [], "answer to choose from; several become A, B, ...")
WORDS = flags.DEFINE_bool("words", False, "ask for an answer in words, not for a number")
BEGIN = flags.DEFINE_string("begin", "", "words that the response is made to begin with")
SAMPLES = flags.DEFINE_integer("samples", 1, "answers to sample", lower_bound=1)
BEST = flags.DEFINE_integer("best", None, "show the N likeliest of --samples (default: all)")
TEMPERATURE = flags.DEFINE_float(
  "temperature", None, "of sampling; 0 is greedy (default: 0, or 1 where --samples is over 1)"
)
WORKDIR = flags.DEFINE_string("workdir", "runs/ask", "folder of drawn pictures and report.html")


def read_flags(argv: list[str]) -> list[str]:
  """Flags, with the default --config read only where there is no other."""
  given = any(argument.partition("=")[0] in ("--config", "-config") for argument in argv)
  return parse_flags(argv if given else [argv[0], f"--config={_DEFAULT}", *argv[1:]])


def main(arguments: Sequence[str]) -> None:
  """Asks."""
  if len(arguments) != 1 or not arguments[0].strip():
    raise UserError('give one question, in quotes: "How far is the chair from the table?"')
  keep_compilations()
  show(arguments[0])


def show(question: str) -> None:
  """Asks and prints."""
  samples, temperature = SAMPLES.value, TEMPERATURE.value
  how = Asking(
    begin=BEGIN.value,
    samples=samples,
    best=samples if BEST.value is None else BEST.value,
    temperature=float(samples > 1) if temperature is None else temperature,
  )
  workdir = pathlib.Path(WORKDIR.value)
  command = shlex.join(["python", "-m", "spatial_jax.ask", *sys.argv[1:]])
  settings, task = _settings(), _task(question)
  with Console(stderr=True).status(
    f"reading {CHECKPOINT.value}, compiling for the question"
  ) as bar:

    def say(words: str) -> None:
      bar.stop()
      print(words, end="", flush=True)

    kept = ask(settings, CHECKPOINT.value, task, how, workdir, command, say)
  print("\n")
  for trajectory in kept:
    answer = final_answer(trajectory)
    if answer is None:
      reason = trajectory.end_reason.replace("_", " ")
      answer = "none that can be read" if reason == "answer" else f"none, ended by {reason}"
    likely = f" (sample {trajectory.sample + 1}, {mean_logp(trajectory):.2f} nats a token)"
    print(f"answer: {answer}{likely if samples > 1 else ''}")
  print(f"wrote {workdir / 'report.html'}")


def _settings() -> dict[str, Any]:
  """Of --config where it was given, else of the run, else of the default; what is set, over it."""
  flag = flags.FLAGS["config"]
  default = pathlib.Path(config_flags.get_config_filename(flag)) == _DEFAULT
  recorded = recorded_settings(CHECKPOINT.value) if default else None
  if recorded is None:
    return settings_of(json.loads(CONFIG.value.to_json_best_effort()))
  return settings_of(overlay(recorded, config_flags.get_override_values(flag)))


def _task(question: str) -> Task:
  options = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(OPTION.value)]
  kind = "choice" if options else "words" if WORDS.value else "number"
  return Task(
    task_id="asked",
    question_type="a question",
    question=question,
    options=tuple(options) or None,
    answer="",
    answer_kind=kind,
    images=tuple(np.asarray(read_picture(pathlib.Path(path))) for path in IMAGE.value),
    source="hand",
    scene_id="",
    benchmark=None,
    boxes=(),
  )


if __name__ == "__main__":
  launch(main, "stopped", read_flags)
