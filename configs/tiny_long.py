"""The default run, longer and calmer: how far the embedded policy goes within an hour.

Source: as configs/tiny.py. Expected: greedy MRA rises too (not run yet). Time: about 45 minutes
on two CPU cores, by the steps of the default run.
Command: python -m spatial_jax.train --config=configs/tiny_long.py --workdir=runs/long
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
  """Six times the steps, each half as far; the temperature comes to where the default ends."""
  cfg = common.get_config()
  cfg.loop = common.loop(400)
  cfg.learn = common.learn(400)
  cfg.learn.optimizer.learning_rate = 4e-4
  cfg.learn.optimizer.gain_rate = 0.0045
  return cfg
