"""The loop of every stage: a run that is stopped and resumed equals one that was not stopped."""

import dataclasses
import functools
import signal
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_defaults
from spatial_jax import checkpoint, metrics, preemption, run_stage, sharding, train
from spatial_jax.checkpoint import Progress, Saver
from spatial_jax.config import ConfigError, build
from spatial_jax.errors import CheckpointError
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.learn.update import apply_gradient
from spatial_jax.metrics import LogConfig
from spatial_jax.policy.param_tree import matches
from spatial_jax.preemption import Terminated
from spatial_jax.reward.compose import score
from spatial_jax.sharding import path_name
from spatial_jax.stages import loop, sampling
from spatial_jax.stages.load import load_policy
from spatial_jax.stages.loop import LoopConfig
from spatial_jax.types import TrainState
from tests.evaluate_fixtures import SETTINGS, save_policy
from tests.test_learn_optimizer import CFG

STEPS = 9
LOOP = LoopConfig(
  steps=STEPS, checkpoint_every=2, evaluate_every=0, keep=2, log=LogConfig(False, False)
)
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


def step_of(first, stop_at=None, stop=None):
  """Data are a function of the step; their iterator must start at the first step of the run."""
  numbers = iter(range(first, 100))

  def step(state, step):
    assert next(numbers) == step
    if step == stop_at:
      stop()
    x_T = np.random.default_rng(step).normal(size=(4, 2)).astype(np.float32)
    return update(state, x_T)

  return step


def interrupt():
  raise KeyboardInterrupt


def run(workdir, stop_at=None, stop=interrupt, cfg=LOOP, evaluate=None):
  step = functools.partial(step_of, stop_at=stop_at, stop=stop)
  return loop.run(workdir, cfg, "toy", start(), step, evaluate, "vsi-bench", {"seed": 0})


def test_held_out_tasks_are_answered_before_every_second_step(tmp_path):
  """Also by a run that was stopped and resumed."""
  cfg = dataclasses.replace(LOOP, evaluate_every=2, checkpoint_every=1)

  def evaluate(state):
    return {"held_out_score": float(state.step)}

  run(tmp_path / "whole", cfg=cfg, evaluate=evaluate)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / "parts", stop_at=1, cfg=cfg, evaluate=evaluate)
  run(tmp_path / "parts", cfg=cfg, evaluate=evaluate)
  for folder in ("whole", "parts"):
    scores = [record.get("held_out_score") for record in metrics.read(tmp_path / folder)]
    assert scores == [float(step) if step % 2 == 0 else None for step in range(STEPS)]


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, run(workdir)


def values(workdir):
  """The records of a run without times and without what this process had compiled before."""
  other = ("time_s", "seconds", "programs_compiled")
  return [{k: v for k, v in r.items() if k not in other} for r in metrics.read(workdir)]


@pytest.mark.parametrize("stops", [(1,), (5,), (8,), (3, 3, 7)])
def test_a_stopped_and_resumed_run_is_the_same_run(whole, tmp_path, stops):
  for stop_at in stops:
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path, stop_at)
  state = run(tmp_path)
  assert_same(state, whole[1])
  assert [record["step"] for record in metrics.read(tmp_path)] == list(range(STEPS))
  assert values(tmp_path) == values(whole[0])


def test_the_last_step_is_saved_with_its_progress(whole):
  workdir, state = whole
  progress = checkpoint.read_progress(checkpoint.find(workdir))
  assert progress.step == STEPS
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
  assert_same(run(workdir, stop_at=STEPS - 1), state)
  assert values(workdir) == before


def test_a_run_can_be_prolonged(whole, tmp_path):
  short = dataclasses.replace(LOOP, steps=5)
  run(tmp_path, cfg=short)
  assert_same(run(tmp_path), whole[1])


def test_without_a_checkpoint_it_starts_over(whole, tmp_path):
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, stop_at=1, cfg=dataclasses.replace(LOOP, checkpoint_every=100))
  assert [record["step"] for record in metrics.read(tmp_path)] == [0]
  assert_same(run(tmp_path), whole[1])


def damage(workdir, step):
  file = max((workdir / "checkpoints" / step).rglob("d/*"), key=lambda path: path.stat().st_size)
  file.write_bytes(file.read_bytes()[:-1])


