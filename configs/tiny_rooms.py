"""AP-GRPO from the embedded policy on real rooms: scene metadata of VSI-Bench, rendered.

Source: VSI-Bench (arXiv:2412.14171): metadata (ScanNet, ARKitScenes) and question rules; the
rewards are the defaults, with sharpness 1 to 100. The rooms belong to the benchmark: checkpoints of
this run say so, and an evaluation on the benchmark prints it above the table.
The metadata files (arkitscenes*.json, scannet*.json) are part of the VSI-Bench repository.
Expected: not measured since the default optimizer changed. Time: 10 minutes on two CPU cores.
Command: python -m spatial_jax.train --config=configs/tiny_rooms.py --workdir=runs/rooms
         --config.source.path=FOLDER_OR_FILE
"""

from ml_collections import ConfigDict

from configs import tiny_defaults


def get_config() -> ConfigDict:
  """40 steps on real rooms."""
  cfg = tiny_defaults.get_config()
  cfg.source.kind = "rooms"
  cfg.loop.steps = 40
  cfg.evaluation.tasks = 256
  return cfg
