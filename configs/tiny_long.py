"""The default run, longer and calmer: how far the embedded policy goes within two hours.

Source: as configs/tiny.py. Expected: greedy MRA rises too. 240 steps at a gain_rate of 0.007 gave
greedy +0.008 [-0.004, +0.021], sampled +0.078 [+0.054, +0.102] (seed 0); 1,000 are still to be run.
Time: an hour and three quarters on two CPU cores, by the steps of the default run.
Command: python -m spatial_jax.train --config=configs/tiny_long.py --workdir=runs/long
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
  """Eighteen times the steps, each two thirds as far; the temperature comes to the same."""
  cfg = common.get_config()
  cfg.loop = common.loop(1000)
  cfg.learn = common.learn(1000)
  cfg.learn.optimizer.learning_rate = 5e-4
  cfg.learn.optimizer.gain_rate = 0.0017
  return cfg
