"""The default loop on a small Qwen3-VL.

Source: as configs/tiny.py. Run configs/tiny_qwen3_pretrain.py first: this starts from its policy.
Expected: sampled score +0.07 [+0.03, +0.11] of 256 held-out questions, all of it sharpening: the
greedy score and that on grey pictures stay. Three minutes on two cores.
Command: python -m spatial_jax.train --config=configs/tiny_qwen3.py --workdir=runs/qwen3
"""

from ml_collections import ConfigDict

from configs import common, tiny_qwen3_pretrain


def get_config() -> ConfigDict:
  """20 steps; pictures of 160 pixels, and buckets for patches of 16."""
  cfg = common.get_config()
  cfg.init = "runs/qwen3_pretrain/policy"
  cfg.loop = common.loop(20)
  cfg.learn = common.learn(20)
  cfg.source.camera.width_px = cfg.source.camera.height_px = tiny_qwen3_pretrain.SIDE_PX
  cfg.preprocess.update(tiny_qwen3_pretrain.preprocess())
  # Without windows a token is counted as one: 25 a picture, 32 pictures and 256 drawings.
  cfg.rollout.vision = {"windows": (400, 1600, 7200), "frames": (16, 64, 512), "patches": (100,)}
  cfg.learn.vision = {"windows": (1600, 7200), "frames": (64, 512), "patches": (100,)}
  cfg.evaluation.tasks = 256
  cfg.evaluation.prompts = 128
  return cfg
