"""Any output, and any failure of a worker, affects one trajectory; device and host agree."""

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
from spatial_jax.learn.gradient import batch_logprobs
from spatial_jax.learn.train_batch import Microbatches, to_train_batch
from spatial_jax.rollout import device, scheduler
from spatial_jax.rollout import trajectory as trajectory_lib
from spatial_jax.rollout.sampling import scores
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from tests import rollout_fixtures as fixtures
from tests.rollout_fixtures import (
  ANSWER_TURN,
  BOX_TURN,
  PADS,
  ROLLOUT,
  SAMPLED,
  STOP,
  TOKENIZER,
  flat,
  policy_and_params,
  sampled_ids,
)
from tests.test_rollout_engine import ALLOWED, FRAGMENTS, OTHER_BOX_TURN, ROOT

# --- workers -------------------------------------------------------------------------------------

# A worker that fails on some labels; the rest is the real one.
FAILING_WORKER = """
import os, time
import numpy as np
from spatial_jax.drawing import worker
paint = worker.paint

def failing_paint(pixels, drawn, style):
  label = drawn[-1].label if drawn else ""
  if label == "die":
    os._exit(3)
  if label == "hang":
    time.sleep(60)
  if label == "allocate":
    np.ones(1 << 40)
  return paint(pixels, drawn, style)

worker.paint = failing_paint
worker.main()
"""


