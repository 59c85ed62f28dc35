"""The policy's functions agree with one another: cache and full forward, scanned and unrolled, chunked and whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.data.vision import patch_image, plan_vision
from spatial_jax.policy import cache as cache_lib
from tests import policy_fixtures as fixtures


@functools.cache
def setting():
  policy = fixtures.small_policy()
  params = fixtures.random_params(policy, 0)
  images = [
    patch_image(fixtures.picture(seed, *size), fixtures.PREPROCESS)
    for seed, size in enumerate([(24, 40), (16, 16), (32, 24)])
  ]
  batch, index = plan_vision(images, policy.cfg.vision.window_blocks, fixtures.BUCKETS)
  features_MD = jax.jit(policy.encode)(params, batch)
  return policy, params, images, index, features_MD


def full_forward(sequences, features_MD, params, policy, index):
  """hidden of every sequence, each padded to the longest."""
  length = max(len(ids) for ids, *_ in sequences)
  ids = fixtures.pad_rows([s[0] for s in sequences], length)
  positions = fixtures.pad_rows([s[1] for s in sequences], length)
  valid = fixtures.pad_rows([np.ones(len(s[0]), bool) for s in sequences], length, False)
  feature = fixtures.pad_rows([fixtures.features_of(s[3], s[5]) for s in sequences], length, -1)
  hidden = jax.jit(policy.hidden)(params, ids, positions, valid, features_MD, feature)
  return np.asarray(hidden), (ids, positions, valid, feature)


def two_prompts():
  """Two prompts of different lengths, two rows each; rows draw at different times.

  row 0   prompt 0 | 5 text | image 2 + 3 text | 4 text
  row 1   prompt 0 | 7 text |                    4 text
  row 2   prompt 1 | 5 text | image 1 + 2 text | 4 text
  row 3   prompt 1 | 7 text |                    4 text
  """
  policy, params, images, index, features_MD = setting()
  prompts = [[3, images[0], 6], [4, images[1], 2, images[2], 3]]
  tails = [[5, images[2], 3, 4], [7, 4], [5, images[1], 2, 4], [7, 4]]
  order = [[0], [1, 2]]
  rows = []
  for r, tail in enumerate(tails):
    prompt = r // 2
    ids, positions, _, image_of, used = fixtures.sequence(prompts[prompt] + tail, policy.cfg)
    numbers = [next(i for i, image in enumerate(images) if image is one) for one in used]
    rows.append((ids, positions, None, image_of, used, [index[i] for i in numbers]))
  # Rows of one prompt must agree on its text.
  lengths = [len(fixtures.sequence(prompt, policy.cfg)[0]) for prompt in prompts]
  for r in (1, 3):
    rows[r][0][: lengths[r // 2]] = rows[r - 1][0][: lengths[r // 2]]
  del order
  return rows, lengths


def part_of(batch, starts, ends, width):
  """The tokens [start, end) of each row, left-aligned in `width` columns."""
  ids, positions, valid, feature = batch
  cut = [slice(s, e) for s, e in zip(starts, ends, strict=True)]
  rows = range(len(cut))
  return (
    fixtures.pad_rows([ids[r][cut[r]] for r in rows], width),
    fixtures.pad_rows([positions[r][cut[r]] for r in rows], width),
    fixtures.pad_rows([valid[r][cut[r]] for r in rows], width, False),
    fixtures.pad_rows([feature[r][cut[r]] for r in rows], width, -1),
  )


@pytest.mark.parametrize("unstacked", [True, False])
def test_prefill_append_decode_equal_the_full_forward(unstacked):
  policy, params, _, index, features_MD = setting()
  rows, lengths = two_prompts()
  expected, batch = full_forward(rows, features_MD, params, policy, index)
  weights = policy.unstack(params) if unstacked else params
  prefill, append, decode = (jax.jit(f) for f in (policy.prefill, policy.append, policy.decode))

  first = part_of(batch, [0, 0, 0, 0], [lengths[0], 0, lengths[1], 0], max(lengths) + 3)
  ids, positions, valid, feature = (x[::2] for x in first)
  hidden_BTD, prefix = prefill(weights, ids, positions, valid, features_MD, feature)
  for b in range(2):
    np.testing.assert_allclose(
      hidden_BTD[b, : lengths[b]], expected[2 * b, : lengths[b]], atol=2e-5
    )
  cache = policy.init_cache(2, 2, max(lengths) + 8, 40)
  cache = cache_lib.admit(cache, prefix, jnp.arange(2))

  prompt_of = np.repeat(lengths, 2)
  spoken = np.array([5, 7, 5, 7])
  done = prompt_of.copy()
  for step in range(7):  # rows 0 and 2 stop after five tokens
    active = step < spoken
    at = np.where(active, prompt_of + step, 0)
    pick = np.arange(4)
    hidden, cache = decode(
      weights, cache, batch[0][pick, at], batch[1][pick, at], jnp.asarray(active)
    )
    done += active
    np.testing.assert_allclose(hidden[active], expected[pick, at][active], atol=2e-5)
  np.testing.assert_array_equal(cache.length_R, spoken)

  observation = [len(rows[0][0]) - 4 - done[0], len(rows[2][0]) - 4 - done[2]]
  slots = np.array([2, 9, 0], np.int32)  # any order; slot 9 does not exist
  starts = [done[2], 0, done[0]]
  ends = [done[2] + observation[1], 3, done[0] + observation[0]]
  wide = tuple(np.concatenate([x, x[:1]]) for x in batch)
  chosen = tuple(x[[2, 4, 0]] for x in wide)
  part = part_of(chosen, starts, ends, max(observation) + 2)
  hidden, cache = append(weights, cache, slots, *part[:3], features_MD, part[3])
  np.testing.assert_allclose(
    hidden[0, : observation[1]], expected[2, starts[0] : ends[0]], atol=2e-5
  )
  np.testing.assert_allclose(
    hidden[2, : observation[0]], expected[0, starts[2] : ends[2]], atol=2e-5
  )
  done[[0, 2]] += observation

  last = part_of(batch, done, done + 4, 6)  # all rows at once, prefixes read in place
  hidden, cache = append(weights, cache, None, *last[:3], features_MD, last[3])
  for r in range(4):
    np.testing.assert_allclose(hidden[r, :4], expected[r, done[r] : done[r] + 4], atol=2e-5)
  np.testing.assert_array_equal(cache.length_R, done + 4 - prompt_of)
