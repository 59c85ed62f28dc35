"""Pretraining of a small Qwen3-VL with the recipe of the embedded policy, for a few minutes.

Source: as configs/tiny_pretrain.py; patches of 16 pixels, learned positions, DeepStack.
Expected: answers in the right format that do not depend on the image yet (sampled 0.20, greedy
0.32); configs/tiny_qwen3.py starts from them. Time: 14 minutes on two cores beside other work.
Command: python -m experiments.tiny.pretrain --config=configs/tiny_qwen3_pretrain.py
         --workdir=runs/qwen3_pretrain
"""

from ml_collections import ConfigDict

from configs import tiny_pretrain

SIDE_PX = 160  # 5 x 5 tokens
HALF = (0.5, 0.5, 0.5)


def get_config() -> ConfigDict:
  """240 steps; another family, images of 160 pixels."""
  cfg = tiny_pretrain.get_config()
  cfg.loop.steps = 240
  cfg.optimizer.learning_rate = 1.5e-3
  cfg.optimizer.warmup_steps = 20
  cfg.optimizer.decay_steps = 60
  cfg.recipe.vision_steps = 80
  cfg.family = "qwen3_vl"
  cfg.vision.update(vision())
  cfg.decoder.update(decoder())
  cfg.camera.width_px = cfg.camera.height_px = SIDE_PX
  cfg.preprocess.update(preprocess())
  # Without windows each token is a window of its own.
  cfg.shapes.vision = {"windows": (400, 800, 1600), "frames": (16, 32, 64), "patches": (100,)}
  cfg.shapes.window_blocks = 1
  cfg.out = "runs/qwen3_pretrain/policy"
  return cfg


def vision() -> dict:
  """LayerNorm, two matrices with GELU, a table of 12 x 12 positions, every layer over the frame."""
  return {
    "patch_size": 16,
    "window_px": 0,
    "full_layers": (0, 1, 2, 3),
    "norm": "layer",
    "mlp": "gelu_tanh",
    "mlp_width": 512,
    "patch_bias": True,
    "table_side": 12,
    "deepstack": (0, 2),
  }


def decoder() -> dict:
  """Heads of 48 channels, 6 x 48 of a width of 192; normalised queries and keys."""
  return {
    "head_dim": 48,
    "rope_sections": (8, 8, 8),
    "rope_interleaved": True,
    "qkv_bias": False,
    "qk_norm": True,
  }


def preprocess() -> dict:
  """As in Qwen3-VL, except the pixel budget."""
  return {"patch_size": 16, "max_pixels": SIDE_PX**2, "mean": HALF, "std": HALF}
