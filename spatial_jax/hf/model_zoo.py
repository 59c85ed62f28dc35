"""The configs of released checkpoints, to compile and count parameters without their files.

Loading a checkpoint uses its own config.json, not this table.
"""

import dataclasses

import numpy as np

from spatial_jax.data.image import PreprocessConfig
from spatial_jax.hf.name_map import name_table
from spatial_jax.policy.config import DecoderConfig, QwenVLConfig, VisionConfig

# name: decoder layers, width, heads, KV heads, feed-forward, vocabulary, tied
_QWEN2: dict[str, tuple[int, int, int, int, int, int, bool]] = {
  "Qwen2-VL-2B": (28, 1536, 12, 2, 8960, 151936, True),
  "Qwen2-VL-7B": (28, 3584, 28, 4, 18944, 152064, False),
  "Qwen2-VL-72B": (80, 8192, 64, 8, 29568, 152064, False),
  "Qwen2.5-VL-3B": (36, 2048, 16, 2, 11008, 151936, True),
  "Qwen2.5-VL-7B": (28, 3584, 28, 4, 18944, 152064, False),
  "Qwen2.5-VL-32B": (64, 5120, 40, 8, 27648, 152064, False),
  "Qwen2.5-VL-72B": (80, 8192, 64, 8, 29568, 152064, False),
}
_QWEN3: dict[str, tuple[int, int, int, int, int, int, bool]] = {
  "Qwen3-VL-2B": (28, 2048, 16, 8, 6144, 151936, True),
  "Qwen3-VL-4B": (36, 2560, 32, 8, 9728, 151936, True),
  "Qwen3-VL-8B": (36, 4096, 32, 8, 12288, 151936, False),
  "Qwen3-VL-32B": (64, 5120, 64, 8, 25600, 151936, False),
}
NAMES = (*_QWEN2, *_QWEN3)
_IDS = (151655, 151656, 151652, 151653)  # image pad, video pad, vision start, vision end
_HEAD_DIM = 128
# Mean and standard deviation of pixels, and their bounds: of images, and of videos (Qwen2-VL and
# Qwen2.5-VL: of one frame; Qwen3-VL: of the clip).
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_PIXELS_2 = ((56 * 56, 16384 * 28 * 28), (128 * 28 * 28, 768 * 28 * 28))
_PIXELS_3 = ((256 * 256, 4096 * 4096), (64 * 64, 24576 * 32 * 32))


def released(name: str) -> QwenVLConfig:
  """Returns the config of a released checkpoint, equal to that of its config.json.

  Args:
    name: one of NAMES.
  """
  if name in _QWEN3:
    return QwenVLConfig(_tower_3(name), _decoder_3(name), *_IDS, 1, "qwen3_vl")
  if name.startswith("Qwen2.5"):
    return QwenVLConfig(_tower_2_5(name), _decoder_2(name), *_IDS, 2, "qwen2_5_vl")
  return QwenVLConfig(_tower_2(), _decoder_2(name), *_IDS, 1, "qwen2_vl")


def released_processor(cfg: QwenVLConfig) -> tuple[PreprocessConfig, PreprocessConfig]:
  """Returns the settings of images and of videos of the released checkpoints of a family."""
  three, tower = cfg.family == "qwen3_vl", cfg.vision
  sizes = (tower.patch_size, tower.merge_size, tower.temporal_size)
  mean, std = (_HALF, _HALF) if three else (_CLIP_MEAN, _CLIP_STD)
  image, video = _PIXELS_3 if three else _PIXELS_2
  return (
    PreprocessConfig(*sizes, *image, mean, std),
    PreprocessConfig(*sizes, *video, mean, std),
  )


def parameter_count(cfg: QwenVLConfig) -> int:
  """Returns the number of parameters of a policy."""
  return sum(int(np.prod(entry.full_shape)) for entry in name_table(cfg))


def _decoder_2(name: str) -> DecoderConfig:
  layers, width, heads, kv_heads, mlp_width, vocabulary, tied = _QWEN2[name]
  sizes = (layers, width, heads, kv_heads, _HEAD_DIM, mlp_width, vocabulary)
  return DecoderConfig(
    *sizes, 1e6, (16, 24, 24), 1e-6, tied, rope_interleaved=False, qkv_bias=True, qk_norm=False
  )


def _decoder_3(name: str) -> DecoderConfig:
  layers, width, heads, kv_heads, mlp_width, vocabulary, tied = _QWEN3[name]
  sizes = (layers, width, heads, kv_heads, _HEAD_DIM, mlp_width, vocabulary)
  return DecoderConfig(
    *sizes, 5e6, (24, 20, 20), 1e-6, tied, rope_interleaved=True, qkv_bias=False, qk_norm=True
  )


def _tower_2() -> VisionConfig:
  tower = tower_2_5((32, 1280, 16, 5120), tuple(range(32)))
  return dataclasses.replace(tower, window_px=0, norm="layer", mlp="quick_gelu")


def _tower_2_5(name: str) -> VisionConfig:
  mlp_width = 3420 if name in ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B") else 3456
  return tower_2_5((32, 1280, 16, mlp_width), (7, 15, 23, 31))


def tower_2_5(sizes: tuple[int, int, int, int], full_layers: tuple[int, ...]) -> VisionConfig:
  """Returns a vision tower in the form of Qwen2.5-VL.

  Args:
    sizes: layers, width, heads, feed-forward width.
    full_layers: layers that attend over the whole frame.
  """
  return VisionConfig(
    *sizes,
    patch_size=14,
    merge_size=2,
    temporal_size=2,
    window_px=112,
    full_layers=full_layers,
    norm_eps=1e-6,
    norm="rms",
    mlp="gated",
    patch_bias=False,
    table_side=0,
    deepstack=(),
  )


def _tower_3(name: str) -> VisionConfig:
  small = name in ("Qwen3-VL-2B", "Qwen3-VL-4B")
  layers, width, mlp_width = (24, 1024, 4096) if small else (27, 1152, 4304)
  tower = tower_2_5((layers, width, 16, mlp_width), tuple(range(layers)))
  return dataclasses.replace(
    tower,
    patch_size=16,
    window_px=0,
    norm="layer",
    mlp="gelu_tanh",
    patch_bias=True,
    table_side=48,
    deepstack=(5, 11, 17) if small else (8, 16, 24),
  )
