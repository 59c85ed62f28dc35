"""Entry point: python -m spatial_jax.chat --checkpoint=A --image=a.jpg "How far is the chair?"

Puts a question about pictures to a policy (a Hugging Face folder or the work directory of a run),
prints what it says while it says it, and leaves the pictures that it drew and report.html, the
conversation on one page, in the work directory.

A run knows which words and limits its policy was taught with. For a Hugging Face folder they are
those of --config, by default configs/chat.py: ViLaSR's conversation, for policies of full size. The
embedded policy wants --config=configs/tiny.py.
"""

import copy
import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from PIL import Image
from rich.console import Console

from spatial_jax import compiled, sharding
from spatial_jax.cli import CHECKPOINT_HELP, enable_compilation_cache, launch
from spatial_jax.config import ConfigError, build, parse_flags
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.prompt_text import TextConfig
from spatial_jax.data.records import read_image
from spatial_jax.data.tokenizer import Tokenizer
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from spatial_jax.errors import UserError
from spatial_jax.evaluate.best_of_n import mean_logp, most_likely
from spatial_jax.hf import processor
from spatial_jax.report.report import About, write_report
from spatial_jax.reward.format import final_answer, format_reward
from spatial_jax.rollout.auto_buckets import fitted
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.memory import bytes_of
from spatial_jax.rollout.request import Row
from spatial_jax.rollout.saved_groups import Group, SavedRollout, save_groups
from spatial_jax.rollout.scheduler import generate_rollouts
from spatial_jax.sharding import MeshConfig
from spatial_jax.stages.context import make_engine
from spatial_jax.stages.load import load_policy, recorded_settings
from spatial_jax.types import Prompt, Task, Trajectory

_DEFAULT = pathlib.Path(__file__).parents[1] / "configs" / "chat.py"

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "words and limits (default: those of the run, else configs/chat.py)"
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
WORKDIR = flags.DEFINE_string("workdir", "runs/chat", "folder of drawn pictures and report.html")

CHUNK = 8  # tokens that appear at once
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class AskRun:
  """What of a config a question needs; see `configs/common.py`."""

  seed: int
  mesh: MeshConfig
  text: TextConfig
  preprocess: PreprocessConfig
  rollout: RolloutConfig
  style: Style
  executor: ExecutorConfig


@dataclasses.dataclass(frozen=True)
class Asking:
  """How one question is put.

  Attributes:
    begin: words put into the policy's mouth, which it goes on from.
    samples: answers; a single one is greedy where `temperature` is 0.
    best: of them, the likeliest so many are kept.
    temperature: of sampling; 0: the likeliest token each time.
  """

  begin: str
  samples: int
  best: int
  temperature: float

  def __post_init__(self):
    if not 1 <= self.best <= self.samples or self.temperature < 0:
      raise ConfigError(
        f"--best {self.best} must lie between 1 and --samples {self.samples}, and --temperature "
        f"{self.temperature:g} must not be negative"
      )
    if self.samples > 1 and self.temperature == 0:
      raise ConfigError("--samples over 1 needs a --temperature over 0: greedy answers are equal")


def settings_of(settings: Mapping[str, Any]) -> dict[str, Any]:
  """The keys of `AskRun`, from a config of any kind."""
  names = {field.name for field in dataclasses.fields(AskRun)}
  return {name: value for name, value in settings.items() if name in names}