@pytest.mark.parametrize("failure", ["die", "hang", "allocate"])
def test_failing_worker_costs_one_trajectory(monkeypatch, failure):
  def start(config):
    limits = [str(config.memory_mib), "60"]
    return subprocess.Popen(
      [sys.executable, "-c", FAILING_WORKER, *limits],
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
  fine = [BOX_TURN, ANSWER_TURN]
  failing = [BOX_TURN.replace("chair", failure), ANSWER_TURN]
  prompts = [fixtures.conversation().prompt(fixtures.task(f"room/{i}")) for i in range(2)]

  def run(scripts):
    with Executor(ExecutorConfig(1, 2.0, 1024), fixtures.STYLE) as executor:
      engine = dataclasses.replace(fixtures.scripted_engine(scripts, cfg), executor=executor)
      job = RolloutJob(prompts, 0, 0, [SAMPLED] * cfg.group)
      return flat(generate_rollouts(engine, {}, job))

  whole, with_failure = run([fine] * 4), run([fine, failing, fine, fine])
  assert [t.end_reason for t in with_failure] == ["answer", "fault", "answer", "answer"]
  for one, other in zip(whole, with_failure, strict=True):
    if other.end_reason != "fault":
      assert sampled_ids(one) == sampled_ids(other)
      assert [i.content_hash for i in one.images] == [i.content_hash for i in other.images]


# A run that draws without end and prints the process ids of its workers.
RUN = """
import dataclasses, os, pathlib
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from tests import rollout_fixtures as fixtures
from tests.rollout_fixtures import BOX_TURN, SAMPLED
from tests.test_rollout_engine import long_response
scripts = [[BOX_TURN] * 2] * 100000
with Executor(ExecutorConfig(1, 20.0, 1024), fixtures.STYLE) as executor:
  prompt = fixtures.conversation().prompt(fixtures.task("room/one"))
  engine = fixtures.scripted_engine(scripts, long_response())
  engine = dataclasses.replace(engine, executor=executor)
  while True:
    generate_rollouts(engine, {}, RolloutJob([prompt], 0, 0, [SAMPLED]))
    tasks = pathlib.Path(f"/proc/{os.getpid()}/task").glob("*/children")  # a thread started it
    print(*(task.read_text() for task in tasks), flush=True)
"""


@pytest.mark.slow
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


# --- any output ----------------------------------------------------------------------------------

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
PIECES = [
  *FRAGMENTS, BOX_TURN, OTHER_BOX_TURN, BOX_TURN, ANSWER_TURN, '"bbox_2d": [9, 9, 1, 1]',
  BOX_TURN.replace("15", "1" + "0" * 30), BOX_TURN.replace('"index": 1', '"index": -1'),
]  # fmt: skip


def random_output(random, tokens):
  """Tokens of one rollout: turns of noise, of pieces of the grammar, and correct ones."""
  ids = []
  while len(ids) < tokens:
    match random.integers(4):
      case 0:
        turn = random.choice(ALLOWED, random.integers(1, 50)).tolist()
      case 1:
        turn = TOKENIZER.encode("".join(random.choice(PIECES, random.integers(1, 9))))
      case _:
        box = random.integers(1, random.choice([3, 22]), 4).tolist()  # of few values: some repeat
        turn = TOKENIZER.encode(BOX_TURN.replace("[2, 3, 15, 17]", str(box)))
    ids += [*turn, *([STOP] if random.random() < 0.95 else [])]
  return ids[:tokens]


class UnreliableExecutor(Executor):
  """One drawing in twenty is a fault, depending on its operations; the others may be late."""

  def __init__(self):
    super().__init__(ExecutorConfig(0, 20.0, 1024), fixtures.STYLE)

  def submit(self, images, operations):
    number = zlib.crc32(repr(operations).encode()) % 20
    drawing, result = Future(), super().submit(images, operations).result()
    if number == 0:
      result = executor_lib.Fault("a failure")
    threading.Timer(0.002 * number, lambda: drawing.set_result(result)).start()
    return drawing


class ForcedOutput:
  """A real engine in which each rollout samples the tokens of a table."""

  def __init__(self, monkeypatch):
    self.table_BGT = np.zeros(
      (ADVERSE.prompts, ADVERSE.group, ADVERSE.stop.max_response_tokens), np.int32
    )
    monkeypatch.setattr(device, "sample_token", self.sample_token)
    monkeypatch.setattr(scheduler, "sampling_keys", self.keys)
    engine = fixtures.watch(fixtures.real_engine(policy_and_params()[0], ADVERSE), self.around)
    self.engine = dataclasses.replace(engine, executor=UnreliableExecutor())

  def keys(self, seed, step, prompts, sample_index):
    return np.indices((len(prompts), len(sample_index))).transpose(1, 2, 0).astype(np.uint32)

  def tokens_of(self, key_R2, count_R):
    b_R, g_R = np.asarray(key_R2, int).T
    last = self.table_BGT.shape[2] - 1  # inactive rows may have sampled their whole table
    return self.table_BGT[b_R, g_R, np.minimum(count_R, last)]

  def sample_token(self, logits_RV, count_R, sampling, forbidden_V, truncate):
    shape = jax.ShapeDtypeStruct(count_R.shape, jnp.int32)
    token_R = jax.pure_callback(self.tokens_of, shape, jax.random.key_data(sampling.key_R), count_R)
    logp_RV = jax.nn.log_softmax(scores(logits_RV, sampling.temperature_R, forbidden_V))
    return token_R, jnp.take_along_axis(logp_RV, token_R[:, None], axis=-1)[:, 0]

  def around(self, name, program, *arguments):
    if name == "append":
      self.check_append(*arguments)
    result = program(*arguments)
    if name == "decode":
      self.check_decode(result[0], arguments[2])
    return result

  def check_append(self, params, state, feature_buffer_MYD, rows):
    """Observations are appended where the host expects, to rows that do not sample."""
    active_R, length_R = np.asarray(state.active_R), np.asarray(state.cache.length_R)
    used = [(i, r) for i, r in enumerate(rows.row_R) if r < len(active_R)]
    assert len({r for _, r in used}) == len(used), "each row once"
    for i, r in used:
      assert not active_R[r]
      assert length_R[r] == rows.start_R[i]

  def check_decode(self, state, halt_R):
    """No row is longer than its cache, and no active row has reached its limit."""
    active_R, length_R = np.asarray(state.active_R), np.asarray(state.cache.length_R)
    assert (length_R <= ADVERSE.stop.max_response_tokens).all()
    assert not (active_R & halt_R).any()
    count_R, limit_R = np.asarray(state.count_R), np.asarray(state.sampling.limit_R)
    assert (count_R < limit_R)[active_R].all()


def end_reasons_of_random_outputs(monkeypatch, outputs):
  """Samples random outputs; each is a valid record, and the trainer agrees with it."""
  forced, (policy, params, _) = ForcedOutput(monkeypatch), policy_and_params()
  # Smaller weights: among half a million tokens, the wide logits of other tests lose a digit.
  params = jax.tree.map(lambda x: x * jnp.float32(0.7), params)
  weights = fixtures.decode_params(policy, params)
  most, vision = ADVERSE.stop.max_response_tokens, VisionBuckets((512,), (256,), (64,))
  shapes = dataclasses.replace(fixtures.shapes(), tokens=most + 8, vision=vision)
  recompute = jax.jit(
    functools.partial(batch_logprobs, policy, Microbatches(8, (128, shapes.tokens)))
  )
  sizes = [((24, 24),), ((24, 24), (16, 40)), ((40, 16),)]
  tasks = [fixtures.task(f"room/{i}", sizes[i % 3]) for i in range(ADVERSE.prompts)]
  prompts = [forced.engine.conversation.prompt(task) for task in tasks]
  job, reasons = RolloutJob(prompts, 0, 0, [SAMPLED] * ADVERSE.group), set()
  for number in range(-(-outputs // (ADVERSE.prompts * ADVERSE.group))):
    random = np.random.default_rng(number)
    forced.table_BGT[:] = [
      [random_output(random, most) for _ in range(ADVERSE.group)] for _ in range(ADVERSE.prompts)
    ]
    rollouts = generate_rollouts(forced.engine, weights, job)
    tables_RT = forced.table_BGT.reshape(-1, most)
    for table_T, trajectory in zip(tables_RT, flat(rollouts), strict=True):
      trajectory_lib.check(trajectory, PADS)
      ids = sampled_ids(trajectory)
      np.testing.assert_array_equal(ids, table_T[: len(ids)])
      assert len(trajectory.token_ids_T) - trajectory.prompt_length <= most
      assert len(trajectory.images) <= ADVERSE.stop.max_images
      assert len(trajectory.turns) <= ADVERSE.stop.max_turns
      reasons.add(trajectory.end_reason)
    batch, _ = to_train_batch(rollouts, np.zeros((ADVERSE.prompts, ADVERSE.group)), shapes)
    logp_RT = np.asarray(recompute(params, batch))
    trained_RT = batch.rows.trained_RT
    faults = [t.end_reason == "fault" for t in flat(rollouts)]
    assert not trained_RT[np.flatnonzero(faults)].any()
    recorded = batch.rows.old_logp_RT[trained_RT]
    np.testing.assert_allclose(logp_RT[trained_RT], recorded, atol=1e-4, rtol=0)
  return reasons


REASONS = {
  "answer", "token_limit", "no_action", "repeated_operation", "too_many_images", "turn_limit",
  "fault",
}  # fmt: skip


@pytest.mark.slow(always=True)
def test_device_and_host_agree_on_any_output(monkeypatch):
  assert end_reasons_of_random_outputs(monkeypatch, 192) == REASONS


@pytest.mark.slow
def test_device_and_host_agree_on_four_thousand_outputs(monkeypatch):
  assert end_reasons_of_random_outputs(monkeypatch, 4_000) == REASONS
