"""Evaluation on real photographs with metric truth: counting, distances, sizes, left and right.

Source: photographs of KITTI, nuScenes and SUN RGB-D with annotated 3D boxes. The embedded policy
has seen rendered rooms alone: this shows that the pipeline answers, draws and scores on real
pictures, not that it is good.
Expected: 5 to 9 % of answers can be read, which is far below the median answer's score; three in
ten draw. Time: under two minutes on two CPU cores.
Command: python -m spatial_jax.evaluate --config=configs/tiny_photos.py --checkpoint=runs/tiny
         --workdir=runs/photos [--config.source.path=FOLDER, default ../shared/data/real3d]
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
  """The evaluation half of the default run, on photographs."""
  cfg = common.get_config()
  cfg.source.kind = "photos"
  cfg.source.path = "../shared/data/real3d"
  cfg.text.response_prefix_fraction = 1.0
  return cfg
