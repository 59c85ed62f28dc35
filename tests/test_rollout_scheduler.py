"""Who runs when: slots, refill, drawings in logical time; none of it changes what is said."""

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
from spatial_jax.rollout.device import SampleState
from spatial_jax.rollout.sampling import scores
from spatial_jax.rollout.scheduler import generate_rollouts
from tests import rollout_fixtures as fixtures
from tests.rollout_fixtures import (
  ANSWER_TURN,
  BOX_TURN,
  GREEDY,
  ROLLOUT,
  SAMPLED,
  STOP,
  TOKENIZER,
  flat,
  say,
)
from tests.test_rollout_engine import PADS, ROOT, engine_of, everybody_draws, lab, said

__all__ = ["everybody_draws"]  # a fixture

QUESTIONS = ("How far?", "How far is the chair?", "Far?", "chair chair", "the chair is how far?")


def prompts():
  """Five prompts, one with two pictures, two about the same picture."""
  sizes = [((24, 24),), ((24, 24), (16, 40)), ((16, 40),), ((24, 24),), ((40, 16),)]
  tasks = [
    fixtures.task(f"room/{i}", size, question)
    for i, (size, question) in enumerate(zip(sizes, QUESTIONS, strict=True))
  ]
  tasks[3] = dataclasses.replace(tasks[3], images=tasks[0].images)
  return [fixtures.conversation().prompt(task) for task in tasks]


def roll(cfg=ROLLOUT, engine=None, seed=1, sampling_params=None, token_listener=None):
  engine = engine or engine_of(cfg)
  sampling_params = sampling_params or [SAMPLED] * cfg.group
  return generate_rollouts(
    engine, lab()[2], prompts(), seed, 3, sampling_params, token_listener=token_listener
  )


class LateExecutor(Executor):
  """Every drawing is there after a while, in whatever order the dice say."""

  def __init__(self, seed):
    super().__init__(ExecutorConfig(0, 20.0, 1024), fixtures.STYLE)
    self.dice = np.random.default_rng(seed)

  def submit(self, images, operations):
    drawing, late = super().submit(images, operations), Future()
    threading.Timer(self.dice.uniform(0, 0.1), lambda: late.set_result(drawing.result())).start()
    return late


def counted(engine):
  """The engine, and the names and shapes of the programs it runs."""
  calls = []

  def watch(name):
    program = getattr(engine.programs, name)

    def call(*arguments):
      given = arguments[1:] if name == "start_rows" else arguments[2:]
      shapes = [np.shape(x) for x in given if not isinstance(x, tuple)]
      shapes += [np.shape(leaf) for x in given if isinstance(x, tuple) for leaf in x]
      taken = [np.asarray(x).tolist() for x in given[:2]] if name == "start_rows" else []
      calls.append((name, *map(str, shapes + taken)))
      return program(*arguments)

    return call

  names = ("encode_images", "prefill", "start_rows", "sample", "append")
  run = dataclasses.replace(engine.programs, **{name: watch(name) for name in names})
  return dataclasses.replace(engine, programs=run), calls


def assert_same(one, other, atol):
  for a, b in zip(flat(one), flat(other), strict=True):
    assert said(a) == said(b)
    assert a.end_reason == b.end_reason
    assert [i.content_hash for i in a.images] == [i.content_hash for i in b.images]
    np.testing.assert_allclose(a.logp_T, b.logp_T, atol=atol, rtol=0)


# --- nothing of it changes what is said ----------------------------------------------------------


@pytest.mark.parametrize(
  "changed",
  [
    {"slots": 1, "prefill": (1,)},
    {"slots": 4, "decode_steps": 1},
    {"slots": 16, "prefill": (16,), "append": (1,)},
    {"decode_steps": 8, "gather_fractions": ()},
    {"slots": 2, "decode_steps": 32},
    {"schedule": "eager"},
    {"schedule": "barrier", "slots": 2},
    {"drawing_delay": 4},
    {"rows": 1},
    {"rows": 4, "slots": 4, "schedule": "eager"},
    {"rows": 3, "slots": 3, "decode_steps": 8, "gather_fractions": (0.3, 0.7)},
    {"rows": 2, "slots": 2, "schedule": "barrier"},
    {
      "feature_buffer_tokens": 72
    },  # room for hardly more than two pictures: most are looked at again
  ],
  ids=str,
)
def test_the_schedule_does_not_show(everybody_draws, changed):
  cfg = dataclasses.replace(ROLLOUT, **changed)
  for seed in range(2):
    whole, other = roll(seed=seed), roll(cfg, seed=seed)
    for trajectory in flat(other):
      trajectory_lib.check(trajectory, PADS)
    assert_same(whole, other, atol=1e-4)
  assert max(len(t.turns) for t in flat(whole)) > 1, "nobody drew"


