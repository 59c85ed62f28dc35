"""A very small policy, its tokenizer, and the settings of an evaluation of it."""

import pathlib

from spatial_jax.config import build
from spatial_jax.data.text import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, train_tokenizer
from spatial_jax.evaluate.run import EvaluateRun
from spatial_jax.policy import weights
from spatial_jax.policy.config import DecoderConfig, QwenVLConfig, VisionConfig
from tests.policy_fixtures import hashed_params

VOCABULARY = 288
SIDE_PX = 56  # 2 x 2 merged tokens

SETTINGS = {
  "seed": 0,
  "init": "",
  "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
  "source": {
    "kind": "procedural",
    "path": "",
    "rooms": {
      "objects": (3, 5),
      "side_m": (3.0, 4.0),
      "l_shape_share": 0.0,
      "repeat_share": 0.3,
    },
    "look": {
      "width_px": SIDE_PX,
      "height_px": SIDE_PX,
      "field_of_view_deg": 75.0,
      "frame_counts": (1,),
    },
    "questions": {
      "types": ("object_counting", "object_rel_distance", "camera_distance"),
      "max_per_type": 4,
      "min_pixels": 10,
      "min_fraction": 0.5,
      "scope": "views",
      "seconds_per_view": 2.0,
      "prefix": "",
    },
    "per_scene": 3,
  },
  "text": {
    "system": "",
    "image_line": "",
    "question": "{question}\n",
    "number_suffix": "",
    "choice_suffix": "",
    "observation": "",
    "more": "",
    "final": "",
  },
  "preprocess": {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_size": 2,
    "min_pixels": 28 * 28,
    "max_pixels": SIDE_PX**2,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.3, 0.3, 0.3),
  },
  "rollout": {
    "prompts": 8,
    "group": 8,
    "temperature": 1.0,
    "top_p": 1.0,
    "turn_tokens": 8,
    "chunk": 8,
    "stop": {"turns": 2, "images": 4, "tokens": 32},
    "limits": {
      "blocks": 4,
      "block_chars": 2000,
      "depth": 8,
      "operations": 8,
      "label_chars": 40,
      "digits": 6,
    },
    "prompt_buckets": (256,),
    "observation_buckets": (64,),
    "vision": {"windows": (8, 16), "frames": (8, 16), "patches": (16,)},
  },
  "style": {"line_px": 1, "dot_px": 1, "font_px": 8, "label_offset_px": (1, 1)},
  "executor": {"workers": 0, "timeout_s": 20.0, "memory_mib": 1024},
  "reward": {
    "number": "sigmoid",
    "choice": "exact",
    "schedule": {
      "kind": "sigmoid",
      "k_min": 1.0,
      "k_max": 10.0,
      "midpoint": 0.5,
      "steepness": 10.0,
    },
    "discrete_sharpness": None,
    "strict_mra": False,
    "hard_threshold": 0.0,
    "format_weight": 0.2,
    "gate": "format",
  },
  "evaluation": {
    "tasks": 10,
    "train_tasks": 12,
    "temperatures": (0.3, 0.7),
    "prompts": 8,
    "gallery": 2,
    "required": True,
  },
}  # fmt: skip


def run_config() -> EvaluateRun:
  return build(EvaluateRun, SETTINGS)


def tokenizer():
  """Bytes and special tokens, and no merges to speak of."""
  return train_tokenizer(["<answer> 2 </answer>"], VOCABULARY)


def policy_config() -> QwenVLConfig:
  """One layer of everything."""
  vision = VisionConfig(2, 16, 2, 24, 14, 2, 2, SIDE_PX, (1,), 1e-6)
  decoder = DecoderConfig(2, 16, 2, 1, 8, 32, VOCABULARY, 1e4, (2, 1, 1), 1e-6, True)
  words = tokenizer()
  pad, video, start, end = map(words.id, (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END))
  return QwenVLConfig(vision, decoder, pad, video, start, end, 2, "pixels")


def random_params(seed: int):
  """Weights under which pictures matter."""
  return hashed_params(policy_config(), seed)


def save_policy(folder: pathlib.Path, seed: int) -> pathlib.Path:
  """A Hugging Face folder of random weights."""
  weights.save(random_params(seed), policy_config(), folder)
  tokenizer().inner.save(str(folder / "tokenizer.json"))
  return folder


def with_settings(**groups) -> dict:
  """SETTINGS with single keys of some groups replaced: source={"kind": "rooms"}."""
  replaced = {
    name: SETTINGS[name] | value if isinstance(value, dict) else value
    for name, value in groups.items()
  }
  return SETTINGS | replaced
