"""The default run, longer: how far the embedded policy goes in two hours.

Source: as configs/tiny.py. Expected: greedy MRA rises too. Time: at most 2 hours on two CPU cores.
Command: python -m spatial_jax.train --config=configs/tiny_long.py --workdir=runs/long
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
  """More steps of more prompts."""
  cfg = common.get_config()
  cfg.loop.steps = 800
  cfg.learn.optimizer.total_steps = 800
  cfg.rollout.prompts = 16
  return cfg
