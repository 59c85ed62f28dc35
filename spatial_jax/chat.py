"""Entry point: python -m spatial_jax.chat --checkpoint=A --image=a.jpg "How far is the chair?"

Answers one question about images with a policy (a Hugging Face folder or the work directory of a
run). Streams the answer, and writes the drawn images and report.html into the work directory.

The work directory of a run records its prompt form and limits. For a Hugging Face folder they come
from --config, by default configs/chat.py: ViLaSR's conversation, for full-size policies. The
embedded policy needs --config=configs/tiny.py.
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

from spatial_jax import checkpoint as checkpoint_lib
from spatial_jax import compiled, sharding
from spatial_jax import workdir as workdir_lib
from spatial_jax.cli import CHECKPOINT_HELP, enable_compilation_cache, launch, parse_flags
from spatial_jax.config import ConfigError, build
from spatial_jax.data.prompt_form import form_of, read_form
from spatial_jax.data.records import read_image
from spatial_jax.data.tokenizer import SPECIAL_TOKENS
from spatial_jax.errors import UserError
from spatial_jax.evaluate.predictions import mean_logp, most_likely
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.report.report import About, write_report
from spatial_jax.reward.format import final_answer
from spatial_jax.rollout.auto_buckets import fit_rollout_config
from spatial_jax.rollout.config import TEMPERATURES, is_temperature
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.request import Request
from spatial_jax.rollout.saved_groups import make_saved_groups, save_groups
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.stages.context import RunConfig, open_context, settings_of
from spatial_jax.stages.load import (
  FORM_KEY,
  load_to_sample,
  own_preprocess,
  read_policy,
  recorded_settings,
)
from spatial_jax.types import ImageRef, Task, Trajectory
from spatial_jax.workdir import lock_workdir, to_path

_DEFAULT = pathlib.Path(__file__).parents[1] / "configs" / "chat.py"

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "prompt form and limits (default: of the run, else configs/chat.py)"
)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP, required=True)
IMAGE = flags.DEFINE_multi_string("image", [], "image file; repeat for several images")
OPTION = flags.DEFINE_multi_string("option", [], "answer option; repeat for A, B, ...")
WORDS = flags.DEFINE_bool("words", False, "ask for an answer in words, not for a number")
BEGIN = flags.DEFINE_string("begin", "", "text that the response starts with")
SAMPLES = flags.DEFINE_integer("samples", 1, "number of answers", lower_bound=1)
BEST = flags.DEFINE_integer("best", None, "show only the N most likely of --samples (default: all)")
TEMPERATURE = flags.DEFINE_float(
  "temperature", None, "of sampling; 0: greedy (default: 0, and 1 if --samples is above 1)"
)
WORKDIR = flags.DEFINE_string("workdir", "runs/chat", "folder of drawn images and report.html")

DECODE_STEPS = 8  # tokens between two updates of the streamed answer
Stream = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ChatOptions:
  """How one question is answered."""

  begin: str  # text that the response starts with; the policy continues it
  samples: int  # number of answers; 1 if `temperature` is 0
  best: int  # number of answers that are kept, the most likely ones
  temperature: float  # of sampling; 0: greedy

  def __post_init__(self):
    if not 1 <= self.best <= self.samples:
      raise ConfigError(f"--best is {self.best} and must be from 1 to --samples {self.samples}")
    if self.temperature != 0 and not is_temperature(self.temperature):
      raise ConfigError(f"--temperature is {self.temperature:g} and must {TEMPERATURES}, or 0")
    if any(token in self.begin for token in SPECIAL_TOKENS):
      raise ConfigError(f"--begin is {self.begin!r} and must contain no special token")
    if self.samples > 1 and self.temperature == 0:
      raise ConfigError("--samples above 1 needs --temperature above 0: greedy answers are equal")


def overlay(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
  """A copy of the settings with some values replaced ("rollout.max_tokens_per_turn": 64).

  Raises:
    ConfigError: if a key is not in the settings.
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


