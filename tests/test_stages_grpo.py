"""The GRPO stage: metrics of a step, and what it saves for the report."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from configs import common
from spatial_jax import metrics
from spatial_jax.config import build
from spatial_jax.data.background import prefetch
from spatial_jax.data.pipeline import PipelineConfig, PromptBatch
from spatial_jax.evaluate.evaluator import progress_evaluation
from spatial_jax.metrics import LogConfig
from spatial_jax.report.report import About, write_report
from spatial_jax.stages import grpo, loop
from spatial_jax.stages.grpo import GrpoConfig, GrpoStage, update_config
from spatial_jax.stages.health import BlindCheck, HealthConfig
from spatial_jax.stages.loop import LoopConfig
from spatial_jax.stages.replaced import ReplacedTasks
from spatial_jax.stages.sampling import Sampler
from spatial_jax.stages.step_metrics import reward_std, zero_variance_share
from spatial_jax.stages.updates import Updater
from spatial_jax.types import Scores
from tests import dummies, step_fixtures

LEARN = GrpoConfig(
  reward=dummies.REWARD,
  advantage=dummies.ADVANTAGE,
  loss=step_fixtures.LOSS,
  optimizer=step_fixtures.OPTIMIZER,
  health=build(HealthConfig, common.health().to_dict() | {"blind_every": 1, "blind_rows": 2}),
  minibatches=1,
  epochs=1,
  max_refills=0,
  mask_truncated=False,
  keep_fraction=step_fixtures.KEEP_FRACTION,
  prefix_buckets=step_fixtures.SHAPES.prefix_buckets,
  vision=step_fixtures.SHAPES.vision,
  micro=step_fixtures.MICRO,
  reference="device",
  save_rollouts_every=1,
  saved_groups=2,
)
METRICS = {
  "prefill_tokens_per_s", "decode_tokens_per_s", "slot_occupancy", "padded_share",
  "drawing_wait_share", "device_idle_share", "image_cache_hits", "programs_compiled",
  "logp_difference", "kl_old_k1", "kl_old_k3", "effective_share", "faults", "tokens_per_s",
}  # fmt: skip


PIPELINE = PipelineConfig(workers=0, steps_ahead=1)
PACKAGE = pathlib.Path(grpo.__file__).parent.parent
CALLED = set()  # files of the functions that `GrpoStage.step` calls


def record_call(frame, event, _):
  """A profile function of `sys`."""
  caller = frame.f_back
  if event == "call" and caller is not None and caller.f_code is GrpoStage.step.__code__:
    path = pathlib.Path(frame.f_code.co_filename)
    if PACKAGE in path.parents:
      CALLED.add(path)


def stage_of(lab, cfg, prompts, folder, refill=None):
  """A GRPO stage of two steps; `prompts`: step -> PromptBatch."""
  shapes, learn = step_fixtures.SHAPES, lab.learn
  return GrpoStage(
    sampler=Sampler(
      engine=lab.engine,
      decode_params=lab.decode_params,
      keep_features=not lab.policy.vision_trainable,
      reward=cfg.reward,
      shapes=shapes,
      batches=lambda step: [range(step_fixtures.ROLLOUT.prompts)],
      seed=0,
      max_refills=cfg.max_refills,
      refill=refill,
      replaced=ReplacedTasks(),
      place=learn.place,
      attention=learn.attention,
    ),
    updater=Updater(learn, update_config(cfg), shapes, 0, None),
    prompt_stream=lambda first: prefetch(prompts, first, 1),
    cfg=cfg,
    steps=2,
    workdir=folder,
    blind=BlindCheck(cfg.health, shapes, 1, learn.place, learn.policy_logprobs),
  )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """The work directory of a run of two steps."""
  folder = tmp_path_factory.mktemp("run")
  lab = step_fixtures.step_setup(1, 1, 1)

  def prompts(step):
    tasks = step_fixtures.tasks(100 * step)[: lab.engine.cfg.prompts]
    return PromptBatch([lab.engine.conversation.prompt(task) for task in tasks], ())

  stage = stage_of(lab, LEARN, prompts, folder)
  log = LogConfig(False, False)
  with pytest.MonkeyPatch.context() as monkeypatch:
    step_fixtures.make_rollouts_draw(monkeypatch)
    cfg = LoopConfig(steps=2, checkpoint_every=9, evaluate_every=1, keep=1, log=log)
    evaluate = progress_evaluation(
      lab.engine, lab.decode_params, step_fixtures.tasks(900), LEARN.reward, 0, PIPELINE
    )
    sys.setprofile(record_call)
    loop.run(folder, cfg, "grpo", lab.state, stage.step_function, evaluate, None, {})
    sys.setprofile(None)
  jax.clear_caches()  # no other test uses these shapes
  return folder


def test_every_step_has_all_metrics(workdir):
  first, second = metrics.read(workdir)
  assert first.keys() >= METRICS
  assert first["programs_compiled"] > second["programs_compiled"]
  assert second["drawing_share"] > 0
  for record in (first, second):
    assert all(np.isfinite(record[name]) for name in METRICS)
    assert all(0 <= record[name] <= 1 + 1e-6 for name in METRICS if name.endswith("share"))
    assert 0 < record["slot_occupancy"] < 1, "rows that draw or have ended do not sample"
    assert record["logp_difference"] < 1e-4
    assert 0 <= record["held_out_score"] <= record["held_out_parsed"] <= 1


def test_the_report_shows_the_timeline(workdir):
  kept = json.loads((workdir / "timeline.json").read_text())
  assert kept["step"] == 1
  programs = {span["program"] for span in kept["programs"]}
  assert programs == {"encode_images", "prefill", "append", "decode"}
  page = write_report(workdir, About("a run", "of two steps", ()), None, 2).read_text()
  section = page.split("What the devices did during the rollouts of step 1")[1]
  for word in ("<svg", "decode", "idle"):  # shorter programs may be too short to be drawn
    assert word in section.split("</svg>")[0], word


def test_zero_variance_share_counts_groups_with_two_valid_rollouts():
  """Equal rewards; different ones; equal but for a fault; a fault leaves one."""
  reward_BG = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float32)
  valid_BG = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
  zero_BG = np.zeros_like(reward_BG)
  scores = Scores(reward_BG, zero_BG, zero_BG, zero_BG, valid_BG, zero_BG, {}, {}, {})
  assert zero_variance_share(scores) == pytest.approx(2 / 3)
  assert reward_std(scores) == pytest.approx(np.std([0, 1, 1]) / 3), "a fault has no reward"
  none_valid = scores._replace(valid_BG=np.zeros_like(valid_BG))
  assert zero_variance_share(none_valid) == reward_std(none_valid) == 0.0


def test_a_step_calls_functions_of_few_files(workdir):
  """What a reader opens to understand a step: its file and those of the functions it calls."""
  files = {pathlib.Path(grpo.__file__), *CALLED}
  assert len(files) <= 8
  assert sum(len(path.read_text().splitlines()) for path in files) <= 2200
