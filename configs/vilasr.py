"""ViLaSR: cold start, reflective rejection sampling, then RL, with drawing while it thinks.

    --config=configs/vilasr.py             Qwen2.5-VL-7B, all three stages
    --config=configs/vilasr.py:cold_start  one of them: cold_start, reject, rl
    --config=configs/vilasr.py:tiny        all three with the embedded policy on procedural rooms

Data: ViLaSR-ColdStart-33k and -RL-40k (Hugging Face, AntResearchNLP), converted by
         python -m spatial_jax.tools.build --format=vilasr --input=FILE --media=DIR --out=DIR
       then config.sft.path=COLD_START/rows.jsonl and config.source.path=RL/rows.jsonl.
Source: ViLaSR (arXiv:2506.09965) and its repository. Stated: 256 * 28 * 28 pixels in training, 16
frames; SFT at 1e-5, 3 epochs, cosine, warm-up 0.1, vision tower frozen; RL at a constant 1e-6,
32 x 8 rollouts, 16 x 8 per update, clip 0.2 and 0.3, dual clip 3, no KL term, vision tower trained,
42 images, 10 turns of 1,024 tokens, 13,312 in all, prompts of 5,120. Inferred: the updates of the
second stage.
Expected: VSI-Bench 33.0 -> 45.4 (paper). Not run here at full size. Chips and hours: the paper
needs 16 A100 for about 24 hours (cold start), 3 hours, and RL; here see docs/memory.md.
:tiny: its table is in docs/papers.md. Time: 18 minutes on two CPU cores.
Command: python -m spatial_jax.train --config=configs/vilasr.py:tiny --workdir=runs/vilasr
"""

from ml_collections import ConfigDict

from configs import common, tiny_defaults

_STAGES = {"cold_start": ("sft",), "reject": ("reject",), "rl": ("grpo",)}
_ALL = ("sft", "reject", "grpo")


def get_config(variant: str = "") -> ConfigDict:
  """All stages or one, at full size or in miniature."""
  if variant == "tiny":
    return tiny()
  if variant and variant not in _STAGES:
    raise ValueError(f"{variant} is no variant; use {', '.join(_STAGES)}, tiny, or none")
  cfg = common.get_config()
  cfg.init = "Qwen2.5-VL-7B"
  cfg.stages = _STAGES.get(variant, _ALL)
  cfg.text = "vilasr"
  cfg.lora.paths = ()
  cfg.preprocess.max_pixels = cfg.video.max_pixels = 256 * 28 * 28
  cfg.video.min_frames = cfg.video.max_frames = 16
  cfg.sft.steps = 3100  # 33,000 demonstrations, three times, 32 at a time
  cfg.reject.train.steps = 730
  cfg.loop.steps = 1250  # 40,000 tasks, 32 at a time
  learn = cfg.learn
  learn.minibatches = 2
  learn.advantage.alpha = 0.0
  learn.loss.dual_clip = 3.0
  learn.optimizer.update({"learning_rate": 1e-6, "warmup_steps": 0})  # constant
  learn.optimizer.frozen = ()
  cfg.rollout.max_tokens_per_turn = 1024
  _equation_2(learn.reward)
  return cfg


def _equation_2(reward: ConfigDict) -> None:
  """S = [S_correct > 0] (S_correct + S_format), as published."""
  reward.weights.update({"accuracy": 1.0, "format": 1.0})
  reward.gated = ("accuracy", "format")
  reward.update({"number": "mra", "score": "strict_mra", "choice": "exact"})


def tiny() -> ConfigDict:
  """The same path: the solver marks objects, corrects a box, and answers."""
  cfg = tiny_defaults.get_config()
  cfg.stages = _ALL
  cfg.source.questions.types = ("object_abs_distance", "object_size_estimation", "camera_distance")
  cfg.sft.update({"steps": 70, "draw_fraction": 1.0, "correct_fraction": 0.5})
  cfg.sft.optimizer.learning_rate = 7e-5
  cfg.reject.tasks = 192
  cfg.reject.keep.min_score = 0.3
  cfg.reject.train.steps = 12
  cfg.loop.steps = 20
  cfg.loop.evaluate_every = 0
  cfg.rollout.update({"prompts": 16, "slots": 16, "prefill": (16,)})
  # Two drawings and an answer.
  cfg.rollout.stop.update({"max_turns": 4, "max_response_tokens": 447})
  cfg.learn.micro.lengths = (80, 160, 256, 448)
  cfg.learn.minibatches = 2
  cfg.learn.advantage.alpha = 0.0
  cfg.learn.loss.dual_clip = 3.0
  _equation_2(cfg.learn.reward)
  cfg.evaluation.update({"tasks": 64, "progress_tasks": 32, "pass_at": 8, "temperatures": ()})
  cfg.evaluation.other_images = False
  return cfg