def test_a_damaged_checkpoint_is_replaced_from_the_one_before(whole, tmp_path, capsys):
  run(tmp_path)
  damage(tmp_path, str(STEPS))
  assert_same(run(tmp_path), whole[1])
  assert capsys.readouterr().err.count("warning: ") == 1
  assert values(tmp_path) == values(whole[0])
  assert checkpoint.find(tmp_path).name == str(STEPS)
  assert capsys.readouterr().err == ""


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(tmp_path):
  run(tmp_path, cfg=dataclasses.replace(LOOP, keep=1))
  damage(tmp_path, str(STEPS))
  with pytest.raises(CheckpointError, match=r"delete \S+/checkpoints to start again"):
    run(tmp_path)


@pytest.mark.parametrize("key", ["steps", "checkpoint_every", "keep"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one_are_refused(key, value):
  with pytest.raises(ConfigError, match=f"^config.loop.{key} is {value} and must be at least 1$"):
    build(LoopConfig, dataclasses.asdict(LOOP) | {key: value}, "config.loop")


# --- SIGTERM -------------------------------------------------------------------------------------


def terminate():
  signal.raise_signal(signal.SIGTERM)


def test_sigterm_saves_the_step_that_runs(whole, tmp_path):
  handler = signal.getsignal(signal.SIGTERM)
  for stop_at in (0, 4):
    with pytest.raises(Terminated, match=f"^stopped by SIGTERM; step {stop_at + 1} is saved and"):
      run(tmp_path, stop_at, terminate)
    assert checkpoint.find(tmp_path).name == str(stop_at + 1)
  assert_same(run(tmp_path), whole[1])
  assert values(tmp_path) == values(whole[0])
  assert signal.getsignal(signal.SIGTERM) is handler
  assert signal.set_wakeup_fd(-1) == -1


def test_sigterm_in_the_last_step_ends_the_program_too(tmp_path):
  with pytest.raises(Terminated, match=f"step {STEPS} is saved"):
    run(tmp_path, STEPS - 1, terminate)


def test_a_second_sigterm_exits_at_once(tmp_path, monkeypatch):
  exits, exited = [], threading.Event()
  monkeypatch.setattr(preemption.os, "_exit", lambda code: (exits.append(code), exited.set()))

  def stop():
    terminate()
    terminate()
    assert exited.wait(60)

  with pytest.raises(Terminated):
    run(tmp_path, 3, stop)
  assert exits == [143]


STUCK = """
  import hashlib, pathlib, sys
  import jax, jax.numpy as jnp
  from absl import flags
  from spatial_jax import cli, preemption
  from spatial_jax.metrics import LogConfig
  from spatial_jax.stages import loop
  from spatial_jax.stages.loop import LoopConfig
  from spatial_jax.types import TrainState

  preemption.GRACE_S = 0.3
  state = TrainState({"w": jnp.zeros(3)}, {}, jnp.int32(0))

  def step(state, number):
    if number == 3:
      print("stuck", flush=True)
      hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # an hour without a signal handler
    return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), {"reward": 0.0}

  cfg = LoopConfig(9, 2, 0, 2, LogConfig(False, False))
  cli.launch(
    lambda _: loop.run(
      pathlib.Path(sys.argv[1]), cfg, "toy", state, lambda _: step, None, None, {}
    ),
    "stopped",
    read=lambda argv: flags.FLAGS(argv),
  )
"""


def test_a_step_that_does_not_end_is_abandoned(tmp_path):
  command = [sys.executable, "-c", textwrap.dedent(STUCK), str(tmp_path)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  with subprocess.Popen(command, text=True, **pipes) as process:
    while process.stdout.readline() not in ("stuck\n", ""):
      pass
    process.terminate()
    _, errors = process.communicate(timeout=300)
  assert process.returncode == 143, errors
  assert errors.strip() == (
    "stopped by SIGTERM; step 3 is saved and the same command resumes from it"
  )
  found = checkpoint.find(tmp_path)
  assert checkpoint.read_progress(found).step == 3
  assert int(loop.resume(tmp_path, TrainState({"w": jnp.zeros(3)}, {}, jnp.int32(0)))[1].step) == 3
  assert [record["step"] for record in metrics.read(tmp_path)] == [0, 1, 2]


def test_a_state_that_the_update_overwrites_is_not_saved(tmp_path):
  state = start()
  with Saver(tmp_path, keep=2) as saver:
    saver.save(state, Progress(1, None, {}))
    checkpoints = loop.Checkpoints(saver, 1, None, {})
    jax.tree.map(lambda x: x.delete(), state)
    line = checkpoints.finish(state, 2)
  assert line == "stopped by SIGTERM; step 2 is not saved (the running update overwrites it)"
  assert checkpoint.find(tmp_path).name == "1"


# --- a whole training run ------------------------------------------------------------------------


def tiny_run(init, steps, storage):
  """`configs/tiny_defaults.py` with a very small policy of random weights."""
  cfg = tiny_defaults.get_config()
  cfg.init, cfg.mesh.data = str(init), 1
  cfg.loop.steps, cfg.loop.checkpoint_every = steps, 1
  cfg.text = SETTINGS["text"]
  for name in ("source", "preprocess", "video", "rollout", "style", "executor"):
    cfg[name].update(SETTINGS[name])
  cfg.rollout.prompts, cfg.rollout.group = 2, 2
  cfg.learn.micro, cfg.learn.save_rollouts_every = {"rows": 2, "lengths": (320,)}, 0
  cfg.learn.prefix_buckets = (256,)
  # A constant rate: other schedules depend on the length of the run.
  cfg.learn.optimizer.update({"warmup_steps": 0, "decay_steps": 0, "total_steps": 100})
  cfg.learn.loss.kl.weight = 0.1  # with a reference policy
  cfg.evaluation.tasks = 0  # without an evaluation
  cfg.loop.evaluate_every = 0
  cfg.update_from_flattened_dict(storage)
  return cfg


def reward_of_tokens(rollouts, tasks, cfg, sharpness, attention_BG):
  """Random weights never answer: the reward depends on the tokens, so that there is a gradient."""
  scores = score(rollouts, tasks, cfg, sharpness, attention_BG)
  sum_BG = [[t.token_ids_T[t.trained_T].sum() % 7 for t in group] for group in rollouts]
  return scores._replace(reward_BG=np.array(sum_BG, np.float32), accuracy_BG=scores.format_BG + 1)


# Storage in two bytes, and a reference on the host.
SMALL_STATE = {
  "frozen_dtype": "bfloat16",
  "learn.reference": "host",
  "learn.optimizer.mu_dtype": "bfloat16",
  "learn.optimizer.gradient_dtype": "bfloat16",
}


@pytest.mark.slow
@pytest.mark.parametrize("storage", [{}, SMALL_STATE], ids=["default", "small state"])
def test_reinforcement_learning_resumes_bit_for_bit(storage, tmp_path, monkeypatch):
  monkeypatch.setattr(run_stage, "report", lambda *_: None)
  monkeypatch.setattr(sampling, "score", reward_of_tokens)
  monkeypatch.setattr(jax, "devices", jax.local_devices()[:1].copy)
  (tmp_path / "init").mkdir()
  save_policy(tmp_path / "init", 1)
  train.run(tiny_run(tmp_path / "init", 3, storage), tmp_path / "whole")
  for steps in (1, 2, 3):
    train.run(tiny_run(tmp_path / "init", steps, storage), tmp_path / "parts")
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices())
  whole, parts, before = (
    load_policy(tmp_path / name, mesh).params for name in ("whole", "parts", "init")
  )
  assert_same(whole, parts)
  stored = jnp.dtype(storage.get("frozen_dtype", "float32"))
  frozen_before = jax.tree.map(lambda x: x.astype(stored).astype(jnp.float32), before)
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), frozen_before, whole)
  frozen = tiny_defaults.get_config().learn.optimizer.frozen
  for path, has_moved in jax.tree_util.tree_leaves_with_path(moved):
    assert has_moved != matches(path_name(path), frozen), jax.tree_util.keystr(path)
  numbers = [
    [
      (r["step"], r["reward"], r["loss"], r["response_tokens"], r["kl_ref_k3"])
      for r in metrics.read(tmp_path / run)
    ]
    for run in ("whole", "parts")
  ]
  assert numbers[0] == numbers[1]
  assert numbers[0][-1][-1] > 0  # the policy has moved away from the reference