@functools.cache
def jitted():
  """What `draw_of` computes with."""
  policy, _, _ = lab()
  return jax.jit(policy.hidden), jax.jit(policy.encode), jax.jit(policy.logits)


def draw_of(trajectory, index, seed):
  """The uniform number that token `index` was drawn by, and the cumulated probabilities."""
  (hidden, encode, logits), params = jitted(), lab()[1]
  batch, _ = to_train_batch([[trajectory]], np.zeros((1, 1)), fixtures.shapes())
  before = trajectory.prompt_length - 1  # the last token of the prompt is the row's first

  def row(prefix_BT, own_RT):
    whole = np.concatenate([prefix_BT[0][:before], own_RT[0], prefix_BT[0][before:]])
    return whole[None]  # of one length: what stands behind is not seen

  token_RT = row(batch.prefix.token_BT, batch.token_RT)
  hidden_RTD = hidden(
    params,
    token_RT,
    row(batch.prefix.position_BTA, batch.position_RTA),
    np.arange(token_RT.shape[1])[None] < index,
    encode(params, batch.vision),
    row(batch.prefix.feature_BT, batch.feature_RT),
  )
  logits_RV = logits(params, hidden_RTD[:, index - 1])
  logp_RV = jax.nn.log_softmax(scores(logits_RV, np.ones(1, np.float32), batch.forbidden_V))
  _, step, number, draw = trajectory.seed_path
  key = rng.fold(rng.stream(seed, "sample"), step, number, draw)
  count = int(trajectory.trained_T[:index].sum())
  uniform = float(jax.random.uniform(jax.random.fold_in(key, count)))
  return uniform, np.cumsum(np.exp(np.asarray(logp_RV, np.float64)[0]))


def border_distance(one, other, seed):
  """How far the draw was from the border between the tokens in which two rollouts first differ."""
  shared = min(len(one.token_ids_T), len(other.token_ids_T))
  index = int(np.argmax(one.token_ids_T[:shared] != other.token_ids_T[:shared]))
  uniform, cdf_V = draw_of(one, index, seed)
  first, last = sorted((int(one.token_ids_T[index]), int(other.token_ids_T[index])))
  return max(abs(uniform - cdf_V[first]), abs(uniform - cdf_V[last - 1]))


