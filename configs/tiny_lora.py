"""The default run with low-rank adapters and a KL term to the policy without them.

Source: as configs/tiny.py; LoRA (arXiv:2106.09685) beside value, output and last feed-forward
kernels. The KL reference is the same policy with the adapters off: no second copy.
Expected: not measured since the default run changed. Time: nine minutes on two CPU cores.
Command: python -m spatial_jax.train --config=configs/tiny_lora.py --workdir=runs/lora
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Adapters of rank 16, KL weight 0.01."""
  cfg = tiny.get_config()
  cfg.lora.paths = (r"^decoder/layers/attn/[vo]/kernel", r"^decoder/layers/mlp/down/kernel")
  cfg.lora.alpha = 16.0
  cfg.learn.loss.kl.weight = 0.01
  optimizer = cfg.learn.optimizer
  optimizer.learning_rate = 1e-3
  optimizer.frozen = ("vision/",)
  return cfg
