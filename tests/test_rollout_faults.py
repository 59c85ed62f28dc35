"""Whatever the policy says and whatever befalls a worker: one trajectory pays, the state holds."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.drawing import executor as executor_lib
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from spatial_jax.learn.gradient import Microbatches, score_batch
from spatial_jax.learn.train_batch import to_train_batch
from spatial_jax.rollout import device, scheduler
from spatial_jax.rollout import trajectory as trajectory_lib
from spatial_jax.rollout.sampling import scores
from spatial_jax.rollout.scheduler import generate_rollouts
from tests import rollout_fixtures as fixtures
from tests.rollout_fixtures import ANSWER_TURN, BOX_TURN, ROLLOUT, SAMPLED, STOP, TOKENIZER, flat
from tests.test_rollout_engine import (
  ALLOWED,
  FRAGMENTS,
  OTHER_BOX_TURN,
  PADS,
  ROOT,
  lab,
  said,
)

# --- workers -------------------------------------------------------------------------------------

# A worker in which some labels do harm; all else is the real one.
HARM = """
import os, time
import numpy as np
from spatial_jax.drawing import worker
paint = worker.paint

def harmful(pixels, drawn, style):
  label = drawn[-1].label if drawn else ""
  if label == "die":
    os._exit(3)
  if label == "hang":
    time.sleep(60)
  if label == "eat":
    np.ones(1 << 40)
  return paint(pixels, drawn, style)

worker.paint = harmful
worker.main()
"""


@pytest.mark.parametrize("harm", ["die", "hang", "eat"])
def test_a_worker_that_breaks_costs_one_trajectory(monkeypatch, harm):
  def start(config):
    limits = [str(config.memory_mib), "60"]
    return subprocess.Popen(
      [sys.executable, "-c", HARM, *limits],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      env={**os.environ, **executor_lib.WORKER_ENVIRONMENT},
    )

  monkeypatch.setattr(executor_lib, "_start", start)
  stop = dataclasses.replace(ROLLOUT.stop, max_response_tokens=400)
  cfg = dataclasses.replace(
    ROLLOUT, prompts=2, slots=2, max_tokens_per_turn=80, decode_steps=16, stop=stop
  )
  fine, broken = [BOX_TURN, ANSWER_TURN], [BOX_TURN.replace("chair", harm), ANSWER_TURN]
  prompts = [fixtures.conversation().prompt(fixtures.task(f"room/{i}")) for i in range(2)]

  def roll(turns_by_row):
    scripts = [[fixtures.say(turn) for turn in turns] for turns in turns_by_row]
    engine = fixtures.make_engine(fixtures.scripted(scripts, cfg), cfg)
    with Executor(ExecutorConfig(1, 2.0, 1024), fixtures.STYLE) as executor:
      engine = dataclasses.replace(engine, executor=executor)
      return flat(generate_rollouts(engine, {}, prompts, 0, 0, [SAMPLED] * cfg.group))

  whole, harmed = roll([fine] * 4), roll([fine, broken, fine, fine])
  assert [t.end_reason for t in harmed] == ["answer", "fault", "answer", "answer"]
  for one, other in zip(whole, harmed, strict=True):
    if other.end_reason != "fault":
      assert said(one) == said(other)
      assert [i.content_hash for i in one.images] == [i.content_hash for i in other.images]


# The command of a run that draws all the time, and says when its worker is there.
RUN = """
import os, pathlib
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from tests import rollout_fixtures as fixtures
from tests.test_rollout_engine import ONE, say, generate_rollouts, SAMPLED, BOX_TURN, stop
import dataclasses
cfg = stop()
scripts = [[say(BOX_TURN)] * 2] * 100000
with Executor(ExecutorConfig(1, 20.0, 1024), fixtures.STYLE) as executor:
  prompt = fixtures.conversation().prompt(fixtures.task("room/one"))
  engine = fixtures.make_engine(fixtures.scripted(scripts, cfg), cfg)
  engine = dataclasses.replace(engine, executor=executor)
  while True:
    generate_rollouts(engine, {}, [prompt], 0, 0, [SAMPLED])
    tasks = pathlib.Path(f"/proc/{os.getpid()}/task").glob("*/children")  # a thread started it
    print(*(task.read_text() for task in tasks), flush=True)
