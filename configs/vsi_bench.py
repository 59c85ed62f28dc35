"""VSI-Bench with its own prompts, 32 frames per video and answers of at most 16 tokens.

    --config=configs/vsi_bench.py:FOLDER     the policy, or the one that training started from

Source: VSI-Bench (arXiv:2412.14171), its released evaluation: greedy answers to 5,130 questions.
Expected: not measured here. Its own average is a sentence below the table. Time: hours on one
accelerator.
Command: python -m spatial_jax.tools.build --format=vsi_bench --input=test.parquet --media=VIDEOS
         --out=DIR
         python -m spatial_jax.evaluate --config=configs/vsi_bench.py:FOLDER --checkpoint=FOLDER
         --config.source.path=DIR/rows.jsonl --workdir=runs/vsi_bench
"""

from ml_collections import ConfigDict

from configs import qwen_vl

FRAMES = 32
QUESTIONS = 5130


def get_config(model: str) -> ConfigDict:
  """The evaluation of a released size or a folder."""
  cfg = qwen_vl.get_config(model)
  cfg.text = "vsi_bench"
  cfg.video.min_frames = cfg.video.max_frames = FRAMES
  cfg.rollout.stop.max_response_tokens = 16
  cfg.evaluation.tasks = QUESTIONS
  return cfg
