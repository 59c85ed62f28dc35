"""One question to a full-size policy in ViLaSR's conversation.

Source: ViLaSR, arXiv:2506.09965: its grammar, limits and drawing sizes; the wording is ours.
Expected: a policy that was trained on the grammar draws; other policies answer, rarely with a
drawing. Time: minutes to compile, then seconds per question on one accelerator.
Command: python -m spatial_jax.chat --checkpoint=HF_FOLDER --image=a.jpg "How far is the chair?"
"""

from ml_collections import ConfigDict

from configs import common

SYSTEM = """You reason about space, and may draw on the images while you think.

### Available tools:
Object Mapper marks objects with boxes; its input is a JSON list of
{"index": i, "bbox_2d": [x1, y1, x2, y2], "label": "..."}
Path Tracer marks ways and distances with lines; its input is a JSON list of
{"index": i, "start_point_2d": [x1, y1], "end_point_2d": [x2, y2], "label": "..."}
"index" is that of the image to draw on, from 1; coordinates are its pixels, (0, 0) top left.
After each use you are shown the drawing: wait for it.

### Required Output Format:
<think> ... </think> Action: Object Mapper or Path Tracer
```json
[...]
```
and in the end
<think> ... </think> Action: Answer
<answer> ... </answer>

Look at each drawing critically, correct it where it is wrong, and go back where it led nowhere."""


def get_config() -> ConfigDict:
  """Images of up to 448 x 448 pixels, 256 visual tokens each."""
  cfg = common.get_config()
  cfg.text = ConfigDict(
    {
      "system": SYSTEM,
      "image_line": "The index of the given image is {index} (width: {width}, height: {height}).\n",
      "question": "\n### Question:\n{question}\n\nBegin your reasoning. After each tool use, look "
      "critically at the drawing and correct it if needed:\n",
      "number_suffix": "\nPlease answer with a single number (e.g., 42 or 3.14).",
      "choice_suffix": "\nAnswer with the option's letter from the given choices directly.",
      "words_suffix": "",
      "observation": "The index of the given image is {index} (width: {width}, height: {height}).",
      "more": " Continue your reasoning. After each tool use, look critically at the drawing and "
      "correct it if needed:",
      "final": " No tool can be used any more. Answer the question in the required format:",
    }
  )
  cfg.preprocess.max_pixels = 448 * 448
  cfg.style = ConfigDict({"line_px": 4, "dot_px": 4, "font_px": 10, "label_offset_px": (8, 6)})
  cfg.rollout.max_tokens_per_turn = 1024
  cfg.rollout.stop = ConfigDict(
    {
      "max_turns": 10,
      "max_images": 42,
      "max_image_tokens": 42 * 256,
      "max_response_tokens": 13312,
    }
  )
  cfg.rollout.suffix_block_edges = (1024, 4096)  # the first turns, and most conversations
  return cfg
