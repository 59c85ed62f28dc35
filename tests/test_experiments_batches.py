"""Lessons of the embedded policy: reproducible, sound, their truth where it belongs."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.tiny import batches
from experiments.tiny.dense_targets import dense_targets
from spatial_jax.data.image import patch_image
from spatial_jax.data.pipeline import HELD_OUT_SEED
from spatial_jax.data.tokenizer import IM_END
from spatial_jax.errors import DataError
from spatial_jax.rollout import trajectory as trajectory_lib
from spatial_jax.rollout.demonstration import demonstration_trajectory
from spatial_jax.synthetic.floorplan import procedural_scene
from spatial_jax.synthetic.tasks import render_views
from tests import rollout_fixtures as fixtures
from tests.pretrain_fixtures import SEE, builder


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_batch_is_a_function_of_the_step(step):
  one, again = builder().batch(step), builder().batch(step)
  jax.tree.map(np.testing.assert_array_equal, one, again)
  assert (one.rows is None) == (step < SEE)


def test_batches_take_turns():
  plain, drawing, choice = (builder().batch(step) for step in (1, 2, 3))
  assert [x.rows.prefix.token_BT.shape[0] for x in (plain, drawing, choice)] == [2, 2, 1]
  assert [x.rows.token_RT.shape[0] for x in (plain, drawing, choice)] == [4, 2, 2]
  end = fixtures.TOKENIZER.id(IM_END)

  def turns(batch):
    return ((batch.token_RT == end) & batch.trained_RT).sum(1)

  assert (turns(plain.rows) == 1).all()
  assert (turns(drawing.rows) == 2).any()
  assert (turns(choice.rows) == 1).all()


def test_rooms_of_batches_are_not_held_out(monkeypatch):
  seen = []

  def scene_of(number, cfg):
    seen.append(number)
    return procedural_scene(number, cfg)

  monkeypatch.setattr(batches, "procedural_scene", scene_of)
  for step in range(6):
    builder().batch(step)
  assert len(set(seen)) == len(seen) >= 2 * SEE + 2 + 2 + 1
  assert max(seen) < HELD_OUT_SEED


@pytest.mark.parametrize("step", [0, 2])
def test_truth_stands_where_its_features_do(step, monkeypatch):
  """Each original picture's truth at its own features; drawn pictures and padding have none."""
  seen = []

  def look(scene, number, cfg):
    views = render_views(scene, number, cfg)
    seen.extend((scene, view) for view in views)
    return views

  monkeypatch.setattr(batches, "render_views", look)
  one = builder()
  batch = one.batch(step)
  patches_M4X = batch.vision.patches_PX.reshape(-1, 4, batch.vision.patches_PX.shape[1])
  found = 0
  for scene, view in seen:
    truth = dense_targets(scene, view, one.cfg.categories, 28, one.cfg.share)
    image = patch_image(view.image, one.conversation.preprocess)
    for m, patches_4X in enumerate(image.patches_PX.reshape(image.tokens, 4, -1)):
      places = np.flatnonzero((patches_M4X == patches_4X[None]).all((1, 2)))
      if len(places) != 1:
        continue  # its room is not asked about, or two cells look alike
      (index,) = places
      found += 1
      assert batch.dense.valid_M[index]
      assert batch.dense.category_M[index] == truth.category_M[m]
      assert batch.dense.log_depth_M[index] == truth.log_depth_M[m]
      np.testing.assert_array_equal(batch.dense.box_M4[index], truth.box_M4[m])
      np.testing.assert_array_equal(batch.dense.extent_M2[index], truth.extent_M2[m])
      np.testing.assert_array_equal(batch.dense.place_M6[index], truth.place_M6[m])
      assert batch.dense.object_M[index] == truth.object_M[m]
  assert found > 10
  shown = (batch.vision.frame_P > 0).reshape(-1, 4).all(1)
  assert not (batch.dense.valid_M & ~shown).any()
  if step == 2:
    assert (shown & ~batch.dense.valid_M).any(), "drawn pictures have no truth"


def test_demonstrations_of_batches_are_sound(monkeypatch):
  played = []

  def record(*arguments):
    played.append(demonstration_trajectory(*arguments))
    return played[-1]

  monkeypatch.setattr(batches, "demonstration_trajectory", record)
  for step in (1, 2):
    builder().batch(step)
  pads = (builder().conversation.policy.image_pad_id,)
  for trajectory in played:
    trajectory_lib.check(trajectory, pads)
  assert len(played) >= 4


def test_rooms_without_questions_are_an_error(monkeypatch):
  monkeypatch.setattr(batches, "_TRIES", 3)
  nothing = dataclasses.replace(
    builder(), questions=dataclasses.replace(builder().questions, min_visible_pixels=10**6)
  )
  with pytest.raises(DataError, match="rooms in a row gave no question that a number answers"):
    nothing.batch(1)
