"""Scheduling: slots, refill, drawings in logical time; none of it changes what is sampled."""

import dataclasses
import functools
import os
import subprocess
import sys
import threading
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from spatial_jax import rng
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from spatial_jax.learn.train_batch import to_train_batch
from spatial_jax.rollout import trajectory as trajectory_lib
from spatial_jax.rollout.conversation import TrajectoryBuilder
from spatial_jax.rollout.device import SampleState
from spatial_jax.rollout.profiling import Timeline
from spatial_jax.rollout.sampling import scores
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.types import TokenArrays
from tests import rollout_fixtures as fixtures
from tests.rollout_fixtures import (
  ANSWER_TURN,
  BOX_TURN,
  GREEDY,
  PADS,
  ROLLOUT,
  SAMPLED,
  STOP,
  TOKENIZER,
  engine_for,
  flat,
  largest_difference,
  policy_and_params,
  sampled_ids,
  scripted_engine,
  turn_ids,
)
from tests.test_rollout_engine import ROOT, all_turns_draw

__all__ = ["all_turns_draw"]  # a fixture

QUESTIONS = ("How far?", "How far is the chair?", "Far?", "chair chair", "the chair is how far?")
PROGRAMS = {"encode_images", "prefill", "start_rows", "decode", "append"}


def prompts():
  """Five prompts, one with two images, two about the same image."""
  sizes = [((24, 24),), ((24, 24), (16, 40)), ((16, 40),), ((24, 24),), ((40, 16),)]
  tasks = [
    fixtures.task(f"room/{i}", size, question)
    for i, (size, question) in enumerate(zip(sizes, QUESTIONS, strict=True))
  ]
  tasks[3] = dataclasses.replace(tasks[3], media=tasks[0].media)
  return [fixtures.conversation().prompt(task) for task in tasks]


def run_rollouts(cfg=ROLLOUT, engine=None, seed=1, sampling_params=None, **observers):
  params = sampling_params or [SAMPLED] * cfg.group
  job = RolloutJob(prompts(), seed, 3, params, **observers)
  return generate_rollouts(engine or engine_for(cfg), policy_and_params()[2], job)


class LateExecutor(Executor):
  """Every drawing is ready after a random time, so the order varies."""

  def __init__(self, seed):
    super().__init__(ExecutorConfig(0, 20.0, 1024), fixtures.STYLE)
    self.random = np.random.default_rng(seed)

  def submit(self, images, operations):
    drawing, late = super().submit(images, operations), Future()
    delay_s = self.random.uniform(0, 0.1)
    threading.Timer(delay_s, lambda: late.set_result(drawing.result())).start()
    return late


def recorded(engine):
  """The engine, and a list that is filled with the names and shapes of the programs it runs."""
  calls = []

  def around(name, program, *arguments):
    given = arguments[1:] if name == "start_rows" else arguments[2:]
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(given)]
    rows = [np.asarray(x).tolist() for x in given[:2]] if name == "start_rows" else []
    calls.append((name, *map(str, shapes + rows)))
    return program(*arguments)

  return fixtures.watch(engine, around), calls


def assert_same(one, other, atol):
  for a, b in zip(flat(one), flat(other), strict=True):
    assert sampled_ids(a) == sampled_ids(b)
    assert a.end_reason == b.end_reason
    assert [i.content_hash for i in a.images] == [i.content_hash for i in b.images]
    np.testing.assert_allclose(a.logp_T, b.logp_T, atol=atol, rtol=0)


# --- scheduling changes no token -----------------------------------------------------------------


