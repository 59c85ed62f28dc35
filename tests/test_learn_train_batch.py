"""Trajectories to rows: nothing lost, nothing twice, padding that trains nothing."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.errors import DataError
from spatial_jax.learn.train_batch import downsample_rollouts, kept_rows, to_train_batch
from spatial_jax.rollout.conversation import TrajectoryBuilder
from spatial_jax.rollout.demonstration import demonstration_trajectory
from spatial_jax.synthetic.oracle import DemonstrationConfig, demonstrate
from tests import rollout_fixtures as fixtures

TALK = fixtures.conversation()
SHAPES = fixtures.shapes()
SIZES = ((24, 24), (16, 40))


def demonstration(name, pictures=1, sample_index=True):
  """A played conversation about the first pictures of `SIZES`."""
  task = fixtures.task(name, SIZES[:pictures])
  cfg = DemonstrationConfig(float(sample_index), 2)
  script = demonstrate(task, np.random.default_rng(0), cfg)
  return demonstration_trajectory(TALK, TALK.prompt(task), script, fixtures.STYLE)


def spoken(name, count, temperature=1.0, reason="answer", question=""):
  """One turn of some tokens, sampled with log-probability -0.5, -1.0, ..."""
  builder = TrajectoryBuilder(
    TALK.prompt(fixtures.task(name, question=question)),
    0,
    (0, 0, 0, 0),
    temperature,
    TALK.forbidden_ids,
  )
  logps = [-0.5 * (i + 1) for i in range(count)]
  builder.add_turn(list(range(40, 40 + count)), logps, 0, "", (), ())
  return builder.finish(reason)


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
  """Every group is one row here: its prefix and its own part, behind one another."""
  advantage_BG = np.linspace(-1, 1, len(trajectories))[:, None]
  batch, feature_of = to_train_batch([[t] for t in trajectories], advantage_BG, SHAPES)
  patches_M4X = batch.vision.patches_PX.reshape(-1, 4, batch.vision.patches_PX.shape[1])
  assert batch.token_RT.shape[1] == SHAPES.tokens
  assert batch.prefix.token_BT.shape[1] in SHAPES.prefix_buckets
  for r, trajectory in enumerate(trajectories):
    shared, t = trajectory.prompt_length - 1, len(trajectory.token_ids_T)
    own = t - shared
    assert batch.prefix.valid_BT[r].sum() == batch.prefix.valid_BT[r, :shared].sum() == shared
    assert batch.valid_RT[r].sum() == batch.valid_RT[r, :own].sum() == own

    def whole(prefix, rows, r=r, shared=shared, own=own):
      return np.concatenate([prefix[r, :shared], rows[r, :own]])

    np.testing.assert_array_equal(
      whole(batch.prefix.token_BT, batch.token_RT), trajectory.token_ids_T
    )
    np.testing.assert_array_equal(
      whole(batch.prefix.position_BTA, batch.position_RTA), trajectory.position_TA
    )
    np.testing.assert_array_equal(batch.trained_RT[r, :own], trajectory.trained_T[shared:])
    np.testing.assert_array_equal(batch.old_logp_RT[r, :own], trajectory.logp_T[shared:])
    assert not batch.trained_RT[r, 0]
    assert not batch.trained_RT[r, own:].any()
    assert batch.temperature_R[r] == np.float32(trajectory.temperature)
    feature_T = whole(batch.prefix.feature_BT, batch.feature_RT)
    seen_T = np.zeros(t, bool)
    for image, start in zip(trajectory.images, trajectory.image_start, strict=True):
      span = slice(start, start + image.tokens)
      seen_T[span] = True
      shown = patches_M4X[feature_T[span]]
      np.testing.assert_array_equal(shown, image.patches_PX.reshape(image.tokens, 4, -1))
      np.testing.assert_array_equal(feature_T[span], feature_of[image.content_hash])
    np.testing.assert_array_equal(feature_T >= 0, seen_T)
    assert (batch.feature_RT[r, own:] == -1).all()
    assert (batch.prefix.feature_BT[r, shared:] == -1).all()
  distinct = {image.content_hash: image for t in trajectories for image in t.images}
  assert (batch.vision.frame_P > 0).sum() == 4 * sum(image.tokens for image in distinct.values())
  assert feature_of.keys() == distinct.keys()
  np.testing.assert_array_equal(np.flatnonzero(batch.forbidden_V), sorted(TALK.forbidden_ids))
  assert batch.advantage_R.dtype == batch.temperature_R.dtype == np.float32


def test_a_group_shares_its_prompt():
  """Up to the token behind which its rows differ; even where all say the same at first."""
  one, other = spoken("a", 3), spoken("a", 9)
  batch, _ = to_train_batch([[one, other]], np.zeros((1, 2)), SHAPES)
  assert batch.prefix.valid_BT.sum() == one.prompt_length - 1
  assert batch.valid_RT.sum(1).tolist() == [1 + 3, 1 + 9]
  assert batch.token_RT[0, 0] == batch.token_RT[1, 0] == one.token_ids_T[one.prompt_length - 1]
  assert (batch.vision.frame_P > 0).sum() == 4 * one.images[0].tokens


def test_questions_about_one_picture_share_it():
  one, other = spoken("a", 3), spoken("b", 3, question="What is it?")
  batch, feature_of = to_train_batch([[one, other]], np.zeros((1, 2)), SHAPES)
  shared = int(batch.prefix.valid_BT.sum())
  assert one.image_start[0] + one.images[0].tokens <= shared < one.prompt_length - 1
  assert one.token_ids_T[shared] != other.token_ids_T[shared]
  (features,) = feature_of.values()
  seen = batch.prefix.feature_BT[0]
  np.testing.assert_array_equal(seen[seen >= 0], features)
  assert (batch.feature_RT == -1).all()


def test_another_picture_under_the_same_tokens_is_not_shared():
  """Image pads look alike: what they show decides."""
  one = spoken("a", 3)
  pixels = np.flipud(one.images[0].pixels) // 2
  patches_PX = one.images[0].patches_PX * 0.5
  twin = dataclasses.replace(
    one.images[0], content_hash="twin", pixels=pixels, patches_PX=patches_PX
  )
  other = dataclasses.replace(one, images=(twin,))
  batch, _ = to_train_batch([[one, other]], np.zeros((1, 2)), SHAPES)
  assert batch.prefix.valid_BT.sum() == one.image_start[0]


def test_buckets():
  short = spoken("a", 3)
  asked = spoken("a", 3, question="How far is it? " * 12)
  assert batch_of([short]).prefix.token_BT.shape == (1, 96)
  assert batch_of([short, asked]).prefix.token_BT.shape == (2, 256)
  with pytest.raises(DataError, match=r"response tokens of task bb exceed the largest bucket 256"):
    batch_of([short, spoken("bb", 300)])
  narrow = dataclasses.replace(SHAPES, prefix_buckets=(8,))
  with pytest.raises(DataError, match=r"prompt tokens of task a exceed the largest bucket 8"):
    to_train_batch([[short]], np.zeros((1, 1)), narrow)


def test_pictures_without_room_name_the_key_to_raise():
  """But a batch that shows none is not mended by it."""
  one = spoken("a", 3)
  few = dataclasses.replace(SHAPES, vision=dataclasses.replace(SHAPES.vision, windows=(1,)))
  image_features = {one.images[0].content_hash: np.zeros((one.images[0].tokens, 1, 8), np.float32)}
  for seen in (None, image_features):
    with pytest.raises(DataError, match=r"exceed .* 1; raise config\.learn\.vision$"):
      to_train_batch([[one]], np.zeros((1, 1)), few, image_features=seen)
  blind = dataclasses.replace(one, images=(), image_start=(), prompt_images=0)
  with pytest.raises(DataError, match=r"^no images"):
    to_train_batch([[blind]], np.zeros((1, 1)), few, image_features={})


def test_fault_keeps_its_row_and_trains_nothing():
  batch = batch_of([spoken("a", 3, reason="fault"), spoken("b", 3)])
  assert batch.valid_RT[0].any()
  assert batch.trained_RT.sum(1).tolist() == [0, 3]


def test_rows_must_forbid_the_same_and_groups_be_as_large():
  other = dataclasses.replace(spoken("a", 3), forbidden_ids=(1, 2))
  with pytest.raises(ValueError, match="different ids forbidden"):
    batch_of([spoken("a", 3), other])
  with pytest.raises(ValueError, match=r"advantages \(2, 2\) for groups of \[2, 1\]"):
    to_train_batch([[other, other], [other]], np.zeros((2, 2)), SHAPES)


def test_only_what_is_kept_becomes_rows():
  """In their order, behind the prefixes of all; a picture that only others drew is not there."""
  one, other, third = spoken("a", 3), spoken("a", 9), demonstration("bb")
  groups, advantage_BG = [[one, other], [third, third]], np.array([[0.1, 0.2], [0.3, 0.4]])
  whole, _ = to_train_batch(groups, advantage_BG, SHAPES)
  kept_BG = np.array([[False, True], [False, False]])
  batch, _ = to_train_batch(groups, advantage_BG, SHAPES, kept_BG)
  assert batch.prompt_R.tolist() == [0]
  assert whole.prompt_R.tolist() == [0, 0, 1, 1]
  np.testing.assert_array_equal(batch.token_RT[0], whole.token_RT[1])
  np.testing.assert_allclose(batch.advantage_R, [0.2])
  assert batch.prefix.token_BT.shape == whole.prefix.token_BT.shape
  assert len(third.images) == 2, "it drew"
  undrawn = [[one, other], [third, spoken("bb", 2)]]
  kept_BG = np.array([[True, True], [False, True]])
  batch, _ = to_train_batch(undrawn, advantage_BG, SHAPES, kept_BG)
  shown = {image.content_hash: image for image in (one.images[0], third.images[0])}
  assert (batch.vision.frame_P > 0).sum() == 4 * sum(image.tokens for image in shown.values())


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.floats(0.01, 1), st.randoms())
def test_the_largest_advantages_are_kept(blocks, prompts, group, share, random):
  """Of each block as many, and none that is smaller than one left out."""
  shape = (blocks * prompts, group)
  advantage_BG = np.array([random.choice((-2.0, -1.0, 0.0, 0.5)) for _ in range(np.prod(shape))])
  advantage_BG = advantage_BG.reshape(shape)
  kept_BG = downsample_rollouts(advantage_BG, share, blocks)
  assert kept_BG.shape == shape
  assert kept_BG.sum() == kept_rows(advantage_BG.size, share, blocks) >= share * advantage_BG.size
  size_NR = np.abs(advantage_BG).reshape(blocks, -1)
  for size_R, kept_R in zip(size_NR, kept_BG.reshape(blocks, -1), strict=True):
    assert kept_R.sum() == kept_BG.sum() // blocks
    assert size_R[kept_R].min() >= size_R[~kept_R].max(initial=0.0)


def batch_of(trajectories):
  """Groups of one."""
  return to_train_batch([[t] for t in trajectories], np.zeros((len(trajectories), 1)), SHAPES)[0]
