"""Rollouts: how they end, that no output stops a run, and that they record the truth."""

import dataclasses
import functools
import itertools
import math
import pathlib
from concurrent.futures import Future

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import tiny_defaults
from spatial_jax import compiled, sharding
from spatial_jax.config import ConfigError, build
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.prompt_form import read_form
from spatial_jax.data.source import SourceConfig, make_source
from spatial_jax.data.video import VideoConfig
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.executor import Executor, ExecutorConfig, Fault
from spatial_jax.drawing.termination import StopLimits
from spatial_jax.errors import DataError
from spatial_jax.learn.gradient import batch_logprobs
from spatial_jax.learn.train_batch import Microbatches, to_train_batch
from spatial_jax.rollout import trajectory as trajectory_lib
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.image_feature_cache import max_drawn_images, max_drawn_tokens
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.stages.context import make_engine
from spatial_jax.stages.grpo import GrpoConfig, batch_config
from spatial_jax.stages.load import load_policy
from tests import rollout_fixtures as fixtures
from tests.rollout_fixtures import (
  ANSWER_TURN,
  BOX_TURN,
  PADS,
  ROLLOUT,
  SAMPLED,
  STOP,
  TOKENIZER,
  VOCABULARY,
  engine_for,
  flat,
  largest_difference,
  policy_and_params,
  sampled_ids,
  turn_ids,
)

ROOT = pathlib.Path(__file__).parent.parent
ONE = dataclasses.replace(
  ROLLOUT, prompts=1, slots=1, group=1, max_tokens_per_turn=80, decode_steps=16
)
OTHER_BOX_TURN = BOX_TURN.replace("[2, 3", "[1, 1")
SCRATCH = "```json\n[{}]\n```"


def scripted_rollout(*turns: str, cfg=ONE, executor=None, sizes=((24, 24),)):
  """The trajectory of a policy that writes these turns."""
  engine = fixtures.scripted_engine([turns], cfg)
  if executor is not None:
    engine = dataclasses.replace(engine, executor=executor)
  prompt = engine.conversation.prompt(fixtures.task("room/one", sizes))
  ((trajectory,),) = generate_rollouts(engine, {}, RolloutJob([prompt], 0, 0, [SAMPLED]))
  trajectory_lib.check(trajectory, PADS)
  return trajectory


def sampling(temperature, top_p, greedy):
  return dataclasses.replace(SAMPLED, temperature=temperature, top_p=top_p, greedy=greedy)


class BrokenExecutor(Executor):
  """Every drawing is a fault."""

  def submit(self, images, operations):
    broken = Future()
    broken.set_result(Fault("the worker died"))
    return broken


def long_response(**changed):
  """One rollout of up to 400 tokens, with other limits changed."""
  stop = dataclasses.replace(ROLLOUT.stop, max_response_tokens=400, **changed)
  return dataclasses.replace(ONE, stop=stop)


# --- how a rollout ends --------------------------------------------------------------------------


def test_drawing_then_answer():
  trajectory = scripted_rollout(BOX_TURN, ANSWER_TURN, cfg=long_response())
  assert trajectory.end_reason == "answer"
  drawing, answer = trajectory.turns
  assert [o.label for o in drawing.operations] == ["chair"]
  assert drawing.executable
  assert answer.executable
  assert drawing.produced == (trajectory.images[1].content_hash,)
  assert (trajectory.images[1].pixels != trajectory.images[0].pixels).any()
  assert TOKENIZER.decode(trajectory.token_ids_T[answer.start : answer.end]) == ANSWER_TURN
  assert sampled_ids(trajectory) == turn_ids(BOX_TURN) + turn_ids(ANSWER_TURN)
  assert (trajectory.token_ids_T[[drawing.end - 1, answer.end - 1]] == STOP).all()