"""


def test_ctrl_c_leaves_no_process():
  with subprocess.Popen(
    [sys.executable, "-c", RUN],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    start_new_session=True,
  ) as run:
    assert run.stdout is not None
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert workers
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    run.stdout.close()
    assert run.wait(timeout=30) != 0
  end = time.monotonic() + 20
  while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < end:
    time.sleep(0.05)
  assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


# --- whatever it says ----------------------------------------------------------------------------

ADVERSE = dataclasses.replace(
  ROLLOUT,
  prompts=24,
  group=2,
  slots=5,
  rows=7,
  decode_steps=7,
  max_tokens_per_turn=80,
  stop=dataclasses.replace(ROLLOUT.stop, max_turns=4, max_images=5, max_response_tokens=400),
  observation_buckets=(32, 64, 128),
  suffix_block_edges=(90, 200),
)
WORDS = [
  *FRAGMENTS, BOX_TURN, OTHER_BOX_TURN, BOX_TURN, ANSWER_TURN, '"bbox_2d": [9, 9, 1, 1]',
  BOX_TURN.replace("15", "1" + "0" * 30), BOX_TURN.replace('"index": 1', '"index": -1'),
]  # fmt: skip


def wild(random, tokens):
  """What one rollout says, turn behind turn: noise, pieces of the grammar, and what is right."""
  ids = []
  while len(ids) < tokens:
    match random.integers(4):
      case 0:
        turn = random.choice(ALLOWED, random.integers(1, 50)).tolist()
      case 1:
        turn = TOKENIZER.encode("".join(random.choice(WORDS, random.integers(1, 9))))
      case _:
        box = random.integers(1, random.choice([3, 22]), 4).tolist()  # few of them: some repeat
        turn = TOKENIZER.encode(BOX_TURN.replace("[2, 3, 15, 17]", str(box)))
    ids += [*turn, *([STOP] if random.random() < 0.95 else [])]
  return ids[:tokens]


class Accidents(Executor):
  """One drawing in twenty meets an accident, by what is to be drawn; others are late."""

  def __init__(self):
    super().__init__(ExecutorConfig(0, 20.0, 1024), fixtures.STYLE)

  def submit(self, images, operations):
    dice = zlib.crc32(repr(operations).encode()) % 20
    drawing, result = Future(), super().submit(images, operations).result()
    if dice == 0:
      result = executor_lib.Fault("an accident")
    threading.Timer(0.002 * dice, lambda: drawing.set_result(result)).start()
    return drawing


class Forced:
  """A real engine whose policy has no say: each rollout says what its table holds."""

  def __init__(self, monkeypatch):
    self.table_BGT = np.zeros(
      (ADVERSE.prompts, ADVERSE.group, ADVERSE.stop.max_response_tokens), np.int32
    )
    monkeypatch.setattr(device, "sample_token", self.sample)
    monkeypatch.setattr(scheduler, "_keys", self.keys)
    run = fixtures.real_engine(lab()[0], ADVERSE).programs
    run = dataclasses.replace(run, append=self.observing(run.append), sample=self.saying(run))
    engine = fixtures.make_engine(run, ADVERSE)
    self.engine = dataclasses.replace(engine, executor=Accidents())

  def keys(self, seed, step, prompts, sample_index):
    return np.indices((len(prompts), len(sample_index))).transpose(1, 2, 0).astype(np.uint32)

  def look_up(self, key_R2, count_R):
    b_R, g_R = np.asarray(key_R2, int).T
    last = self.table_BGT.shape[2] - 1  # rows that do not sample may have said all they can
    return self.table_BGT[b_R, g_R, np.minimum(count_R, last)]

  def sample(self, logits_RV, count_R, sampling, forbidden_V, truncate):
    shape = jax.ShapeDtypeStruct(count_R.shape, jnp.int32)
    token_R = jax.pure_callback(self.look_up, shape, sampling.key_R2, count_R)
    logp_RV = jax.nn.log_softmax(scores(logits_RV, sampling.temperature_R, forbidden_V))
    return token_R, jnp.take_along_axis(logp_RV, token_R[:, None], axis=-1)[:, 0]

  def observing(self, observe):
    """What is read goes behind exactly what the host knows of, into rows that are silent."""

    def call(params, state, feature_buffer_MYD, rows):
      active_R, length_R = np.asarray(state.active_R), np.asarray(state.cache.length_R)
      there = [(i, r) for i, r in enumerate(rows.row_R) if r < len(active_R)]
      assert len({r for _, r in there}) == len(there), "each row once"
      for i, r in there:
        assert not active_R[r]
        assert length_R[r] == rows.start_R[i]
      return observe(params, state, feature_buffer_MYD, rows)

    return call

  def saying(self, run):
    """No row is longer than its cache, none that samples has said all it may."""

    def call(params, state, halt_R, row_R, truncate):
      state, token_RT, logp_RT = run.sample(params, state, halt_R, row_R, truncate)
      active_R, length_R = np.asarray(state.active_R), np.asarray(state.cache.length_R)
      assert (length_R <= ADVERSE.stop.max_response_tokens).all()
      assert not (active_R & halt_R).any()
      count_R, limit_R = np.asarray(state.count_R), np.asarray(state.sampling.limit_R)
      assert (count_R < limit_R)[active_R].all()
      return state, token_RT, logp_RT

    return call


def says_anything(monkeypatch, outputs):
  """So many rollouts of tables; each is a valid record, and what the trainer computes of it."""
  forced, (policy, params, _) = Forced(monkeypatch), lab()
  # Tame weights: among half a million tokens, the wide logits of other tests lose a digit.
  params = jax.tree.map(lambda x: x * jnp.float32(0.7), params)
  weights = fixtures.decode_params(policy, params)
  vision = VisionBuckets((512,), (256,), (64,))
  shapes = dataclasses.replace(
    fixtures.shapes(), tokens=ADVERSE.stop.max_response_tokens + 8, vision=vision
  )
  recompute = jax.jit(functools.partial(score_batch, policy, Microbatches(8, (128, shapes.tokens))))
  sizes = [((24, 24),), ((24, 24), (16, 40)), ((40, 16),)]
  reasons = set()
  for number in range(-(-outputs // (ADVERSE.prompts * ADVERSE.group))):
    random = np.random.default_rng(number)
    forced.table_BGT[:] = [
      [wild(random, ADVERSE.stop.max_response_tokens) for _ in range(ADVERSE.group)]
      for _ in range(ADVERSE.prompts)
    ]
    tasks = [fixtures.task(f"room/{i}", sizes[i % 3]) for i in range(ADVERSE.prompts)]
    prompts = [forced.engine.conversation.prompt(task) for task in tasks]
    sampling_params = [SAMPLED] * ADVERSE.group
    rollouts = generate_rollouts(forced.engine, weights, prompts, 0, 0, sampling_params)
    for table_T, trajectory in zip(
      forced.table_BGT.reshape(-1, ADVERSE.stop.max_response_tokens), flat(rollouts), strict=True
    ):
      trajectory_lib.check(trajectory, PADS)
      ids = trajectory.token_ids_T[trajectory.trained_T]
      np.testing.assert_array_equal(ids, table_T[: len(ids)])
      assert (
        len(trajectory.token_ids_T) - trajectory.prompt_length <= ADVERSE.stop.max_response_tokens
      )
      assert len(trajectory.images) <= ADVERSE.stop.max_images
      assert len(trajectory.turns) <= ADVERSE.stop.max_turns
      reasons.add(trajectory.end_reason)
    batch, _ = to_train_batch(rollouts, np.zeros((ADVERSE.prompts, ADVERSE.group)), shapes)
    logp_RT = np.asarray(recompute(params, batch))
    trained_RT = batch.trained_RT
    broken = [t.end_reason == "fault" for t in flat(rollouts)]
    assert not trained_RT[np.flatnonzero(broken)].any()
    recorded = batch.old_logp_RT[trained_RT]
    np.testing.assert_allclose(logp_RT[trained_RT], recorded, atol=1e-4, rtol=0)
  return reasons


REASONS = {
  "answer", "token_limit", "no_action", "repeated_operation", "too_many_images", "turn_limit",
  "fault",
}  # fmt: skip


def test_no_output_leaves_the_state_wrong(monkeypatch):
  assert says_anything(monkeypatch, 480) == REASONS


@pytest.mark.slow
def test_ten_thousand_outputs_leave_the_state_right(monkeypatch):
  assert says_anything(monkeypatch, 10_000) == REASONS
