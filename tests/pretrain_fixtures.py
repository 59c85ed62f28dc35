"""The recipe of the embedded policy with a very small policy and few rooms."""

import dataclasses
import functools

from configs import tiny_pretrain
from experiments.tiny.pretrain import BatchBuilder, PretrainConfig
from spatial_jax.config import build
from spatial_jax.data.chat_template import CHATML
from spatial_jax.data.prompt_form import read_form
from spatial_jax.rollout.conversation import Conversation
from tests import rollout_fixtures as fixtures

VISION_STEPS, STEPS = 1, 4


def batch_recipe(rooms, questions_per_room, answer_kind, draw_fraction):
  return {
    "rooms": rooms,
    "questions_per_room": questions_per_room,
    "answer_kind": answer_kind,
    "draw_fraction": draw_fraction,
  }


def small_config(out):
  """`configs/tiny_pretrain.py` in small: a vision step, then batches without and with drawings."""
  cfg = tiny_pretrain.get_config()
  cfg.recipe.update(
    {
      "vision_steps": VISION_STEPS,
      "vision_rooms": 2,
      "micro": {"rows": 2, "lengths": (256, 1024)},
      "batches": (
        batch_recipe(1, 2, "choice", 0.0),
        batch_recipe(2, 2, "number", 0.0),
        batch_recipe(2, 1, "number", 1.0),
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


@functools.cache
def builder() -> BatchBuilder:
  cfg = build(PretrainConfig, dict(small_config("unused")))
  policy = dataclasses.replace(
    fixtures.policy_config(),
    vision=cfg.vision,
    decoder=dataclasses.replace(cfg.decoder, vocabulary=fixtures.VOCABULARY),
  )
  form = read_form(cfg.text)
  conversation = Conversation(fixtures.TOKENIZER, form, CHATML, cfg.preprocess, cfg.video, policy)
  shapes = dataclasses.replace(
    cfg.shapes, prefix_buckets=(512,), tokens=1024, vocabulary=fixtures.VOCABULARY
  )
  return BatchBuilder(
    conversation, cfg.recipe, cfg.rooms, cfg.camera, cfg.questions, shapes, cfg.style, cfg.seed
  )
