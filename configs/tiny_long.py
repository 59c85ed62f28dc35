"""The default run, longer and calmer: how far the embedded policy goes within half an hour.

Source: as configs/tiny.py. Expected: greedy MRA rises too (not run yet). Time: about 45 minutes
on two CPU cores, by the steps of the default run.
Command: python -m spatial_jax.train --config=configs/tiny_long.py --workdir=runs/long
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
  """Four times the steps, each two thirds as far; the temperature comes to the same."""
  cfg = common.get_config()
  cfg.loop = common.loop(240)
  cfg.learn = common.learn(240)
  cfg.learn.optimizer.learning_rate = 5e-4
  cfg.learn.optimizer.gain_rate = 0.007
  return cfg
