"""Rollouts: how they end, that no output stops a run, and that they record the truth."""

import dataclasses
import functools
import itertools
import pathlib
from concurrent.futures import Future

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import common
from spatial_jax import compiled, sharding
from spatial_jax.config import ConfigError, build
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.prompt_text import TextConfig
from spatial_jax.data.source import SourceConfig, make_source
from spatial_jax.data.tokenizer import IMAGE_PAD
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.executor import Executor, ExecutorConfig, Fault
from spatial_jax.drawing.parser import Parsed, parse
from spatial_jax.drawing.termination import StopLimits
from spatial_jax.errors import DataError
from spatial_jax.learn.gradient import Microbatches, score_batch
from spatial_jax.learn.train_batch import to_train_batch
from spatial_jax.rollout import request as rows_lib
from spatial_jax.rollout import trajectory as trajectory_lib
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.image_feature_cache import most_drawn, most_drawn_tokens
from spatial_jax.rollout.scheduler import generate_rollouts
from spatial_jax.stages.context import make_engine
from spatial_jax.stages.grpo import GrpoConfig, batch_config
from spatial_jax.stages.load import load_policy
from spatial_jax.types import Operation
from tests import rollout_fixtures as fixtures
from tests.rollout_fixtures import (
  ANSWER_TURN,
  BOX_TURN,
  ROLLOUT,
  SAMPLED,
  STOP,
  TOKENIZER,
  VOCABULARY,
  flat,
  say,
)

ROOT = pathlib.Path(__file__).parent.parent
PADS = (TOKENIZER.id(IMAGE_PAD),)
ONE = dataclasses.replace(
  ROLLOUT, prompts=1, slots=1, group=1, max_tokens_per_turn=80, decode_steps=16
)
OTHER_BOX_TURN = BOX_TURN.replace("[2, 3", "[1, 1")
SCRATCH = "```json\n[{}]\n```"


def add_tokens(*turns: str, cfg=ONE, executor=None, sizes=((24, 24),)):
  """The one trajectory of a policy that says these turns."""
  engine = fixtures.make_engine(fixtures.scripted([[say(turn) for turn in turns]], cfg), cfg)
  if executor is not None:
    engine = dataclasses.replace(engine, executor=executor)
  prompt = engine.conversation.prompt(fixtures.task("room/one", sizes))
  ((trajectory,),) = generate_rollouts(engine, {}, [prompt], 0, 0, [SAMPLED])
  trajectory_lib.check(trajectory, PADS)
  return trajectory


def mode(temperature, top_p, greedy):
  return dataclasses.replace(SAMPLED, temperature=temperature, top_p=top_p, greedy=greedy)


class BrokenExecutor(Executor):
  """Every drawing meets an accident."""

  def submit(self, images, operations):
    broken = Future()
    broken.set_result(Fault("the worker died"))
    return broken


def stop(**changed):
  return dataclasses.replace(ONE, stop=dataclasses.replace(ROLLOUT.stop, max_response_tokens=400, **changed))


# --- how a rollout ends --------------------------------------------------------------------------


def test_drawing_then_answer():
  trajectory = add_tokens(BOX_TURN, ANSWER_TURN, cfg=stop())
  assert trajectory.end_reason == "answer"
  drawing, answer = trajectory.turns
  assert [o.label for o in drawing.operations] == ["chair"]
  assert drawing.executable
  assert answer.executable
  assert drawing.produced == (trajectory.images[1].content_hash,)
  assert (trajectory.images[1].pixels != trajectory.images[0].pixels).any()
  assert TOKENIZER.decode(trajectory.token_ids_T[answer.start : answer.end]) == ANSWER_TURN
  said = trajectory.token_ids_T[trajectory.trained_T]
  assert said.tolist() == say(BOX_TURN) + say(ANSWER_TURN)
  assert (trajectory.token_ids_T[[drawing.end - 1, answer.end - 1]] == STOP).all()


