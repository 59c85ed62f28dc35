"""Pretraining in small: updates trace, a resumed run is bit-equal, configs are checked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.tiny import pretrain
from experiments.tiny.dense_loss import init_heads
from experiments.tiny.pretrain import BatchBuilder, PretrainConfig
from spatial_jax import rng
from spatial_jax.config import ConfigError, build
from spatial_jax.errors import DataError
from spatial_jax.hf import weights
from spatial_jax.types import TrainState
from tests.pretrain_fixtures import batch_recipe, builder, small_config


def test_updates_of_vision_and_answer_steps_trace():
  """Tracing checks dtypes and ranks; the slow test below runs the updates."""
  one = builder()
  policy = pretrain.make_policy(one.conversation.policy, jnp.dtype("float32"), remat=False)
  optimizer = optax.sgd(1.0)
  heads = init_heads(policy.cfg.decoder.width)
  params = jax.eval_shape(
    lambda key: {"policy": policy.init(key), "heads": heads}, jax.random.key(0)
  )
  state = TrainState(params, jax.eval_shape(optimizer.init, params), jnp.int32(0))
  names = tuple((3, 5) for _ in one.cfg.categories)
  update = pretrain.pretrain_programs(policy, optimizer, one.cfg, names)
  for step in (0, 1):
    after, metrics = jax.eval_shape(functools.partial(update, batch=one.batch(step)), state)
    same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), after, state)
    assert all(jax.tree.leaves(same))
    assert {"dense_loss", "grad_norm"} <= metrics.keys()
    assert ("loss" in metrics) == (step == 1)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_policy(tmp_path, monkeypatch):
  def start(name):
    pretrain.run(small_config(tmp_path / name / "policy"), tmp_path / name)

  start("whole")
  batch = BatchBuilder.batch

  def broken(self, step):
    if step == 2:
      raise DataError("the disk is gone")
    return batch(self, step)

  monkeypatch.setattr(BatchBuilder, "batch", broken)
  with pytest.raises(DataError, match="the disk is gone"):
    start("parts")
  monkeypatch.setattr(BatchBuilder, "batch", batch)
  start("parts")
  for name in ("model.safetensors", "tokenizer.json", "config.json"):
    one, other = ((tmp_path / run / "policy" / name).read_bytes() for run in ("whole", "parts"))
    assert one == other, name
  folder = tmp_path / "whole" / "policy"
  cfg, place = weights.read_config(folder), SingleDeviceSharding(jax.devices()[0])
  params = weights.load(folder, cfg, lambda path: np.dtype(np.float32), lambda name, shape: place)
  init = pretrain.make_policy(cfg, jnp.dtype("float32")).init
  first = jax.eval_shape(init, rng.stream(0, "init"))
  assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, first)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"recipe.batches": ()}, r"recipe\.batches is \(\) and must name at least one"),
    ({"recipe.vision_steps": -1}, r"recipe\.vision_steps is -1 and must be at least 0"),
    ({"recipe.vision_rooms": 0}, r"recipe\.vision_rooms is 0 and must be at least 1"),
    ({"recipe.dense_weight": -1.0}, r"recipe\.dense_weight is -1\.0 and must be at least 0"),
    ({"recipe.pointing_layer": 0}, r"recipe\.pointing_layer is 0 and must be at least 1"),
    ({"recipe.pointing_layer": 2}, r"recipe\.pointing_layer is 2 and must be at most 1"),
    ({"recipe.pointing_tokens": 0}, r"recipe\.pointing_tokens is 0 and must be at least 1"),
    ({"recipe.pointing_reach": -1}, r"recipe\.pointing_reach is -1 and must be at least 0"),
    (
      {"recipe.min_cell_fraction": 1.0},
      r"min_cell_fraction is 1\.0 and must be above 0 and below 1",
    ),
    ({"recipe.categories": ("bed", "bed")}, r"categories is .* and must name .* each once"),
    ({"recipe.max_boxes": -1}, r"recipe\.max_boxes is -1 and must be at least 0"),
    ({"recipe.micro.lengths": (256,)}, r"micro\.lengths ends at 256 and must be at least .* 512"),
    ({"rooms.objects": (5, 3)}, r"config\.rooms\.objects is \(5, 3\) and must be"),
    ({"camera.width_px": 0}, r"config\.camera\.width_px is 0 and must be"),
    ({"tokenizer_rooms": 0}, r"config\.tokenizer_rooms is 0 and must be .* at least 1"),
    ({"out": ""}, r"config\.out is '' and must name a folder"),
  ],
)
def test_values_out_of_range_are_named_by_their_keys(changes, message):
  cfg = small_config("unused")
  cfg.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=message) as caught:
    build(PretrainConfig, dict(cfg))
  assert str(caught.value).startswith("config.")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rooms": 0}, "rooms is 0 and must be at least 1"),
    ({"questions_per_room": 0}, "questions_per_room is 0 and must be at least 1"),
    ({"answer_kind": "words"}, "answer_kind is 'words' and must be number or choice"),
    ({"draw_fraction": 1.5}, "draw_fraction is 1.5 and must be at least 0 and at most 1"),
    ({"draw_fraction": -0.5}, "draw_fraction is -0.5 and must be"),
  ],
)
def test_kinds_of_batches_are_named_by_their_number(changes, message):
  cfg = small_config("unused")
  good = batch_recipe(1, 1, "number", 0.0)
  cfg.recipe.batches = (good, good | changes)
  with pytest.raises(ConfigError, match=r"^config\.recipe\.batches\[1\]\.") as caught:
    build(PretrainConfig, dict(cfg))
  assert message in str(caught.value)
