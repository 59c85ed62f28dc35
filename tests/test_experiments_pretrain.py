"""The recipe of the embedded policy in small: its updates, resuming, what it leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from configs import common
from experiments.tiny import pretrain
from experiments.tiny.dense_loss import init_heads
from experiments.tiny.pretrain import BatchBuilder, PretrainRun
from spatial_jax import rng, train
from spatial_jax.config import ConfigError, build
from spatial_jax.errors import DataError
from spatial_jax.hf import weights
from spatial_jax.types import TrainState
from tests.pretrain_fixtures import builder, settings, small_config


def test_both_kinds_of_lesson_trace():
  """The updates are strict about dtypes and ranks; the slow test below runs them."""
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
    after, metrics = jax.eval_shape(functools.partial(update, data=one.batch(step)), state)
    same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), after, state)
    assert all(jax.tree.leaves(same))
    assert {"dense_loss", "grad_norm"} <= metrics.keys()
    assert ("loss" in metrics) == (step == 1)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_policy(tmp_path, monkeypatch):
  def start(name):
    train.run(small_config(tmp_path / name / "policy"), tmp_path / name)

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
  params = weights.load(folder, cfg, np.dtype(np.float32), lambda name, shape: place)
  init = pretrain.make_policy(cfg, jnp.dtype("float32")).init
  first = jax.eval_shape(init, rng.stream(0, "init"))
  assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, first)


def test_there_must_be_a_batch():
  cfg = small_config("unused")
  cfg.recipe.batches = ()
  with pytest.raises(ConfigError, match=r"config\.recipe\.batches is empty"):
    build(PretrainRun, settings(cfg))


def test_demonstrations_are_not_opened():
  cfg = small_config("unused")
  cfg.text.response_prefix_fraction = 0.5
  with pytest.raises(ConfigError, match=r"text\.opened must be 0"):
    build(PretrainRun, settings(cfg))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"learn.micro.lengths": (64, 200)}, r"micro\.lengths ends at 200: .* 255 \+ 1"),
    ({"learn.prefix_buckets": (64,)}, r"prefix_buckets ends at 64: .* 512"),
    ({"learn.vision.frames": (64,)}, r"learn\.vision\.frames ends at 64: .* 512"),
    ({"learn.keep_fraction": 0.0}, r"learn\.share must lie in \(0, 1\], got 0\.0"),
  ],
)
def test_shapes_of_the_update_must_hold_the_rollouts(changes, message):
  cfg = common.get_config()
  cfg.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=message):
    build(train.GrpoRun, settings(cfg))
