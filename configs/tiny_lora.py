"""The default loop through low-rank adapters: the policy's own parameters stay as they are.

Source: as configs/tiny.py; adapters as in LoRA (arXiv:2106.09685), beside values, outputs and the
feed-forward's last matrix, which are what the default run moves too.
Expected (seed 0): sampled score +0.033 [+0.014, +0.052] of 1,024 held-out questions, greedy +0.001
[-0.015, +0.015]. Time: nine minutes on two CPU cores.
Command: python -m spatial_jax.train --config=configs/tiny_lora.py --workdir=runs/lora
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
  """Adapters with a divergence to the policy without them, which needs no second copy."""
  cfg = common.get_config()
  cfg.lora.paths = (r"^decoder/layers/attn/[vo]/kernel", r"^decoder/layers/mlp/down/kernel")
  cfg.lora.rank = 16
  cfg.lora.alpha = 16.0
  cfg.learn.loss.kl_weight = 0.01
  optimizer = cfg.learn.optimizer
  optimizer.learning_rate = 1e-3
  optimizer.frozen = ("vision/",)
  optimizer.gains = ()
  optimizer.gain_rate = 0.0
  optimizer.scale_by_param_rms = False  # B begins at 0
  return cfg
