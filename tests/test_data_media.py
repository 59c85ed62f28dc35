"""Media of tasks: files, contents and arrays give the same pixels; marks, sizes and clips."""

import io

import numpy as np
import pytest
from PIL import Image

from spatial_jax.data.clip import patch_clip, split_clip
from spatial_jax.data.media import MAX_PIXELS, image_size, read_clip, read_pixels
from spatial_jax.data.tokenizer import VIDEO_PAD
from spatial_jax.data.video import Clip, VideoConfig
from spatial_jax.errors import DataError
from spatial_jax.types import ImageRef, Mark, VideoRef
from tests import policy_fixtures
from tests.policy_fixtures import PREPROCESS, pixels

CFG = VideoConfig(False, 2.0, 2, 4, 64, 4096)


def png(array: np.ndarray) -> bytes:
  file = io.BytesIO()
  Image.fromarray(array).save(file, "png")
  return file.getvalue()


def test_a_path_the_contents_and_the_pixels_are_the_same_image(tmp_path):
  array = pixels(0, 12, 20)
  (tmp_path / "a.png").write_bytes(png(array))
  for data in (str(tmp_path / "a.png"), png(array), array):
    np.testing.assert_array_equal(read_pixels(ImageRef(data)), array)
    assert image_size(ImageRef(data)) == (12, 20)


def test_the_size_is_that_of_the_upright_image(tmp_path):
  image, exif = Image.fromarray(pixels(0, 12, 20)), Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  image.save(tmp_path / "a.jpg", exif=exif)
  ref = ImageRef(str(tmp_path / "a.jpg"))
  assert image_size(ref) == read_pixels(ref).shape[:2] == (20, 12)


def test_marks_are_drawn_on_a_copy():
  array = np.zeros((60, 80, 3), np.uint8)
  marks = (Mark("box", (50, 40, 10, 10), "red"), Mark("point", (70, 50), "#00ff00"))
  drawn = read_pixels(ImageRef(array, marks))
  assert not array.any()
  assert (drawn[10, 10:51] == (255, 0, 0)).all()
  assert (drawn[50, 70] == (0, 255, 0)).all()
  assert not drawn[25, 30].any(), "a box is not filled"


def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path):
  side = int(MAX_PIXELS**0.5) + 1
  Image.new("1", (side, side)).save(tmp_path / "huge.png")
  for read in (read_pixels, image_size):
    with pytest.raises(DataError, match="is larger than 80,000,000 pixels"):
      read(ImageRef(str(tmp_path / "huge.png")))


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n broken", b"text"])
def test_contents_that_are_no_image_are_named(data):
  with pytest.raises(DataError, match=r"the contents of an image \(\d+ bytes\) cannot be read"):
    read_pixels(ImageRef(data))


@pytest.mark.parametrize("array", [np.zeros((4, 4, 1), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_pixels_of_another_form_are_refused(array):
  for read in (read_pixels, image_size):
    with pytest.raises(DataError, match=r"must be uint8 \[height, width, 3\]"):
      read(ImageRef(array))


def test_frames_of_a_list_are_chosen_by_time():
  frames = tuple(ImageRef(pixels(i, 8, 8)) for i in range(8))
  times_s = tuple(i * 0.5 for i in range(8))
  clip = read_clip(VideoRef(frames, times_s), CFG, even_grid=True)
  assert clip.times_s == (0.0, 1.0, 2.5, 3.5)  # at most four
  np.testing.assert_array_equal(clip.frames[1], frames[2].data)
  untimed = read_clip(VideoRef(frames), CFG, even_grid=False)
  assert untimed.times_s == (0.0, 1.0, 2.0, 3.0), "two frames a second, as the config says"


def test_frames_of_several_sizes_are_refused():
  frames = (ImageRef(pixels(0, 8, 8)), ImageRef(pixels(1, 8, 16)))
  with pytest.raises(DataError, match="several sizes \\(16 x 8, 8 x 8\\)"):
    read_clip(VideoRef(frames), CFG, even_grid=True)


def test_a_clip_is_one_image_or_one_image_per_temporal_patch():
  frames = tuple(pixels(3 + i, 8, 8) for i in range(4))
  clip = Clip(frames, (0.0, 0.6, 1.2, 1.8))
  whole = patch_clip(clip, PREPROCESS, CFG, timestamps=False)
  assert [image.grid_3 for image in whole.images] == [(2, 2, 2)]
  assert whole.text.count(VIDEO_PAD) == 1
  assert whole.step_s == pytest.approx((1.2,))
  timed = patch_clip(clip, PREPROCESS, CFG, timestamps=True)
  assert [image.grid_3 for image in timed.images] == [(1, 2, 2)] * 2
  assert timed.text.startswith("<0.3 seconds><|vision_start|>")
  assert timed.text.count(VIDEO_PAD) == 2
  assert timed.step_s == ()


def test_split_clip_keeps_the_order_of_patches():
  clip = policy_fixtures.patch_frames([pixels(i, 8, 8) for i in range(4)], PREPROCESS)
  parts = split_clip(clip)
  patches = np.concatenate([part.patches_PX for part in parts])
  np.testing.assert_array_equal(patches, clip.patches_PX)
  assert len({part.content_hash for part in parts}) == 2
