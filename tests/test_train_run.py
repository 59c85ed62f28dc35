"""A whole training run of a very small policy: from config to report, and again."""

import json

import jax
import pytest

from configs import tiny_defaults
from spatial_jax import checkpoint, metrics, run_stage, train
from spatial_jax.errors import UserError
from spatial_jax.evaluate.results import read_results
from tests import evaluate_fixtures as fixtures


def small_run(folder):
  """One step of 8 prompts, and a short evaluation."""
  cfg = tiny_defaults.get_config()
  cfg.update_from_flattened_dict(fixtures.SMALLER)
  cfg.update_from_flattened_dict(
    {
      "init": str(folder),
      "loop.steps": 1,
      "loop.evaluate_every": 1,
      "rollout.prompts": 8,
      "rollout.group": 2,
      "rollout.slots": 8,
      "rollout.prefill": (8,),
      "rollout.feature_buffer_tokens": 256,
      "learn.prefix_buckets": (256,),
      "learn.micro": {"rows": 2, "lengths": (64,)},
      "learn.vision": {"windows": (16,), "frames": (16,), "patches": (16,)},
      "learn.loss.kl.weight": 0.01,
      "evaluation.tasks": 4,
      "evaluation.temperatures": (),
      "evaluation.best_of": 0,
      "evaluation.other_images": False,
    }
  )
  return cfg


@pytest.mark.parametrize(
  ("changes", "error"),
  [
    ({"dpo.path": "missing.jsonl"}, r"missing\.jsonl"),
    ({"dpo.optimizer.frozen": ("^nothing/",)}, r"optimizer\.frozen: '\^nothing/' matches no"),
  ],
)
def test_later_stages_are_checked_before_the_first_one_starts(
  changes, error, monkeypatch, tmp_path
):
  cfg = tiny_defaults.get_config()
  cfg.update_from_flattened_dict({"stages": ("sft", "dpo", "grpo"), **changes})
  monkeypatch.setattr(train, "run_stage", lambda *_: pytest.fail("a stage was started"))
  with pytest.raises(UserError, match=error):
    train.run(cfg, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Orbax
def test_a_run_from_config_to_report_and_again(tmp_path, monkeypatch, capsys):
  folder, workdir = fixtures.save_policy(tmp_path / "policy", 0), tmp_path / "run"
  sizes, evaluate = [], run_stage.evaluate
  others = jax.live_arrays()  # of other tests

  def measured(*arguments):
    alive = [x for x in jax.live_arrays() if not x.is_deleted()]
    sizes.append(sum(x.nbytes for x in alive if all(x is not other for other in others)))
    return evaluate(*arguments)

  monkeypatch.setattr(run_stage, "evaluate", measured)
  train.run(small_run(folder), workdir)
  params = sum(x.nbytes for x in jax.tree.leaves(fixtures.random_params(0)))
  assert params <= sizes[0] < 1.5 * params, "the decode parameters of the end, nothing else"
  assert [record["step"] for record in metrics.read(workdir)] == [0]
  assert read_results(workdir) is not None
  assert (workdir / "report.html").exists()
  assert checkpoint.read_progress(checkpoint.find(workdir)).step == 1
  longer = small_run(folder)
  longer.loop.steps = 2
  train.run(longer, workdir)
  assert [record["step"] for record in metrics.read(workdir)] == [0, 1]
  assert json.loads((workdir / "results.json").read_text())["origin"]["steps"] == 2
  capsys.readouterr()
  train.run(longer, workdir)
  assert "run is finished" in capsys.readouterr().out
  assert len(sizes) == 2
