"""vsGRPO: R1-Zero-like GRPO with a small KL term on VSI-100k, against SFT and DPO.

    --config=configs/vsgrpo.py              Qwen2-VL-2B, GRPO
    --config=configs/vsgrpo.py:7b,dpo       a size (2b, 7b) and a method (grpo, sft, dpo)
    --config=configs/vsgrpo.py:tiny         the three methods from the embedded policy
    --config.text=think                     or observe, vanilla: the three prompts of the paper

Data: VSI-100k (Hugging Face, OPPOer/VSI-100k), converted by
         python -m spatial_jax.tools.build --format=vsi100k --input=FILE --media=DIR --out=DIR
       then config.source.path=DIR/rows.jsonl.
Source: vsGRPO (arXiv:2504.00883). Stated: adapters, rates 1e-5 (2B) and 5e-6 (7B), 14 rollouts,
temperature 1, beta 1e-4 (with 0 the format collapses), rewards of format and accuracy: character
match, and a ratio for numbers whose mapping to a reward is not stated (here max(0, 1 - q)). Not
stated: rank, frames, batch, steps, all of SFT and DPO. Eq. 1 has one ratio per response; here
it is per token, as in the library that the paper builds on (both are 1 with one update per batch).
The vanilla prompt has no tags: every answer keeps its format.
Expected: VSI-Bench, vanilla prompt: 2B 23.3 -> 35.4, 7B 32.2 -> 40.7; SFT 29.6 and 38.1, DPO 23.9
and 32.6 (paper). Not run here at full size. The paper states 120 GPU hours for 2B.
:tiny: its table is in docs/papers.md. Time: 13 minutes on two CPU cores.
Command: python -m spatial_jax.train --config=configs/vsgrpo.py:tiny --workdir=runs/vsgrpo
"""

from ml_collections import ConfigDict

from configs import qwen_vl, tiny_defaults

_SIZES = {"2b": 1e-5, "7b": 5e-6}
_NAMES = {"2b": "Qwen2-VL-2B", "7b": "Qwen2-VL-7B"}
_METHODS = ("grpo", "sft", "dpo")


def get_config(variant: str = "2b,grpo") -> ConfigDict:
  """A size and a method, or the miniature."""
  if variant == "tiny":
    return _tiny()
  words = variant.split(",")
  wrong = [word for word in words if word not in (*_SIZES, *_METHODS)]
  if wrong:
    raise ValueError(f"{wrong[0]} is no size (2b, 7b) and no method ({', '.join(_METHODS)})")
  size = next((word for word in words if word in _SIZES), "2b")
  method = next((word for word in words if word in _METHODS), "grpo")
  cfg = qwen_vl.get_config("2b")
  cfg.init = _NAMES[size]
  cfg.stages = (method,)
  cfg.text = "vanilla"
  cfg.rollout.group = 14
  cfg.loop.steps = 1000
  for optimizer in (cfg.learn.optimizer, cfg.sft.optimizer):
    optimizer.learning_rate = _SIZES[size]
  _paper(cfg)
  return cfg


def _paper(cfg: ConfigDict) -> None:
  """Rewards, advantage and KL term of the paper."""
  reward = cfg.learn.reward
  reward.weights.update({"accuracy": 1.0, "format": 1.0})
  reward.update({"gated": (), "number": "ratio", "choice": "exact"})
  cfg.learn.advantage.alpha = 0.0
  cfg.learn.loss.kl.weight = 1e-4
  cfg.learn.loss.clip_high = 0.2


def _tiny() -> ConfigDict:
  """The three methods on three numeric question types at a new camera."""
  cfg = tiny_defaults.get_config()
  cfg.source.questions.types = ("object_abs_distance", "object_size_estimation", "camera_distance")
  cfg.source.camera.field_of_view_deg = 50.0
  cfg.loop.steps = 24
  cfg.loop.evaluate_every = 0
  cfg.evaluation.update({"tasks": 192, "temperatures": (), "other_images": False})
  cfg.evaluation.progress_tasks = 64
  _paper(cfg)
  cfg.sft.update({"steps": 40, "draw_fraction": 0.0})
  cfg.sft.optimizer.learning_rate = 1e-4
  cfg.dpo.steps = 40
  cfg.conditions = ConfigDict({name: {"stages": (name,)} for name in _METHODS})
  return cfg