def test_response_prefix_is_parsed_and_not_trained():
  response_prefix = "<think> I mark"
  rest, cfg = BOX_TURN.removeprefix(response_prefix), long_response()
  engine = fixtures.scripted_engine([[rest, ANSWER_TURN]], cfg)
  conversation = dataclasses.replace(engine.conversation, response_prefix=response_prefix)
  engine = dataclasses.replace(engine, conversation=conversation)
  prompt = conversation.prompt(fixtures.task("room/one"))
  ((trajectory,),) = generate_rollouts(engine, {}, RolloutJob([prompt], 0, 0, [SAMPLED]))
  trajectory_lib.check(trajectory, PADS)
  assert [turn.text for turn in trajectory.turns] == [BOX_TURN, ANSWER_TURN]
  assert [turn.executable for turn in trajectory.turns] == [True, True]
  assert sampled_ids(trajectory) == turn_ids(rest) + turn_ids(ANSWER_TURN)
  prompt_text = TOKENIZER.decode(trajectory.token_ids_T[: trajectory.prompt_length])
  assert prompt_text.endswith(response_prefix)


@pytest.mark.parametrize(
  ("reason", "turns", "cfg"),
  [
    ("answer", [ANSWER_TURN], long_response()),
    ("answer", [BOX_TURN + ANSWER_TURN], long_response()),
    ("no_action", ["<think> I see nothing. </think> Action: Answer"], long_response()),
    ("no_action", [""], long_response()),
    ("no_action", [SCRATCH], long_response()),
    ("too_many_images", [BOX_TURN], long_response(max_images=1)),
    ("too_many_images", [BOX_TURN], long_response(max_image_tokens=17)),  # 9 per image
    ("answer", [BOX_TURN, ANSWER_TURN], long_response(max_image_tokens=18)),
    ("repeated_operation", [BOX_TURN, BOX_TURN], long_response()),
    ("turn_limit", [BOX_TURN], long_response(max_turns=1)),
    ("turn_limit", [BOX_TURN, OTHER_BOX_TURN], long_response(max_turns=2)),
    ("token_limit", ["word " * 200], long_response()),
    ("token_limit", [BOX_TURN], dataclasses.replace(ONE, stop=StopLimits(3, 4, 999, 50, 0.0))),
    ("token_limit", [BOX_TURN], dataclasses.replace(long_response(), observation_buckets=(12,))),
  ],
)
def test_every_end_reason_is_reached(reason, turns, cfg):
  trajectory = scripted_rollout(*turns, cfg=cfg)
  assert trajectory.end_reason == reason
  assert len(trajectory.turns) == len(turns)
  assert len(trajectory.token_ids_T) - trajectory.prompt_length <= cfg.stop.max_response_tokens
  assert all(turn.end - turn.start <= cfg.max_tokens_per_turn for turn in trajectory.turns)
  if trajectory.turns[-1].operations or trajectory.turns[-1].errors:
    assert not trajectory.turns[-1].executable, "the turn that ended the rollout was not drawn"


def test_observation_is_added_whole_or_not_at_all():
  two = BOX_TURN.replace("}]", '}, {"index": 2, "bbox_2d": [1, 1, 9, 9], "label": "b"}]')
  sizes = ((24, 24), (16, 40))
  shown = scripted_rollout(ANSWER_TURN, cfg=long_response(), sizes=sizes).images
  tokens = sum(image.tokens for image in shown)
  enough = dataclasses.replace(
    long_response(max_images=9, max_image_tokens=2 * tokens), max_tokens_per_turn=120
  )
  assert len(scripted_rollout(two, ANSWER_TURN, cfg=enough, sizes=sizes).images) == 4
  less = dataclasses.replace(enough.stop, max_image_tokens=2 * tokens - 1)
  ended = scripted_rollout(two, cfg=dataclasses.replace(enough, stop=less), sizes=sizes)
  assert ended.end_reason == "too_many_images"
  assert len(ended.images) == 2


def test_last_turn_is_announced_and_may_only_answer():
  cfg = long_response(max_turns=3, max_images=9)
  trajectory = scripted_rollout(BOX_TURN, OTHER_BOX_TURN, ANSWER_TURN, cfg=cfg)
  ids, turns = trajectory.token_ids_T, trajectory.turns
  observations = [
    TOKENIZER.decode(ids[before.end : after.start]) for before, after in itertools.pairwise(turns)
  ]
  assert ["more" in text for text in observations] == [True, False]
  assert ["final" in text for text in observations] == [False, True]
  repeated = scripted_rollout(BOX_TURN, BOX_TURN, cfg=long_response(max_turns=2))
  assert repeated.end_reason == "repeated_operation"


