"""A new camera: AP-GRPO calibrates the embedded policy to a lens that pretraining never used.

Pretraining rendered every room with a horizontal field of view of 75 degrees. This run uses 50
degrees, so that objects look closer than they are, and distances are underestimated. Only rewards
tell the policy so. What it learns is a calibration of metric scale: the table shows the start times
one fitted constant per question type beside it.

Source: Smooth Operator (arXiv:2601.07695: SNRA, AP-GRPO; reconstructed).
Expected: greedy score 0.52 to 0.61-0.62 on three seeds, see README.md. Time: 8 minutes on two CPU
cores.
Command: ./launch/local.sh
"""

from ml_collections import ConfigDict

from configs import tiny_defaults


def get_config() -> ConfigDict:
  """Three numeric question types at 50 degrees."""
  cfg = tiny_defaults.get_config()
  cfg.source.camera.field_of_view_deg = 50.0
  cfg.source.questions.types = ("object_abs_distance", "object_size_estimation", "camera_distance")
  # The run is short: guesses are ranked from the start, and most of it has the final sharpness.
  # Reward of an answer that is 20 % off: 0.80 at sharpness 10, 0.34 at 40.
  cfg.learn.reward.schedule.update({"k_min": 10.0, "k_max": 40.0, "midpoint": 0.25})
  return cfg
