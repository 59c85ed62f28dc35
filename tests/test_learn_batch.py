"""Trajectories to rows: nothing lost, nothing twice, padding that trains nothing."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.data.demonstrations import DemonstrationConfig, demonstrate
from spatial_jax.errors import DataError
from spatial_jax.learn.batch import to_train_batch
from spatial_jax.rollout.conversation import Episode
from spatial_jax.rollout.demonstration import play
from tests import rollout_fixtures as fixtures

TALK = fixtures.conversation()
SHAPES = fixtures.shapes()
SIZES = ((24, 24), (16, 40))


def demonstration(name, pictures=1, draws=True):
  """A played conversation about the first pictures of `SIZES`."""
  task = fixtures.task(name, SIZES[:pictures])
  cfg = DemonstrationConfig(float(draws), 2)
  script = demonstrate(task, np.random.default_rng(0), cfg)
  return play(TALK, TALK.prompt(task), script, fixtures.STYLE)


def spoken(name, count, temperature=1.0, reason="answer"):
  """One turn of some tokens, sampled with log-probability -0.5, -1.0, ..."""
  episode = Episode(
    TALK.prompt(fixtures.task(name)), 0, (0, 0, 0, 0), temperature, TALK.forbidden_ids
  )
  logps = [-0.5 * (i + 1) for i in range(count)]
  episode.add_turn(list(range(40, 40 + count)), logps, 0, "", (), ())
  return episode.finish(reason)


@settings(deadline=None, max_examples=25)
@given(
  st.lists(
    st.one_of(
      st.builds(demonstration, st.sampled_from(("a", "bb")), st.integers(1, 2), st.booleans()),
      st.builds(spoken, st.sampled_from(("a", "ccc")), st.integers(1, 20), st.floats(0.2, 2)),
    ),
    min_size=1,
    max_size=4,
  )
)
def test_rows_are_the_trajectories(trajectories):
  advantage_R = np.linspace(-1, 1, len(trajectories))
  batch, feature_of = to_train_batch(trajectories, advantage_R, SHAPES)
  patches_M4X = batch.vision.patches_PX.reshape(-1, 4, batch.vision.patches_PX.shape[1])
  assert batch.token_RT.shape[1] in SHAPES.token_buckets
  for r, trajectory in enumerate(trajectories):
    t = len(trajectory.token_ids_T)
    assert batch.valid_RT[r].sum() == batch.valid_RT[r, :t].sum() == t
    np.testing.assert_array_equal(batch.token_RT[r, :t], trajectory.token_ids_T)
    np.testing.assert_array_equal(batch.position_RTA[r, :t], trajectory.position_TA)
    np.testing.assert_array_equal(batch.trained_RT[r, :t], trajectory.trained_T)
    np.testing.assert_array_equal(batch.old_logp_RT[r, :t], trajectory.logp_T)
    assert not batch.trained_RT[r, t:].any()
    assert batch.temperature_R[r] == np.float32(trajectory.temperature)
    seen_T = np.zeros(t, bool)
    for image, start in zip(trajectory.images, trajectory.image_start, strict=True):
      span = slice(start, start + image.tokens)
      seen_T[span] = True
      shown = patches_M4X[batch.feature_RT[r, span]]
      np.testing.assert_array_equal(shown, image.patches_PX.reshape(image.tokens, 4, -1))
      np.testing.assert_array_equal(batch.feature_RT[r, span], feature_of[image.content_hash])
    np.testing.assert_array_equal(batch.feature_RT[r, :t] >= 0, seen_T)
    assert (batch.feature_RT[r, t:] == -1).all()
  distinct = {image.content_hash: image for t in trajectories for image in t.images}
  assert batch.vision.valid_P.sum() == 4 * sum(image.tokens for image in distinct.values())
  assert feature_of.keys() == distinct.keys()
  np.testing.assert_array_equal(np.flatnonzero(batch.forbidden_V), sorted(TALK.forbidden_ids))
  assert batch.advantage_R.dtype == batch.temperature_R.dtype == np.float32


def test_group_shares_its_pictures():
  batch, _ = to_train_batch([spoken("a", 3), spoken("a", 9)], np.zeros(2), SHAPES)
  assert batch.vision.valid_P.sum() == 4 * TALK.prompt(fixtures.task("a")).images[0].tokens
  seen_R = [set(features[features >= 0].tolist()) for features in batch.feature_RT]
  assert seen_R[0] == seen_R[1]


def test_buckets():
  short, long = spoken("a", 3), spoken("a", 100)
  assert to_train_batch([short], np.zeros(1), SHAPES)[0].token_RT.shape == (1, 96)
  assert to_train_batch([short, long], np.zeros(2), SHAPES)[0].token_RT.shape == (2, 256)
  with pytest.raises(DataError, match=r"tokens of task bb exceed the largest bucket 256"):
    to_train_batch([short, spoken("bb", 300)], np.zeros(2), SHAPES)


def test_fault_keeps_its_row_and_trains_nothing():
  batch, _ = to_train_batch([spoken("a", 3, reason="fault"), spoken("b", 3)], np.ones(2), SHAPES)
  assert batch.valid_RT[0].any()
  assert batch.trained_RT.sum(1).tolist() == [0, 3]


def test_rows_must_forbid_the_same():
  other = dataclasses.replace(spoken("a", 3), forbidden_ids=(1, 2))
  with pytest.raises(ValueError, match="different ids forbidden"):
    to_train_batch([spoken("a", 3), other], np.zeros(2), SHAPES)
