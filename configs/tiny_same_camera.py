"""The control for configs/tiny.py: the camera and question types of pretraining.

The sharpness is the default, 1 to 100. The rest is as in configs/tiny.py.

Source: as configs/tiny.py. Expected: the greedy score does not change, because pretraining has
taught what these rewards could teach. Seed 0, 96 held-out questions at steps 0, 8, ..., 40: 0.61,
0.62, 0.61, 0.63, 0.61, 0.63.
Time: 8 minutes on two CPU cores.
Command: python -m spatial_jax.train --config=configs/tiny_same_camera.py --workdir=runs/same_camera
"""

from ml_collections import ConfigDict

from configs import tiny_defaults


def get_config() -> ConfigDict:
  """The defaults: 75 degrees, all eight question types."""
  return tiny_defaults.get_config()