def test_a_first_turn_that_was_opened_is_read_whole_and_trained_in_part():
  response_prefix = "<think> I mark"
  rest, cfg = BOX_TURN.removeprefix(response_prefix), stop()
  engine = fixtures.make_engine(fixtures.scripted([[say(rest), say(ANSWER_TURN)]], cfg), cfg)
  words = dataclasses.replace(
    fixtures.WORDS, response_prefix=response_prefix, response_prefix_fraction=1.0
  )
  conversation = dataclasses.replace(engine.conversation, text=words)
  engine = dataclasses.replace(engine, conversation=conversation)
  prompt = conversation.prompt(fixtures.task("room/one"))
  ((trajectory,),) = generate_rollouts(engine, {}, [prompt], 0, 0, [SAMPLED])
  trajectory_lib.check(trajectory, PADS)
  assert [turn.text for turn in trajectory.turns] == [BOX_TURN, ANSWER_TURN]
  assert [turn.executable for turn in trajectory.turns] == [True, True]
  said = trajectory.token_ids_T[trajectory.trained_T]
  assert said.tolist() == say(rest) + say(ANSWER_TURN)
  assert TOKENIZER.decode(trajectory.token_ids_T[: trajectory.prompt_length]).endswith(
    response_prefix
  )


@pytest.mark.parametrize(
  ("reason", "turns", "cfg"),
  [
    ("answer", [ANSWER_TURN], stop()),
    ("answer", [BOX_TURN + ANSWER_TURN], stop()),
    ("no_action", ["<think> I see nothing. </think> Action: Answer"], stop()),
    ("no_action", [""], stop()),
    ("no_action", [SCRATCH], stop()),
    ("too_many_images", [BOX_TURN], stop(max_images=1)),
    ("too_many_images", [BOX_TURN], stop(max_image_tokens=17)),  # 9 each
    ("answer", [BOX_TURN, ANSWER_TURN], stop(max_image_tokens=18)),
    ("repeated_operation", [BOX_TURN, BOX_TURN], stop()),
    ("turn_limit", [BOX_TURN], stop(max_turns=1)),
    ("turn_limit", [BOX_TURN, OTHER_BOX_TURN], stop(max_turns=2)),
    ("token_limit", ["word " * 200], stop()),
    ("token_limit", [BOX_TURN], dataclasses.replace(ONE, stop=StopLimits(3, 4, 999, 50))),
    ("token_limit", [BOX_TURN], dataclasses.replace(stop(), observation_buckets=(12,))),
  ],
)
def test_every_end_is_reached(reason, turns, cfg):
  trajectory = add_tokens(*turns, cfg=cfg)
  assert trajectory.end_reason == reason
  assert len(trajectory.turns) == len(turns)
  assert len(trajectory.token_ids_T) - trajectory.prompt_length <= cfg.stop.max_response_tokens
  assert all(turn.end - turn.start <= cfg.max_tokens_per_turn for turn in trajectory.turns)
  if trajectory.turns[-1].operations or trajectory.turns[-1].errors:
    assert not trajectory.turns[-1].executable, "what ended the rollout was never drawn"


def test_of_two_drawings_none_is_shown_where_one_has_no_room():
  two = BOX_TURN.replace("}]", '}, {"index": 2, "bbox_2d": [1, 1, 9, 9], "label": "b"}]')
  sizes = ((24, 24), (16, 40))
  shown = [image.tokens for image in add_tokens(ANSWER_TURN, cfg=stop(), sizes=sizes).images]
  room = dataclasses.replace(
    stop(max_images=9, max_image_tokens=2 * sum(shown)), max_tokens_per_turn=120
  )
  assert len(add_tokens(two, ANSWER_TURN, cfg=room, sizes=sizes).images) == 4
  less = dataclasses.replace(room.stop, max_image_tokens=2 * sum(shown) - 1)
  ended = add_tokens(two, cfg=dataclasses.replace(room, stop=less), sizes=sizes)
  assert ended.end_reason == "too_many_images"
  assert len(ended.images) == 2


def test_the_last_permitted_turn_is_announced_and_may_only_answer():
  trajectory = add_tokens(BOX_TURN, OTHER_BOX_TURN, ANSWER_TURN, cfg=stop(max_turns=3, max_images=9))
  ids, turns = trajectory.token_ids_T, trajectory.turns
  observed = [
    TOKENIZER.decode(ids[before.end : after.start]) for before, after in itertools.pairwise(turns)
  ]
  assert ["more" in text for text in observed] == [True, False]
  assert ["final" in text for text in observed] == [False, True]
  assert add_tokens(BOX_TURN, BOX_TURN, cfg=stop(max_turns=2)).end_reason == "repeated_operation"


