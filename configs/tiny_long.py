"""The default run, longer and calmer: how far the embedded policy goes in an hour.

Source: as configs/tiny.py. Expected: greedy MRA rises too (not run yet). Time: about an hour
on two CPU cores, by the steps of the default run.
Command: python -m spatial_jax.train --config=configs/tiny_long.py --workdir=runs/long
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
  """Five times the steps, each two thirds as far."""
  cfg = common.get_config()
  cfg.loop = common.loop(400)
  cfg.learn = common.learn(400)
  cfg.learn.optimizer.learning_rate = 1e-4
  return cfg
