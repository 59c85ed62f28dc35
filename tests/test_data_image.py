"""Preprocessing is bit-equal to the reference processor; packing keeps every patch in its place."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from spatial_jax.config import ConfigError
from spatial_jax.data import image as image_lib
from spatial_jax.data import vision_packing as packing
from spatial_jax.data.vision_packing import first_fit
from spatial_jax.errors import DataError
from tests import policy_fixtures as fixtures

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
QWEN = image_lib.PreprocessConfig(14, 2, 2, 56 * 56, 28 * 28 * 64, *CLIP)
SMALL = fixtures.PREPROCESS
BUCKETS = packing.VisionBuckets((1, 4, 16, 64, 256), (1, 4, 16, 32), (64, 256, 1024))


@pytest.mark.parametrize("cfg", [QWEN, SMALL], ids=["qwen", "small"])
@pytest.mark.parametrize(
  "size", [(56, 56), (224, 224), (97, 131), (480, 640), (33, 700), (5, 9), (28, 84), (300, 2)]
)
def test_patches_equal_the_reference_processor_bit_for_bit(cfg, size):
  pixels = fixtures.pixels(sum(size), *size)
  processor = Qwen2VLImageProcessorPil(
    size={"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels},
    patch_size=cfg.patch_size,
    image_mean=list(cfg.mean),
    image_std=list(cfg.std),
  )
  expected = processor(images=[pixels], return_tensors="np")
  ours = image_lib.patch_image(pixels, cfg)
  assert ours.patches_PX.dtype == np.float32
  np.testing.assert_array_equal(ours.grid_3, expected["image_grid_thw"][0])
  np.testing.assert_array_equal(ours.patches_PX, expected["pixel_values"])
  assert ours.pixels.shape == (ours.grid_3[1] * cfg.patch_size, ours.grid_3[2] * cfg.patch_size, 3)
  assert len(ours.patches_PX) == 4 * ours.tokens


def test_a_clip_has_pairs_of_frames_and_repeats_the_last():
  frames = [fixtures.pixels(i, 20, 28) for i in range(5)]
  clip = image_lib.patch_frames(frames, SMALL)
  assert clip.grid_3[0] == 3
  patches = clip.patches_PX.reshape(3, -1, 3, 2, 16)  # time, patch, channel, frame, pixel
  for i, frame in enumerate([*frames, frames[-1]]):
    alone = image_lib.patch_image(frame, SMALL).patches_PX.reshape(-1, 3, 2, 16)
    np.testing.assert_array_equal(patches[i // 2, :, :, i % 2], alone[:, :, 0])


def test_the_content_hash_depends_on_pixels_and_number_of_frames():
  one, other = fixtures.pixels(1, 24, 24), fixtures.pixels(2, 24, 24)
  hashes = [
    image_lib.patch_image(one, SMALL).content_hash,
    image_lib.patch_image(other, SMALL).content_hash,
    image_lib.patch_frames([one, other], SMALL).content_hash,
    image_lib.patch_frames([one] * 4, SMALL).content_hash,
  ]
  assert len(set(hashes)) == 4
  assert image_lib.patch_image(one.copy(), SMALL).content_hash == hashes[0]


@pytest.mark.parametrize(
  ("pixels", "message"),
  [
    (np.zeros((4, 804, 3), np.uint8), "4 x 804 .* aspect ratio"),
    (np.zeros((0, 10, 3), np.uint8), "0 x 10 .* empty"),
    (np.zeros((10, 10), np.uint8), "uint8"),
    (np.zeros((10, 10, 4), np.uint8), "uint8"),
    (np.zeros((10, 10, 3), np.float32), "float32"),
  ],
)
def test_invalid_images_are_refused(pixels, message):
  with pytest.raises(DataError, match=message):
    image_lib.patch_image(pixels, SMALL)


def test_clips_without_frames_or_of_several_sizes_are_refused():
  with pytest.raises(DataError, match="one size"):
    image_lib.patch_frames([fixtures.pixels(0, 8, 8), fixtures.pixels(0, 8, 16)], SMALL)
  with pytest.raises(DataError, match="frame"):
    image_lib.patch_frames([], SMALL)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"patch_size": 0}, "patch_size is 0 and must be a whole number, at least 1"),
    ({"merge_size": 0}, "merge_size is 0 and must be a whole number, at least 1"),
    ({"temporal_size": 0}, "temporal_size is 0 and must be a whole number, at least 1"),
    ({"min_pixels": 0}, "min_pixels is 0 and must be a whole number, at least 1"),
    ({"max_pixels": 3000}, "max_pixels is 3000 and must be a whole number, at least 3136"),
    ({"mean": (0.5, math.nan, 0.5)}, "mean is .* and must be finite"),
    ({"std": (0.5, 0.5, 0.0)}, "std is .* and must be above 0 and finite"),
    ({"std": (0.5, math.inf, 0.5)}, "std is .* and must be above 0 and finite"),
    ({"std": (0.5, -0.5, 0.5)}, "std is .* and must be above 0 and finite"),
  ],
)
def test_preprocessing_values_out_of_range_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(QWEN, **changes)


# --- packing -----------------------------------------------------------------------------------


def grid_image(grid):
  """An image whose patches contain their own index."""
  patches = int(np.prod(grid))
  values = np.arange(patches, dtype=np.float32)[:, None] + 1000 * np.float32(grid[2])
  return packing.PatchedImage("", values, grid, np.zeros((1, 1, 3), np.uint8))


IMAGES, FRAMES, SIDE = 5, 3, 6  # most images, frames of an image, blocks per side
grids = st.lists(
  st.tuples(st.integers(1, FRAMES), st.integers(1, SIDE), st.integers(1, SIDE)),
  min_size=1,
  max_size=IMAGES,
)
# A window contains at least one block.
ENOUGH = packing.VisionBuckets(
  packing.geometric_buckets(1, IMAGES * FRAMES * SIDE**2),
  packing.geometric_buckets(1, IMAGES * FRAMES),
  packing.geometric_buckets(4, 4 * SIDE**2),
)


@pytest.mark.parametrize("sizes", [(), (0, 1), (2, 1), (1, 1)])
@pytest.mark.parametrize("name", ["windows", "frames", "patches"])
def test_buckets_that_do_not_ascend_are_refused(name, sizes):
  with pytest.raises(ConfigError, match=f"{name} is .* and must list at least one size, ascending"):
    dataclasses.replace(BUCKETS, **{name: sizes})


@settings(max_examples=60, deadline=None)
@given(grids, st.integers(1, 4))
@example([(FRAMES, SIDE, SIDE)] * IMAGES, 1)
def test_every_patch_has_one_place_in_its_window_and_frame(blocks, window_blocks):
  images = [grid_image((t, 2 * h, 2 * w)) for t, h, w in blocks]
  batch, token_of = packing.plan_vision(images, window_blocks, ENOUGH)
  slot = 4 * window_blocks**2
  total = sum(len(image.patches_PX) for image in images)
  assert (batch.window_P > 0).sum() == (batch.frame_P > 0).sum() == total
  assert len(np.unique(np.concatenate(token_of))) == total // 4
  used_windows, frame = set(), 0
  for image, tokens in zip(images, token_of, strict=True):
    t, h, w = image.grid_3
    index_P = (tokens[:, None] * 4 + np.arange(4)).reshape(-1)
    np.testing.assert_array_equal(batch.patches_PX[index_P], image.patches_PX)
    # Patches have the same window number exactly if frame and window are the same.
    row, column, height, width = batch.position_P4[index_P].T
    assert set(zip(height, width, strict=True)) == {(h, w)}
    time = np.repeat(np.arange(t), h * w)
    side = 2 * window_blocks
    cell = (time * 100 + row // side) * 100 + column // side
    windows = list(zip((index_P // slot).tolist(), batch.window_P[index_P].tolist(), strict=True))
    pairs = set(zip(cell.tolist(), windows, strict=True))
    assert len(pairs) == len(set(cell.tolist())) == len(set(windows))
    assert not used_windows & set(windows), "a window belongs to one image"
    used_windows |= set(windows)
    # Every patch maps to a row of frames and back, and each frame has its own number.
    np.testing.assert_array_equal(batch.frame_NS.reshape(-1)[batch.slot_P[index_P]], index_P)
    np.testing.assert_array_equal(batch.frame_P[index_P], frame + 1 + time)
    rows = batch.slot_P[index_P].reshape(t, -1) // batch.frame_NS.shape[1]
    assert (rows == rows[:, :1]).all(), "a frame is in one row"
    frame += t
  assert (batch.frame_NS < len(batch.frame_P)).sum() == total, "the rest is padding"


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30))
def test_items_fit_their_rows_and_no_two_rows_could_be_merged(sizes):
  places, rows = first_fit(sizes, 12)
  used = np.zeros(rows, int)
  spans = sorted((row, start, size) for (row, start), size in zip(places, sizes, strict=True))
  for row, start, size in spans:
    assert start == used[row], "contiguous"
    used[row] += size
  assert used.max() <= 12
  assert rows < 2 or np.sort(used)[:2].sum() > 12


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6))
def test_images_fit_exactly_if_they_can_be_packed(sizes):
  """Also where tokens alone would fit: borders of windows and rows of frames take room too."""
  images = [fixtures.image(i, 8 * h, 8 * w) for i, (h, w) in enumerate(sizes)]
  buckets = packing.VisionBuckets((1, 6), (2, 4), (16, 64))
  try:
    packing.plan_vision(images, 2, buckets)
    expected = True
  except DataError:
    expected = False
  assert packing.fits(images, 2, buckets, False) == expected
  enough = sum(image.tokens for image in images) <= 6 * 2**2
  assert packing.fits(images, 2, buckets, True) == enough
  assert packing.fits([], 2, buckets, False)


def test_positions_are_rows_and_columns_of_the_frame():
  image = fixtures.image(0, 16, 24)  # 4 x 6 patches
  batch, (tokens,) = packing.plan_vision([image], 2, BUCKETS)
  position = batch.position_P4[:, :2].reshape(-1, 4, 2)[tokens]
  np.testing.assert_array_equal(position[1], [[0, 2], [0, 3], [1, 2], [1, 3]])
  np.testing.assert_array_equal(position[3], [[2, 0], [2, 1], [3, 0], [3, 1]])


def test_a_batch_uses_the_first_bucket_that_fits():
  images = [fixtures.image(0, 16, 24), fixtures.image(1, 8, 8)]
  batch, _ = packing.plan_vision(images, 2, BUCKETS)
  assert batch.frame_P.shape == (4 * 16,)
  assert batch.frame_NS.shape == (1, 64), "both in one row"
  with pytest.raises(DataError, match="attention windows exceed the largest bucket 2"):
    packing.plan_vision(images, 2, packing.VisionBuckets((2,), (4,), (64,)))
  with pytest.raises(DataError, match="no images"):
    packing.plan_vision([], 2, BUCKETS)


def test_geometric_buckets_are_powers_of_two_and_their_midpoints():
  assert packing.geometric_buckets(64, 300) == (64, 96, 128, 192, 256, 384)
  assert packing.geometric_buckets(1, 5) == (1, 2, 3, 4, 6)
  assert packing.geometric_buckets(8, 8) == (8,)


@pytest.mark.parametrize(("patch_size", "window_blocks"), [(14, 1), (14, 4), (16, 1)])
@pytest.mark.parametrize("together", [1, 8])
def test_at_most_a_quarter_of_the_patches_is_padding(patch_size, window_blocks, together):
  """200 images, sides log-uniform from 64 to 2048 pixels, alone and eight at a time."""
  cfg = image_lib.PreprocessConfig(patch_size, 2, 2, 56 * 56, 1280 * 28 * 28, (0,) * 3, (1,) * 3)
  random = np.random.default_rng(0)
  sides = np.exp(random.uniform(np.log(64), np.log(2048), (200, 2))).astype(int)
  grids = [np.array(image_lib.smart_resize(*map(int, pair), cfg)) // patch_size for pair in sides]
  buckets = packing.VisionBuckets(
    packing.geometric_buckets(1, 1 << 16),
    packing.geometric_buckets(1, 8),
    packing.geometric_buckets(16, 1 << 13),
  )
  real, padded, in_rows, shapes = 0, 0, 0, set()
  for first in range(0, len(grids), together):
    images = [grid_image((1, int(h), int(w))) for h, w in grids[first : first + together]]
    batch, _ = packing.plan_vision(images, window_blocks, buckets)
    real += sum(len(image.patches_PX) for image in images)
    padded += len(batch.frame_P)
    in_rows += batch.frame_NS.size
    shapes.add((batch.frame_P.shape, batch.frame_NS.shape))
  assert 1 - real / padded <= 0.25, "of the patches in matrix products"
  assert 1 - real / in_rows <= 0.25, "of the patches in full attention"
  assert len(shapes) <= 30
