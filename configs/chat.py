"""One question to a full-size policy in ViLaSR's conversation.

Source: ViLaSR, arXiv:2506.09965: its prompts, grammar, limits and drawing sizes.
Expected: a policy that was trained on the grammar draws; other policies answer, rarely with a
drawing. Time: minutes to compile, then seconds per question on one accelerator.
Command: python -m spatial_jax.chat --checkpoint=HF_FOLDER --image=a.jpg "How far is the chair?"
"""

from ml_collections import ConfigDict

from configs import tiny_defaults


def get_config() -> ConfigDict:
  """Images of up to 448 x 448 pixels, 256 visual tokens each."""
  cfg = tiny_defaults.get_config()
  cfg.text = "vilasr"
  cfg.preprocess.max_pixels = 448 * 448
  cfg.style = ConfigDict({"line_px": 4, "dot_px": 4, "font_px": 10, "label_offset_px": (8, 6)})
  cfg.rollout.max_tokens_per_turn = 1024
  cfg.rollout.stop = ConfigDict(
    {
      "max_turns": 10,
      "max_images": 42,
      "max_image_tokens": 42 * 256,
      "max_response_tokens": 13312,
      "near_duplicate_px": 0.0,
    }
  )
  cfg.rollout.stop_tokens = ()  # those of the policy
  cfg.rollout.suffix_block_edges = (1024, 4096)  # the first turns, and most conversations
  return cfg
