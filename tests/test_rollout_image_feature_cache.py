"""The order in which images leave the feature buffer is a function of the requests alone."""

import numpy as np

from spatial_jax.data.image import patch_image
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.rollout.engine import RolloutPrograms
from spatial_jax.rollout.image_feature_cache import ImageFeatureCache
from spatial_jax.rollout.profiling import Timeline
from tests.policy_fixtures import PREPROCESS, pixels

COUNT = 8  # images of four tokens each


class RecordingPrograms(RolloutPrograms):
  """Programs that encode nothing and record the buffer rows of each call."""

  def __init__(self):
    self.calls = []

  def empty_feature_buffer(self):
    return np.zeros((4 * COUNT, 1, 1), np.float32)

  def encode_images(self, params, feature_buffer_MYD, vision, buffer_row_M):
    self.calls.append(sorted(buffer_row_M[buffer_row_M < len(feature_buffer_MYD)].tolist()))
    return feature_buffer_MYD, None


def test_least_recently_used_images_leave_the_buffer():
  images = [patch_image(pixels(seed, 16, 16), PREPROCESS) for seed in range(COUNT + 4)]
  names = [image.content_hash for image in images]
  assert len(set(names)) == COUNT + 4
  assert {image.tokens for image in images} == {4}
  programs, buckets = RecordingPrograms(), VisionBuckets((64,), (64,), (16,))
  cache = ImageFeatureCache(programs, {}, 2, buckets, None, Timeline())
  first = cache.encode([images[:COUNT]])
  again = cache.encode([images[3:COUNT], images[:1]])  # the oldest are now 1, 2, then 3, 4, ...
  assert len(programs.calls) == 1
  assert all((first[name] == rows).all() for name, rows in again.items())
  new = cache.encode([images[COUNT:]])
  reused = {int(row) for rows in new.values() for row in rows}
  assert reused == {int(row) for name in names[1:5] for row in first[name]}
  cache.encode([images[5:COUNT], images[:1]])
  assert len(programs.calls) == 2, "images in the buffer are not encoded again"
  assert (cache.requested, cache.encoded) == (COUNT + 6 + 4 + 4, COUNT + 4)
