"""Which frames of a clip are looked at, when they were taken, and how a file is read."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatial_jax.data import video
from spatial_jax.data.image import PreprocessConfig, clip_resize, patch_frames
from spatial_jax.errors import DataError
from tests import policy_fixtures as fixtures

av = pytest.importorskip("av", reason="reading video files needs PyAV (extra video)")

QWEN2 = video.SampleConfig(even_grid=False, fps=2.0, min_frames=4, max_frames=768)
QWEN3 = video.SampleConfig(even_grid=True, fps=2.0, min_frames=4, max_frames=768)
HALF = (0.5, 0.5, 0.5)
PIXELS = {"mpeg4": "yuv420p", "mjpeg": "yuvj420p"}


def test_three_seconds_at_two_frames_each():
  np.testing.assert_array_equal(video.sample_frames(90, 30.0, QWEN2), [0, 15, 30, 45, 60, 75])
  np.testing.assert_array_equal(video.sample_frames(90, 30.0, QWEN3), [0, 18, 36, 53, 71, 89])


@given(
  st.integers(1, 5000),
  st.floats(1, 120),
  st.booleans(),
  st.floats(0.1, 8),
  st.integers(2, 8),
  st.integers(8, 64),
)
def test_frames_ascend_within_the_video(total, fps, even_grid, wanted, least, most):
  cfg = video.SampleConfig(even_grid, wanted, least, most)
  if total < 2:
    with pytest.raises(DataError, match="too short"):
      video.sample_frames(total, fps, cfg)
    return
  chosen = video.sample_frames(total, fps, cfg)
  assert chosen[0] == 0
  assert chosen[-1] < total
  assert (np.diff(chosen) > 0).all()
  assert min(least, total) - 1 <= len(chosen) <= most
  if even_grid:
    assert chosen[-1] == total - 1
    assert np.ptp(np.diff(chosen)) <= 1
  else:
    assert len(chosen) % 2 == 0


def test_a_patch_stands_in_the_middle_of_its_frames():
  assert video.patch_times((0.0, 0.6, 1.2, 1.8)) == pytest.approx((0.3, 1.5))
  assert video.patch_times((0.0, 0.6, 1.2)) == pytest.approx((0.3, 1.2)), "the last is repeated"


def test_seconds_per_patch_follow_the_frames():
  frame = np.zeros((8, 8, 3), np.uint8)
  clip = video.Clip((frame,) * 4, (0.0, 0.7, 1.4, 2.1))
  assert video.seconds_per_patch(clip) == pytest.approx(1.4)
  assert video.seconds_per_patch(video.Clip((frame,), (0.0,))) == 1.0


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("frames", "size", "expected"),
  [
    (16, (240, 320), (192, 256)),
    (2, (240, 320), (256, 320)),
    (2, (8, 16), (192, 384)),  # first up to one token, 32 x 64
    (3, (100, 100), (224, 224)),  # three frames are held against the bounds as four
  ],
)
def test_the_bounds_of_a_whole_clip(frames, size, expected):
  cfg = PreprocessConfig(16, 2, 2, 128 * 32 * 32, 768 * 32 * 32, HALF, HALF)
  assert clip_resize(frames, *size, cfg) == expected
  pictures = [fixtures.pixels(i, *size) for i in range(frames)]
  grid_3 = patch_frames(pictures, cfg, whole_clip=True).grid_3
  assert grid_3 == ((frames + 1) // 2, expected[0] // 16, expected[1] // 16)


@pytest.mark.torch
@pytest.mark.filterwarnings("default")
def test_the_bounds_of_a_whole_clip_are_the_references():
  pytest.importorskip("torch", reason="the reference's module needs torch (extra bench)")
  from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

  generator, cfg = np.random.default_rng(0), PreprocessConfig(16, 2, 2, 50_000, 800_000, HALF, HALF)
  for _ in range(2000):
    frames, height, width = (int(x) for x in generator.integers((2, 8, 8), (40, 900, 900)))
    expected = smart_resize(frames, height, width, 2, 32, cfg.min_pixels, cfg.max_pixels)
    assert clip_resize(frames, height, width, cfg) == expected


def test_one_frame_is_no_clip():
  cfg = PreprocessConfig(16, 2, 2, 1024, 4096, HALF, HALF)
  with pytest.raises(DataError, match="too short"):
    clip_resize(1, 32, 32, cfg)


# --- files -------------------------------------------------------------------------------------


def movie(codec: str, container: str, frames: int) -> bytes:
  """Grey pictures that brighten by two levels each, 30 a second."""
  data = io.BytesIO()
  with av.open(data, "w", format=container) as file:
    stream = file.add_stream(codec, rate=30)
    stream.width, stream.height, stream.pix_fmt = 64, 48, PIXELS[codec]
    for number in range(frames):
      picture = np.full((48, 64, 3), 20 + 2 * number, np.uint8)
      file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    file.mux(stream.encode())
  return data.getvalue()


@pytest.mark.parametrize(("codec", "container"), [("mpeg4", "mp4"), ("mjpeg", "avi")])
def test_a_file_gives_the_frames_that_were_chosen(codec, container, tmp_path):
  path = tmp_path / f"clip.{container}"
  path.write_bytes(movie(codec, container, 90))
  clip = video.read_video(path, QWEN3)
  levels = [frame.mean() for frame in clip.frames]
  np.testing.assert_allclose(levels, 20 + 2 * np.array([0, 18, 36, 53, 71, 89]), atol=3)
  np.testing.assert_allclose(clip.times_s, np.array([0, 18, 36, 53, 71, 89]) / 30)
  assert clip.frames[0].shape == (48, 64, 3)


def test_what_is_no_video_is_named(tmp_path):
  (tmp_path / "notes.mp4").write_text("no video")
  with pytest.raises(DataError, match=r"notes\.mp4"):
    video.read_video(tmp_path / "notes.mp4", QWEN2)
  with pytest.raises(DataError, match=r"gone\.mp4"):
    video.read_video(tmp_path / "gone.mp4", QWEN2)
