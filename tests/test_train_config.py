"""The config of a training run: shapes of the update agree with those of the rollouts."""

import pytest

from configs import common
from spatial_jax.config import ConfigError, build
from spatial_jax.train import TrainConfig


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"learn.micro.lengths": (64, 200)}, r"micro\.lengths ends at 200 and must be .* 256"),
    ({"learn.prefix_buckets": (64,)}, r"prefix_buckets ends at 64 and must be .* 512"),
    ({"learn.vision.frames": (64,)}, r"learn\.vision\.frames ends at 64 and must be .* 512"),
    ({"learn.keep_fraction": 0.0}, r"learn\.keep_fraction is 0\.0 and must be above 0"),
  ],
)
def test_the_update_has_room_for_the_rollouts(changes, message):
  cfg = common.get_config()
  cfg.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=message):
    build(TrainConfig, dict(cfg))
