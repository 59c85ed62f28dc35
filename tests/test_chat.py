"""A question by hand: what is said aloud, what is left in the folder, what is refused."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs import chat as chat_config
from configs import tiny
from spatial_jax import chat as chat_lib
from spatial_jax.chat import ChatOptions, chat, overlay, settings_of_run
from spatial_jax.config import ConfigError, build
from spatial_jax.data.prompt_form import form_record, read_form
from spatial_jax.errors import UserError
from spatial_jax.evaluate.predictions import mean_logp, most_likely
from spatial_jax.rollout.auto_buckets import fit_rollout_config
from spatial_jax.rollout.scheduler import generate_rollouts
from spatial_jax.stages.context import RunConfig, settings_of
from spatial_jax.types import ImageRef
from tests import rollout_fixtures as fixtures
from tests.dummies import TrajectoryWriter

ASSET = "spatial_jax/assets/tiny"
GREEDY = ChatOptions(begin="<think> I mark the", samples=1, best=1, temperature=0.0)


def room():
  """A picture of the size that the embedded policy was taught with."""
  y, x = np.indices((168, 168))
  shade = np.where((x - 60) ** 2 + (y - 110) ** 2 < 900, 60, 200)
  return np.stack([shade, shade // 2, shade // 3], axis=-1).astype(np.uint8)


def question():
  task = fixtures.task("asked", question="How far is the chair from the camera (in meters)?")
  return dataclasses.replace(task, media=(ImageRef(room()),), answer="")


def settings():
  return settings_of(RunConfig, json.loads(tiny.get_config().to_json_best_effort()))


def test_what_is_said_is_what_was_sampled_and_drawn(tmp_path, monkeypatch):
  (tmp_path / "answer_1_image_9.png").touch()  # of a question before
  words: list[str] = []
  while_it_ran = []

  def run(*arguments, **more):
    rollouts = generate_rollouts(*arguments, **more)
    while_it_ran.extend(words)
    return rollouts

  monkeypatch.setattr(chat_lib, "generate_rollouts", run)
  (answer,) = chat(settings(), ASSET, question(), GREEDY, tmp_path, "python ...", words.append)
  paths = sorted(tmp_path.glob("answer_*.png"))
  assert [path.name for path in paths] == ["answer_1_image_2.png"]
  np.testing.assert_array_equal(np.asarray(Image.open(paths[0])), answer.images[1].pixels)
  shown = f"\n[{paths[0]}]\n"
  assert "".join(words) == shown.join(turn.text for turn in answer.turns)
  assert len(words) > 4
  assert words == while_it_ran, "it is said while it is sampled"
  page = (tmp_path / "report.html").read_text()
  assert "How far is the chair from the camera" in page
  assert page.count("data:image/webp") == 2
  assert "truth" not in page.split("</style>")[1]
  for turn in answer.turns:
    sampled = turn.text.removeprefix(GREEDY.begin)
    assert re.findall(r"[\w .]{6,}", sampled)[0].strip() in page


@pytest.mark.slow(always=True)
def test_of_several_answers_the_likeliest_are_kept(tmp_path):
  how = ChatOptions(begin="", samples=5, best=2, temperature=1.0)
  words: list[str] = []
  kept = chat(settings(), ASSET, question(), how, tmp_path, "", words.append)
  everyone = dataclasses.replace(how, best=5)
  answers = chat(settings(), ASSET, question(), everyone, tmp_path, "", words.append)
  assert [t.sample for t in kept] == [t.sample for t in answers[:2]]
  assert sorted(t.sample for t in answers) == list(range(5))
  read = [t for t in answers if t.end_reason == "answer"]
  assert read == answers[: len(read)]
  assert [mean_logp(t) for t in read] == sorted(map(mean_logp, read), reverse=True)


def test_answers_go_before_what_is_likely_but_none():
  def said(logp, reason):
    writer = TrajectoryWriter()
    writer.text([1, 2])
    writer.text([3, 4], [logp, logp])
    return writer.finish("room", 0, 2, 0, reason)

  babble, poor, good = said(-0.1, "token_limit"), said(-2.0, "answer"), said(-0.5, "answer")
  assert most_likely([babble, poor, good], 3) == [good, poor, babble]
  assert most_likely([babble, poor, good], 1) == [good]


@pytest.mark.parametrize(
  ("samples", "best", "temperature"), [(1, 2, 0.0), (1, 0, 0.0), (3, 1, 0.0), (1, 1, -1.0)]
)
def test_how_to_ask_is_checked(samples, best, temperature):
  with pytest.raises(ConfigError, match=r"^--(best|samples|temperature)"):
    ChatOptions("", samples, best, temperature)


def test_a_response_begins_with_no_special_token():
  with pytest.raises(ConfigError, match=r"^--begin is .* no special token"):
    dataclasses.replace(GREEDY, begin="<|im_end|>")


@pytest.mark.parametrize("mine", ["config.json", "checkpoints"])
def test_the_work_directory_of_a_run_is_refused_and_nothing_is_cleared(tmp_path, mine):
  (tmp_path / mine).mkdir()
  (tmp_path / "answer_1_image_2.png").touch()
  (tmp_path / "report.html").write_text("of a run")
  with pytest.raises(UserError, match=rf"--workdir=.* has {mine} of a run, whose report"):
    chat(settings(), ASSET, question(), GREEDY, tmp_path, "", print)
  assert (tmp_path / "answer_1_image_2.png").exists()
  assert (tmp_path / "report.html").read_text() == "of a run"


def test_nothing_is_cleared_before_the_checks(tmp_path):
  (tmp_path / "answer_1_image_2.png").touch()
  wrong = overlay(settings(), {"rollout.stop_tokens": ("xx",)})
  with pytest.raises(ConfigError, match="xx cannot end a turn"):
    chat(wrong, ASSET, question(), GREEDY, tmp_path, "", print)
  assert [path.name for path in tmp_path.iterdir()] == ["answer_1_image_2.png"]


def test_the_shapes_hold_the_prompt_and_whatever_is_drawn():
  conversation = fixtures.conversation()
  task = fixtures.task("room", sizes=((24, 24), (16, 40)))
  prompt = conversation.prompt(task)
  cfg = fit_rollout_config(fixtures.ROLLOUT, conversation, prompt, 3, 4)
  assert (cfg.prompts, cfg.group, cfg.slots, cfg.decode_steps) == (1, 3, 1, 4)
  assert cfg.prompt_buckets[-1] >= len(prompt.token_ids_T)
  largest = max((image.pixels for image in prompt.images), key=lambda pixels: pixels.size)
  look = conversation.observation(
    3, [largest] * 2, True, has_im_end=False
  )  # two more images are allowed
  assert cfg.observation_buckets[-1] >= len(look.token_ids_T)


def test_a_full_size_policy_is_asked_in_a_config_that_builds():
  build(
    RunConfig, settings_of(RunConfig, json.loads(chat_config.get_config().to_json_best_effort()))
  )


def command(tmp_path, *more):
  where = [f"--checkpoint={ASSET}", f"--workdir={tmp_path}"]
  return subprocess.run(
    [sys.executable, "-m", "spatial_jax.chat", *where, *more],
    capture_output=True,
    text=True,
    check=False,
    cwd=_root(),
  )


@pytest.mark.parametrize(
  ("mistake", "says"),
  [
    (("--image=none.png", "What?"), "none.png does not exist"),
    (("--config.rollout.bogus=1", "What?"), "config.rollout has no key 'bogus'"),
    (("--config=none.py", "What?"), "--config=none.py: none.py does not exist"),
    ((), "give one question"),
  ],
)
def test_a_mistake_is_one_line(tmp_path, mistake, says):
  done = command(tmp_path, *mistake)
  assert done.returncode == 2
  line = done.stderr.strip().splitlines()[-1]
  assert line.startswith("error: ")
  assert says in line


@pytest.mark.slow
def test_the_command_prints_the_answer_and_leaves_the_page(tmp_path):
  Image.fromarray(room()).save(tmp_path / "room.png")
  more = ("--config=configs/tiny.py", "--begin=<think> I mark the")
  done = command(tmp_path, *more, f"--image={tmp_path / 'room.png'}", "How far is the chair?")
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("<think> I mark the")
  assert "\nanswer: " in done.stdout
  assert (tmp_path / "answer_1_image_2.png").exists()
  assert "I mark the" in (tmp_path / "report.html").read_text()


def test_what_is_set_by_hand_lies_over_what_the_run_recorded():
  recorded = {"seed": 1, "rollout": {"max_tokens_per_turn": 128, "sampling": {"top_k": 0}}}
  changed = overlay(recorded, {"rollout.sampling.top_k": 5, "seed": 2})
  assert changed == {"seed": 2, "rollout": {"max_tokens_per_turn": 128, "sampling": {"top_k": 5}}}
  assert recorded["rollout"]["sampling"]["top_k"] == 0
  with pytest.raises(ConfigError, match=r"config\.rollout\.bogus is unknown"):
    overlay(recorded, {"rollout.bogus": 1})


def test_the_form_of_a_run_is_the_recorded_one(tmp_path):
  """Its file may have changed, or be gone; another form can be asked for."""
  form = form_record(read_form("tiny"))
  recorded = {**settings(), "text": str(tmp_path / "gone.toml"), "form": form, "init": "x"}
  recorded["rollout"]["stop_tokens"] = ("xx",)
  for overrides, message in (
    ({}, "xx cannot end a turn"),
    ({"text": "vilasr"}, "xx cannot end a turn"),
    ({"text": "vilaser"}, r"config\.text is 'vilaser'"),
    ({"text": str(tmp_path / "gone.toml")}, r"gone\.toml cannot be read"),
  ):
    asked = settings_of_run(recorded, overrides)
    assert ("form" in asked) == (not overrides)
    with pytest.raises(ConfigError, match=message):
      chat(asked, ASSET, question(), GREEDY, tmp_path / "out", "", print)


def _root() -> pathlib.Path:
  return pathlib.Path(__file__).parents[1]
