"""Trajectories to rows: every token once, groups of any sizes, padding that trains nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax import sharding
from spatial_jax.config import ConfigError
from spatial_jax.errors import DataError
from spatial_jax.learn.train_batch import (
  BatchConfig,
  downsample_rollouts,
  kept_rows,
  to_train_batch,
)
from spatial_jax.rollout.conversation import TrajectoryBuilder
from spatial_jax.rollout.demonstration import demonstration_trajectory
from spatial_jax.synthetic.oracle import DemonstrationConfig, demonstrate
from tests import rollout_fixtures as fixtures

CONVERSATION = fixtures.conversation()
SHAPES = fixtures.shapes()
SIZES = ((24, 24), (16, 40))


def demonstration(name, images=1, draws=True):
  """A demonstrated conversation about the first images of `SIZES`."""
  task = fixtures.task(name, SIZES[:images])
  cfg = DemonstrationConfig(float(draws), 2)
  script = demonstrate(task, np.random.default_rng(0), cfg)
  return demonstration_trajectory(CONVERSATION, CONVERSATION.prompt(task), script, fixtures.STYLE)


def sampled(name, count, temperature=1.0, reason="answer", question=""):
  """A rollout of one turn of `count` tokens, with log-probabilities -0.5, -1.0, ..."""
  builder = TrajectoryBuilder(
    CONVERSATION.prompt(fixtures.task(name, question=question)),
    0,
    (0, 0, 0, 0),
    temperature,
    CONVERSATION.forbidden_ids,
  )
  logps = [-0.5 * (i + 1) for i in range(count)]
  builder.add_turn(list(range(40, 40 + count)), logps, 0, "", (), ())
  return builder.finish(reason)


def batch_of(groups, **values):
  return to_train_batch(groups, None, SHAPES, **values)[0]


@settings(deadline=None, max_examples=25)
@given(
  st.lists(
    st.one_of(
      st.builds(demonstration, st.sampled_from(("a", "bb")), st.integers(1, 2), st.booleans()),
      st.builds(sampled, st.sampled_from(("a", "ccc")), st.integers(1, 20), st.floats(0.2, 2)),
    ),
    min_size=1,
    max_size=4,
  )
)
def test_prefix_and_row_together_are_the_trajectory(trajectories):
  """Every group has one row here."""
  advantage_BG = np.linspace(-1, 1, len(trajectories))[:, None]
  batch, feature_of = to_train_batch([[t] for t in trajectories], advantage_BG, SHAPES)
  patches_M4X = batch.vision.patches_PX.reshape(-1, 4, batch.vision.patches_PX.shape[1])
  prefix, rows = batch.prefix, batch.rows
  assert rows.tokens.token_RT.shape[1] == SHAPES.tokens
  assert prefix.token_RT.shape[1] in SHAPES.prefix_buckets
  for r, trajectory in enumerate(trajectories):
    shared, t = trajectory.prompt_length - 1, len(trajectory.token_ids_T)
    rest = t - shared
    assert prefix.valid_RT[r].sum() == prefix.valid_RT[r, :shared].sum() == shared
    assert rows.tokens.valid_RT[r].sum() == rows.tokens.valid_RT[r, :rest].sum() == rest
    whole = jax.tree.map(
      lambda x, y, r=r, shared=shared, rest=rest: np.concatenate([x[r, :shared], y[r, :rest]]),
      prefix,
      rows.tokens,
    )
    np.testing.assert_array_equal(whole.token_RT, trajectory.token_ids_T)
    np.testing.assert_array_equal(whole.position_RTA, trajectory.position_TA)
    np.testing.assert_array_equal(rows.trained_RT[r, :rest], trajectory.trained_T[shared:])
    np.testing.assert_array_equal(rows.old_logp_RT[r, :rest], trajectory.logp_T[shared:])
    assert not rows.trained_RT[r, 0]
    assert not rows.trained_RT[r, rest:].any()
    assert rows.temperature_R[r] == np.float32(trajectory.temperature)
    of_image_T = np.zeros(t, bool)
    for image, start in zip(trajectory.images, trajectory.image_start, strict=True):
      span = slice(start, start + image.tokens)
      of_image_T[span] = True
      patches = patches_M4X[whole.feature_RT[span]]
      np.testing.assert_array_equal(patches, image.patches_PX.reshape(image.tokens, 4, -1))
      np.testing.assert_array_equal(whole.feature_RT[span], feature_of[image.content_hash])
    np.testing.assert_array_equal(whole.feature_RT >= 0, of_image_T)
    assert (rows.tokens.feature_RT[r, rest:] == -1).all()
    assert (prefix.feature_RT[r, shared:] == -1).all()
  distinct = {image.content_hash: image for t in trajectories for image in t.images}
  assert (batch.vision.frame_P > 0).sum() == 4 * sum(image.tokens for image in distinct.values())
  assert feature_of.keys() == distinct.keys()
  np.testing.assert_array_equal(
    np.flatnonzero(batch.forbidden_V), sorted(CONVERSATION.forbidden_ids)
  )
  np.testing.assert_allclose(rows.advantage_R, advantage_BG[:, 0], rtol=1e-6)
  assert rows.advantage_R.dtype == rows.temperature_R.dtype == rows.weight_R.dtype == np.float32
  assert rows.prefix_R.dtype == rows.group_R.dtype == np.int32


# --- the prefix of a group -----------------------------------------------------------------------


def test_the_prefix_of_a_group_is_its_prompt_without_the_last_token():
  """Even where the responses begin with the same tokens."""
  one, other = sampled("a", 3), sampled("a", 9)
  batch = batch_of([[one, other]])
  assert batch.prefix.valid_RT.sum() == one.prompt_length - 1
  tokens = batch.rows.tokens
  assert tokens.valid_RT.sum(1).tolist() == [1 + 3, 1 + 9]
  assert tokens.token_RT[0, 0] == tokens.token_RT[1, 0] == one.token_ids_T[one.prompt_length - 1]
  assert (batch.vision.frame_P > 0).sum() == 4 * one.images[0].tokens


def test_questions_about_one_image_share_the_image():
  one, other = sampled("a", 3), sampled("b", 3, question="What is it?")
  batch, feature_of = to_train_batch([[one, other]], None, SHAPES)
  shared = int(batch.prefix.valid_RT.sum())
  assert one.image_start[0] + one.images[0].tokens <= shared < one.prompt_length - 1
  assert one.token_ids_T[shared] != other.token_ids_T[shared]
  (features,) = feature_of.values()
  of_prefix = batch.prefix.feature_RT[0]
  np.testing.assert_array_equal(of_prefix[of_prefix >= 0], features)
  assert (batch.rows.tokens.feature_RT == -1).all()


def test_different_images_under_the_same_tokens_are_not_shared():
  one = sampled("a", 3)
  pixels = np.flipud(one.images[0].pixels) // 2
  patches_PX = one.images[0].patches_PX * 0.5
  twin = dataclasses.replace(
    one.images[0], content_hash="twin", pixels=pixels, patches_PX=patches_PX
  )
  other = dataclasses.replace(one, images=(twin,))
  assert batch_of([[one, other]]).prefix.valid_RT.sum() == one.image_start[0]


# --- groups, values per rollout ------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_groups_may_differ_in_size(data):
  """Rows are in the order of the groups and have the values of their rollout."""
  sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
  total = sum(sizes)
  groups = [
    [sampled("a" * (b + 1), 1 + 5 * b + g) for g in range(size)] for b, size in enumerate(sizes)
  ]

  def nested(values):
    values = iter(values)
    return [[next(values) for _ in range(size)] for size in sizes]

  kept = data.draw(st.lists(st.booleans(), min_size=total, max_size=total).filter(any))
  advantages = np.linspace(-1, 1, total).astype(np.float32)
  weights = np.linspace(0, 2, total).astype(np.float32)
  values = {"kept_BG": kept, "weight_BG": weights}
  values = {name: nested(x) for name, x in values.items()}
  batch, _ = to_train_batch(groups, nested(advantages), SHAPES, **values)
  lengths = np.array([t.trained_T.sum() for group in groups for t in group])
  group_R = np.repeat(np.arange(len(sizes)), sizes)[kept]
  rows = batch.rows
  np.testing.assert_array_equal(rows.trained_RT.sum(1), lengths[kept])
  np.testing.assert_array_equal(rows.advantage_R, advantages[kept])
  np.testing.assert_array_equal(rows.weight_R, weights[kept])
  np.testing.assert_array_equal(rows.group_R, group_R)
  np.testing.assert_array_equal(rows.prefix_R, group_R)
  assert len(batch.prefix.token_RT) == len(sizes), "a group without rows has a prefix"


def test_a_row_without_values_is_a_rollout_of_weight_one_and_advantage_zero():
  rows = batch_of([[sampled("a", 3)], [sampled("b", 2), sampled("b", 5)]]).rows
  assert rows.advantage_R.tolist() == [0, 0, 0]
  assert rows.weight_R.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"kept_BG": np.ones((2, 2), bool)}, r"kept_BG has \[2, 2\] values for groups of \[2, 1\]"),
    ({"kept_BG": [[1, 0]]}, r"kept_BG has \[2\] values for groups of \[2, 1\]"),
    ({"weight_BG": [[1, 1], [1, 1]]}, r"weight_BG has \[2, 2\] values"),
    ({"weight_BG": [[1, np.nan], [1]]}, "weight_BG must be finite and at least 0"),
    ({"weight_BG": [[1, 1], [-1]]}, "weight_BG must be finite and at least 0"),
    ({"kept_BG": [[0, 0], [0]]}, "the batch has no rows"),
  ],
)
def test_values_that_do_not_fit_the_groups_are_refused(values, message):
  one = sampled("a", 3)
  with pytest.raises(ValueError, match=message):
    batch_of([[one, one], [one]], **values)


def test_advantages_that_do_not_fit_the_groups_are_refused():
  one = sampled("a", 3)
  with pytest.raises(ValueError, match=r"advantage_BG has \[2, 2\] values for groups of \[2, 1\]"):
    to_train_batch([[one, one], [one]], np.zeros((2, 2)), SHAPES)


def test_an_empty_group_is_refused():
  with pytest.raises(ValueError, match="group 1 has no trajectories; leave it out"):
    batch_of([[sampled("a", 3)], []])


def test_rows_with_different_forbidden_ids_are_refused():
  other = dataclasses.replace(sampled("a", 3), forbidden_ids=(1, 2))
  with pytest.raises(ValueError, match="different forbidden ids"):
    batch_of([[sampled("a", 3)], [other]])


def test_a_fault_has_a_row_that_trains_nothing():
  rows = batch_of([[sampled("a", 3, reason="fault")], [sampled("b", 3)]]).rows
  assert rows.tokens.valid_RT[0].any()
  assert rows.trained_RT.sum(1).tolist() == [0, 3]


def test_only_kept_rollouts_become_rows():
  """After the prefixes of all groups; an image that only other rollouts drew is not packed."""
  one, other, third = sampled("a", 3), sampled("a", 9), demonstration("bb")
  groups, advantage_BG = [[one, other], [third, third]], np.array([[0.1, 0.2], [0.3, 0.4]])
  whole, _ = to_train_batch(groups, advantage_BG, SHAPES)
  kept_BG = np.array([[False, True], [False, False]])
  batch, _ = to_train_batch(groups, advantage_BG, SHAPES, kept_BG)
  assert batch.rows.prefix_R.tolist() == [0]
  assert whole.rows.prefix_R.tolist() == [0, 0, 1, 1]
  np.testing.assert_array_equal(batch.rows.tokens.token_RT[0], whole.rows.tokens.token_RT[1])
  np.testing.assert_allclose(batch.rows.advantage_R, [0.2])
  assert batch.prefix.token_RT.shape == whole.prefix.token_RT.shape
  assert len(third.images) == 2, "it drew"
  undrawn = [[one, other], [third, sampled("bb", 2)]]
  batch = batch_of(undrawn, kept_BG=np.array([[True, True], [False, True]]))
  packed = {image.content_hash: image for image in (one.images[0], third.images[0])}
  assert (batch.vision.frame_P > 0).sum() == 4 * sum(image.tokens for image in packed.values())


# --- devices, buckets ----------------------------------------------------------------------------


def test_a_row_on_another_device_than_its_prefix_is_refused():
  """It would read the prefix of another group."""
  mesh = sharding.make_mesh(sharding.MeshConfig(2, 1, 1), jax.devices()[:2])
  window = fixtures.policy_config().vision.window_patches
  batch = batch_of([[sampled("a", 3)], [sampled("bb", 3)] * 3])
  with pytest.raises(ValueError, match="4 rows of an update do not divide over 2 devices"):
    sharding.place_train_batch(batch, window, mesh)
  equal = batch_of([[sampled("a", 3)] * 2, [sampled("bb", 3)] * 2])
  placed = sharding.place_train_batch(equal, window, mesh)
  np.testing.assert_array_equal(placed.rows.prefix_R, equal.rows.prefix_R)


def test_a_batch_has_the_first_bucket_that_holds_it():
  short = sampled("a", 3)
  asked = sampled("a", 3, question="How far is it? " * 12)
  assert batch_of([[short]]).prefix.token_RT.shape == (1, 96)
  assert batch_of([[short], [asked]]).prefix.token_RT.shape == (2, 256)
  with pytest.raises(DataError, match=r"response tokens of task bb exceed the largest bucket 256"):
    batch_of([[short], [sampled("bb", 300)]])
  small = dataclasses.replace(SHAPES, prefix_buckets=(8,))
  with pytest.raises(DataError, match=r"prompt tokens of task a exceed the largest bucket 8"):
    to_train_batch([[short]], None, small)


def test_too_many_images_name_the_key_to_raise():
  """A batch without images does not: raising the key would not help."""
  one = sampled("a", 3)
  few = dataclasses.replace(SHAPES, vision=dataclasses.replace(SHAPES.vision, windows=(1,)))
  image_features = {one.images[0].content_hash: np.zeros((one.images[0].tokens, 1, 8), np.float32)}
  for features in (None, image_features):
    with pytest.raises(DataError, match=r"exceed .* 1; raise config\.learn\.vision$"):
      to_train_batch([[one]], None, few, image_features=features)
  without = dataclasses.replace(one, images=(), image_start=(), prompt_images=0)
  with pytest.raises(DataError, match=r"^no images"):
    to_train_batch([[without]], None, few, image_features={})


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("prefix_buckets", ()),
    ("prefix_buckets", (96, 64)),
    ("prefix_buckets", (64, 64)),
    ("prefix_buckets", (0, 64)),
    ("prefix_buckets", (64.0,)),
    ("tokens", 1),
    ("window_blocks", 0),
    ("vocabulary", 2.5),
  ],
)
def test_sizes_out_of_range_are_refused(field, value):
  sizes = {name.name: vars(SHAPES)[name.name] for name in dataclasses.fields(BatchConfig)}
  with pytest.raises(ConfigError, match="and must be"):
    BatchConfig(**{**sizes, field: value})


# --- selection -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.floats(0.01, 1), st.randoms())
def test_the_largest_advantages_are_kept(blocks, prompts, group, fraction, random):
  """The same number in each block, and none that is smaller than one left out."""
  shape = (blocks * prompts, group)
  advantage_BG = np.array([random.choice((-2.0, -1.0, 0.0, 0.5)) for _ in range(np.prod(shape))])
  advantage_BG = advantage_BG.reshape(shape)
  kept_BG = downsample_rollouts(advantage_BG, fraction, blocks)
  assert kept_BG.shape == shape
  kept = kept_rows(advantage_BG.size, fraction, blocks)
  assert kept_BG.sum() == kept >= fraction * advantage_BG.size
  size_NR = np.abs(advantage_BG).reshape(blocks, -1)
  for size_R, kept_R in zip(size_NR, kept_BG.reshape(blocks, -1), strict=True):
    assert kept_R.sum() == kept_BG.sum() // blocks
    assert size_R[kept_R].min() >= size_R[~kept_R].max(initial=0.0)
