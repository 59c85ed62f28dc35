"""The functions of the policy agree: cached and whole, scanned and unrolled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.clip import clip_batch
from spatial_jax.data.vision_packing import VisionBuckets, geometric_buckets, plan_vision
from spatial_jax.hf.model_zoo import released
from spatial_jax.policy import cache as cache_lib
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.types import PatchedImage, TokenArrays
from tests import policy_fixtures as fixtures

SIZES = ((24, 40), (16, 16), (32, 24))


TIED = "qwen2_5_vl/tied"
FAMILIES = ("qwen2_vl/tied", TIED, "qwen3_vl/tied")


@functools.cache
def setting(name: str = TIED):
  """Policy, parameters, features of three images and their indices."""
  policy = make_policy(fixtures.family_configs()[name], jnp.float32)
  params = fixtures.small_params(policy.cfg)
  images = [fixtures.image(seed, *size) for seed, size in enumerate(SIZES)]
  batch, index = plan_vision(images, policy.cfg.vision.window_blocks, fixtures.BUCKETS)
  features_MYD = jax.jit(policy.encode)(params, batch)
  return policy, params, images, index, features_MYD


@functools.cache
def four_rows(name: str = TIED):
  """Two prompts of different lengths, two rows each; rows 0 and 2 contain another image.

  row 0   prompt 0 | 5 text | image 2 + 3 text | 4 text
  row 1   prompt 0 | 7 text |                    4 text
  row 2   prompt 1 | 5 text | image 1 + 2 text | 4 text
  row 3   prompt 1 | 7 text |                    4 text

  Returns the batch (ids, positions, valid, feature), row and prompt lengths, and hidden states.
  """
  policy, params, images, index, features_MYD = setting(name)
  prompts = [[3, images[0], 6], [4, images[1], 2, images[2], 3]]
  tails = [[5, images[2], 3, 4], [7, 4], [5, images[1], 2, 4], [7, 4]]
  rows = [fixtures.sequence(prompts[r // 2] + tails[r], policy.cfg) for r in range(4)]
  prompt_lengths = [len(fixtures.sequence(prompt, policy.cfg).ids) for prompt in prompts]
  number = {id(image): i for i, image in enumerate(images)}
  features = [row.feature([index[number[id(i)]] for i in row.images]) for row in rows]
  width = max(len(row.ids) for row in rows)
  batch = (
    fixtures.pad_rows([row.ids for row in rows], width),
    fixtures.pad_rows([row.positions for row in rows], width),
    fixtures.pad_rows([np.ones(len(row.ids), bool) for row in rows], width),
    fixtures.pad_rows(features, width, -1),
  )
  hidden = jax.jit(policy.hidden)(params, TokenArrays(*batch), features_MYD)
  return batch, [len(row.ids) for row in rows], prompt_lengths, np.asarray(hidden)


def cut(batch, rows, starts, ends, width):
  """Tokens [start, end) of the given rows, left-aligned in `width` columns."""
  spans = [(row, slice(s, e)) for row, s, e in zip(rows, starts, ends, strict=True)]
  fills = (0, 0, 0, -1)
  return tuple(
    fixtures.pad_rows([array[row, span] for row, span in spans], width, fill)
    for array, fill in zip(batch, fills, strict=True)
  )


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
  ("name", "unstacked", "sizes"),
  [(TIED, False, (6, 3, 31)), (TIED, True, (9, 31)), *((name, True, (40,)) for name in FAMILIES)],
)
def test_prefill_decode_and_append_equal_the_whole_forward(name, unstacked, sizes):
  policy, params, _, _, features_MYD = setting(name)
  batch, lengths, prompt_lengths, expected = four_rows(name)
  weights = policy.unstack(params) if unstacked else params
  prefill, append, decode = (jax.jit(f) for f in (policy.prefill, policy.append, policy.decode))

  part = cut(batch, [0, 2], [0, 0], prompt_lengths, max(prompt_lengths) + 3)
  hidden_BTD, prefix = prefill(weights, TokenArrays(*part), features_MYD)
  for b, length in enumerate(prompt_lengths):
    close(hidden_BTD[b, :length], expected[2 * b, :length])
  cache = policy.init_cache(2, 2, 4, max(prompt_lengths) + 8, sizes)
  cache = cache_lib.put_prefix(cache, prefix, jnp.arange(2))

  start = np.repeat(prompt_lengths, 2)
  rows, done = np.arange(4), start.copy()
  for step in range(7):  # rows 0 and 2 stop after five tokens
    active = step < np.array([5, 7, 5, 7])
    at = np.where(active, start + step, 0)
    hidden_RD, cache = decode(weights, cache, batch[0][rows, at], batch[1][rows, at], active)
    done += active
    close(hidden_RD[active], expected[rows, at][active])
  np.testing.assert_array_equal(cache.length_R, done - start)

  # Both images are appended in one call: any order of rows, one of them padding.
  rows_R, ends = np.array([2, 9, 0], np.int32), np.array(lengths) - 4
  part = cut(batch, [2, 3, 0], done[[2, 3, 0]], ends[[2, 3, 0]], 24)
  hidden, cache = append(weights, cache, rows_R, TokenArrays(*part), features_MYD)
  for i, row in ((0, 2), (2, 0)):
    close(hidden[i, : ends[row] - done[row]], expected[row, done[row] : ends[row]])
    done[row] = ends[row]

  part = cut(batch, range(4), done, done + 4, 6)  # all rows, prefixes read in place
  hidden, cache = append(weights, cache, None, TokenArrays(*part), features_MYD)
  close(hidden[:, :4], np.stack([expected[r, done[r] : done[r] + 4] for r in range(4)]))
  np.testing.assert_array_equal(cache.length_R, done + 4 - start)


def test_put_prefix_replaces_one_prompt_and_leaves_the_other():
  policy, params, _, _, features_MYD = setting()
  batch, _, prompt_lengths, expected = four_rows()
  part = cut(batch, [0, 2], [0, 0], prompt_lengths, max(prompt_lengths))
  _, prefix = jax.jit(policy.prefill)(params, TokenArrays(*part), features_MYD)
  cache = policy.init_cache(2, 2, 4, max(prompt_lengths), (8,))
  cache = cache._replace(length_R=jnp.array([3, 4, 0, 0], jnp.int32))
  first = cache_lib.Prefix(jax.tree.map(lambda x: x[:1], prefix.layers), prefix.length_B[:1])
  cache = cache_lib.put_prefix(cache, first, jnp.array([1]))  # prompt 0 moves into slot 1
  np.testing.assert_array_equal(cache.length_R, [3, 4, 0, 0])
  np.testing.assert_array_equal(cache.prefix.length_B, [1, prompt_lengths[0]])
  at = prompt_lengths[0]
  hidden_RD, cache = jax.jit(policy.decode)(
    params,
    cache,
    batch[0][[0] * 4, at],
    batch[1][[0] * 4, at],
    np.array([False, False, True, True]),
  )
  close(hidden_RD[2:], expected[[0, 0], at])
  np.testing.assert_array_equal(cache.length_R, [3, 4, 1, 1])


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 2), (3, 1), (1, 1, 1, 1)])
def test_write_stores_at_the_offset_and_drops_tokens_beyond_the_end(sizes):
  suffix = tuple(cache_lib.KV(*(jnp.zeros((2, 1, size, 1)) for _ in range(2))) for size in sizes)
  new = cache_lib.KV(*(i * jnp.arange(1.0, 4.0)[None, None, :, None] for i in (1, -1)))
  new = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), new)
  start_R, valid_RT = jnp.array([2, 0]), jnp.array([[True] * 3, [True, True, False]])
  suffix = cache_lib.write(suffix, new, None, start_R, valid_RT)
  whole = cache_lib.KV(*(jnp.concatenate(x, axis=2) for x in zip(*suffix, strict=True)))
  np.testing.assert_array_equal(whole.k_RKSC[:, 0, :, 0], [[0, 0, 1, 2], [1, 2, 0, 0]])
  np.testing.assert_array_equal(whole.v_RKSC, -whole.k_RKSC)
  back = cache_lib.read(suffix, start_R, 2)
  jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(lambda x: x[:, :, :2], new))


def test_take_rows_until_reads_no_block_after_the_end():
  suffix = tuple(cache_lib.KV(*(jnp.ones((3, 1, size, 1)) for _ in range(2))) for size in (2, 3, 4))
  for end, blocks in ((1, 1), (2, 1), (3, 2), (5, 2), (6, 3)):
    taken = cache_lib.take_rows_until(suffix, jnp.array([2, 7]), jnp.int32(end))
    assert [x.k_RKSC.shape for x in taken] == [(2, 1, size, 1) for size in (2, 3, 4)]
    assert [float(x.v_RKSC.max()) for x in taken] == [1.0] * blocks + [0.0] * (3 - blocks)


def test_features_do_not_depend_on_buckets_or_other_images():
  policy, params, images, index, features_MYD = setting()
  roomy = VisionBuckets((64,), (8,), (128,))
  batch, alone = plan_vision(images[2:], policy.cfg.vision.window_blocks, roomy)
  close(jax.jit(policy.encode)(params, batch)[alone[0]], np.asarray(features_MYD)[index[2]])


@pytest.mark.parametrize("name", [TIED, "qwen3_vl/tied"])
def test_remat_and_scan_do_not_change_values_or_gradients(name):
  policy, params, _, _, features_MYD = setting(name)
  batch, *_ = four_rows(name)
  plain = make_policy(policy.cfg, jnp.float32, remat=False)

  def loss(policy, params):
    hidden = policy.hidden(params, TokenArrays(*batch), features_MYD)
    return jnp.mean(jnp.where(batch[2][..., None], jnp.sin(hidden), 0.0))

  one, gradient = jax.jit(jax.value_and_grad(functools.partial(loss, policy)))(params)
  other, expected = jax.jit(jax.value_and_grad(functools.partial(loss, plain)))(params)
  unrolled = jax.jit(functools.partial(loss, policy))(policy.unstack(params))
  np.testing.assert_allclose([one, unrolled], [other, other], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), gradient, expected)


def test_logprobs_are_the_masked_tempered_softmax_for_every_chunk_size():
  policy, params, *_ = setting()
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((2, 7, policy.cfg.decoder.width), np.float32)
  target = rng.integers(0, 90, (2, 7)).astype(np.int32)
  temperature = np.array([0.5, 1.3], np.float32)
  forbidden = np.arange(96) >= 90
  target[1, 3] = 92
  logits = np.where(forbidden, -np.inf, np.asarray(policy.logits(params, hidden), np.float64))
  logits /= temperature[:, None, None]
  expected = np.take_along_axis(logits, target[..., None], -1)[..., 0]
  expected -= np.log(np.exp(logits).sum(-1))
  for chunk in (3, 256):
    chunked = make_policy(policy.cfg, jnp.float32, logprob_chunk=chunk)
    logp = jax.jit(chunked.logprobs)(params, hidden, target, temperature, forbidden).logp_RT
    np.testing.assert_allclose(logp, expected, rtol=1e-5, atol=1e-5)
  assert logp[1, 3] == -np.inf


def test_logprobs_never_hold_all_logits():
  """The program and its gradient contain float32 logits of one chunk, not of all tokens."""
  policy, params, *_ = setting()
  policy = make_policy(policy.cfg, jnp.float32, logprob_chunk=4)
  shapes = (jnp.zeros((2, 64, 48)), jnp.zeros((2, 64), jnp.int32), jnp.ones(2), jnp.zeros(96, bool))
  text = str(jax.make_jaxpr(jax.grad(lambda p: policy.logprobs(p, *shapes).logp_RT.sum()))(params))
  assert "f32[2,4,96]" in text
  assert "f32[2,64,96]" not in text
  assert "f32[16,2,4,96]" not in text


def test_bfloat16_runs_and_stays_close():
  policy, params, _, _, features_MYD = setting()
  batch, *_, expected = four_rows()
  half = make_policy(policy.cfg, jnp.bfloat16)
  hidden = jax.jit(half.hidden)(params, TokenArrays(*batch), features_MYD)
  assert hidden.dtype == jnp.bfloat16
  error = np.abs(np.asarray(hidden, np.float32) - expected)[batch[2]]
  assert error.mean() < 0.05 * np.abs(expected).mean()


def test_init_has_the_shapes_of_the_name_table_and_depends_on_the_key():
  for tied in (True, False):
    policy = fixtures.small_policy(tied)
    one, other = policy.init(jax.random.key(0)), policy.init(jax.random.key(1))
    expected = jax.tree.map(jnp.shape, fixtures.small_params(policy.cfg))
    assert jax.tree.map(jnp.shape, one) == expected
    kernel = one["decoder"]["layers"]["attn"]["q"]["kernel"]
    assert not np.array_equal(kernel, other["decoder"]["layers"]["attn"]["q"]["kernel"])
    assert not np.array_equal(kernel[0], kernel[1])


# --- vision tower: memory and traces -------------------------------------------------------------


def test_a_clip_of_sixteen_large_frames_fits_eight_gib():
  """Vision tower of Qwen2.5-VL-3B: memory of the compiled program, weights included."""
  cfg = released("Qwen2.5-VL-3B")
  policy = make_policy(cfg, jnp.float32)
  params = jax.eval_shape(policy.init, jax.random.key(0))
  memory = (
    jax.jit(policy.encode)
    .lower({"vision": params["vision"]}, clip_batch(cfg, 16))
    .compile()
    .memory_analysis()
  )
  used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
  assert memory.argument_size_in_bytes > 2 << 30
  assert used < 4 << 30


def test_two_hundred_image_sizes_need_one_trace_per_bucket():
  """Sides log-uniform from 2 to 24 patches."""
  policy, params, *_ = setting()
  cfg, traces = policy.cfg.vision, []
  random = np.random.default_rng(0)
  buckets = VisionBuckets(
    geometric_buckets(1, 64), geometric_buckets(1, 1), geometric_buckets(16, 1024)
  )

  @jax.jit
  def encode(params, vision):
    traces.append(vision.window_P.shape)
    return policy.encode(params, vision)

  shapes, real, padded = set(), 0, 0
  for _ in range(200):
    height, width = (2 * np.exp(random.uniform(0, np.log(12), 2))).astype(int) // 2 * 2
    patches = np.zeros((height * width, cfg.patch_values), np.float32)
    image = PatchedImage("", patches, (1, int(height), int(width)), np.zeros((0, 0, 3), np.uint8))
    batch, _ = plan_vision([image], cfg.window_blocks, buckets)
    shape = (batch.window_P.shape, batch.frame_NS.shape)
    if shape not in shapes:
      encode(params, batch)
    shapes.add(shape)
    real, padded = real + height * width, padded + len(batch.window_P)
  assert 8 < len(traces) == len(shapes) < 25
  assert 1 - real / padded <= 0.25
