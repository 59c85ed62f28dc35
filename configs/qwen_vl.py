"""Any Qwen2-VL, Qwen2.5-VL or Qwen3-VL on your own data: AP-GRPO with adapters, or full tuning.

    --config=configs/qwen_vl.py:FOLDER     a Hugging Face folder
    --config=configs/qwen_vl.py:7b         a released size: 2b 3b 7b 8b 32b 72b, for --dry_run and
                                           aot; set --config.init=FOLDER to train
    --config=configs/qwen_vl.py:7b,full    all parameters of the decoder instead of adapters

Source: rates and betas of vsGRPO (arXiv:2504.00883: adapters, 1e-5 for 2B, 5e-6 for 7B) and ViLaSR
(arXiv:2506.09965: full tuning, 1e-6, 32 x 8 rollouts, clip 0.2 and 0.3).
Expected: depends on model and data; the run evaluates start and end on held-out tasks. Time: hours
on one accelerator; --dry_run prints memory and lengths in a minute.
Command: python -m spatial_jax.train --config=configs/qwen_vl.py:FOLDER --workdir=runs/mine
         --config.source.path=rows.jsonl
"""

from ml_collections import ConfigDict

from configs import common

RELEASED = {
  "2b": "Qwen2-VL-2B",
  "3b": "Qwen2.5-VL-3B",
  "7b": "Qwen2.5-VL-7B",
  "8b": "Qwen3-VL-8B",
  "32b": "Qwen2.5-VL-32B",
  "72b": "Qwen2.5-VL-72B",
}
_FULL = ",full"


def get_config(model: str) -> ConfigDict:
  """Settings for a released size or a folder; with ",full" for full tuning."""
  cfg = common.get_config()
  name = model.removesuffix(_FULL)
  if name not in RELEASED and name.endswith("b") and name[:-1].isdigit():
    raise ValueError(f"{name} is no released size; use {', '.join(RELEASED)}, or a folder")
  cfg.init = RELEASED.get(name, name)
  # By the number of parameters, and whether adapters are trained.
  cfg.learn.optimizer.learning_rate = None
  if model.endswith(_FULL):
    cfg.lora.paths = ()
  return cfg