def test_fault_is_left_out_of_the_update():
  executor = BrokenExecutor(ExecutorConfig(0, 20.0, 1024), fixtures.STYLE)
  broken = add_tokens(BOX_TURN, cfg=stop(), executor=executor)
  assert broken.end_reason == "fault"
  assert not broken.turns[0].executable
  sound = add_tokens(ANSWER_TURN, cfg=stop())
  shapes = dataclasses.replace(fixtures.shapes(), tokens=512)
  batch, _ = to_train_batch([[broken, sound]], np.ones((1, 2)), shapes)
  assert not batch.trained_RT[0].any()
  assert batch.trained_RT[1].sum() == len(say(ANSWER_TURN))


# --- whatever it says ----------------------------------------------------------------------------

FRAGMENTS = (
  "<think>", "</think>", " Action: Object Mapper\n", " Action: Path Tracer\n", "Action: Answer",
  "<answer>", "</answer>", "```json\n", "\n```", "[", "]", "{", "}", '"index": ', "1", "2", "0",
  "-1", "1e999", "NaN", ",", '"bbox_2d": [1, 2, 9, 9]', '"bbox_2d": [[[', '"label": "a"',
  '"start_point_2d": [1, 1], "end_point_2d": [1000000000, 2]', "\x00", "é", "\ud7ff",
  BOX_TURN, OTHER_BOX_TURN, BOX_TURN.replace('"index": 1', '"index": 2'),
)  # fmt: skip
ALLOWED = sorted(set(range(VOCABULARY)) - set(fixtures.conversation().forbidden_ids))
TURN = st.one_of(
  st.lists(st.sampled_from(ALLOWED), max_size=40),
  st.lists(st.sampled_from(FRAGMENTS), max_size=8).map(
    lambda parts: TOKENIZER.encode("".join(parts))
  ),
)
WILD = dataclasses.replace(stop(max_images=5), group=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(TURN, min_size=3, max_size=3), min_size=3, max_size=3))
def test_no_output_stops_a_run(turns):
  scripts = [[[*turn, STOP] for turn in row] for row in turns]
  engine = fixtures.make_engine(fixtures.scripted(scripts, WILD), WILD)
  prompt = engine.conversation.prompt(fixtures.task("room/wild", ((24, 24), (16, 40))))
  trajectories = flat(generate_rollouts(engine, {}, [prompt], 0, 0, [SAMPLED] * 3))
  for trajectory in trajectories:
    trajectory_lib.check(trajectory, PADS)
    assert trajectory.end_reason != "fault"
    assert len(trajectory.token_ids_T) - trajectory.prompt_length <= WILD.stop.max_response_tokens
    assert len(trajectory.images) <= WILD.stop.max_images
    assert len(trajectory.turns) <= WILD.stop.max_turns
  shapes = dataclasses.replace(fixtures.shapes(), tokens=512)
  to_train_batch([trajectories], np.zeros((1, 3)), shapes)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 5))
def test_most_drawn(images, limit, turns):
  seen = images
  for _ in range(turns - 1):  # draws on all there are, as long as it may
    seen += seen if 2 * seen <= limit else max(limit - seen, 0)
  assert most_drawn(images, StopLimits(turns, limit, 9, 9)) == seen - images


def test_most_visual_tokens_drawn():
  images = fixtures.conversation().prompt(fixtures.task("room", ((24, 24), (16, 40)))).images
  shown, largest = sum(i.tokens for i in images), max(i.tokens for i in images)
  assert most_drawn_tokens(images, StopLimits(2, 8, 9_999, 9)) == 2 * largest
  assert most_drawn_tokens(images, StopLimits(2, 8, shown + 5, 9)) == 5
  assert most_drawn_tokens(images, StopLimits(2, 8, 1, 9)) == 0


def test_drawings_that_may_not_fit_are_refused_beforehand():
  cfg = dataclasses.replace(ONE, feature_buffer_tokens=10)
  engine = fixtures.make_engine(fixtures.scripted([[say(ANSWER_TURN)]], cfg), cfg)
  prompt = engine.conversation.prompt(fixtures.task("room/one"))
  with pytest.raises(DataError, match=r"of room/one; raise config\.rollout\.feature_buffer_tokens: it is 10"):
    generate_rollouts(engine, {}, [prompt], 0, 0, [SAMPLED])
  short = dataclasses.replace(engine, cfg=dataclasses.replace(ONE, observation_buckets=(10,)))
  with pytest.raises(DataError, match=r"of room/one; raise config\.rollout\.observation_buckets"):
    generate_rollouts(short, {}, [prompt], 0, 0, [SAMPLED])
  long = engine.conversation.prompt(fixtures.task("room/long", question="word " * 200))
  with pytest.raises(DataError, match="room/long"):
    generate_rollouts(dataclasses.replace(engine, cfg=ONE), {}, [long], 0, 0, [SAMPLED])


