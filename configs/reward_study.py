"""Reward design for physical reasoning: seven conditions on PhyX.

    --config=configs/reward_study.py             all conditions, Qwen2-VL-2B
    --config=configs/reward_study.py:accuracy    one: sft, format, accuracy, format_accuracy,
                                                 rubric, attention ("base" is the start of each)
    --config=configs/reward_study.py:tiny        all conditions in miniature; or tiny,accuracy

Data: PhyX (Hugging Face, Cloudriver/PhyX), converted by
         python -m spatial_jax.tools.build --format=phyx --input=FILE --out=DIR
       then config.source.path=DIR/rows.jsonl. SFT imitates the solutions of
       "with_steps", in a column solution, steps or answer_with_steps.
Source: "Reward design for physical reasoning in VLMs" (arXiv:2604.13993). Stated: the four signals,
PhyX, a model of 2B (Granite Vision, here Qwen2-VL). Not stated: weights, layers, group, rates,
split, prompts; here rubric weights 0.4, 0.2, 0.2, 0.1, 0.1 and attention 0.5 A2 + 0.5 A3 over the
last third of the layers.
Expected: accuracy is the strongest signal overall; attention raises spatial relations (0.27 to
0.50) and hurts symbolic domains; multiple choice 0.462 with format + accuracy, 0.440 with the
rubric (paper). Not run here at full size. Chips and hours: 3,000 problems are 94 steps.
:tiny: the embedded policy has never seen physics, so a short SFT (warm_up) is the start of each
condition. Its table is in docs/papers.md. Time: 8 to 14 minutes on two CPU cores.
Command: python -m spatial_jax.train --config=configs/reward_study.py:tiny --workdir=runs/rewards
"""

from ml_collections import ConfigDict

from configs import qwen_vl, tiny_defaults

_REWARDS = ("format", "accuracy", "format_accuracy", "rubric", "attention")
CONDITIONS = ("sft", *_REWARDS)


def get_config(variant: str = "") -> ConfigDict:
  """All conditions or one, at full size or in miniature."""
  words = [word for word in variant.split(",") if word]
  wrong = [word for word in words if word not in ("tiny", *CONDITIONS)]
  if wrong:
    raise ValueError(f"{wrong[0]} is no condition; use {', '.join(CONDITIONS)}, or tiny")
  is_tiny = "tiny" in words
  cfg = _tiny() if is_tiny else _full()
  chosen = [word for word in words if word != "tiny"] or list(CONDITIONS)
  conditions = {name: _condition(name) for name in chosen}
  if is_tiny:
    start = {"init": "@warm_up"}
    warm = {"warm_up": {"stages": ("sft",)}}
    conditions = warm | {name: start | changes for name, changes in conditions.items()}
    if "sft" in chosen:
      # Conditions change plain values: the schedule does not follow the steps.
      schedule = {"learning_rate": 3e-4, "warmup_steps": 6, "total_steps": 60}
      conditions["sft"]["sft"] = {"steps": 60, "optimizer": schedule}
  cfg.conditions = ConfigDict(conditions)
  return cfg


def _condition(name: str) -> dict:
  """What a condition changes."""
  if name == "sft":
    return {"stages": ("sft",)}
  shown = ("accuracy", "format") if name == "format_accuracy" else (name,)
  names = ("accuracy", "format", "rubric", "attention")
  weights = {part: float(part in shown) for part in names}
  return {"stages": ("grpo",), "learn": {"reward": {"weights": weights}}}


def _full() -> ConfigDict:
  """2B with adapters."""
  cfg = qwen_vl.get_config("2b")
  cfg.text = "think"
  cfg.loop.steps = 282  # three passes over 3,000 problems, 32 at a time
  cfg.learn.optimizer.learning_rate = 1e-5
  cfg.sft.steps = 282
  _rewards(cfg)
  return cfg


def _rewards(cfg: ConfigDict) -> None:
  """A right answer is one within the tolerance, and every component counts by itself."""
  cfg.learn.advantage.alpha = 0.0
  cfg.learn.reward.update(
    {"gated": (), "number": "tolerance", "choice": "exact", "score": "tolerance"}
  )


def _tiny() -> ConfigDict:
  """Synthetic problems with the embedded policy."""
  cfg = tiny_defaults.get_config()
  cfg.source.kind = "physics"
  cfg.source.physics.update({"text_levels": ("full", "de_redundant"), "spatial_fraction": 0.25})
  cfg.rollout.prompt_buckets = (224,)
  cfg.learn.prefix_buckets = (224,)
  cfg.rollout.update({"prompts": 16, "slots": 16, "prefill": (16,)})
  cfg.loop.steps = 8
  cfg.loop.evaluate_every = 0
  # The words of physics are new to the policy: their embeddings have to be learnt.
  cfg.sft.update({"steps": 200, "draw_fraction": 0.0, "batch": 16})
  cfg.sft.optimizer.update({"learning_rate": 1e-3, "frozen": ("^vision/",)})
  cfg.evaluation.update({"tasks": 120, "temperatures": (), "other_images": False})
  cfg.evaluation.progress_tasks = 64
  _rewards(cfg)
  return cfg
