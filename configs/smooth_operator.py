"""Smooth Operator: SNRA with a sharpness schedule, and AP-GRPO, on Numerical3D.

    --config=configs/smooth_operator.py          Qwen2.5-VL-7B, adapters
    --config=configs/smooth_operator.py:7b,full  all parameters of the decoder; also 2b, 3b, 8b
    --config=configs/smooth_operator.py:tiny     AP-GRPO, GRPO and a constant sharpness of 400 from
                                                 the embedded policy, on procedural rooms

Data: python -m spatial_jax.tools.build --dataset=numerical3d --source=rooms --out=DIR, a rebuild of
       Numerical3D-50k from rendered rooms (13 minutes); then
       config.source.path=DIR/numerical3d/1.0.0.
Source: Smooth Operator (arXiv:2601.07695). Stated: squared error, r^alpha with alpha 1, k_min 1, a
k_max of 400 is too sharp. Reconstructed: both formulas and the schedule (1 to 100). Not stated:
base model, rates, group, steps; here those of ViLaSR and vsGRPO.
Expected: VSI-Bench 60.0 (paper, unknown base). Not run here at full size. Chips and hours: see
docs/memory.md for what fits; 1,562 steps are one pass over 50,000 tasks.
:tiny: its table is in docs/papers.md. Time: 14 minutes on two CPU cores.
Command: python -m spatial_jax.train --config=configs/smooth_operator.py:tiny --workdir=runs/smooth
"""

from ml_collections import ConfigDict

from configs import qwen_vl, tiny


def get_config(variant: str = "7b") -> ConfigDict:
  """A released size or folder, or the miniature."""
  if variant == "tiny":
    return _tiny()
  cfg = qwen_vl.get_config(variant)
  cfg.text = "think"
  cfg.loop.steps = 1562
  return cfg


def _tiny() -> ConfigDict:
  """Three short runs that differ in one value each."""
  cfg = tiny.get_config()
  cfg.loop.steps = 24
  cfg.loop.evaluate_every = 0
  cfg.evaluation.update({"tasks": 192, "temperatures": (), "other_images": False})
  cfg.evaluation.progress_tasks = 64
  cfg.conditions = ConfigDict(
    {
      "ap_grpo": {},
      "grpo": {"learn": {"advantage": {"alpha": 0.0}}},
      "constant_400": {"learn": {"reward": {"schedule": {"kind": "constant", "k_max": 400.0}}}},
    }
  )
  return cfg