def test_fault_is_left_out_of_the_update():
  executor = BrokenExecutor(ExecutorConfig(0, 20.0, 1024), fixtures.STYLE)
  fault = scripted_rollout(BOX_TURN, cfg=long_response(), executor=executor)
  assert fault.end_reason == "fault"
  assert not fault.turns[0].executable
  other = scripted_rollout(ANSWER_TURN, cfg=long_response())
  shapes = dataclasses.replace(fixtures.shapes(), tokens=512)
  batch, _ = to_train_batch([[fault, other]], np.ones((1, 2)), shapes)
  assert not batch.rows.trained_RT[0].any()
  assert batch.rows.trained_RT[1].sum() == len(turn_ids(ANSWER_TURN))


# --- any output ----------------------------------------------------------------------------------

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
THREE = dataclasses.replace(long_response(max_images=5), group=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(TURN, min_size=3, max_size=3), min_size=3, max_size=3))
def test_no_output_stops_a_run(turns):
  scripts = [[[*turn, STOP] for turn in row] for row in turns]
  engine = fixtures.make_engine(fixtures.ScriptedPrograms(scripts, THREE), THREE)
  prompt = engine.conversation.prompt(fixtures.task("room/any", ((24, 24), (16, 40))))
  trajectories = flat(generate_rollouts(engine, {}, RolloutJob([prompt], 0, 0, [SAMPLED] * 3)))
  for trajectory in trajectories:
    trajectory_lib.check(trajectory, PADS)
    assert trajectory.end_reason != "fault"
    assert len(trajectory.token_ids_T) - trajectory.prompt_length <= THREE.stop.max_response_tokens
    assert len(trajectory.images) <= THREE.stop.max_images
    assert len(trajectory.turns) <= THREE.stop.max_turns
  shapes = dataclasses.replace(fixtures.shapes(), tokens=512)
  to_train_batch([trajectories], np.zeros((1, 3)), shapes)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 5))
def test_max_drawn_images_is_reached_by_drawing_on_all_images(images, limit, turns):
  count = images
  for _ in range(turns - 1):
    count += count if 2 * count <= limit else max(limit - count, 0)
  assert max_drawn_images(images, StopLimits(turns, limit, 9, 9, 0.0)) == count - images


def test_max_drawn_tokens_is_limited_by_images_and_budget():
  images = fixtures.conversation().prompt(fixtures.task("room", ((24, 24), (16, 40)))).images
  shown, largest = sum(i.tokens for i in images), max(i.tokens for i in images)
  assert max_drawn_tokens(images, StopLimits(2, 8, 9_999, 9, 0.0)) == 2 * largest
  assert max_drawn_tokens(images, StopLimits(2, 8, shown + 5, 9, 0.0)) == 5
  assert max_drawn_tokens(images, StopLimits(2, 8, 1, 9, 0.0)) == 0