def test_a_draw_takes_the_token_in_whose_part_its_number_falls(everybody_draws):
  for trajectory in flat(roll(seed=1))[:3]:
    sampled = np.flatnonzero(trajectory.trained_T)
    for index in sampled[[0, len(sampled) // 2, -1]]:
      uniform, cdf_V = draw_of(trajectory, index, 1)
      token = int(trajectory.token_ids_T[index])
      assert cdf_V[token - 1] - 1e-4 < uniform < cdf_V[token] + 1e-4


def distances(one, other, seed):
  """Of the rollouts that differ, how far the draw was from the border; and how many there are."""
  pairs = list(zip(flat(one), flat(other), strict=True))
  return [border_distance(*pair, seed) for pair in pairs if said(pair[0]) != said(pair[1])], len(
    pairs
  )


def test_a_draw_on_the_border_is_told_from_another_draw(everybody_draws):
  """Weights that are a little different move a few tokens, all of them drawn close to a border."""
  policy, params, _ = lab()
  noise = np.random.default_rng(0)
  noisy = jax.tree.map(
    lambda x: x * (1 + 5e-4 * noise.normal(size=x.shape).astype(np.float32)), params
  )
  weights, of = fixtures.decode_params(policy, noisy), engine_of(ROLLOUT)
  whole = [roll(seed=seed) for seed in range(3)]
  moved = [generate_rollouts(of, weights, prompts(), seed, 3, [SAMPLED] * 2) for seed in range(3)]
  close = [d for seed in range(3) for d in distances(whole[seed], moved[seed], seed)[0]]
  assert close, "nothing moved"
  assert max(close) < 0.02
  assert np.median(distances(whole[0], whole[1], 0)[0]) > 0.1


SCHEDULES = (
  {"slots": 1, "prefill": (1,)},
  {"slots": 4, "decode_steps": 8},
  {"slots": 16, "prefill": (16,), "decode_steps": 1},
  {"slots": 4, "rows": 3, "decode_steps": 32},
  {"schedule": "eager", "slots": 2},
  {"schedule": "barrier", "slots": 2, "gather_fractions": ()},
)


@pytest.mark.slow
def test_where_a_token_differs_the_draw_was_on_the_border(everybody_draws):
  """Other shapes round otherwise: one rollout in 500 may fall to the other side of a border."""
  differing, count = [], 0
  for seed in range(9):
    whole = roll(seed=seed)
    for changed in SCHEDULES:
      cfg = dataclasses.replace(ROLLOUT, **changed)
      engine = dataclasses.replace(engine_of(cfg), executor=LateExecutor(seed))
      found, compared = distances(whole, roll(cfg, engine, seed=seed), seed)
      differing, count = differing + found, count + compared
  assert count >= 500
  assert len(differing) <= count / 500
  assert all(distance < 1e-4 for distance in differing)


@pytest.mark.parametrize("rows", [0, 3])
def test_late_drawings_change_no_bit_and_no_program(everybody_draws, rows):
  cfg = dataclasses.replace(ROLLOUT, slots=2, rows=rows)
  engine, calls = counted(engine_of(cfg))
  first = roll(cfg, engine)
  expected = calls.copy()
  for seed in range(3):
    calls.clear()
    again = roll(cfg, dataclasses.replace(engine, executor=LateExecutor(seed)))
    assert_same(first, again, atol=0)
    assert calls == expected
  assert {name for name, *_ in expected} == {"encode_images", "prefill", "start_rows", "sample", "append"}


def test_eager_takes_drawings_as_they_come_and_says_the_same(everybody_draws):
  cfg = dataclasses.replace(ROLLOUT, schedule="eager", slots=2)
  engine, calls = counted(engine_of(cfg))
  whole, orders = roll(), set()
  for seed in range(4):
    calls.clear()
    assert_same(whole, roll(cfg, dataclasses.replace(engine, executor=LateExecutor(seed))), 1e-4)
    orders.add(tuple(name for name, *_ in calls))
  assert len(orders) > 1, "the clock decides what runs"


# A run of its own, with worker processes: a hash of all that was sampled, to the bit.
PROCESS = """
import dataclasses, hashlib, pytest
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from tests import rollout_fixtures as fixtures, test_rollout_engine, test_rollout_scheduler as ours
with pytest.MonkeyPatch.context() as monkeypatch:
  test_rollout_engine.draw_always(monkeypatch)
  with Executor(ExecutorConfig(2, 20.0, 1024), fixtures.STYLE) as executor:
    cfg = dataclasses.replace(fixtures.ROLLOUT, slots=2, rows=3)
    engine = dataclasses.replace(test_rollout_engine.engine_of(cfg), executor=executor)
    bits = hashlib.sha256()
    for trajectory in fixtures.flat(ours.roll(cfg, engine)):
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


@pytest.mark.parametrize("rows", [0, 2])
def test_rollouts_of_one_group_may_sample_each_in_its_way(everybody_draws, rows):
  hot = dataclasses.replace(SAMPLED, temperature=1.7)
  cfg = dataclasses.replace(ROLLOUT, group=3, rows=rows)
  mixed = roll(cfg, sampling_params=[SAMPLED, GREEDY, hot])
  for g, mode in enumerate((SAMPLED, GREEDY, hot)):
    alone = roll(cfg, sampling_params=[mode])
    assert_same([[group[g]] for group in mixed], alone, atol=1e-4)


def test_what_leaves_one_token_to_draw_is_greedy(everybody_draws):
  """Each row by its own limits, through the whole engine."""
  hot = dataclasses.replace(SAMPLED, temperature=2.0)
  limits = ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999})
  sampling_params = [GREEDY, *(dataclasses.replace(hot, **limit) for limit in limits)]
  for group in roll(dataclasses.replace(ROLLOUT, group=4), sampling_params=sampling_params):
    assert [said(t) for t in group] == [said(group[0])] * 4


def test_each_rollout_keeps_to_its_own_length(everybody_draws):
  """Others go on: a shorter turn is the front of the longer one."""
  sampling_params = [dataclasses.replace(SAMPLED, max_tokens_per_turn=most) for most in (2, 5, 0)]
  cfg, lengths = dataclasses.replace(ROLLOUT, group=3), set()
  for group in roll(cfg, sampling_params=sampling_params):
    first = [t.token_ids_T[t.turns[0].start : t.turns[0].end].tolist() for t in group]
    for mode, tokens in zip(sampling_params, first, strict=True):
      assert tokens == first[-1][: mode.max_tokens_per_turn or cfg.max_tokens_per_turn]
    lengths |= {turn.end - turn.start for t in group[:2] for turn in t.turns}
  assert {2, 5} <= lengths <= {1, 2, 3, 4, 5}


# --- who runs when -------------------------------------------------------------------------------


def scripted(scripts, cfg):
  return fixtures.make_engine(fixtures.scripted([[say(t) for t in s] for s in scripts], cfg), cfg)


def scripted_roll(engine, count, **more):
  tasks = [fixtures.task(f"room/{i}") for i in range(count)]
  of = [engine.conversation.prompt(task) for task in tasks]
  return generate_rollouts(engine, {}, of, 0, 0, [SAMPLED] * engine.cfg.group, **more)


def test_finished_groups_are_replaced_at_once():
  """One long answer beside three short ones: one slot is enough for all of these."""
  words = dataclasses.replace(
    ROLLOUT, group=1, slots=2, decode_steps=4, max_tokens_per_turn=100, gather_fractions=()
  )
  stop = dataclasses.replace(ROLLOUT.stop, max_response_tokens=200)
  cfg = dataclasses.replace(words, stop=stop, prefill=(1,))
  long, short = ["word " * 40 + ANSWER_TURN], [ANSWER_TURN]
  engine, calls = counted(scripted([long, *[short] * 3], cfg))
  scripted_roll(engine, 4)
  chunks = sum(name == "sample" for name, *_ in calls)
  took = [min(-(-len(say(script[0])) // 4), 25) for script in (long, short)]
  assert chunks == max(took[0], 3 * (took[1] + 1)) + 1, "what ended is heard a chunk later"
  lazy = dataclasses.replace(engine.cfg, schedule="barrier")
  calls.clear()
  scripted_roll(dataclasses.replace(engine, cfg=lazy), 4)
  assert chunks < sum(name == "sample" for name, *_ in calls)


def test_others_go_on_while_one_draws():
  stop = dataclasses.replace(ROLLOUT.stop, max_response_tokens=400)
  cfg = dataclasses.replace(
    ROLLOUT, group=2, slots=1, decode_steps=4, max_tokens_per_turn=200, stop=stop, gather_fractions=()
  )
  engine, calls = counted(scripted([[BOX_TURN, ANSWER_TURN], ["word " * 60 + ANSWER_TURN]], cfg))
  ((drew, _),) = scripted_roll(engine, 1)
  names = [name for name, *_ in calls]
  assert len(drew.turns) == 2
  assert names.count("append") == 1
  chunks = -(-len(say("word " * 60 + ANSWER_TURN)) // cfg.decode_steps)
  assert names.count("sample") <= chunks + 2, "nobody waited"


class Promised(Future):
  """A drawing that nobody may wait for in vain."""

  def result(self, timeout=None):
    return super().result(timeout=5.0)


def test_a_drawing_is_made_while_others_decode():
  """It is finished only by a chunk that begins after it was handed over."""
  stop = dataclasses.replace(ROLLOUT.stop, max_response_tokens=400)
  cfg = dataclasses.replace(
    ROLLOUT,
    group=2,
    slots=1,
    decode_steps=4,
    max_tokens_per_turn=200,
    stop=stop,
    gather_fractions=(),
    drawing_delay=2,
  )
  engine = scripted([[BOX_TURN, ANSWER_TURN], ["word " * 60 + ANSWER_TURN]], cfg)
  promised = []

  class Slow(Executor):
    def submit(self, images, operations):
      promised.append((Promised(), super().submit(images, operations)))
      return promised[-1][0]

  def sample(*arguments):
    while promised:
      late, drawing = promised.pop()
      late.set_result(drawing.result())
    return engine.programs.sample(*arguments)

  run = dataclasses.replace(engine.programs, sample=sample)
  slow = Slow(ExecutorConfig(0, 20.0, 1024), fixtures.STYLE)
  engine_of_it = dataclasses.replace(engine, programs=run, executor=slow)
  ((drew, _),) = scripted_roll(engine_of_it, 1)
  assert drew.end_reason == "answer"
  assert len(drew.turns) == 2


def test_the_cache_is_handed_from_program_to_program(everybody_draws):
  """None of them keeps the old one, or makes a new one beside it."""
  engine, moved = engine_of(dataclasses.replace(ROLLOUT, slots=2)), []

  def place(state):
    own = state.cache.layers[0][0].k_RKSC
    return own.unsafe_buffer_pointer(), state.cache.prefix.layers[0].k_RKSC.unsafe_buffer_pointer()

  def watch(name):
    program = getattr(engine.programs, name)

    def call(*arguments):
      old = next(x for x in arguments if isinstance(x, SampleState))
      before = place(old)
      result = program(*arguments)
      new = result if isinstance(result, SampleState) else result[0]
      assert all(x.is_deleted() for x in jax.tree.leaves(old.cache)), name
      moved.append((name, place(new) != before))
      return result

    return call

  names = ("prefill", "start_rows", "sample", "append")
  run = dataclasses.replace(engine.programs, **{name: watch(name) for name in names})
  roll(engine=dataclasses.replace(engine, programs=run))
  assert {name for name, _ in moved} == set(names)
  assert not [name for name, elsewhere in moved if elsewhere]


# --- ends of turns -------------------------------------------------------------------------------


def test_a_stop_string_ends_a_turn_with_the_token_that_completes_it():
  stop = dataclasses.replace(ROLLOUT.stop, max_response_tokens=400)
  cfg = dataclasses.replace(
    ROLLOUT, group=1, slots=1, decode_steps=5, max_tokens_per_turn=200, stop=stop, stop_strings=("chair.",)
  )
  script = [["the chair. and " + ANSWER_TURN]]
  ((trajectory,),) = scripted_roll(scripted(script, cfg), 1)
  trajectory_lib.check(trajectory, PADS)
  text = trajectory.turns[0].text
  assert "chair." in text
  whole = say(script[0][0])
  count = next(n for n in range(len(whole)) if "chair." in TOKENIZER.decode(whole[:n]))
  assert said(trajectory) == whole[:count]
  assert trajectory.end_reason == "no_action"


def test_what_was_sampled_behind_a_stop_string_is_forgotten(everybody_draws):
  """Its tokens lie in the cache, and are written over: sampler and trainer still agree."""
  from tests.test_rollout_engine import largest_difference

  frequent = "e"
  cfg = dataclasses.replace(ROLLOUT, stop_strings=(frequent,))
  rollouts = roll(cfg)
  cut = [t for t in flat(rollouts) if said(t)[-1] != STOP and frequent in t.turns[-1].text]
  assert cut
  assert any(len(t.turns) > 1 for t in flat(rollouts))
  for trajectory in flat(rollouts):
    trajectory_lib.check(trajectory, PADS)
  assert largest_difference(rollouts) < 1e-4
  assert_same(rollouts, roll(dataclasses.replace(cfg, decode_steps=8, slots=1)), atol=1e-4)


def test_what_is_heard_is_told_in_order(everybody_draws):
  heard = {}

  def listen(number, row):
    heard.setdefault((number, row.episode.sample), []).append(row.sampled + len(row.ids))

  rollouts = roll(token_listener=listen)
  assert len(heard) == len(flat(rollouts))
  for (number, sample), counts in heard.items():
    assert counts == sorted(counts)
    assert counts[-1] == len(said(rollouts[number][sample]))
