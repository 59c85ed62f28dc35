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
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from spatial_jax.data.records import read_picture
from spatial_jax.errors import UserError
from spatial_jax.evaluate.ask import Asking, ask, settings_of
from spatial_jax.reward.format import final_answer
from spatial_jax.rollout.likeliest import mean_logp
from spatial_jax.stages.load import recorded_settings
from spatial_jax.types import Task

_CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "ask.py"

CONFIG = config_flags.DEFINE_config_file("config", str(_CONFIG), "words and limits")
CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Hugging Face folder or work directory of a run", required=True
)
IMAGE = flags.DEFINE_multi_string("image", [], "picture; several in the order they are shown")
OPTION = flags.DEFINE_multi_string("option", [], "answer to choose from; several become A, B, ...")
WORDS = flags.DEFINE_bool("words", False, "ask for an answer in words, not for a number")
BEGIN = flags.DEFINE_string("begin", "", "words that the answer has to begin with")
SAMPLES = flags.DEFINE_integer("samples", 1, "answers to sample", lower_bound=1)
BEST = flags.DEFINE_integer("best", None, "of them, show the likeliest so many (default: all)")
TEMPERATURE = flags.DEFINE_float(
  "temperature", None, "of sampling; 0 takes the likeliest token (default: 0, 1 for samples)"
)
WORKDIR = flags.DEFINE_string("workdir", "runs/ask", "folder of drawn pictures and report.html")


def main(argv: list[str]) -> None:
  """Asks; a user's mistake is one line and exit code 2."""
  if len(argv) != 2 or not argv[1].strip():
    raise app.UsageError('give one question, in quotes: "How far is the chair from the table?"')
  logging.set_verbosity(logging.WARNING)
  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache/spatial_jax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  try:
    show(argv[1])
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def show(question: str) -> None:
  """Asks and prints."""
  samples, heat = SAMPLES.value, TEMPERATURE.value
  how = Asking(
    begin=BEGIN.value,
    samples=samples,
    best=samples if BEST.value is None else BEST.value,
    temperature=float(samples > 1) if heat is None else heat,
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
  """Of --config where it was given, else of the run, else of --config's default."""
  given = not flags.FLAGS["config"].using_default_value
  recorded = None if given else recorded_settings(CHECKPOINT.value)
  return settings_of(recorded or json.loads(CONFIG.value.to_json_best_effort()))


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
  app.run(main)