def test_drawings_that_may_not_fit_are_refused_before_sampling():
  cfg = dataclasses.replace(ONE, feature_buffer_tokens=10)
  engine = fixtures.scripted_engine([[ANSWER_TURN]], cfg)
  prompt = engine.conversation.prompt(fixtures.task("room/one"))
  job = RolloutJob([prompt], 0, 0, [SAMPLED])
  message = r"of room/one; raise config\.rollout\.feature_buffer_tokens: it is 10"
  with pytest.raises(DataError, match=message):
    generate_rollouts(engine, {}, job)
  short = dataclasses.replace(engine, cfg=dataclasses.replace(ONE, observation_buckets=(10,)))
  with pytest.raises(DataError, match=r"of room/one; raise config\.rollout\.observation_buckets"):
    generate_rollouts(short, {}, job)
  long = engine.conversation.prompt(fixtures.task("room/long", question="word " * 200))
  with pytest.raises(DataError, match="room/long"):
    generate_rollouts(
      dataclasses.replace(engine, cfg=ONE), {}, dataclasses.replace(job, prompts=[long])
    )


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
  ("cfg", "field", "values"),
  [
    (SAMPLED, "temperature", (0.0, -1.0, NAN, INF, 1e-50, True, "hot")),
    (SAMPLED, "top_p", (0.0, 1.1, NAN, -INF, 1e-50, None)),
    (SAMPLED, "min_p", (1.0, -0.1, NAN)),
    (SAMPLED, "top_k", (-1, 1.5, NAN, True)),
    (SAMPLED, "max_tokens_per_turn", (-1, 2.0)),
    (SAMPLED, "greedy", (1, None)),
    (ROLLOUT, "prompts", (0, -3, 1.0, NAN)),
    (ROLLOUT, "group", (0, 2.5)),
    (ROLLOUT, "slots", (0, -1, NAN, True)),
    (ROLLOUT, "rows", (-1, 7, 2.5, NAN)),
    (ROLLOUT, "decode_steps", (0, NAN)),
    (ROLLOUT, "drawing_delay", (0, -1)),
    (ROLLOUT, "max_tokens_per_turn", (0, 1e3)),
    (ROLLOUT, "feature_buffer_tokens", (0, -1)),
    (ROLLOUT, "gather_fractions", ((0.0,), (0.5, 1.0), (NAN,), (-0.5,), ("half",))),
    (ROLLOUT, "schedule", ("fast", None)),
    (ROLLOUT, "weights", ("int4",)),
    (ROLLOUT, "stop_tokens", (("",),)),
    (ROLLOUT, "stop_strings", (("",), ("a", ""))),
    (ROLLOUT, "prefill", ((), (4, 2), (2, 2), (0, 1), (1.0,))),
    (ROLLOUT, "append", ((), (4, 2), (True, 2))),
    (ROLLOUT, "prompt_buckets", ((), (64, 32), (-1,), (NAN,))),
    (ROLLOUT, "observation_buckets", ((), (64, 32))),
    (ROLLOUT, "suffix_block_edges", ((0, 8), (8, 8), (9, 8))),
  ],
)
def test_values_out_of_range_are_refused_by_name(cfg, field, values):
  for value in values:
    with pytest.raises(ConfigError, match=rf"^{field} is .* and must ") as error:
      dataclasses.replace(cfg, **{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("key", "value"), [("slots", 0), ("sampling.temperature", NAN), ("prefill", (8, 1))]
)
def test_message_of_a_wrong_value_has_the_full_config_key(key, value):
  settings_of_run = tiny_defaults.get_config().rollout
  *parents, name = key.split(".")
  section = settings_of_run
  for parent in parents:
    section = section[parent]
  with section.unlocked():
    section[name] = value
  with pytest.raises(ConfigError, match=rf"^config\.rollout\.{key} .*must "):
    build(RolloutConfig, settings_of_run, "config.rollout")


# --- the random policy ---------------------------------------------------------------------------


def prompts():
  """Two prompts of different length, one with two images of different sizes."""
  tasks = [
    fixtures.task("room/a", ((24, 24), (16, 40))),
    fixtures.task("room/b", question="How far is the chair from the other chair?"),
  ]
  return [fixtures.conversation().prompt(task) for task in tasks]


def run_rollouts(params=SAMPLED, cfg=ROLLOUT, of=None, seed=1, step=3):
  job = RolloutJob(of or prompts(), seed, step, [params] * cfg.group)
  return generate_rollouts(engine_for(cfg), policy_and_params()[2], job)


@pytest.fixture
def all_turns_draw(monkeypatch):
  fixtures.draw_in_all_turns(monkeypatch)


@pytest.mark.parametrize(
  "params",
  [SAMPLED, sampling(1.7, 1.0, False), sampling(0.6, 0.8, False), sampling(0.6, 1.0, True)],
  ids=["plain", "hot", "nucleus", "greedy"],
)
def test_sampler_equals_trainer(all_turns_draw, params):
  rollouts = run_rollouts(params)
  for trajectory in flat(rollouts):
    trajectory_lib.check(trajectory, PADS)
    assert trajectory.temperature == (1.0 if params.greedy else params.temperature)
  assert any(len(t.turns) > 1 for t in flat(rollouts)), "some rollouts draw"
  assert largest_difference(rollouts) < 1e-4


def test_features_that_leave_the_buffer_are_kept_too(all_turns_draw):
  """With room for two images, most are copied to the host, and some are encoded again."""
  large, small = {}, {}
  small_buffer = dataclasses.replace(ROLLOUT, feature_buffer_tokens=72)
  for cfg, features in ((ROLLOUT, large), (small_buffer, small)):
    job = RolloutJob(prompts(), 1, 3, [SAMPLED] * 2, features)
    generate_rollouts(engine_for(cfg), policy_and_params()[2], job)
  assert large.keys() == small.keys()
  assert sum(len(features) for features in large.values()) > 72
  for name, features in large.items():
    np.testing.assert_allclose(small[name], features, atol=1e-5)


def test_each_image_is_encoded_once_and_its_features_serve_the_update(all_turns_draw):
  """The rollouts are the same, their update needs no pixels, and no image is encoded twice."""
  policy, params, weights = policy_and_params()
  encoded = []

  def around(name, program, *arguments):
    if name == "encode_images":
      encoded.append(int((arguments[2].frame_P > 0).sum()))
    return program(*arguments)

  image_features: dict[str, np.ndarray] = {}
  of = [*prompts(), *prompts()[:1]]  # one prompt twice: its drawings too
  job = RolloutJob(of, 1, 3, [SAMPLED] * 2, image_features)
  rollouts = generate_rollouts(fixtures.watch(engine_for(ROLLOUT), around), weights, job)
  for one, other in zip(flat(rollouts), flat(run_rollouts(of=of)), strict=True):
    np.testing.assert_array_equal(one.token_ids_T, other.token_ids_T)
    np.testing.assert_allclose(one.logp_T, other.logp_T, atol=1e-5)
  images = {image.content_hash: image for t in flat(rollouts) for image in t.images}
  assert image_features.keys() == images.keys()
  assert sum(encoded) == sum(4 * image.tokens for image in images.values())
  assert any(turn.produced for t in flat(rollouts) for turn in t.turns)
  zero_BG = np.zeros((len(rollouts), len(rollouts[0])))
  batch, _ = to_train_batch(rollouts, zero_BG, fixtures.shapes(), image_features=image_features)
  score = jax.jit(functools.partial(batch_logprobs, policy, Microbatches(2, (256,))))
  logp_RT = np.asarray(score(params, batch))
  assert np.abs(logp_RT - batch.rows.old_logp_RT)[batch.rows.trained_RT].max() < 1e-4


def test_sampler_equals_trainer_over_several_drawing_turns(all_turns_draw):
  rollouts = [group for seed in range(4) for group in run_rollouts(seed=seed)]
  trajectories = flat(rollouts)
  assert max(len(t.turns) for t in trajectories) == 3
  assert any(len(t.turns[0].produced) > 1 for t in trajectories)
  assert len({t.end_reason for t in trajectories}) > 1
  assert largest_difference(rollouts) < 1e-4


def all_sampled_ids(rollouts):
  return [sampled_ids(t) for t in flat(rollouts)]


def test_same_seed_gives_the_same_tokens(all_turns_draw):
  first, again = run_rollouts(), run_rollouts()
  assert all_sampled_ids(first) == all_sampled_ids(again)
  for one, other in zip(flat(first), flat(again), strict=True):
    np.testing.assert_array_equal(one.logp_T, other.logp_T)
  assert all_sampled_ids(first) != all_sampled_ids(run_rollouts(seed=2))
  assert all_sampled_ids(first) != all_sampled_ids(run_rollouts(step=4))
  assert len({tuple(ids) for ids in all_sampled_ids(first)}) == len(flat(first))


def test_samples_do_not_depend_on_the_place_of_the_task(all_turns_draw):
  a, b = run_rollouts()
  back, front = run_rollouts(of=prompts()[::-1])
  (alone,) = run_rollouts(of=prompts()[1:])
  assert all_sampled_ids([a, b]) == all_sampled_ids([front, back])
  assert all_sampled_ids([b]) == all_sampled_ids([alone])


def test_samples_do_not_depend_on_group_or_chunk(all_turns_draw):
  vision = dataclasses.replace(ROLLOUT.vision, frames=(2, 8, 32))
  wide = dataclasses.replace(ROLLOUT, group=3, decode_steps=5, vision=vision)
  for small, large in zip(run_rollouts(), run_rollouts(cfg=wide), strict=True):
    assert all_sampled_ids([small]) == all_sampled_ids([large[:2]])
    assert [t.seed_path for t in small] == [t.seed_path for t in large[:2]]


def test_gathered_rows_and_cache_blocks_change_no_token(all_turns_draw):
  counts = []

  def around(name, program, *arguments):
    if name == "decode":
      row_R = arguments[3]
      counts.append(None if row_R is None else (row_R < 6).sum())
    return program(*arguments)

  watched = fixtures.watch(engine_for(ROLLOUT), around)
  plain = dataclasses.replace(ROLLOUT, gather_fractions=(), suffix_block_edges=())
  for seed in range(4):
    job = RolloutJob(prompts(), seed, 3, [SAMPLED] * 2)
    gathered = generate_rollouts(watched, policy_and_params()[2], job)
    whole = run_rollouts(cfg=plain, seed=seed)
    assert all_sampled_ids(gathered) == all_sampled_ids(whole)
    for one, other in zip(flat(gathered), flat(whole), strict=True):
      np.testing.assert_allclose(one.logp_T, other.logp_T, atol=1e-4)
  assert len(set(counts)) > 1, "chunks of several row counts"


def test_greedy_ignores_seed_and_temperature():
  one = run_rollouts(sampling(0.5, 1.0, True), seed=1)
  other = run_rollouts(sampling(2.0, 1.0, True), seed=9)
  assert all_sampled_ids(one) == all_sampled_ids(other)
  assert all(sampled_ids(group[0]) == sampled_ids(group[1]) for group in one)


def test_forbidden_ids_are_never_sampled():
  for seed in range(3):
    for trajectory in flat(run_rollouts(sampling(30.0, 1.0, False), seed=seed)):
      assert not set(sampled_ids(trajectory)) & set(trajectory.forbidden_ids)
      assert max(sampled_ids(trajectory)) < TOKENIZER.inner.get_vocab_size()


def test_largest_difference_detects_wrong_temperature_position_and_image(all_turns_draw):
  trajectories = flat(run_rollouts(sampling(1.7, 1.0, False)))
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
  """Rooms, texts, boxes and log-probabilities are those of a run."""
  cfg = tiny_defaults.get_config()
  rollout = build(RolloutConfig, cfg.rollout)
  rollout = dataclasses.replace(rollout, prompts=6, group=4)
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
  loaded = load_policy(ROOT / cfg.init, mesh)
  policy = dataclasses.replace(loaded.policy, remat=False)
  conversation = Conversation(
    loaded.tokenizer,
    read_form(cfg.text),
    loaded.template,
    build(PreprocessConfig, cfg.preprocess),
    build(VideoConfig, cfg.video),
    policy.cfg,
  )
  executor = Executor(ExecutorConfig(0, 20.0, 1024), build(Style, cfg.style))
  engine = make_engine(policy, conversation, executor, rollout, 0, "config.rollout.slots")
  tasks = make_source(build(SourceConfig, cfg.source)).held_out(6)
  of = [conversation.prompt(task) for task in tasks]
  params = compiled.decode_params(policy, mesh, "compute")(loaded.params)
  job = RolloutJob(of, 0, 0, [sampling(1.2, 1.0, False)] * 4)
  rollouts = generate_rollouts(engine, params, job)
  trajectories = flat(rollouts)
  for trajectory in trajectories:
    trajectory_lib.check(trajectory, (policy.cfg.image_pad_id,))
  drew = [t for t in trajectories if any(turn.produced for turn in t.turns)]
  assert drew
  assert any(t.end_reason == "answer" for t in drew)
  learn = build(GrpoConfig, cfg.learn)
  shapes = batch_config(learn, policy.cfg)
  batch, _ = to_train_batch(rollouts, np.zeros((6, 4)), shapes)
  recompute = jax.jit(functools.partial(batch_logprobs, policy, learn.micro))
  logp_RT = np.asarray(recompute(loaded.params, batch))
  difference_RT = np.abs(logp_RT - batch.rows.old_logp_RT)[batch.rows.trained_RT]
  assert difference_RT.max() < 1e-4, f"{difference_RT.max()} in {len(difference_RT)} tokens"
