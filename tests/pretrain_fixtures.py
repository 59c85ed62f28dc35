"""The recipe of the embedded policy, hardly there."""

import dataclasses
import functools

from configs import tiny_pretrain
from experiments.tiny.pretrain import BatchBuilder, PretrainRun
from spatial_jax.config import build
from spatial_jax.rollout.conversation import Conversation
from tests import rollout_fixtures as fixtures

SEE, STEPS = 1, 4


def small_config(out):
  """`configs/tiny_pretrain.py`, hardly there: one seeing step, then plain and drawing batches."""
  cfg = tiny_pretrain.get_config()
  cfg.recipe.update(
    {
      "vision_steps": SEE,
      "vision_scenes": 2,
      "micro": {"rows": 2, "lengths": (256, 1024)},
      "batches": (
        {"scenes": 1, "group": 2, "answer": "choice", "draw_share": 0.0},
        {"scenes": 2, "group": 2, "answer": "number", "draw_share": 0.0},
        {"scenes": 2, "group": 1, "answer": "number", "draw_share": 1.0},
      ),
    }
  )
  cfg.loop.steps, cfg.loop.checkpoint_every = STEPS, 1
  cfg.optimizer.update(total_steps=9, warmup_steps=0, decay_steps=0)
  cfg.shapes.update(
    prefix_buckets=(256,),
    tokens=512,
    vision={"windows": (32,), "frames": (8,), "patches": (144,)},
  )
  cfg.vision.update(layers=2, width=32, heads=2, mlp_width=32, full_layers=(1,))
  cfg.decoder.update(
    layers=2, width=32, heads=2, kv_heads=1, head_dim=16, mlp_width=32, rope_sections=(2, 3, 3)
  )
  cfg.tokenizer_rooms = 2
  cfg.out = str(out)
  return cfg


def settings(cfg):
  return {key: value for key, value in cfg.items() if key != "stage"}


@functools.cache
def builder() -> BatchBuilder:
  run = build(PretrainRun, settings(small_config("unused")))
  policy = dataclasses.replace(
    fixtures.policy_config(),
    vision=run.vision,
    decoder=dataclasses.replace(run.decoder, vocabulary=fixtures.VOCABULARY),
  )
  conversation = Conversation(fixtures.TOKENIZER, run.text, run.preprocess, policy)
  shapes = dataclasses.replace(
    run.shapes, prefix_buckets=(512,), tokens=1024, vocabulary=fixtures.VOCABULARY
  )
  return BatchBuilder(
    conversation, run.recipe, run.rooms, run.camera, run.questions, shapes, run.style, run.seed
  )
