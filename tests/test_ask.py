"""A question by hand: what is said aloud, what is left in the folder, what is refused."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs import ask as ask_config
from configs import tiny
from spatial_jax.config import ConfigError, build
from spatial_jax.evaluate.ask import Asking, AskRun, ask, settings_of
from spatial_jax.rollout.fit import fitted
from spatial_jax.rollout.likeliest import likeliest, mean_logp
from tests import rollout_fixtures as fixtures
from tests.dummies import TrajectoryWriter

ASSET = "spatial_jax/assets/tiny"
GREEDY = Asking(begin="<think> I mark the", samples=1, best=1, temperature=0.0)


def room():
  """A picture of the size that the embedded policy was taught with."""
  y, x = np.indices((168, 168))
  shade = np.where((x - 60) ** 2 + (y - 110) ** 2 < 900, 60, 200)
  return np.stack([shade, shade // 2, shade // 3], axis=-1).astype(np.uint8)


def question():
  task = fixtures.task("asked", question="How far is the chair from the camera (in meters)?")
  return dataclasses.replace(task, images=(room(),), answer="")


def settings():
  return settings_of(json.loads(tiny.get_config().to_json_best_effort()))


def test_what_is_said_is_what_was_sampled_and_drawn(tmp_path):
  (tmp_path / "answer_1_image_9.png").touch()  # of a question before
  words: list[str] = []
  (answer,) = ask(settings(), ASSET, question(), GREEDY, tmp_path, "python ...", words.append)
  paths = sorted(tmp_path.glob("answer_*.png"))
  assert [path.name for path in paths] == ["answer_1_image_2.png"]
  np.testing.assert_array_equal(np.asarray(Image.open(paths[0])), answer.images[1].pixels)
  shown = f"\n[{paths[0]}]\n"
  assert "".join(words) == shown.join(turn.text for turn in answer.turns)
  assert len(words) > 4, "it is said while it is sampled"
  page = (tmp_path / "report.html").read_text()
  assert "How far is the chair from the camera" in page
  assert page.count("data:image/webp") == 2
  assert "truth" not in page.split("</style>")[1]


def test_of_several_answers_the_likeliest_are_kept(tmp_path):
  how = Asking(begin="", samples=5, best=2, temperature=1.0)
  words: list[str] = []
  kept = ask(settings(), ASSET, question(), how, tmp_path, "", words.append)
  assert len(kept) == 2
  assert mean_logp(kept[0]) >= mean_logp(kept[1])


def test_answers_go_before_what_is_likely_but_none():
  def said(logp, reason):
    writer = TrajectoryWriter()
    writer.text([1, 2])
    writer.text([3, 4], [logp, logp])
    return writer.finish("room", 0, 2, 0, reason)

  babble, poor, good = said(-0.1, "token_limit"), said(-2.0, "answer"), said(-0.5, "answer")
  assert likeliest([babble, poor, good], 3) == [good, poor, babble]
  assert likeliest([babble, poor, good], 1) == [good]


@pytest.mark.parametrize(
  ("samples", "best", "temperature"), [(1, 2, 0.0), (1, 0, 0.0), (3, 1, 0.0), (1, 1, -1.0)]
)
def test_how_to_ask_is_checked(samples, best, temperature):
  with pytest.raises(ConfigError, match=r"^--(best|samples)"):
    Asking("", samples, best, temperature)


def test_the_shapes_hold_the_prompt_and_whatever_is_drawn():
  talk = fixtures.conversation()
  task = fixtures.task("room", sizes=((24, 24), (16, 40)))
  prompt = talk.prompt(task)
  cfg = fitted(fixtures.ROLLOUT, talk, prompt, 3, 4)
  assert (cfg.prompts, cfg.group, cfg.slots, cfg.chunk) == (1, 3, 1, 4)
  assert cfg.prompt_buckets[-1] >= len(prompt.token_ids_T)
  largest = max((image.pixels for image in prompt.images), key=lambda pixels: pixels.size)
  look = talk.observation(3, [largest] * 2, True, closed=False)  # two more images are allowed
  assert cfg.observation_buckets[-1] >= len(look.token_ids_T)


def test_a_full_size_policy_is_asked_in_a_config_that_builds():
  build(AskRun, settings_of(json.loads(ask_config.get_config().to_json_best_effort())))


def test_a_missing_picture_is_one_line(tmp_path):
  where = f"--workdir={tmp_path}"
  command = ["-m", "spatial_jax.ask", f"--checkpoint={ASSET}", "--image=none.png", where, "What?"]
  done = subprocess.run(
    [sys.executable, *command], capture_output=True, text=True, check=False, cwd=_root()
  )
  assert done.returncode == 2
  assert done.stderr.strip().splitlines()[-1].startswith("error: none.png cannot be read")


def _root() -> pathlib.Path:
  return pathlib.Path(__file__).parents[1]
