"""The frame of every stage: a run that is killed and resumed is the run that was never killed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from spatial_jax import checkpoint, metrics, train
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.learn.update import apply_gradient
from spatial_jax.metrics import LogConfig
from spatial_jax.policy.param_tree import matches, path_name
from spatial_jax.reward.compose import score
from spatial_jax.stages import grpo, loop
from spatial_jax.stages.loop import LoopConfig
from spatial_jax.types import TrainState
from tests.evaluate_fixtures import SETTINGS, save_policy
from tests.test_learn_optimizer import CFG

STEPS = 9
LOOP = LoopConfig(steps=STEPS, checkpoint_every=2, keep=2, log=LogConfig(False, False))
OPTIMIZER = make_optimizer(dataclasses.replace(CFG, total_steps=STEPS, decay_steps=3))


def start() -> TrainState:
  params = {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3), "bias": jnp.ones(3)}
  return jax.device_put(TrainState(params, OPTIMIZER.init(params), jnp.int32(0)), jax.devices()[0])


@functools.partial(jax.jit, donate_argnums=0)
def update(state, x_T):
  def loss(params):
    return jnp.mean(jnp.square(x_T @ params["kernel"] + params["bias"][None] - 1.0))

  value, grads = jax.value_and_grad(loss)(state.params)
  return apply_gradient(OPTIMIZER, state, grads, {"loss": value})


def step_of(first, kill_at=None):
  """Data are a function of the step; the iterator must begin where the run does."""
  numbers = iter(range(first, 100))

  def step(state, step):
    assert next(numbers) == step
    if step == kill_at:
      raise KeyboardInterrupt
    x_T = np.random.default_rng(step).normal(size=(4, 2)).astype(np.float32)
    return update(state, x_T)

  return step


def run(workdir, kill_at=None, cfg=LOOP):
  step = functools.partial(step_of, kill_at=kill_at)
  return loop.run(workdir, cfg, "toy", start(), step, "vsi-bench", {"seed": 0})


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, run(workdir)


def values(workdir):
  """The records of a run without what a clock says, and what this process had compiled before."""
  other = ("time_s", "seconds", "programs_compiled")
  return [{k: v for k, v in r.items() if k not in other} for r in metrics.read(workdir)]


@pytest.mark.parametrize("kills", [(1,), (5,), (8,), (3, 3, 7)])
def test_killed_and_resumed_is_the_same_run(whole, tmp_path, kills):
  for kill_at in kills:
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path, kill_at)
  state = run(tmp_path)
  assert_same(state, whole[1])
  assert [record["step"] for record in metrics.read(tmp_path)] == list(range(STEPS))
  assert values(tmp_path) == values(whole[0])


def test_what_is_saved(whole):
  workdir, state = whole
  progress = checkpoint.read_progress(checkpoint.find(workdir))
  assert (progress.step, progress.schedule_step) == (STEPS, STEPS)
  assert progress.benchmark == "vsi-bench"
  assert progress.config == {"seed": 0}
  kept = sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())
  assert kept == [8, STEPS]
  first, restored = loop.resume(workdir, start())
  assert first == STEPS
  assert_same(restored, state)
  assert int(restored.step) == STEPS


def test_a_finished_run_does_nothing_more(whole):
  workdir, state = whole
  before = values(workdir)
  assert_same(run(workdir, kill_at=STEPS - 1), state)
  assert values(workdir) == before


def test_a_run_may_be_prolonged(whole, tmp_path):
  short = dataclasses.replace(LOOP, steps=5)
  run(tmp_path, cfg=short)
  assert_same(run(tmp_path), whole[1])


def test_without_a_checkpoint_it_starts_over(whole, tmp_path):
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, kill_at=1, cfg=dataclasses.replace(LOOP, checkpoint_every=100))
  assert [record["step"] for record in metrics.read(tmp_path)] == [0]
  assert_same(run(tmp_path), whole[1])


# --- the real thing ------------------------------------------------------------------------------


def tiny_run(init, steps):
  """`configs/common.py` around a policy of random weights that is hardly there."""
  cfg = common.get_config()
  cfg.init, cfg.mesh.data = str(init), 1
  cfg.loop.steps, cfg.loop.checkpoint_every = steps, 1
  for name in ("source", "text", "preprocess", "rollout", "style", "executor"):
    cfg[name].update(SETTINGS[name])
  cfg.rollout.prompts, cfg.rollout.group = 2, 2
  cfg.learn.micro, cfg.learn.save_rollouts_every = {"rows": 2, "lengths": (320,)}, 0
  cfg.learn.prefix_buckets = (256,)
  cfg.learn.optimizer.warmup_steps = 0
  cfg.learn.loss.kl_weight = 0.1  # with a reference policy
  return cfg


def luck(rollouts, tasks, cfg, sharpness):
  """Random weights never answer: rewards by what was said, so that there is something to learn."""
  scores = score(rollouts, tasks, cfg, sharpness)
  said_BG = [[t.token_ids_T[t.trained_T].sum() % 7 for t in group] for group in rollouts]
  return scores._replace(reward_BG=np.array(said_BG, np.float32), accuracy_BG=scores.format_BG + 1)


@pytest.mark.slow
def test_reinforcement_learning_resumes_bit_for_bit(tmp_path, monkeypatch):
  ends = []
  monkeypatch.setattr(train, "finish", lambda cfg, learner, end, workdir: ends.append(end))
  monkeypatch.setattr(grpo, "score", luck)
  monkeypatch.setattr(jax, "devices", jax.local_devices()[:1].copy)
  (tmp_path / "init").mkdir()
  save_policy(tmp_path / "init", 1)
  train.run(tiny_run(tmp_path / "init", 3), tmp_path / "whole")
  for steps in (1, 2, 3):
    train.run(tiny_run(tmp_path / "init", steps), tmp_path / "parts")
  whole, *_, parts = ends
  assert_same(whole.after, parts.after)
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), whole.before, whole.after)
  frozen = common.get_config().learn.optimizer.frozen
  for path, has in jax.tree_util.tree_leaves_with_path(moved):
    assert has != matches(path_name(path), frozen), jax.tree_util.keystr(path)
  numbers = [
    [
      (r["step"], r["reward"], r["loss"], r["response_tokens"], r["kl_ref_k3"])
      for r in metrics.read(tmp_path / run)
    ]
    for run in ("whole", "parts")
  ]
  assert numbers[0] == numbers[1]
  assert numbers[0][-1][-1] > 0  # it has left the reference
