"""Pretraining batches: reproducible, valid, and dense targets at the right features."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.tiny import batches
from experiments.tiny.dense_targets import dense_targets
from spatial_jax.data.image import patch_image
from spatial_jax.data.source import HELD_OUT_SEED
from spatial_jax.data.tokenizer import IM_END
from spatial_jax.errors import DataError
from spatial_jax.rollout import trajectory as trajectory_lib
from spatial_jax.rollout.demonstration import demonstration_trajectory
from spatial_jax.synthetic.floorplan import procedural_scene
from spatial_jax.synthetic.tasks import render_views
from tests import rollout_fixtures as fixtures
from tests.pretrain_fixtures import VISION_STEPS, builder


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_the_same_step_gives_the_same_batch(step):
  first, second = builder().batch(step), builder().batch(step)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert (first.answers is None) == (step < VISION_STEPS)


def test_kinds_of_batches_take_turns():
  plain, drawing, choice = (builder().batch(step) for step in (1, 2, 3))
  assert [x.answers.prefix.token_RT.shape[0] for x in (plain, drawing, choice)] == [2, 2, 1]
  assert [x.answers.rows.tokens.token_RT.shape[0] for x in (plain, drawing, choice)] == [4, 2, 2]
  end = fixtures.TOKENIZER.id(IM_END)

  def turns(batch):
    return ((batch.rows.tokens.token_RT == end) & batch.rows.trained_RT).sum(1)

  assert (turns(plain.answers) == 1).all()
  assert (turns(drawing.answers) == 2).any()
  assert (turns(choice.answers) == 1).all()


def test_rooms_of_batches_are_new_and_not_held_out(monkeypatch):
  numbers = []

  def record(number, cfg):
    numbers.append(number)
    return procedural_scene(number, cfg)

  monkeypatch.setattr(batches, "procedural_scene", record)
  for step in range(6):
    builder().batch(step)
  assert len(set(numbers)) == len(numbers) >= 2 * VISION_STEPS + 2 + 2 + 1
  assert max(numbers) < HELD_OUT_SEED


@pytest.mark.parametrize("step", [0, 2])
def test_dense_targets_are_at_the_features_of_their_image(step, monkeypatch):
  """Drawings and padding have no targets."""
  rendered = []

  def record(scene, number, cfg):
    views = render_views(scene, number, cfg)
    rendered.extend((scene, view) for view in views)
    return views

  monkeypatch.setattr(batches, "render_views", record)
  one = builder()
  batch = one.batch(step)
  found = batch.dense_targets
  patches_M4X = batch.vision.patches_PX.reshape(-1, 4, batch.vision.patches_PX.shape[1])
  compared = 0
  for scene, view in rendered:
    truth = dense_targets(scene, view, one.cfg.categories, 28, one.cfg.min_cell_fraction)
    image = patch_image(view.image, one.conversation.preprocess)
    for m, patches_4X in enumerate(image.patches_PX.reshape(image.tokens, 4, -1)):
      places = np.flatnonzero((patches_M4X == patches_4X[None]).all((1, 2)))
      if len(places) != 1:
        continue  # the batch has no question about the room, or two cells are equal
      (index,) = places
      compared += 1
      assert found.valid_M[index]
      assert found.category_M[index] == truth.category_M[m]
      assert found.log_depth_M[index] == truth.log_depth_M[m]
      np.testing.assert_array_equal(found.box_M4[index], truth.box_M4[m])
      np.testing.assert_array_equal(found.extent_M2[index], truth.extent_M2[m])
      np.testing.assert_array_equal(found.place_M6[index], truth.place_M6[m])
      assert found.object_M[index] == truth.object_M[m]
  assert compared > 10
  shown = (batch.vision.frame_P > 0).reshape(-1, 4).all(1)
  assert not (found.valid_M & ~shown).any()
  if step == 2:
    assert (shown & ~found.valid_M).any(), "drawings have no targets"


def test_demonstrations_of_batches_are_valid_trajectories(monkeypatch):
  trajectories = []

  def record(*arguments):
    trajectories.append(demonstration_trajectory(*arguments))
    return trajectories[-1]

  monkeypatch.setattr(batches, "demonstration_trajectory", record)
  for step in (1, 2):
    builder().batch(step)
  pads = (builder().conversation.policy.image_pad_id,)
  for trajectory in trajectories:
    trajectory_lib.check(trajectory, pads)
  assert len(trajectories) >= 4


def test_rooms_without_questions_are_an_error(monkeypatch):
  monkeypatch.setattr(batches, "_MAX_EMPTY_ROOMS", 3)
  without = dataclasses.replace(
    builder(), questions=dataclasses.replace(builder().questions, min_visible_pixels=10**6)
  )
  with pytest.raises(DataError, match="rooms in a row gave no question with a number"):
    without.batch(1)