@pytest.mark.parametrize(
  ("of", "wrong"),
  [
    (SAMPLED, {"temperature": 0.0}),
    (SAMPLED, {"top_p": 0.0}),
    (SAMPLED, {"top_p": 1.1}),
    (SAMPLED, {"top_k": -1}),
    (SAMPLED, {"min_p": 1.0}),
    (ROLLOUT, {"decode_steps": 0}),
    (ROLLOUT, {"group": 0}),
    (ROLLOUT, {"drawing_delay": 0}),
    (ROLLOUT, {"prefill": ()}),
    (ROLLOUT, {"append": (4, 2)}),
    (ROLLOUT, {"suffix_block_edges": (0, 8)}),
    (ROLLOUT, {"prompt_buckets": ()}),
    (ROLLOUT, {"observation_buckets": (64, 32)}),
    (SAMPLED, {"max_tokens_per_turn": -1}),
  ],
)
def test_settings_without_meaning_are_refused(of, wrong):
  with pytest.raises(ConfigError, match=r"rollout|sampling"):
    dataclasses.replace(of, **wrong)


# --- the real policy -----------------------------------------------------------------------------


@functools.cache
def lab():
  policy, params = fixtures.random_policy()
  return policy, params, fixtures.decode_params(policy, params)


@functools.cache
def engine_of(cfg):
  return fixtures.real_engine(lab()[0], cfg)


def prompts():
  """Two prompts of different length, one with two pictures of different sizes."""
  tasks = [
    fixtures.task("room/a", ((24, 24), (16, 40))),
    fixtures.task("room/b", question="How far is the chair from the other chair?"),
  ]
  return [fixtures.conversation().prompt(task) for task in tasks]


def roll(mode=SAMPLED, cfg=ROLLOUT, of=None, seed=1, step=3):
  return generate_rollouts(
    engine_of(cfg), lab()[2], of or prompts(), seed, step, [mode] * cfg.group
  )


def draw_always(monkeypatch):
  """Random weights speak no protocol: a turn that ends of itself counts as boxes, by its text."""

  def boxes(text, coordinates, limits) -> Parsed:
    parsed = parse(text, coordinates, limits)
    images = range(1, 1 + min(len(coordinates.sizes), 1 + len(text) % 2))
    box = (1.0, 2.0, 9.0, 3.0 + len(text.encode()) % 11)
    operations = tuple(Operation("box", i, box, text[:3]) for i in images)
    return dataclasses.replace(parsed, operations=operations, answer_text=None)

  monkeypatch.setattr(rows_lib, "parse", boxes)


@pytest.fixture
def everybody_draws(monkeypatch):
  draw_always(monkeypatch)


def largest_difference(rollouts) -> float:
  """Between the recorded log-probabilities and those of the trainer."""
  policy, params, _ = lab()
  trajectories = flat(rollouts)
  advantage_BG = np.zeros((len(rollouts), len(rollouts[0])))
  batch, _ = to_train_batch(rollouts, advantage_BG, fixtures.shapes())
  micro = Microbatches(2, (64, batch.token_RT.shape[1]))
  logp_RT = np.asarray(jax.jit(functools.partial(score_batch, policy, micro))(params, batch))
  assert batch.trained_RT.sum() == sum(t.trained_T.sum() for t in trajectories)
  assert np.isfinite(logp_RT).all()
  assert (logp_RT[~batch.trained_RT] == 0).all()
  return float(np.abs(logp_RT - batch.old_logp_RT)[batch.trained_RT].max())


@pytest.mark.parametrize(
  "way",
  [SAMPLED, mode(1.7, 1.0, False), mode(0.6, 0.8, False), mode(0.6, 1.0, True)],
  ids=["plain", "hot", "nucleus", "greedy"],
)
def test_sampler_equals_trainer(everybody_draws, way):
  rollouts = roll(way)
  for trajectory in flat(rollouts):
    trajectory_lib.check(trajectory, PADS)
    assert trajectory.temperature == (1.0 if way.greedy else way.temperature)
  assert any(len(t.turns) > 1 for t in flat(rollouts)), "nobody drew"
  assert largest_difference(rollouts) < 1e-4