def slow(changed):
  return pytest.param(changed, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  "changed",
  [
    slow({"schedule": "eager"}),
    slow({"drawing_delay": 4, "gather_fractions": ()}),
    slow({"slots": 1, "prefill": (1,), "decode_steps": 1}),
    slow({"slots": 16, "prefill": (16,), "append": (1,), "decode_steps": 32}),
    slow({"slots": 2, "schedule": "barrier"}),
    {"slots": 2, "rows": 3, "gather_fractions": (0.3, 0.7)},
    slow({"slots": 2, "rows": 1, "schedule": "barrier"}),
    # Little more than two images: most are encoded again.
    slow({"slots": 4, "rows": 4, "schedule": "eager", "feature_buffer_tokens": 72}),
  ],
  ids=str,
)
def test_schedule_changes_no_token(all_turns_draw, changed):
  cfg = dataclasses.replace(ROLLOUT, **changed)
  for seed in range(2):
    whole, other = run_rollouts(seed=seed), run_rollouts(cfg, seed=seed)
    for trajectory in flat(other):
      trajectory_lib.check(trajectory, PADS)
    assert_same(whole, other, atol=1e-4)
  assert max(len(t.turns) for t in flat(whole)) > 1, "some rollouts draw"


@functools.cache
def jitted_policy():
  """The functions that `draw_of` computes with."""
  policy, _, _ = policy_and_params()
  return jax.jit(policy.hidden), jax.jit(policy.encode), jax.jit(policy.logits)


def draw_of(trajectory, index, seed):
  """The uniform number that token `index` was drawn with, and the cumulated probabilities."""
  (hidden, encode, logits), params = jitted_policy(), policy_and_params()[1]
  batch, _ = to_train_batch([[trajectory]], np.zeros((1, 1)), fixtures.shapes())
  before = trajectory.prompt_length - 1  # the last token of the prompt is the first of the row

  def row(prefix_BT, suffix_RT):
    whole = np.concatenate([prefix_BT[0][:before], suffix_RT[0], prefix_BT[0][before:]])
    return whole[None]  # of one length: attention is causal, so what follows changes nothing

  token_RT = row(batch.prefix.token_RT, batch.rows.tokens.token_RT)
  tokens = TokenArrays(
    token_RT,
    row(batch.prefix.position_RTA, batch.rows.tokens.position_RTA),
    np.arange(token_RT.shape[1])[None] < index,
    row(batch.prefix.feature_RT, batch.rows.tokens.feature_RT),
  )
  hidden_RTD = hidden(params, tokens, encode(params, batch.vision))
  logits_RV = logits(params, hidden_RTD[:, index - 1])
  logp_RV = jax.nn.log_softmax(scores(logits_RV, np.ones(1, np.float32), batch.forbidden_V))
  _, step, number, sample_index = trajectory.seed_path
  key = rng.fold(rng.stream(seed, "sample"), step, number, sample_index)
  count = int(trajectory.trained_T[:index].sum())
  uniform = float(jax.random.uniform(jax.random.fold_in(key, count)))
  return uniform, np.cumsum(np.exp(np.asarray(logp_RV, np.float64)[0]))


def border_distance(one, other, seed):
  """Distance of the draw from the border between the first tokens in which two rollouts differ."""
  shared = min(len(one.token_ids_T), len(other.token_ids_T))
  index = int(np.argmax(one.token_ids_T[:shared] != other.token_ids_T[:shared]))
  uniform, cdf_V = draw_of(one, index, seed)
  first, last = sorted((int(one.token_ids_T[index]), int(other.token_ids_T[index])))
  return max(abs(uniform - cdf_V[first]), abs(uniform - cdf_V[last - 1]))


