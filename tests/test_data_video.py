"""Video files: which frames are read, their times, orientation, and damaged files."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.config import ConfigError
from spatial_jax.data import video
from spatial_jax.errors import DataError

av = pytest.importorskip("av", reason="reading video files needs PyAV (extra video)")

CFG = video.VideoConfig(False, 2.0, 4, 768, 1, 10**9)
QWEN2, QWEN3 = (CFG, False), (CFG, True)  # the last value: an even grid
PIXELS = {"mpeg4": "yuv420p", "mjpeg": "yuvj420p", "png": "rgba"}


def test_three_seconds_at_two_frames_per_second_give_six_frames():
  np.testing.assert_array_equal(video.sample_frames(90, 30.0, *QWEN2), [0, 15, 30, 45, 60, 75])
  np.testing.assert_array_equal(video.sample_frames(90, 30.0, *QWEN3), [0, 18, 36, 53, 71, 89])


@given(
  st.integers(1, 5000),
  st.floats(1, 120),
  st.booleans(),
  st.floats(0.1, 8),
  st.integers(2, 8),
  st.integers(8, 64),
)
def test_chosen_frames_ascend_within_the_video(total, fps, even_grid, wanted, least, most):
  cfg = video.VideoConfig(False, wanted, least, most, 1, 1)
  if total < 2:
    with pytest.raises(DataError, match="too short"):
      video.sample_frames(total, fps, cfg, even_grid)
    return
  chosen = video.sample_frames(total, fps, cfg, even_grid)
  assert chosen[0] == 0
  assert chosen[-1] < total
  assert (np.diff(chosen) > 0).all()
  assert min(least, total) - 1 <= len(chosen) <= most
  if even_grid:
    assert chosen[-1] == total - 1
    assert np.ptp(np.diff(chosen)) <= 1
  else:
    assert len(chosen) % 2 == 0


def test_the_time_of_a_patch_is_the_mean_of_its_frames():
  assert video.patch_times((0.0, 0.6, 1.2, 1.8), 2) == pytest.approx((0.3, 1.5))
  assert video.patch_times((0.0, 0.6, 1.2), 2) == pytest.approx((0.3, 1.2)), "the last is repeated"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"fps": 0.0}, "fps is 0.0 and must be above 0"),
    ({"fps": math.nan}, "fps is nan"),
    ({"fps": math.inf}, "fps is inf"),
    ({"min_frames": 1}, "min_frames is 1 and must be a whole number, at least 2"),
    ({"max_frames": 3}, "max_frames is 3 and must be a whole number, at least 4"),
  ],
)
def test_sampling_out_of_range_is_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(CFG, **changes)


def test_seconds_per_patch_follow_the_frames():
  frame = np.zeros((8, 8, 3), np.uint8)
  clip = video.Clip((frame,) * 4, (0.0, 0.7, 1.4, 2.1))
  assert video.seconds_per_patch(clip, 2) == pytest.approx(1.4)
  assert video.seconds_per_patch(video.Clip((frame,), (0.0,)), 2) == 1.0


# --- files -------------------------------------------------------------------------------------


def movie(codec: str, container: str, frames: int, pixels=None, display=()) -> bytes:
  """A video of 64 x 48 pixels with 30 frames per second.

  Args:
    codec, container: of the file.
    frames: number of frames.
    pixels: of all frames; None: grey images, each two levels brighter than the last.
    display: arguments of the display matrix, (degrees counter-clockwise, mirrored).
  """
  data = io.BytesIO()
  with av.open(data, "w", format=container) as file:
    stream = file.add_stream(codec, rate=30)
    stream.width, stream.height, stream.pix_fmt = 64, 48, PIXELS[codec]
    if display:
      stream.set_display_rotation(display[0], hflip=display[1])
    for number in range(frames):
      image = np.full((48, 64, 3), 20 + 2 * number, np.uint8) if pixels is None else pixels
      form = "rgb24" if image.shape[2] == 3 else "rgba"
      file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format=form)))
    file.mux(stream.encode())
  return data.getvalue()


@pytest.mark.parametrize(("codec", "container"), [("mpeg4", "mp4"), ("mjpeg", "avi")])
def test_a_file_gives_the_frames_that_were_chosen(codec, container, tmp_path):
  path = tmp_path / f"clip.{container}"
  path.write_bytes(movie(codec, container, 90))
  clip = video.read_video(path, *QWEN3)
  levels = [frame.mean() for frame in clip.frames]
  np.testing.assert_allclose(levels, 20 + 2 * np.array([0, 18, 36, 53, 71, 89]), atol=3)
  np.testing.assert_allclose(clip.times_s, np.array([0, 18, 36, 53, 71, 89]) / 30)
  assert clip.frames[0].shape == (48, 64, 3)


def test_frames_are_chosen_again_if_the_header_counts_too_many(tmp_path):
  whole, path = movie("mjpeg", "avi", 90), tmp_path / "cut.avi"
  start = [match.start() for match in re.finditer(b"00dc", whole)]  # name of the chunk of a frame
  path.write_bytes(whole[: start[60]])
  clip = video.read_video(path, *QWEN3)
  assert len(clip.frames) >= 4
  levels = np.array([frame.mean() for frame in clip.frames])
  np.testing.assert_allclose(levels, 20 + 2 * 30 * np.array(clip.times_s), atol=3)
  assert clip.times_s[-1] == pytest.approx(59 / 30, abs=0.04)


def corners(frame: np.ndarray) -> list[list[int]]:
  """Grey levels of the four quarters of a frame."""
  height, width = frame.shape[0] // 4, frame.shape[1] // 4
  return frame[height :: 2 * height, width :: 2 * width, 0][:2, :2].round(-1).tolist()


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_frames_are_turned_and_mirrored_upright(tmp_path, degrees, mirrored):
  """As the display matrix says: first turned, then mirrored."""
  quarters = np.array([[20, 80], [140, 200]], np.uint8)
  stored = np.repeat(np.repeat(quarters, 24, 0), 32, 1)[..., None].repeat(3, 2)
  path = tmp_path / "phone.mp4"
  path.write_bytes(movie("mpeg4", "mp4", 4, stored, (degrees, mirrored)))
  upright = np.rot90(quarters, degrees // 90)
  upright = upright[:, ::-1] if mirrored else upright
  frame = video.read_video(path, *QWEN2).frames[0]
  assert frame.shape == ((64, 48, 3) if degrees in (90, 270) else (48, 64, 3))
  np.testing.assert_allclose(corners(frame), upright, atol=10)


def test_a_display_matrix_with_another_angle_is_refused(tmp_path):
  (tmp_path / "tilted.mp4").write_bytes(movie("mpeg4", "mp4", 4, display=(30, False)))
  with pytest.raises(DataError, match=r"tilted\.mp4 .*not a multiple of 90 degrees"):
    video.read_video(tmp_path / "tilted.mp4", *QWEN2)


def test_transparent_pixels_become_white(tmp_path):
  stored = np.zeros((48, 64, 4), np.uint8)
  stored[20:28] = [0, 0, 0, 255]
  (tmp_path / "plan.mov").write_bytes(movie("png", "mov", 4, stored))
  frame = video.read_video(tmp_path / "plan.mov", *QWEN2).frames[0]
  assert (frame[:20] == 255).all()
  assert (frame[20:28] == 0).all()


def test_files_that_cannot_be_read_are_named(tmp_path):
  (tmp_path / "notes.mp4").write_text("no video")
  (tmp_path / "empty.mp4").touch()
  (tmp_path / "short.mp4").write_bytes(movie("mpeg4", "mp4", 1))
  (tmp_path / "cut.mp4").write_bytes(movie("mpeg4", "mp4", 30)[:2000])
  for name, problem in (
    ("notes.mp4", "cannot be read as a video"),
    ("gone.mp4", "does not exist"),
    ("", "is a folder"),
    ("empty.mp4", "is empty"),
    ("short.mp4", "a video of 1 frames is too short"),
    ("cut.mp4", "cannot be read as a video"),
  ):
    with pytest.raises(DataError, match=problem) as caught:
      video.read_video(tmp_path / name, *QWEN2)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(
  st.floats(0, 1), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4)
)
def test_a_damaged_video_is_read_or_named(tmp_path_factory, kept, changes):
  data = bytearray(DAMAGED)
  for place, value in changes:
    data[place % len(data)] = value
  path = tmp_path_factory.mktemp("damaged") / "a.mp4"
  path.write_bytes(data[: round(kept * len(data))])
  message = str(path)
  try:
    assert len(video.read_video(path, *QWEN2).frames) >= 2
  except DataError as error:
    message = str(error)
  assert message.startswith(str(path))
  assert "\n" not in message


def test_a_file_without_video_is_named(tmp_path):
  with av.open(str(tmp_path / "sound.wav"), "w") as file:
    stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
    frame.rate = 8000
    file.mux(stream.encode(frame))
  with pytest.raises(DataError, match=r"sound\.wav .*no video stream"):
    video.read_video(tmp_path / "sound.wav", *QWEN2)


DAMAGED = movie("mpeg4", "mp4", 6)