def overlay(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
  """Settings with values of some keys, "rollout.max_tokens_per_turn", in their place.

  Raises:
    ConfigError: on the host, for a key that the settings do not have.
  """
  changed = copy.deepcopy(dict(settings))
  for path, value in overrides.items():
    *parents, name = path.split(".")
    place = changed
    for parent in parents:
      place = place.get(parent, {})
    if name not in place:
      raise ConfigError(f"config.{path} is unknown to the run")
    place[name] = value
  return changed


def ask(
  settings: Mapping[str, Any],
  checkpoint: str,
  task: Task,
  how: Asking,
  workdir: pathlib.Path,
  command: str,
  say: Say,
) -> list[Trajectory]:
  """From checkpoint to page.

  Args:
    settings: as `AskRun`.
    checkpoint: as for `load_policy`.
    task: the question; nobody knows its answer.
    how: samples and temperature.
    workdir: of drawn pictures and page.
    command: for the page.
    say: is given the words of the first answer as they come.

  Returns:
    The answers, likeliest first.

  Raises:
    UserError: on the host or I/O, for what the user has to mend.
  """
  cfg = build(AskRun, settings)
  mesh = sharding.make_mesh(cfg.mesh, jax.devices())
  loaded = load_policy(checkpoint, mesh)
  text = dataclasses.replace(
    cfg.text, response_prefix=how.begin, response_prefix_fraction=float(bool(how.begin))
  )
  conversation = Conversation(loaded.tokenizer, text, _pixels(checkpoint, cfg), loaded.policy.cfg)
  prompt = conversation.prompt(task)
  rollout = fitted(cfg.rollout, conversation, prompt, how.samples, CHUNK)
  greedy, temperature = how.temperature == 0, how.temperature or 1.0
  mode = dataclasses.replace(rollout.sampling, greedy=greedy, temperature=temperature)
  workdir.mkdir(parents=True, exist_ok=True)
  for old in workdir.glob(_drawn("*", "*")):
    old.unlink()
  aloud = _Streamer(loaded.tokenizer, how.begin, workdir, say)
  with Executor(cfg.executor, cfg.style) as executor:
    resident = bytes_of(loaded.params)
    engine = make_engine(loaded.policy, conversation, executor, rollout, resident, "--samples")
    params = compiled.decode_params(loaded.policy, mesh, rollout.weights)(loaded.params)
    sampling_params = [mode] * how.samples
    (group,) = generate_rollouts(
      engine, params, [prompt], cfg.seed, 0, sampling_params, token_listener=aloud
    )
  kept = most_likely(group, how.best)
  save_groups([_group(prompt, kept, greedy)], workdir)
  facts = (("policy", checkpoint), ("command", command))
  write_report(workdir, About("A question by hand", task.question, facts), None, 1)
  return kept


def _pixels(checkpoint: str, cfg: AskRun) -> PreprocessConfig:
  """How the checkpoint's own processor cuts pictures, within the config's bounds on their size."""
  folder = pathlib.Path(checkpoint)
  if not (folder / processor.IMAGES).exists():
    return cfg.preprocess
  return dataclasses.replace(
    processor.read_processor(folder),
    min_pixels=cfg.preprocess.min_pixels,
    max_pixels=cfg.preprocess.max_pixels,
  )


def _drawn(sample: int | str, number: int | str) -> str:
  """Name of the file with image `number` of the conversation."""
  return f"answer_{sample}_image_{number}.png"


class _Streamer:
  """Says the first sample's words as they are heard, and keeps every picture that is drawn."""

  def __init__(self, tokenizer: Tokenizer, begin: str, workdir: pathlib.Path, say: Say):
    self._tokenizer, self._begin, self._workdir, self._say = tokenizer, begin, workdir, say
    self._kept: set[pathlib.Path] = set()
    self._turn, self._said = -1, ""

  def __call__(self, number: int, row: Row) -> None:
    fresh = self._keep(row)
    if row.episode.sample > 0:
      return
    if len(row.parsed) != self._turn:
      self._turn, self._said = len(row.parsed), ""
      self._say("".join(f"\n[{path}]" for path in fresh) + "\n" if fresh else self._begin)
    # A character may end with the next token.
    text = self._tokenizer.decode(row.ids).rstrip("\N{REPLACEMENT CHARACTER}")
    self._say(text[len(self._said) :])
    self._said = text

  def _keep(self, row: Row) -> list[pathlib.Path]:
    """Writes the pictures of the row that are new."""
    shown, fresh = len(row.episode.prompt.images), []
    for number, picture in enumerate(row.pictures[shown:], shown + 1):
      path = self._workdir / _drawn(row.episode.sample + 1, number)
      if path not in self._kept:
        Image.fromarray(picture.pixels).save(path)
        fresh.append(path)
    self._kept.update(fresh)
    return fresh


def _group(prompt: Prompt, answers: Sequence[Trajectory], greedy: bool) -> Group:
  """For the page, without a truth and so without scores."""
  rollouts = [
    SavedRollout(
      trajectory=trajectory,
      answer=final_answer(trajectory),
      reward=None,
      advantage=None,
      score_=None,
      format=format_reward(trajectory),
      valid=trajectory.end_reason != "fault",
      greedy=greedy,
    )
    for trajectory in answers
  ]
  task = prompt.task
  return Group(
    step=None,
    task_id=task.task_id,
    question_type=task.question_type,
    question=task.question,
    options=task.options or (),
    truth=None,
    rollouts=tuple(rollouts),
  )


def read_flags(argv: list[str]) -> list[str]:
  """Flags, with the default --config read only where there is no other."""
  given = any(argument.partition("=")[0] in ("--config", "-config") for argument in argv)
  return parse_flags(argv if given else [argv[0], f"--config={_DEFAULT}", *argv[1:]])


def main(arguments: Sequence[str]) -> None:
  """Asks."""
  if len(arguments) != 1 or not arguments[0].strip():
    raise UserError('give one question, in quotes: "How far is the chair from the table?"')
  enable_compilation_cache()
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
  command = shlex.join(["python", "-m", "spatial_jax.chat", *sys.argv[1:]])
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
    images=tuple(np.asarray(read_image(pathlib.Path(path))) for path in IMAGE.value),
    source="hand",
    scene_id="",
    benchmark=None,
    boxes=(),
  )


if __name__ == "__main__":
  launch(main, "stopped", read_flags)
