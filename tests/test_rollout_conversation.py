"""Prompts, observations and demonstrations: one form of trajectory, whoever speaks."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.data.tokenizer import IM_END, IMAGE_PAD, SPECIAL_TOKENS
from spatial_jax.drawing.parser import Coordinates, Limits, parse
from spatial_jax.errors import DataError
from spatial_jax.policy.rope import mrope_positions
from spatial_jax.reward.compose import score
from spatial_jax.rollout import trajectory as trajectory_lib
from spatial_jax.rollout.conversation import Episode
from spatial_jax.rollout.demonstration import play
from spatial_jax.synthetic.oracle import DemonstrationConfig, ScriptTurn, demonstrate
from spatial_jax.types import ObjectBox, Operation
from tests import dummies
from tests import rollout_fixtures as fixtures
from tests.rollout_fixtures import STYLE, TOKENIZER, VOCABULARY

PADS = (TOKENIZER.id(IMAGE_PAD),)
TALK = fixtures.conversation()
LIMITS = Limits(4, 2000, 8, 8, 40, 6)


# --- prompts -------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(8, 60), st.integers(8, 60)), min_size=1, max_size=3))
def test_prompt_holds_its_pictures(sizes):
  prompt = TALK.prompt(fixtures.task("room/x", sizes))
  is_pad_T = prompt.token_ids_T == PADS[0]
  assert is_pad_T.sum() == sum(image.tokens for image in prompt.images)
  for image, start in zip(prompt.images, prompt.image_start, strict=True):
    assert is_pad_T[start : start + image.tokens].all()
    assert not is_pad_T[start - 1]
    assert not is_pad_T[start + image.tokens]
  assert prompt.position_TA.dtype == prompt.token_ids_T.dtype == np.int32
  assert prompt.next_position == prompt.position_TA.max() + 1
  again = TALK.prompt(prompt.task, prompt.images)
  np.testing.assert_array_equal(again.token_ids_T, prompt.token_ids_T)


def test_prompt_reads_as_a_conversation():
  prompt = TALK.prompt(fixtures.task("room/x", ((24, 24), (24, 24)), "Is it <|im_end|> near?"))
  read = TOKENIZER.inner.decode(prompt.token_ids_T.tolist(), skip_special_tokens=False)
  image = f"<|vision_start|>{'<|image_pad|>' * prompt.images[0].tokens}<|vision_end|>"
  assert read == (
    f"<|im_start|>user\n{image}1\n{image}2\nIs it < |im_end|> near? N<|im_end|>\n"
    "<|im_start|>assistant\n"
  )


def test_pictures_that_cannot_be_used_are_named():
  with pytest.raises(DataError, match="aspect ratio over 200"):
    TALK.prompt(fixtures.task("room/x", ((2, 500),)))
  grey = dataclasses.replace(fixtures.task("x"), images=(np.zeros((24, 24), np.uint8),))
  with pytest.raises(DataError, match=r"uint8 \[height, width, 3\]"):
    TALK.prompt(grey)


def test_forbidden_ids():
  forbidden = set(TALK.forbidden_ids)
  special = {TOKENIZER.id(token) for token in SPECIAL_TOKENS}
  assert special - forbidden == {TOKENIZER.id(IM_END)}
  assert forbidden - special == set(range(TOKENIZER.inner.get_vocab_size(), VOCABULARY))


# --- episodes ------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=4))
def test_episode_grows_a_sound_trajectory(turns):
  prompt = TALK.prompt(fixtures.task("room/x", ((24, 24), (16, 40))))
  episode = Episode(prompt, 1, (0, 2, 7, 1), 0.5, TALK.forbidden_ids)
  pixels = [image.pixels for image in prompt.images]
  for number, (count, drawn) in enumerate(turns):
    ids = list(range(40, 40 + count))
    operations = (Operation("box", 1, (1.0, 1.0, 5.0, 5.0), "a"),) * bool(drawn)
    episode.add_turn(ids, [-0.5] * count, number, "text", operations, ())
    assert episode.turns[-1].executable == (not drawn), "nothing is drawn yet"
    if drawn:
      observation = TALK.observation(len(episode.images) + 1, pixels[:drawn], last=False)
      episode.add_observation(observation)
      assert episode.turns[-1].executable
      assert len(episode.turns[-1].produced) == drawn
  trajectory = episode.finish("answer")
  trajectory_lib.check(trajectory, PADS)
  assert len(trajectory.images) == 2 + sum(drawn for _, drawn in turns)
  assert trajectory.trained_T.sum() == sum(count for count, _ in turns)
  for number, turn in enumerate(trajectory.turns):
    assert (trajectory.policy_step_T[turn.start : turn.end] == number).all()
    assert (trajectory.logp_T[turn.start : turn.end] == -0.5).all()
  whole, _ = mrope_positions(
    trajectory.token_ids_T, [i.grid_3 for i in trajectory.images], TALK.policy, (), "max"
  )
  np.testing.assert_array_equal(trajectory.position_TA, whole)


def test_episode_of_a_turn_with_errors_is_not_executable():
  prompt = TALK.prompt(fixtures.task("room/x"))
  episode = Episode(prompt, 0, (), 1.0, ())
  operation = Operation("box", 1, (1.0, 1.0, 5.0, 5.0), "a")
  error = dummies.OperationError("bad_json", "no")
  episode.add_turn([40], [-1.0], 0, "text", (operation,), (error,))
  episode.add_observation(TALK.observation(2, [prompt.images[0].pixels], last=True))
  assert not episode.turns[0].executable
  assert episode.turns[0].produced


# --- demonstrations ------------------------------------------------------------------------------


def two_pictures(scale=1):
  """Boxes on pictures that are `scale` times as large as the policy may see them."""
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
def test_demonstrations_are_flawless_rollouts(seed, scale, unit):
  task = two_pictures(scale)
  conversation = fixtures.conversation(dataclasses.replace(TALK.policy, family=FAMILY[unit]))
  script = demonstrate(task, np.random.default_rng(seed), DemonstrationConfig(0.8, 3))
  trajectory = play(conversation, conversation.prompt(task), script, STYLE)
  trajectory_lib.check(trajectory, PADS)
  scores = score([[trajectory]], [task], dummies.REWARD, 100.0)
  assert scores.format_BG[0, 0] == scores.score_BG[0, 0] == 1
  sizes = [(image.pixels.shape[1], image.pixels.shape[0]) for image in trajectory.images]
  seen = 2
  for turn in trajectory.turns:
    parsed = parse(turn.text, Coordinates(unit, tuple(sizes[:seen])), LIMITS)
    assert parsed.operations == turn.operations
    assert not parsed.errors
    assert parsed.well_formed
    seen += len(turn.produced)
    said = trajectory.token_ids_T[turn.start : turn.end].tolist()
    assert said == [*TOKENIZER.encode(turn.text), TOKENIZER.id(IM_END)]
  assert seen == len(trajectory.images)


def test_boxes_follow_a_picture_that_is_made_smaller():
  script = demonstrate(two_pictures(2), np.random.default_rng(0), DemonstrationConfig(1.0, 3))
  trajectory = play(TALK, TALK.prompt(two_pictures(2)), script, STYLE)
  assert trajectory.images[0].pixels.shape == (64, 64, 3)
  assert trajectory.turns[0].operations[0].points_4 == (2.0, 3.0, 40.0, 50.0)


def test_several_drawing_turns():
  """The policy is told to answer after the last drawing, and not before."""
  boxes = [Operation("box", 1, (1.0, 2.0, 9.0 + i, 9.0), "a") for i in range(2)]
  on_drawn = Operation("line", 2, (1.0, 2.0, 9.0, 9.0), "path")
  script = [
    ScriptTurn("One.", (boxes[0],), None),
    ScriptTurn("Two.", (on_drawn,), None),
    ScriptTurn("Three.", (), "2.1"),
  ]
  task = fixtures.task("room/x", ((24, 24),))
  trajectory = play(TALK, TALK.prompt(task), script, STYLE)
  trajectory_lib.check(trajectory, PADS)
  assert [len(turn.produced) for turn in trajectory.turns] == [1, 1, 0]
  assert trajectory.turns[1].operations == (on_drawn,)
  told = TOKENIZER.decode(trajectory.token_ids_T[trajectory.turns[0].end :])
  assert told.index("more") < told.index("final")
