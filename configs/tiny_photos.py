"""Evaluation on real photographs with metric truth: counting, distances, sizes, left and right.

Source: photographs of KITTI, nuScenes and SUN RGB-D with annotated 3D boxes. The embedded policy
was trained on rendered rooms only. This run shows that the pipeline answers, draws and scores on
real images; the policy fails on them.
Expected: 5 to 9 % of the answers can be read; the score is 0.36 below that of the median answer.
Time: under two minutes on two CPU cores.
Command: python -m spatial_jax.evaluate --config=configs/tiny_photos.py --checkpoint=runs/tiny
         --workdir=runs/photos --config.source.path=FOLDER   (annotations.json and images/)
"""

from ml_collections import ConfigDict

from configs import tiny_defaults


def get_config() -> ConfigDict:
  """The evaluation of the default run, on photographs."""
  cfg = tiny_defaults.get_config()
  cfg.source.kind = "photos"
  return cfg