def chat(
  settings: Mapping[str, Any],  # of a config, or of a run, which records its prompt form
  checkpoint: str,
  task: Task,
  how: ChatOptions,
  workdir: pathlib.Path,
  command: str,
  stream: Stream,
) -> list[Trajectory]:
  """Answers a question, saves the drawn images and writes the page.

  Raises:
    UserError: if something cannot be used; then nothing in the work directory has changed.
  """
  cfg = build(RunConfig, {key: value for key, value in settings.items() if key != FORM_KEY})
  form = form_of(settings[FORM_KEY]) if FORM_KEY in settings else read_form(cfg.text)
  sharding.refuse_several_processes()
  mesh = sharding.make_mesh(cfg.mesh, jax.devices())
  files = read_policy(checkpoint)
  cfg = dataclasses.replace(cfg, preprocess=own_preprocess(files, cfg.preprocess))
  policy = make_policy(files.cfg, compiled.compute_dtype(mesh), mesh)
  with open_context(policy, files, form, cfg, None) as context:
    conversation = dataclasses.replace(context.conversation, response_prefix=how.begin)
    context = dataclasses.replace(context, conversation=conversation)
    prompt = conversation.prompt(task)
    rollout = fit_rollout_config(cfg.rollout, conversation, prompt, how.samples, DECODE_STEPS)
    greedy, temperature = how.temperature == 0, how.temperature or 1.0
    sampling = dataclasses.replace(rollout.sampling, greedy=greedy, temperature=temperature)
    engine = context.evaluation_engine(rollout, has_start=False, slots_key="--samples")
    _lock(workdir)
    weights = context.decode_params(load_to_sample(files, mesh))
    for old in workdir.glob(_image_name("*", "*")):
      old.unlink()
    job = RolloutJob(
      prompts=[prompt],
      seed=cfg.seed,
      step=0,
      sampling_params=[sampling] * how.samples,
      token_listener=_Streamer(conversation, workdir, stream),
    )
    (group,) = generate_rollouts(engine, weights, job)
  kept = most_likely(group, how.best)
  names = ["greedy"] if greedy else []
  given = conversation.turn_prefix(first=True)
  saved = make_saved_groups([prompt], [kept], None, names=names, response_prefix=given)
  save_groups(saved, workdir)
  facts = (("policy", checkpoint), ("command", command))
  write_report(workdir, About("One question", task.question, facts), None, 1)
  return kept


def _lock(workdir: pathlib.Path) -> None:
  """Locks the work directory; that of a run or an evaluation, which has a config, is refused."""
  for name in (workdir_lib.CONFIG, checkpoint_lib.FOLDER):
    if (workdir / name).exists():
      raise UserError(
        f"--workdir={workdir} has {name} of a run, whose report would be replaced; choose another"
        " folder"
      )
  lock_workdir(workdir)


def _image_name(sample: int | str, number: int | str) -> str:
  """File name of image `number` of the conversation."""
  return f"answer_{sample}_image_{number}.png"


class _Streamer:
  """Streams the text of the first sample, and saves every drawn image."""

  def __init__(self, conversation: Conversation, workdir: pathlib.Path, stream: Stream):
    self._conversation, self._workdir, self._stream = conversation, workdir, stream
    self._kept: set[pathlib.Path] = set()
    self._turn, self._streamed = -1, ""

  def __call__(self, number: int, request: Request) -> None:
    fresh = self._keep(request)
    if request.builder.sample > 0:
      return
    if len(request.parsed) != self._turn:
      self._turn, self._streamed = len(request.parsed), ""
      drawn = "".join(f"\n[{path}]" for path in fresh) + "\n" if fresh else ""
      self._stream(drawn + self._conversation.turn_prefix(first=not request.parsed))
    # A character may end with the next token.
    text = self._conversation.tokenizer.decode(request.turn_ids)
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    self._stream(text[len(self._streamed) :])
    self._streamed = text

  def _keep(self, request: Request) -> list[pathlib.Path]:
    """Saves the new images of the request."""
    shown, fresh = len(request.builder.prompt.images), []
    for number, image in enumerate(request.images[shown:], shown + 1):
      path = self._workdir / _image_name(request.builder.sample + 1, number)
      if path not in self._kept:
        Image.fromarray(image.pixels).save(path)
        fresh.append(path)
    self._kept.update(fresh)
    return fresh


