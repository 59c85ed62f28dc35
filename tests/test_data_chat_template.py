"""Chats of words, pictures and clips: the text of each family, and what it becomes as tokens."""

import dataclasses

import numpy as np
import pytest

from spatial_jax.data.chat_template import (
  HELPFUL,
  QWEN3,
  Message,
  PatchedClip,
  chat_text,
  frames_of,
)
from spatial_jax.data.image import patch_frames, patch_image
from spatial_jax.data.tokenizer import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from tests import policy_fixtures, rollout_fixtures

CUT = policy_fixtures.PREPROCESS  # a token is 8 x 8 pixels
IMAGE_TOKENS = patch_image(policy_fixtures.picture(1, 8, 16), CUT)
OTHER = patch_image(policy_fixtures.picture(2, 16, 16), CUT)
FRAMES = [policy_fixtures.picture(3 + i, 8, 8) for i in range(4)]
CLIP = PatchedClip(patch_frames(FRAMES, CUT), (0.3, 1.5), 1.2)
QUESTION = [Message("user", (IMAGE_TOKENS, "Here ", CLIP, "moves. And ", OTHER, "?"))]
SEEN = f"{VISION_START}{IMAGE_PAD}{VISION_END}"
MOVING = f"{VISION_START}{VIDEO_PAD}{VISION_END}"


def test_the_text_of_qwen2_and_qwen2_5():
  chat = chat_text(QUESTION, HELPFUL)
  assert chat.text == (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n{SEEN}Here {MOVING}moves. And {SEEN}?<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  assert chat.pictures == [IMAGE_TOKENS, CLIP.image, OTHER]
  assert chat.seconds == [1.2]


def test_the_text_of_qwen3_writes_times():
  written = f"<0.3 seconds>{MOVING}<1.5 seconds>{MOVING}"
  chat = chat_text(QUESTION, QWEN3)
  assert chat.text == (
    f"<|im_start|>user\n{SEEN}Here {written}moves. And {SEEN}?<|im_end|>\n<|im_start|>assistant\n"
  )
  assert [picture.grid_3 for picture in chat.pictures] == [
    (1, 2, 4), (1, 2, 2), (1, 2, 2), (1, 4, 4)
  ]  # fmt: skip
  paired = chat_text(QUESTION, dataclasses.replace(QWEN3, outer_pair=True)).text
  assert f"Here {VISION_START}{written}{VISION_END}moves" in paired


def test_a_system_message_replaces_the_default_and_turns_follow():
  chat = chat_text(
    [Message("system", ("Be brief.",)), Message("user", ("1?",)), Message("assistant", ("2.",))],
    HELPFUL,
  )
  assert chat.text == (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n"
    "<|im_start|>assistant\n2.<|im_end|>\n<|im_start|>assistant\n"
  )


def test_words_cannot_name_a_special_token():
  chat = chat_text([Message("user", ("<|im_end|>",))], QWEN3)
  assert chat.text.count("<|im_end|>") == 1


def test_frames_of_a_clip_are_its_patches_in_order():
  frames = frames_of(CLIP.image)
  np.testing.assert_array_equal(
    np.concatenate([frame.patches_PX for frame in frames]), CLIP.image.patches_PX
  )
  assert len({frame.content_hash for frame in frames}) == 2


@pytest.mark.parametrize("rule", ["max", "hf5"])
def test_pads_stand_for_their_pictures_in_any_order(rule):
  """Qwen2.5-VL: a clip of two patches, 2 x 1.2 s apart, between two images."""
  conversation = rollout_fixtures.conversation()
  read = conversation.chat(QUESTION, HELPFUL, rule)
  cfg = conversation.policy
  kinds = [cfg.image_pad_id, cfg.video_pad_id, cfg.image_pad_id]
  for image, start, kind in zip(read.images, read.image_start, kinds, strict=True):
    span = read.token_ids_T[start : start + image.tokens]
    assert (span == kind).all()
    assert read.token_ids_T[start - 1] == cfg.vision_start_id
    assert read.token_ids_T[start + image.tokens] == cfg.vision_end_id
  start = read.image_start[1]
  first, second = read.position_TA[start : start + 2, 0]
  assert second - first == 2  # floor(2 tokens a second x 1.2 s)
  behind = read.position_TA[start + 2, 0] - first
  assert behind == (3 if rule == "max" else 1)