def test_what_had_to_leave_the_pool_is_known_too(everybody_draws):
  """With room for two pictures, most are brought to the host, and some seen again."""
  image_features, few = ({}, {})
  engines = (engine_of(ROLLOUT), engine_of(dataclasses.replace(ROLLOUT, feature_buffer_tokens=72)))
  for engine, kept in zip(engines, (image_features, few), strict=True):
    generate_rollouts(engine, lab()[2], prompts(), 1, 3, [SAMPLED] * 2, kept)
  assert image_features.keys() == few.keys()
  assert sum(len(features) for features in image_features.values()) > 72
  for name, features in image_features.items():
    np.testing.assert_allclose(few[name], features, atol=1e-5)


def test_known_features_change_nothing_and_each_image_is_seen_once(everybody_draws):
  """The rollouts are the same, their update needs no pixels, and no image is encoded twice."""
  policy, params, weights = lab()
  engine, seen = engine_of(ROLLOUT), []

  def counted(params, feature_buffer_MYD, vision, place_M):
    seen.append(int((vision.frame_P > 0).sum()))
    return engine.programs.encode_images(params, feature_buffer_MYD, vision, place_M)

  run = dataclasses.replace(engine.programs, encode_images=counted)
  image_features: dict[str, np.ndarray] = {}
  asked = [*prompts(), *prompts()[:1]]  # one prompt twice: its drawings too
  rollouts = generate_rollouts(
    dataclasses.replace(engine, programs=run), weights, asked, 1, 3, [SAMPLED] * 2, image_features
  )
  for one, other in zip(flat(rollouts), flat(roll(of=asked)), strict=True):
    np.testing.assert_array_equal(one.token_ids_T, other.token_ids_T)
    np.testing.assert_allclose(one.logp_T, other.logp_T, atol=1e-5)
  images = {image.content_hash: image for t in flat(rollouts) for image in t.images}
  assert image_features.keys() == images.keys()
  assert sum(seen) == sum(4 * image.tokens for image in images.values())
  assert any(turn.produced for t in flat(rollouts) for turn in t.turns)
  zero_BG = np.zeros((len(rollouts), len(rollouts[0])))
  batch, _ = to_train_batch(rollouts, zero_BG, fixtures.shapes(), image_features=image_features)
  score = jax.jit(functools.partial(score_batch, policy, Microbatches(2, (256,))))
  logp_RT = np.asarray(score(params, batch))
  assert np.abs(logp_RT - batch.old_logp_RT)[batch.trained_RT].max() < 1e-4


def test_long_conversations_are_among_them(everybody_draws):
  rollouts = [group for seed in range(4) for group in roll(seed=seed)]
  trajectories = flat(rollouts)
  assert max(len(t.turns) for t in trajectories) == 3
  assert any(len(t.turns[0].produced) > 1 for t in trajectories)
  assert len({t.end_reason for t in trajectories}) > 1
  assert largest_difference(rollouts) < 1e-4


def said(trajectory):
  return trajectory.token_ids_T[trajectory.trained_T].tolist()


def test_same_seed_same_tokens(everybody_draws):
  first, again = flat(roll()), flat(roll())
  assert [said(t) for t in first] == [said(t) for t in again]
  for one, other in zip(first, again, strict=True):
    np.testing.assert_array_equal(one.logp_T, other.logp_T)
  assert [said(t) for t in first] != [said(t) for t in flat(roll(seed=2))]
  assert [said(t) for t in first] != [said(t) for t in flat(roll(step=4))]
  assert len({tuple(said(t)) for t in first}) == len(first)


def test_samples_belong_to_the_task_wherever_it_stands(everybody_draws):
  a, b = roll()
  back, front = roll(of=prompts()[::-1])
  alone = roll(of=prompts()[1:])[0]
  assert [said(t) for t in (*a, *b)] == [said(t) for t in (*front, *back)]
  assert [said(t) for t in b] == [said(t) for t in alone]


def test_samples_do_not_depend_on_group_or_chunk(everybody_draws):
  wide = dataclasses.replace(
    ROLLOUT, group=3, decode_steps=5, vision=dataclasses.replace(ROLLOUT.vision, frames=(2, 8, 32))
  )
  for small, large in zip(roll(), roll(cfg=wide), strict=True):
    assert [said(t) for t in small] == [said(t) for t in large[:2]]
    assert [t.seed_path for t in small] == [t.seed_path for t in large[:2]]


