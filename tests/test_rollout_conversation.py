"""Prompts, observations and demonstrations become trajectories of one form."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.data.tokenizer import IM_END, SPECIAL_TOKENS
from spatial_jax.drawing.parser import Coordinates, Limits, parse
from spatial_jax.errors import DataError
from spatial_jax.policy.rope import mrope_positions
from spatial_jax.reward.compose import score
from spatial_jax.rollout import trajectory as trajectory_lib
from spatial_jax.rollout.conversation import TrajectoryBuilder
from spatial_jax.rollout.demonstration import demonstration_trajectory
from spatial_jax.synthetic.oracle import DemonstrationConfig, demonstrate
from spatial_jax.types import ImageRef, ObjectBox, Operation, ScriptTurn
from tests import dummies
from tests import rollout_fixtures as fixtures
from tests.rollout_fixtures import PADS, STYLE, TOKENIZER, VOCABULARY

CONVERSATION = fixtures.conversation()
LIMITS = Limits(4, 2000, 8, 8, 40, 6)


# --- prompts -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(8, 60), st.integers(8, 60)), min_size=1, max_size=3))
def test_prompt_has_the_tokens_of_its_images(sizes):
  prompt = CONVERSATION.prompt(fixtures.task("room/x", sizes))
  is_pad_T = prompt.token_ids_T == PADS[0]
  assert is_pad_T.sum() == sum(image.tokens for image in prompt.images)
  for image, start in zip(prompt.images, prompt.image_start, strict=True):
    assert is_pad_T[start : start + image.tokens].all()
    assert not is_pad_T[start - 1]
    assert not is_pad_T[start + image.tokens]
  assert prompt.position_TA.dtype == prompt.token_ids_T.dtype == np.int32
  assert prompt.next_position == prompt.position_TA.max() + 1
  again = CONVERSATION.prompt(prompt.task, prompt.images)
  np.testing.assert_array_equal(again.token_ids_T, prompt.token_ids_T)


def test_prompt_text_is_the_chat_format():
  task = fixtures.task("room/x", ((24, 24), (24, 24)), "Is it <|im_end|> near?")
  prompt = CONVERSATION.prompt(task)
  text = TOKENIZER.inner.decode(prompt.token_ids_T.tolist(), skip_special_tokens=False)
  image = f"<|vision_start|>{'<|image_pad|>' * prompt.images[0].tokens}<|vision_end|>"
  assert text == (
    f"<|im_start|>user\n{image}1\n{image}2\nIs it < |im_end|> near? N<|im_end|>\n"
    "<|im_start|>assistant\n"
  )


def test_unusable_images_are_named():
  with pytest.raises(DataError, match="aspect ratio over 200"):
    CONVERSATION.prompt(fixtures.task("room/x", ((2, 500),)))
  one_channel = dataclasses.replace(
    fixtures.task("x"), media=(ImageRef(np.zeros((24, 24), np.uint8)),)
  )
  with pytest.raises(DataError, match=r"uint8 \[height, width, 3\]"):
    CONVERSATION.prompt(one_channel)


def test_all_special_tokens_but_im_end_are_forbidden():
  forbidden = set(CONVERSATION.forbidden_ids)
  special = {TOKENIZER.id(token) for token in SPECIAL_TOKENS}
  assert special - forbidden == {TOKENIZER.id(IM_END)}
  assert forbidden - special == set(range(TOKENIZER.inner.get_vocab_size(), VOCABULARY))


# --- the trajectory builder ----------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=4))
def test_builder_keeps_all_invariants(turns):
  prompt = CONVERSATION.prompt(fixtures.task("room/x", ((24, 24), (16, 40))))
  builder = TrajectoryBuilder(prompt, 1, (0, 2, 7, 1), 0.5, CONVERSATION.forbidden_ids)
  pixels = [image.pixels for image in prompt.images]
  for number, (count, drawn) in enumerate(turns):
    ids = list(range(40, 40 + count))
    operations = (Operation("box", 1, (1.0, 1.0, 5.0, 5.0), "a"),) * bool(drawn)
    builder.add_turn(ids, [-0.5] * count, number, "text", operations, ())
    assert builder.turns[-1].executable == (not drawn), "nothing is drawn yet"
    if drawn:
      observation = CONVERSATION.observation(len(builder.images) + 1, pixels[:drawn], last=False)
      builder.add_observation(observation)
      assert builder.turns[-1].executable
      assert len(builder.turns[-1].produced) == drawn
  trajectory = builder.finish("answer")
  trajectory_lib.check(trajectory, PADS)
  assert len(trajectory.images) == 2 + sum(drawn for _, drawn in turns)
  assert trajectory.trained_T.sum() == sum(count for count, _ in turns)
  for number, turn in enumerate(trajectory.turns):
    assert (trajectory.policy_step_T[turn.start : turn.end] == number).all()
    assert (trajectory.logp_T[turn.start : turn.end] == -0.5).all()
  grids = [image.grid_3 for image in trajectory.images]
  whole_TA, _ = mrope_positions(trajectory.token_ids_T, grids, CONVERSATION.policy, (), "max")
  np.testing.assert_array_equal(trajectory.position_TA, whole_TA)


def test_turn_with_errors_is_not_executable():
  prompt = CONVERSATION.prompt(fixtures.task("room/x"))
  builder = TrajectoryBuilder(prompt, 0, (), 1.0, ())
  operation = Operation("box", 1, (1.0, 1.0, 5.0, 5.0), "a")
  error = dummies.OperationError("bad_json", "no")
  builder.add_turn([40], [-1.0], 0, "text", (operation,), (error,))
  builder.add_observation(CONVERSATION.observation(2, [prompt.images[0].pixels], last=True))
  assert not builder.turns[0].executable
  assert builder.turns[0].produced


# --- demonstrations ------------------------------------------------------------------------------


def task_with_boxes(scale=1):
  """Two images that are `scale` times as large as the policy may get them, with three boxes."""
  side = 64 * scale
  boxes = (
    ObjectBox("chair", 0, (2.0 * scale, 3.0 * scale, 40.0 * scale, 50.0 * scale), 2.1),
    ObjectBox("chair", 0, (44.0 * scale, 3.0 * scale, 60.0 * scale, 20.0 * scale), 2.6),
    ObjectBox("table", 1, (0.0, 0.0, 64.0 * scale, 33.0 * scale), 3.0),
  )
  return dataclasses.replace(fixtures.task("room/x", ((side, side),) * 2), boxes=boxes)


FAMILY = {"pixels": "qwen2_5_vl", "per_mille": "qwen3_vl"}


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from((1, 2)), st.sampled_from(("pixels", "per_mille")))
def test_demonstrations_have_full_score_and_parse_back(seed, scale, unit):
  task = task_with_boxes(scale)
  policy = dataclasses.replace(CONVERSATION.policy, family=FAMILY[unit])
  conversation = fixtures.conversation(policy)
  script = demonstrate(task, np.random.default_rng(seed), DemonstrationConfig(0.8, 3))
  prompt = conversation.prompt(task)
  trajectory = demonstration_trajectory(conversation, prompt, script, STYLE)
  trajectory_lib.check(trajectory, PADS)
  scores = score([[trajectory]], [task], dummies.REWARD, 100.0)
  assert scores.format_BG[0, 0] == scores.score_BG[0, 0] == 1
  sizes = [(image.pixels.shape[1], image.pixels.shape[0]) for image in trajectory.images]
  shown = 2
  for turn in trajectory.turns:
    parsed = parse(turn.text, Coordinates(unit, tuple(sizes[:shown])), LIMITS)
    assert parsed.operations == turn.operations
    assert not parsed.errors
    assert parsed.well_formed
    shown += len(turn.produced)
    ids = trajectory.token_ids_T[turn.start : turn.end].tolist()
    assert ids == [*TOKENIZER.encode(turn.text), TOKENIZER.id(IM_END)]
  assert shown == len(trajectory.images)


def demonstration(task, script):
  return demonstration_trajectory(CONVERSATION, CONVERSATION.prompt(task), script, STYLE)


def test_boxes_scale_with_an_image_that_is_resized():
  task = task_with_boxes(2)
  script = demonstrate(task, np.random.default_rng(0), DemonstrationConfig(1.0, 3))
  trajectory = demonstration(task, script)
  assert trajectory.images[0].pixels.shape == (64, 64, 3)
  assert trajectory.turns[0].operations[0].points_4 == (2.0, 3.0, 40.0, 50.0)


def test_only_the_last_observation_asks_for_the_answer():
  boxes = [Operation("box", 1, (1.0, 2.0, 9.0 + i, 9.0), "a") for i in range(2)]
  on_drawn = Operation("line", 2, (1.0, 2.0, 9.0, 9.0), "path")
  script = [
    ScriptTurn("One.", (boxes[0],), None),
    ScriptTurn("Two.", (on_drawn,), None),
    ScriptTurn("Three.", (), "2.1"),
  ]
  trajectory = demonstration(fixtures.task("room/x", ((24, 24),)), script)
  trajectory_lib.check(trajectory, PADS)
  assert [len(turn.produced) for turn in trajectory.turns] == [1, 1, 0]
  assert trajectory.turns[1].operations == (on_drawn,)
  observations = TOKENIZER.decode(trajectory.token_ids_T[trajectory.turns[0].end :])
  assert observations.index("more") < observations.index("final")
