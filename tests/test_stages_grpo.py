"""One step as a run takes it: what it says of itself, and what it leaves for the report."""

import json

import jax
import numpy as np
import pytest

from spatial_jax import metrics
from spatial_jax.metrics import LogConfig
from spatial_jax.report.report import About, write_report
from spatial_jax.stages import loop
from spatial_jax.stages.grpo import GrpoConfig, Learner, zero_variance_share
from spatial_jax.stages.loop import LoopConfig
from spatial_jax.types import Scores
from tests import dummies, step_fixtures

LEARN = GrpoConfig(
  reward=dummies.REWARD,
  advantage=dummies.ADVANTAGE,
  loss=step_fixtures.LOSS,
  optimizer=step_fixtures.OPTIMIZER,
  share=step_fixtures.SHARE,
  prefix_buckets=step_fixtures.SHAPES.prefix_buckets,
  vision=step_fixtures.SHAPES.vision,
  micro=step_fixtures.MICRO,
  save_rollouts_every=1,
  saved_groups=2,
)
INSTRUMENTS = {
  "prefill_tokens_per_s", "decode_tokens_per_s", "slot_occupancy", "padded_share",
  "drawing_wait_share", "device_idle_share", "image_cache_hits", "programs_compiled",
  "logp_difference", "kl_old_k1", "kl_old_k3", "effective_share", "faults", "tokens_per_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Of a run of two steps."""
  folder = tmp_path_factory.mktemp("run")
  lab = step_fixtures.lab(1, 1, 1)
  learner = Learner(
    engine=lab.engine,
    programs=lab.learn,
    decode_params=lab.decode_params,
    tasks_of=lambda seed, step, count: step_fixtures.tasks(100 * step)[:count],
    count=step_fixtures.ROLLOUT.prompts,
    cfg=LEARN,
    shapes=step_fixtures.SHAPES,
    steps=2,
    seed=0,
    reference=None,
    vision_trainable=True,
    workdir=folder,
  )
  log = LogConfig(False, False)
  with pytest.MonkeyPatch.context() as monkeypatch:
    step_fixtures.everybody_draws(monkeypatch)
    cfg = LoopConfig(steps=2, checkpoint_every=9, keep=1, log=log)
    loop.run(folder, cfg, "grpo", lab.state, learner.step_of, None, {})
  jax.clear_caches()  # what these shapes compiled serves nobody else
  return folder


def test_every_step_tells_what_its_instruments_saw(workdir):
  first, second = metrics.read(workdir)
  assert first.keys() >= INSTRUMENTS
  assert first["programs_compiled"] > second["programs_compiled"]
  assert second["drawing_share"] > 0
  for record in (first, second):
    assert all(np.isfinite(record[name]) for name in INSTRUMENTS)
    assert all(0 <= record[name] <= 1 + 1e-6 for name in INSTRUMENTS if name.endswith("share"))
    assert 0 < record["slot_occupancy"] < 1, "rows that draw or have ended do not sample"
    assert record["logp_difference"] < 1e-4


def test_the_report_shows_who_was_where(workdir):
  kept = json.loads((workdir / "timeline.json").read_text())
  assert kept["step"] == 1
  programs = {span["program"] for span in kept["programs"]}
  assert programs == {"encode_images", "prefill", "append", "decode"}
  page = write_report(workdir, About("a run", "of two steps", ()), None, 2).read_text()
  section = page.split("Rollouts of step 1")[1]
  for word in ("<svg", "decoding", "drawing", "idle", "tower", "prefill", "append"):
    assert word in section.split("</svg>")[0], word


def test_groups_without_news_are_counted_among_those_that_could_have_some():
  """Equal rewards; different ones; equal but for a fault; a fault leaves one."""
  reward_BG = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float32)
  valid_BG = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
  zero_BG = np.zeros_like(reward_BG)
  scores = Scores(reward_BG, zero_BG, zero_BG, zero_BG, valid_BG, zero_BG)
  assert zero_variance_share(scores) == pytest.approx(2 / 3)
  nobody = scores._replace(valid_BG=np.zeros_like(valid_BG))
  assert zero_variance_share(nobody) == 0.0
