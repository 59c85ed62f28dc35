"""The default loop on a small Qwen3-VL.

Source: as configs/tiny_same_camera.py. Run configs/tiny_qwen3_pretrain.py first; this run starts
from its policy. Expected: not measured since the default optimizer changed. Time: three minutes on
two CPU cores.
Command: python -m spatial_jax.train --config=configs/tiny_qwen3.py --workdir=runs/qwen3
"""

from ml_collections import ConfigDict

from configs import tiny_defaults, tiny_qwen3_pretrain


def get_config() -> ConfigDict:
  """20 steps; images of 160 pixels, and buckets for patches of 16."""
  cfg = tiny_defaults.get_config()
  cfg.init = "runs/qwen3_pretrain/policy"
  cfg.loop.steps = 20
  cfg.source.camera.width_px = cfg.source.camera.height_px = tiny_qwen3_pretrain.SIDE_PX
  cfg.preprocess.update(tiny_qwen3_pretrain.preprocess())
  # Without windows each token counts as a window: 25 per image, 32 images and 256 drawings.
  cfg.rollout.vision = {"windows": (400, 1600, 7200), "frames": (16, 64, 512), "patches": (100,)}
  cfg.learn.vision = {"windows": (1600, 7200), "frames": (64, 512), "patches": (100,)}
  cfg.evaluation.tasks = 256
  cfg.evaluation.prompts = 128
  return cfg