def test_samples_do_not_depend_on_how_many_are_decoded_together(everybody_draws):
  """Rows by themselves once few are left, and caches cut to their front, change no token."""
  calls = []
  engine = engine_of(ROLLOUT)

  def sample(params, state, halt_R, row_R, truncate):
    calls.append(None if row_R is None else (row_R < 6).sum())
    return engine.programs.sample(params, state, halt_R, row_R, truncate)

  counted = dataclasses.replace(engine.programs, sample=sample)
  counted = dataclasses.replace(engine, programs=counted)
  plain = dataclasses.replace(ROLLOUT, gather_fractions=(), suffix_block_edges=())
  for seed in range(4):
    cut = generate_rollouts(counted, lab()[2], prompts(), seed, 3, [SAMPLED] * 2)
    whole = roll(cfg=plain, seed=seed)
    assert [said(t) for t in flat(cut)] == [said(t) for t in flat(whole)]
    for one, other in zip(flat(cut), flat(whole), strict=True):
      np.testing.assert_allclose(one.logp_T, other.logp_T, atol=1e-4)
  assert len(set(calls)) > 1, "few and fewer"


def test_greedy_takes_no_chances():
  one, other = roll(mode(0.5, 1.0, True), seed=1), roll(mode(2.0, 1.0, True), seed=9)
  assert [said(t) for t in flat(one)] == [said(t) for t in flat(other)]
  assert all(said(group[0]) == said(group[1]) for group in one)


def test_forbidden_ids_are_never_said():
  for seed in range(3):
    for trajectory in flat(roll(mode(30.0, 1.0, False), seed=seed)):
      assert not set(said(trajectory)) & set(trajectory.forbidden_ids)
      assert max(said(trajectory)) < TOKENIZER.inner.get_vocab_size()


def test_difference_would_show(everybody_draws):
  """The comparison above is sharp: it sees a wrong temperature, position or picture."""
  trajectories = flat(roll(mode(1.7, 1.0, False)))
  drawing = next(t for t in trajectories if len(t.images) > t.prompt_images)
  shifted = drawing.position_TA.copy()
  shifted[drawing.turns[-1].start :] += 1
  for wrong in (
    dataclasses.replace(drawing, temperature=1.6),
    dataclasses.replace(drawing, position_TA=shifted),
    dataclasses.replace(drawing, images=(*drawing.images[:-1], drawing.images[0])),
  ):
    assert largest_difference([[wrong]]) > 1e-3


# --- the embedded policy, which does draw --------------------------------------------------------


@pytest.mark.slow
def test_sampler_equals_trainer_on_real_drawings():
  """Nothing is made up here: rooms, words, boxes and log-probabilities are those of a run."""
  cfg = common.get_config()
  rollout = build(RolloutConfig, cfg.rollout)
  rollout = dataclasses.replace(rollout, prompts=6, group=4)
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
  loaded = load_policy(ROOT / cfg.init, mesh)
  policy = dataclasses.replace(loaded.policy, remat=False)
  conversation = Conversation(
    loaded.tokenizer,
    build(TextConfig, cfg.text),
    build(PreprocessConfig, cfg.preprocess),
    policy.cfg,
  )
  executor = Executor(ExecutorConfig(0, 20.0, 1024), build(Style, cfg.style))
  engine = make_engine(policy, conversation, executor, rollout, 0, "config.rollout.slots")
  tasks = make_source(build(SourceConfig, cfg.source)).held_out(6)
  of = [conversation.prompt(task) for task in tasks]
  params = compiled.decode_params(policy, mesh, "compute")(loaded.params)
  rollouts = generate_rollouts(engine, params, of, 0, 0, [mode(1.2, 1.0, False)] * 4)
  trajectories = flat(rollouts)
  for trajectory in trajectories:
    trajectory_lib.check(trajectory, (policy.cfg.image_pad_id,))
  drew = [t for t in trajectories if any(turn.produced for turn in t.turns)]
  assert drew
  assert any(t.end_reason == "answer" for t in drew)
  learn = build(GrpoConfig, cfg.learn)
  shapes = batch_config(learn, policy.cfg)
  batch, _ = to_train_batch(rollouts, np.zeros((6, 4)), shapes)
  recompute = jax.jit(functools.partial(score_batch, policy, learn.micro))
  logp_RT = np.asarray(recompute(loaded.params, batch))
  difference_RT = np.abs(logp_RT - batch.old_logp_RT)[batch.trained_RT]
  assert difference_RT.max() < 1e-4, f"{difference_RT.max()} in {len(difference_RT)} tokens"
