"""A very small policy, its tokenizer, and the settings of an evaluation of it."""

import dataclasses
import pathlib
from typing import Any

from configs import tiny_defaults
from experiments.tiny.tokenizer import train_tokenizer
from spatial_jax.config import build
from spatial_jax.data.chat_template import CHATML
from spatial_jax.evaluate_main import EvaluateRun
from spatial_jax.hf import weights
from spatial_jax.hf.generation import NOTHING
from spatial_jax.policy import lora
from spatial_jax.policy.config import DecoderConfig, QwenVLConfig, VisionConfig
from spatial_jax.stages.load import PolicyFiles
from tests.policy_fixtures import QWEN2_5_TOWER, QWEN2_DECODER, hashed_params, with_ids

VOCABULARY = 288
SIDE_PX = 56  # 2 x 2 merged tokens
EVALUATED = tuple(f.name for f in dataclasses.fields(EvaluateRun) if f.name != "reward")

# Values of a small policy and short tests that differ from `configs/tiny_defaults.py`.
SMALLER = {
  "init": "",
  "source.rooms": {
    "objects": (3, 5),
    "side_m": (3.0, 4.0),
    "l_shape_share": 0.0,
    "repeat_share": 0.3,
  },
  "source.camera.width_px": SIDE_PX,
  "source.camera.height_px": SIDE_PX,
  "source.questions.types": ("object_counting", "object_rel_distance", "camera_distance"),
  "source.questions.min_visible_pixels": 10,
  "source.max_tasks_per_scene": 3,
  "text": str(pathlib.Path(__file__).parent / "short_form.toml"),
  "preprocess.min_pixels": 28 * 28,
  "preprocess.max_pixels": SIDE_PX**2,
  "rollout.max_tokens_per_turn": 8,
  "rollout.decode_steps": 8,
  "rollout.stop": {
    "max_turns": 2,
    "max_images": 4,
    "max_image_tokens": 64,
    "max_response_tokens": 32,
    "near_duplicate_px": 0.0,
  },
  "rollout.prompt_buckets": (256,),
  "rollout.observation_buckets": (64,),
  "rollout.prefill": (4,),
  "rollout.vision": {"windows": (8, 16), "frames": (8, 16), "patches": (16,)},
  "executor.workers": 0,
  "learn.reward.schedule.k_max": 10.0,
  "evaluation": {
    "tasks": 10,
    "progress_tasks": 1,
    "train_tasks": 12,
    "temperatures": (0.3, 0.7),
    "pass_at": 0,
    "best_of": 3,
    "prompts": 8,
    "slots": 4,
    "gallery": 2,
    "other_images": True,
  },
}


def _settings() -> dict[str, Any]:
  """The settings of an evaluation: the defaults, made smaller."""
  cfg = tiny_defaults.get_config()
  cfg.update_from_flattened_dict(SMALLER)
  training = cfg.to_dict()
  settings = {name: training[name] for name in EVALUATED}
  return settings | {"reward": training["learn"]["reward"]}


SETTINGS = _settings()


def run_config() -> EvaluateRun:
  return build(EvaluateRun, SETTINGS)


def tokenizer():
  """A byte tokenizer with the special tokens."""
  return train_tokenizer(["<answer> 2 </answer>"], VOCABULARY)


def policy_config() -> QwenVLConfig:
  """A very small policy."""
  vision = VisionConfig(2, 16, 2, 24, 14, 2, 2, SIDE_PX, (1,), 1e-6, *QWEN2_5_TOWER)
  decoder = DecoderConfig(
    2, 16, 2, 1, 8, 32, VOCABULARY, 1e4, (2, 1, 1), 1e-6, True, *QWEN2_DECODER
  )
  return with_ids(vision, decoder, tokenizer())


def policy_files() -> PolicyFiles:
  """The very small policy without a folder."""
  return PolicyFiles(
    path=pathlib.Path(),
    checkpoint=None,
    cfg=policy_config(),
    lora=lora.OFF,
    tokenizer=tokenizer(),
    template=CHATML,
    generation=NOTHING,
    preprocess=None,
    benchmark=None,
  )


def random_params(seed: int):
  """Random weights; logits depend on the images."""
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
