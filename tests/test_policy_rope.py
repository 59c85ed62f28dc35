"""Rotary positions of text, images and clips under both rules."""

import numpy as np
import pytest

from spatial_jax.policy import rope
from tests import policy_fixtures as fixtures

CFG = fixtures.small_config(True)
IMG, VID = fixtures.IMAGE, fixtures.VIDEO


def test_text_positions_count_up():
  positions, following = rope.mrope_positions(np.arange(5), [], CFG, (), "max")
  np.testing.assert_array_equal(positions, np.repeat(np.arange(5)[:, None], 3, 1))
  assert following == 5
  empty, following = rope.mrope_positions(np.zeros(0, np.int32), [], CFG, (), "max")
  assert empty.shape == (0, 3)
  assert following == 0


@pytest.mark.parametrize("rule", ["max", "hf5"])
def test_an_image_spans_a_box_of_positions(rule):
  ids = np.array([1, 1] + [IMG] * 6 + [1])
  positions, following = rope.mrope_positions(ids, [(1, 4, 6)], CFG, (), rule)
  np.testing.assert_array_equal(positions[:, 0], [0, 1, 2, 2, 2, 2, 2, 2, 5])
  np.testing.assert_array_equal(positions[:, 1], [0, 1, 2, 2, 2, 3, 3, 3, 5])
  np.testing.assert_array_equal(positions[:, 2], [0, 1, 2, 3, 4, 2, 3, 4, 5])
  assert following == 6


def test_clip_time_counts_seconds_and_the_rules_differ_after_it():
  """2 tokens per second x 1.4 s: steps of 2.8, floored in float32."""
  ids = np.array([1] + [VID] * 6 + [1, 1])
  grids = [(6, 2, 2)]
  by_max, following_max = rope.mrope_positions(ids, grids, CFG, (1.4,), "max")
  by_hf5, following_hf5 = rope.mrope_positions(ids, grids, CFG, (1.4,), "hf5")
  np.testing.assert_array_equal(by_max[1:7, 0], 1 + np.array([0, 2, 5, 8, 11, 14]))
  np.testing.assert_array_equal(by_max[7:], [[16] * 3, [17] * 3])
  np.testing.assert_array_equal(by_hf5[:7], by_max[:7])
  np.testing.assert_array_equal(by_hf5[7:], [[2] * 3, [3] * 3])
  assert (following_max, following_hf5) == (18, 4)  # generation continues after the last token


def test_time_is_floored_in_float32():
  """In float64 the fifth step of 1.4 would be 6 instead of 7."""
  ids = np.array([VID] * 6)
  positions, _ = rope.mrope_positions(ids, [(6, 2, 2)], CFG, (0.7,), "max")
  assert positions[5, 0] == 7


def test_adjacent_images_are_separated_by_their_grids():
  ids = np.array([IMG] * 5)
  positions, _ = rope.mrope_positions(ids, [(1, 2, 2), (1, 4, 4)], CFG, (), "max")
  np.testing.assert_array_equal(positions[:, 1], [0, 1, 1, 2, 2])


@pytest.mark.parametrize(
  ("ids", "grids", "message"),
  [
    ([1, IMG, 1], [(1, 4, 4)], "image 0"),
    ([1, IMG, IMG], [(1, 2, 2)], "1 pad tokens follow the last of 1 grids"),
    ([1, 1], [(1, 2, 2)], "image 0"),
    ([IMG, 1, IMG, IMG], [(1, 2, 2), (1, 2, 6)], "image 1"),
  ],
)
def test_pad_tokens_must_match_the_grids(ids, grids, message):
  with pytest.raises(ValueError, match=message):
    rope.mrope_positions(np.array(ids), grids, CFG, (), "max")


def test_a_clip_needs_its_seconds():
  with pytest.raises(ValueError, match="second_per_grid"):
    rope.mrope_positions(np.array([VID, VID]), [(2, 2, 2)], CFG, (), "max")
