"""Which images lie in the pool does not depend on how a process hashes strings."""

import numpy as np

from spatial_jax.data.image import patch_image
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.rollout.image_feature_cache import ImageFeatureCache
from spatial_jax.rollout.profiling import Timeline
from tests.policy_fixtures import PREPROCESS, picture

COUNT = 8  # images of four tokens each


def test_who_was_asked_for_longest_ago_goes():
  images = [patch_image(picture(seed, 16, 16), PREPROCESS) for seed in range(COUNT + 4)]
  names = [image.content_hash for image in images]
  assert len(set(names)) == COUNT + 4
  assert {image.tokens for image in images} == {4}
  calls = []

  def see(params, feature_buffer_MYD, vision, place_M):
    calls.append(sorted(place_M[place_M < len(feature_buffer_MYD)].tolist()))
    return feature_buffer_MYD, None

  feature_buffer_MYD = np.zeros((4 * COUNT, 1, 1), np.float32)
  pictures = ImageFeatureCache(
    see, {}, feature_buffer_MYD, 2, VisionBuckets((64,), (64,), (16,)), None, Timeline()
  )
  first = pictures.encode([images[:COUNT]])
  again = pictures.encode([images[3:COUNT], images[:1]])  # the oldest are now 1, 2, then 3, 4, ...
  assert len(calls) == 1
  assert all((first[name] == rows).all() for name, rows in again.items())
  new = pictures.encode([images[COUNT:]])
  taken = {int(row) for rows in new.values() for row in rows}
  assert taken == {int(row) for name in names[1:5] for row in first[name]}
  pictures.encode([images[5:COUNT], images[:1]])
  assert len(calls) == 2, "those that stayed are seen no second time"
