"""Chats of text, images and clips: the text of each family, and its tokens and positions."""

import dataclasses

import numpy as np
import pytest

from spatial_jax.data.chat_template import (
  QWEN2_CHAT,
  QWEN3_CHAT,
  Message,
  PatchedClip,
  chat_text,
  split_clip,
)
from spatial_jax.data.image import patch_frames, patch_image
from spatial_jax.data.tokenizer import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from tests import policy_fixtures, rollout_fixtures

PREPROCESS = policy_fixtures.PREPROCESS  # a token is 8 x 8 pixels
IMAGE = patch_image(policy_fixtures.pixels(1, 8, 16), PREPROCESS)
OTHER = patch_image(policy_fixtures.pixels(2, 16, 16), PREPROCESS)
FRAMES = [policy_fixtures.pixels(3 + i, 8, 8) for i in range(4)]
CLIP = PatchedClip(patch_frames(FRAMES, PREPROCESS), (0.3, 1.5), 1.2)
QUESTION = [Message("user", (IMAGE, "Here ", CLIP, "moves. And ", OTHER, "?"))]
IMAGE_TEXT = f"{VISION_START}{IMAGE_PAD}{VISION_END}"
VIDEO_TEXT = f"{VISION_START}{VIDEO_PAD}{VISION_END}"


def test_the_text_of_qwen2_and_qwen2_5():
  chat = chat_text(QUESTION, QWEN2_CHAT)
  assert chat.text == (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n{IMAGE_TEXT}Here {VIDEO_TEXT}moves. And {IMAGE_TEXT}?<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  assert chat.images == [IMAGE, CLIP.image, OTHER]
  assert chat.step_s == [1.2]


def test_the_text_of_qwen3_has_the_time_before_each_temporal_patch():
  timed = f"<0.3 seconds>{VIDEO_TEXT}<1.5 seconds>{VIDEO_TEXT}"
  chat = chat_text(QUESTION, QWEN3_CHAT)
  assert chat.text == (
    f"<|im_start|>user\n{IMAGE_TEXT}Here {timed}moves. And {IMAGE_TEXT}?<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  assert [image.grid_3 for image in chat.images] == [
    (1, 2, 4), (1, 2, 2), (1, 2, 2), (1, 4, 4)
  ]  # fmt: skip
  paired = chat_text(QUESTION, dataclasses.replace(QWEN3_CHAT, outer_vision_pair=True)).text
  assert f"Here {VISION_START}{timed}{VISION_END}moves" in paired


def test_a_system_message_replaces_the_default_and_turns_follow():
  chat = chat_text(
    [Message("system", ("Be brief.",)), Message("user", ("1?",)), Message("assistant", ("2.",))],
    QWEN2_CHAT,
  )
  assert chat.text == (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n"
    "<|im_start|>assistant\n2.<|im_end|>\n<|im_start|>assistant\n"
  )


def test_text_cannot_contain_a_special_token():
  chat = chat_text([Message("user", ("<|im_end|>",))], QWEN3_CHAT)
  assert chat.text.count("<|im_end|>") == 1


def test_split_clip_keeps_the_order_of_patches():
  frames = split_clip(CLIP.image)
  np.testing.assert_array_equal(
    np.concatenate([frame.patches_PX for frame in frames]), CLIP.image.patches_PX
  )
  assert len({frame.content_hash for frame in frames}) == 2


@pytest.mark.parametrize("rule", ["max", "hf5"])
def test_pads_are_expanded_to_their_images_in_any_order(rule):
  """Qwen2.5-VL: a clip of two patches, 2 x 1.2 s apart, between two images."""
  conversation = rollout_fixtures.conversation()
  segment = conversation.chat(QUESTION, QWEN2_CHAT, rule)
  cfg = conversation.policy
  pads = [cfg.image_pad_id, cfg.video_pad_id, cfg.image_pad_id]
  for image, start, pad in zip(segment.images, segment.image_start, pads, strict=True):
    span = segment.token_ids_T[start : start + image.tokens]
    assert (span == pad).all()
    assert segment.token_ids_T[start - 1] == cfg.vision_start_id
    assert segment.token_ids_T[start + image.tokens] == cfg.vision_end_id
  start = segment.image_start[1]
  first, second = segment.position_TA[start : start + 2, 0]
  assert second - first == 2  # floor(2 tokens a second x 1.2 s)
  after = segment.position_TA[start + 2, 0] - first
  assert after == (3 if rule == "max" else 1)
