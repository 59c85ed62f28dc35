"""A video as patches, and as text: the families of Qwen-VL write a clip in two ways.

    Qwen2-VL, Qwen2.5-VL    <|vision_start|><|video_pad|><|vision_end|>
    Qwen3-VL                <0.3 seconds><|vision_start|><|video_pad|><|vision_end|><1.4 seconds>..

In the first the clip is one image with several temporal patches. In the second each temporal patch
is an image of its own, after its time.

Source: the chat templates and processors of the three families in transformers. transformers 5 also
encloses a clip of Qwen3-VL in <|vision_start|> and <|vision_end|>; its earlier releases and other
engines do not, and neither does this module.
"""

import dataclasses
import hashlib

import numpy as np

from spatial_jax.data.image import PreprocessConfig, patch_frames
from spatial_jax.data.tokenizer import VIDEO_PAD, VISION_END, VISION_START
from spatial_jax.data.video import Clip, VideoConfig, patch_times, seconds_per_patch
from spatial_jax.types import PatchedImage

VIDEO_TOKENS = f"{VISION_START}{VIDEO_PAD}{VISION_END}"


@dataclasses.dataclass(frozen=True, eq=False)
class PatchedClip:
  """The frames of a video as patches, with the text in their place."""

  text: str  # one pad token per image
  images: tuple[PatchedImage, ...]
  step_s: tuple[float, ...]  # seconds between the temporal patches of each image with several


def patch_clip(
  clip: Clip, preprocess: PreprocessConfig, video: VideoConfig, timestamps: bool
) -> PatchedClip:
  """Resizes, normalises and cuts the frames of a video.

  Args:
    clip: its frames.
    preprocess: sizes of patches and normalisation, of images; the pixel bounds are those of
      `video`.
    timestamps: the form of Qwen3-VL, whose pixel bounds are those of the whole clip.
  """
  cfg = dataclasses.replace(preprocess, min_pixels=video.min_pixels, max_pixels=video.max_pixels)
  patched = patch_frames(clip.frames, cfg, whole_clip=timestamps)
  if not timestamps:
    step_s = seconds_per_patch(clip, cfg.temporal_size)
    return PatchedClip(VIDEO_TOKENS, (patched,), (step_s,))
  times_s = patch_times(clip.times_s, cfg.temporal_size)
  text = "".join(f"<{time:.1f} seconds>{VIDEO_TOKENS}" for time in times_s)
  return PatchedClip(text, split_clip(patched), ())


def split_clip(clip: PatchedImage) -> tuple[PatchedImage, ...]:
  """Splits a clip into its temporal patches, each an image of grid (1, height, width)."""
  time, height, width = clip.grid_3
  return tuple(
    dataclasses.replace(
      clip,
      content_hash=hashlib.sha256(f"{clip.content_hash}/{number}".encode()).hexdigest(),
      patches_PX=patches,
      grid_3=(1, height, width),
    )
    for number, patches in enumerate(np.split(clip.patches_PX, time))
  )