def test_draw_is_the_inverse_cdf_of_its_uniform_number(all_turns_draw):
  for trajectory in flat(run_rollouts(seed=1))[:3]:
    sampled = np.flatnonzero(trajectory.trained_T)
    for index in sampled[[0, len(sampled) // 2, -1]]:
      uniform, cdf_V = draw_of(trajectory, index, 1)
      token = int(trajectory.token_ids_T[index])
      assert cdf_V[token - 1] - 1e-4 < uniform < cdf_V[token] + 1e-4


def border_distances(one, other, seed):
  """Border distances of the rollouts that differ, and the number of rollouts."""
  pairs = list(zip(flat(one), flat(other), strict=True))
  differing = [pair for pair in pairs if sampled_ids(pair[0]) != sampled_ids(pair[1])]
  return [border_distance(*pair, seed) for pair in differing], len(pairs)


def test_border_distance_tells_rounding_from_another_draw(all_turns_draw):
  """Slightly different weights change a few tokens, all of them drawn close to a border."""
  policy, params, _ = policy_and_params()
  noise = np.random.default_rng(0)
  noisy = jax.tree.map(
    lambda x: x * (1 + 5e-4 * noise.normal(size=x.shape).astype(np.float32)), params
  )
  weights, engine = fixtures.decode_params(policy, noisy), engine_for(ROLLOUT)
  whole = [run_rollouts(seed=seed) for seed in range(3)]
  moved = [
    generate_rollouts(engine, weights, RolloutJob(prompts(), seed, 3, [SAMPLED] * 2))
    for seed in range(3)
  ]
  close = [d for seed in range(3) for d in border_distances(whole[seed], moved[seed], seed)[0]]
  assert close, "some tokens change"
  assert max(close) < 0.02
  assert np.median(border_distances(whole[0], whole[1], 0)[0]) > 0.1


SCHEDULES = (
  {"slots": 1, "prefill": (1,)},
  {"slots": 4, "decode_steps": 8},
  {"slots": 16, "prefill": (16,), "decode_steps": 1},
  {"slots": 4, "rows": 3, "decode_steps": 32},
  {"schedule": "eager", "slots": 2},
  {"schedule": "barrier", "slots": 2, "gather_fractions": ()},
)


@pytest.mark.slow
def test_tokens_that_differ_were_drawn_on_a_border(all_turns_draw):
  """Other shapes round differently: one rollout in 500 may fall to the other side of a border."""
  differing, count = [], 0
  for seed in range(9):
    whole = run_rollouts(seed=seed)
    for changed in SCHEDULES:
      cfg = dataclasses.replace(ROLLOUT, **changed)
      engine = dataclasses.replace(engine_for(cfg), executor=LateExecutor(seed))
      found, compared = border_distances(whole, run_rollouts(cfg, engine, seed=seed), seed)
      differing, count = differing + found, count + compared
  assert count >= 500
  assert len(differing) <= count / 500
  assert all(distance < 1e-4 for distance in differing)


@pytest.mark.parametrize("rows", [slow(0), 3])
def test_late_drawings_change_no_bit_and_no_program(all_turns_draw, rows):
  cfg = dataclasses.replace(ROLLOUT, slots=2, rows=rows)
  engine, calls = recorded(engine_for(cfg))
  first = run_rollouts(cfg, engine)
  expected = calls.copy()
  for seed in range(3):
    calls.clear()
    again = run_rollouts(cfg, dataclasses.replace(engine, executor=LateExecutor(seed)))
    assert_same(first, again, atol=0)
    assert calls == expected
  assert {name for name, *_ in expected} == PROGRAMS


@pytest.mark.slow
def test_eager_schedule_changes_programs_and_no_token(all_turns_draw):
  cfg = dataclasses.replace(ROLLOUT, schedule="eager", slots=2)
  engine, calls = recorded(engine_for(cfg))
  whole, orders = run_rollouts(), set()
  for seed in range(4):
    calls.clear()
    late = dataclasses.replace(engine, executor=LateExecutor(seed))
    assert_same(whole, run_rollouts(cfg, late), 1e-4)
    orders.add(tuple(name for name, *_ in calls))
  assert len(orders) > 1, "the clock decides which programs run"


# A run of its own, with worker processes: a hash of every sampled bit.
PROCESS = """
import dataclasses, hashlib, pytest
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from tests import rollout_fixtures as fixtures, test_rollout_scheduler as scheduler
with pytest.MonkeyPatch.context() as monkeypatch:
  fixtures.draw_in_all_turns(monkeypatch)
  with Executor(ExecutorConfig(2, 20.0, 1024), fixtures.STYLE) as executor:
    cfg = dataclasses.replace(fixtures.ROLLOUT, slots=2, rows=3)
    engine = dataclasses.replace(fixtures.engine_for(cfg), executor=executor)
    bits = hashlib.sha256()
    for trajectory in fixtures.flat(scheduler.run_rollouts(cfg, engine)):
      bits.update(trajectory.token_ids_T.tobytes() + trajectory.logp_T.tobytes())
print(bits.hexdigest())
"""


@pytest.mark.slow
def test_every_process_samples_the_same_bits():
  def digest(hash_seed):
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROCESS]
    return subprocess.run(
      command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout

  one, other = digest("1"), digest("2")
  assert len(one.strip()) == 64
  assert one == other


@pytest.mark.parametrize("rows", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_rollouts_of_a_group_may_have_different_parameters(all_turns_draw, rows):
  hot = dataclasses.replace(SAMPLED, temperature=1.7)
  cfg = dataclasses.replace(ROLLOUT, group=3, rows=rows)
  mixed = run_rollouts(cfg, sampling_params=[SAMPLED, GREEDY, hot])
  for g, params in enumerate((SAMPLED, GREEDY, hot)):
    alone = run_rollouts(cfg, sampling_params=[params])
    assert_same([[group[g]] for group in mixed], alone, atol=1e-4)


@pytest.mark.slow
def test_truncation_to_one_token_is_greedy(all_turns_draw):
  hot = dataclasses.replace(SAMPLED, temperature=2.0)
  limits = ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999})
  params = [GREEDY, *(dataclasses.replace(hot, **limit) for limit in limits)]
  for group in run_rollouts(dataclasses.replace(ROLLOUT, group=4), sampling_params=params):
    assert [sampled_ids(t) for t in group] == [sampled_ids(group[0])] * 4


def test_each_rollout_has_its_own_turn_limit(all_turns_draw):
  """A shorter turn is the beginning of the longer one."""
  params = [dataclasses.replace(SAMPLED, max_tokens_per_turn=limit) for limit in (2, 5, 0)]
  cfg, lengths = dataclasses.replace(ROLLOUT, group=3), set()
  for group in run_rollouts(cfg, sampling_params=params):
    first = [t.token_ids_T[t.turns[0].start : t.turns[0].end].tolist() for t in group]
    for one, tokens in zip(params, first, strict=True):
      assert tokens == first[-1][: one.max_tokens_per_turn or cfg.max_tokens_per_turn]
    lengths |= {turn.end - turn.start for t in group[:2] for turn in t.turns}
  assert {2, 5} <= lengths <= {1, 2, 3, 4, 5}


# --- the order of programs -----------------------------------------------------------------------


def run_scripted(engine, count, **observers):
  tasks = [fixtures.task(f"room/{i}") for i in range(count)]
  of = [engine.conversation.prompt(task) for task in tasks]
  job = RolloutJob(of, 0, 0, [SAMPLED] * engine.cfg.group, **observers)
  return generate_rollouts(engine, {}, job)


def scripted_config(max_response_tokens=400, **changed):
  stop = dataclasses.replace(ROLLOUT.stop, max_response_tokens=max_response_tokens)
  return dataclasses.replace(ROLLOUT, stop=stop, decode_steps=4, gather_fractions=(), **changed)


def test_finished_groups_are_replaced_at_once():
  """One long answer and three short ones: one slot is enough for the short ones."""
  cfg = scripted_config(200, group=1, slots=2, prefill=(1,), max_tokens_per_turn=100)
  long, short = ["word " * 40 + ANSWER_TURN], [ANSWER_TURN]
  engine, calls = recorded(scripted_engine([long, *[short] * 3], cfg))
  run_scripted(engine, 4)
  chunks = sum(name == "decode" for name, *_ in calls)
  took = [min(-(-len(turn_ids(script[0])) // 4), 25) for script in (long, short)]
  assert chunks == max(took[0], 3 * (took[1] + 1)) + 1, "the host reads an end one chunk later"
  barrier = dataclasses.replace(engine.cfg, schedule="barrier")
  calls.clear()
  run_scripted(dataclasses.replace(engine, cfg=barrier), 4)
  assert chunks < sum(name == "decode" for name, *_ in calls)


def test_other_rows_decode_while_one_draws():
  cfg = scripted_config(group=2, slots=1, max_tokens_per_turn=200)
  scripts = [[BOX_TURN, ANSWER_TURN], ["word " * 60 + ANSWER_TURN]]
  engine, calls = recorded(scripted_engine(scripts, cfg))
  ((drew, _),) = run_scripted(engine, 1)
  names = [name for name, *_ in calls]
  assert len(drew.turns) == 2
  assert names.count("append") == 1
  chunks = -(-len(turn_ids("word " * 60 + ANSWER_TURN)) // cfg.decode_steps)
  assert names.count("decode") <= chunks + 2, "no row waited"


class PatientFuture(Future):
  """A drawing that fails if it is waited for longer than 5 seconds."""

  def result(self, timeout=None):
    return super().result(timeout=5.0)


def test_drawing_is_made_while_other_rows_decode():
  """It becomes ready only during a chunk that begins after it was submitted."""
  cfg = scripted_config(group=2, slots=1, max_tokens_per_turn=200, drawing_delay=2)
  engine = scripted_engine([[BOX_TURN, ANSWER_TURN], ["word " * 60 + ANSWER_TURN]], cfg)
  submitted = []

  class SlowExecutor(Executor):
    def submit(self, images, operations):
      submitted.append((PatientFuture(), super().submit(images, operations)))
      return submitted[-1][0]

  def around(name, program, *arguments):
    while name == "decode" and submitted:
      late, drawing = submitted.pop()
      late.set_result(drawing.result())
    return program(*arguments)

  executor = SlowExecutor(ExecutorConfig(0, 20.0, 1024), fixtures.STYLE)
  watched = dataclasses.replace(fixtures.watch(engine, around), executor=executor)
  ((drew, _),) = run_scripted(watched, 1)
  assert drew.end_reason == "answer"
  assert len(drew.turns) == 2


def test_cache_is_donated_from_program_to_program(all_turns_draw):
  """No program keeps the old cache or allocates a second one."""
  moved = []

  def addresses(state):
    suffix = state.cache.layers[0][0].k_RKSC
    prefix = state.cache.prefix.layers[0].k_RKSC
    return suffix.unsafe_buffer_pointer(), prefix.unsafe_buffer_pointer()

  def around(name, program, *arguments):
    old = [x for x in arguments if isinstance(x, SampleState)]
    before = [addresses(state) for state in old]
    result = program(*arguments)
    if old:
      new = result if isinstance(result, SampleState) else result[0]
      assert all(x.is_deleted() for x in jax.tree.leaves(old[0].cache)), name
      moved.append((name, addresses(new) != before[0]))
    return result

  cfg = dataclasses.replace(ROLLOUT, slots=2)
  run_rollouts(engine=fixtures.watch(engine_for(cfg), around))
  assert {name for name, _ in moved} == PROGRAMS - {"encode_images"}
  assert not [name for name, has_moved in moved if has_moved]


# --- ends of turns -------------------------------------------------------------------------------


def test_stop_string_ends_a_turn_with_the_token_that_completes_it():
  cfg = scripted_config(group=1, slots=1, max_tokens_per_turn=200, stop_strings=("chair.",))
  text = "the chair. and " + ANSWER_TURN
  ((trajectory,),) = run_scripted(scripted_engine([[text]], cfg), 1)
  trajectory_lib.check(trajectory, PADS)
  assert "chair." in trajectory.turns[0].text
  whole = turn_ids(text)
  count = next(n for n in range(len(whole)) if "chair." in TOKENIZER.decode(whole[:n]))
  assert sampled_ids(trajectory) == whole[:count]
  assert trajectory.end_reason == "no_action"


def test_tokens_sampled_after_a_stop_string_are_overwritten(all_turns_draw):
  """They are in the cache until the observation is appended; sampler and trainer still agree."""
  frequent = "e"
  cfg = dataclasses.replace(ROLLOUT, stop_strings=(frequent,))
  rollouts = run_rollouts(cfg)
  cut = [t for t in flat(rollouts) if sampled_ids(t)[-1] != STOP and frequent in t.turns[-1].text]
  assert cut
  assert any(len(t.turns) > 1 for t in flat(rollouts))
  for trajectory in flat(rollouts):
    trajectory_lib.check(trajectory, PADS)
  assert largest_difference(rollouts) < 1e-4
  other = run_rollouts(dataclasses.replace(cfg, decode_steps=8, slots=1))
  assert_same(rollouts, other, atol=1e-4)


def test_token_listener_gets_growing_requests(all_turns_draw):
  counts = {}

  def listen(prompt_index, request):
    key = (prompt_index, request.builder.sample)
    counts.setdefault(key, []).append(request.sampled_tokens + len(request.turn_ids))

  rollouts = run_rollouts(token_listener=listen)
  assert len(counts) == len(flat(rollouts))
  for (prompt_index, sample), sampled in counts.items():
    assert sampled == sorted(sampled)
    assert sampled[-1] == len(sampled_ids(rollouts[prompt_index][sample]))


# --- broken invariants ---------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["logp_T", "position_TA", "trained_T", "image_start", "turns"])
def test_trajectory_that_breaks_an_invariant_is_one_fault(monkeypatch, field):
  """The run goes on, the other trajectories are as before, and the update can read the fault."""
  cfg = scripted_config(group=2, slots=2, max_tokens_per_turn=200)
  scripts = [[BOX_TURN, ANSWER_TURN]] * 4
  expected = flat(run_scripted(scripted_engine(scripts, cfg), 2))
  original = TrajectoryBuilder.finish
  broken = {
    "logp_T": lambda t: t.logp_T + 1,
    "position_TA": lambda t: t.position_TA * 2,
    "trained_T": lambda t: ~t.trained_T,
    "image_start": lambda t: t.image_start[:-1],
    "turns": lambda t: t.turns[:1],
  }

  def finish(builder, end_reason):
    trajectory = original(builder, end_reason)
    if trajectory.task_id != "room/1" or trajectory.sample != 1 or end_reason == "fault":
      return trajectory
    return dataclasses.replace(trajectory, **{field: broken[field](trajectory)})

  monkeypatch.setattr(TrajectoryBuilder, "finish", finish)
  with Timeline() as timeline:
    rollouts = run_scripted(scripted_engine(scripts, cfg), 2, timeline=timeline)
  found = flat(rollouts)
  assert [t.end_reason for t in found] == ["answer"] * 3 + ["fault"]
  assert_same([found[:3]], [expected[:3]], atol=0)
  (message,) = timeline.violations
  assert message.startswith("task room/1 sample 1: ")
  assert "\n" not in message
  assert timeline.summary()["trajectory_violations"] == 1
  trajectory_lib.check(found[3], PADS)
  shapes = dataclasses.replace(fixtures.shapes(), tokens=512)
  batch, _ = to_train_batch(rollouts, np.ones((2, 2)), shapes)
  assert [row.any() for row in batch.rows.trained_RT] == [True, True, True, False]


def test_run_without_violations_has_none():
  cfg = scripted_config(group=2, slots=2, max_tokens_per_turn=200)
  with Timeline() as timeline:
    run_scripted(scripted_engine([[ANSWER_TURN]] * 4, cfg), 2, timeline=timeline)
  assert timeline.violations == []
  assert timeline.summary()["trajectory_violations"] == 0