def read_flags(argv: list[str]) -> list[str]:
  """Parses the flags; without --config the default config is read."""
  given = any(argument.partition("=")[0] in ("--config", "-config") for argument in argv)
  return parse_flags(argv if given else [argv[0], f"--config={_DEFAULT}", *argv[1:]])


def main(arguments: Sequence[str]) -> None:
  """Answers the question on the command line."""
  if len(arguments) != 1 or not arguments[0].strip():
    raise UserError('give one question, in quotes: "How far is the chair from the table?"')
  enable_compilation_cache()
  show(arguments[0])


def show(question: str) -> None:
  """Answers a question and prints the answers."""
  samples, temperature = SAMPLES.value, TEMPERATURE.value
  how = ChatOptions(
    begin=BEGIN.value,
    samples=samples,
    best=samples if BEST.value is None else BEST.value,
    temperature=float(samples > 1) if temperature is None else temperature,
  )
  workdir = to_path(WORKDIR.value)
  command = shlex.join(["python", "-m", "spatial_jax.chat", *sys.argv[1:]])
  settings, task = _settings(), _task(question)
  if not task.media:
    print("no --image: the policy answers without seeing anything", file=sys.stderr)
  with Console(stderr=True).status(f"reading {CHECKPOINT.value} and compiling") as bar:

    def stream(text: str) -> None:
      bar.stop()
      print(text, end="", flush=True)

    kept = chat(settings, CHECKPOINT.value, task, how, workdir, command, stream)
  print("\n")
  for trajectory in kept:
    answer = final_answer(trajectory)
    if answer is None:
      reason = trajectory.end_reason.replace("_", " ")
      answer = "cannot be read" if reason == "answer" else f"none (the rollout ended: {reason})"
    likelihood = f" (sample {trajectory.sample + 1}, {mean_logp(trajectory):.2f} nats a token)"
    print(f"answer: {answer}{likelihood if samples > 1 else ''}")
  print(f"wrote {workdir / 'report.html'}")


def read_images(paths: Sequence[str]) -> tuple[ImageRef, ...]:
  """The images of --image flags.

  Raises:
    UserError: if one cannot be read.
  """
  return tuple(ImageRef(np.asarray(read_image(to_path(path)))) for path in paths)


def _settings() -> dict[str, Any]:
  """Of --config if given, else of the run, else of the default config; with --config.KEY=V set."""
  flag = flags.FLAGS["config"]
  default = pathlib.Path(config_flags.get_config_filename(flag)) == _DEFAULT
  recorded = recorded_settings(CHECKPOINT.value) if default else None
  if recorded is None:
    return settings_of(RunConfig, json.loads(CONFIG.value.to_json_best_effort()))
  return settings_of_run(recorded, config_flags.get_override_values(flag))


def settings_of_run(recorded: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that a run recorded, some replaced, with its prompt form unless that is replaced.

  The form is not read from its file again, which may have changed since.
  """
  settings = settings_of(RunConfig, overlay(recorded, overrides))
  if FORM_KEY in recorded and "text" not in overrides:
    settings[FORM_KEY] = recorded[FORM_KEY]
  return settings


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
    unit=None,
    media=read_images(IMAGE.value),
    source="hand",
    scene_id="",
    benchmark=None,
    boxes=(),
  )


if __name__ == "__main__":
  launch(main, "stopped", read_flags)
