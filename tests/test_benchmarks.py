"""What benchmarks measure is what they say; nothing is timed."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import measure, shapes, update_work
from spatial_jax.hf import weights
from spatial_jax.learn.losses import policy_loss
from spatial_jax.policy.qwen_vl import make_policy

COUNTS = {  # parameters, those of the vision tower
  "nano": (2_154_944, 645_440),
  "mini": (57_331_008, 10_130_240),
  "small": (444_356_736, 49_644_672),
}


@pytest.mark.parametrize("name", COUNTS)
def test_shapes_have_the_stated_parameters(name):
  cfg = shapes.SHAPES[name]
  assert shapes.parameter_counts(cfg) == COUNTS[name]
  abstract = jax.eval_shape(make_policy(cfg, jnp.dtype("float32")).init, jax.random.key(0))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == COUNTS[name][0]


def test_checkpoint_is_what_both_sides_load(tmp_path):
  cfg = shapes.SHAPES["nano"]
  shapes.write_checkpoint(cfg, tmp_path)
  assert weights.read_config(tmp_path) == cfg
  params = shapes.load(tmp_path, shapes.policy_of(cfg))
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == COUNTS["nano"][0]


def test_questions_hold_what_the_tables_say():
  cfg = shapes.SHAPES["nano"]
  questions = shapes.questions(cfg)
  assert len(questions) == shapes.PROMPTS
  assert len({question.image.content_hash for question in questions}) == shapes.PROMPTS
  for question in questions:
    pads_T = question.token_ids_T == cfg.image_pad_id
    assert question.image.tokens == pads_T.sum() == 256
    assert (~pads_T).sum() == 64
    assert pads_T.argmax() == question.image_start
    said_T = question.token_ids_T[~pads_T]
    assert np.isin(said_T, shapes.forbidden_ids(cfg)).sum() == 2  # around the image


def test_sides_take_turns():
  order = []
  calls = {name: lambda name=name: order.append(name) for name in ("ours", "torch")}
  seconds = measure.alternate(calls, rounds=3)
  assert order == ["ours", "torch"] * 3
  assert [len(rounds) for rounds in seconds.values()] == [3, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_is_gone_again():
  start_kib = measure.anonymous_kib()
  with measure.PeakMemory() as memory:
    block = np.ones(64 * 2**20, np.uint8)
    measure.time.sleep(0.05)
    del block
  assert 60 < (memory.peak_kib - start_kib) / 1024 < 100


def test_results_that_differ_are_an_error():
  measure.require_close("loss", 1e-6, 1e-3)
  for difference in (1e-2, math.nan):
    with pytest.raises(ValueError, match="loss"):
      measure.require_close("loss", difference, 1e-3)


@pytest.mark.torch
def test_torch_side_has_the_same_loss():
  torch = pytest.importorskip("torch")
  from benchmarks import peer

  random = np.random.default_rng(0)
  logp_RT, old_logp_RT = random.normal(-2.0, 0.5, (2, 16, 128)).astype(np.float32)
  advantage_R = random.normal(size=16).astype(np.float32)
  trained_RT = np.ones(logp_RT.shape, bool)
  weight_R = np.full(16, 1 / logp_RT.size, np.float32)
  ours, _ = policy_loss(logp_RT, old_logp_RT, advantage_R, trained_RT, weight_R, update_work.LOSS)
  theirs = peer.policy_loss(*map(torch.tensor, (logp_RT, old_logp_RT, advantage_R)))
  np.testing.assert_allclose(ours, theirs.item() / logp_RT.size, rtol=1e-5)


@pytest.mark.parametrize("name", update_work.CASES)
def test_batches_of_the_update_train_every_response(name):
  cfg, case = shapes.SHAPES["nano"], update_work.CASES[name]
  work = update_work.make_work(cfg, case)
  prompt = len(work.questions[0].token_ids_T)
  assert prompt == {"image": 320, "frames": 1094, "long": 8192}[name]
  for shared in (True, False):
    batch = update_work.make_batch(cfg, work, shared)
    prefixes = case.prompts if shared else case.rows
    assert batch.prefix.token_RT.shape == (prefixes, prompt - 1)
    assert batch.rows.trained_RT.sum() == case.trained
    assert set(batch.rows.trained_RT.sum(axis=1)) == {case.response}


@pytest.mark.torch
def test_idle_is_when_no_thread_runs_anything():
  pytest.importorskip("torch")
  from benchmarks.profile import Event, idle_share

  def share(*spans_s, seconds=10):
    return idle_share([Event("op", 1e9 * start, 1e9 * end) for start, end in spans_s], seconds)

  assert share((3, 13)) == 0
  assert share((3, 8), (4, 6), (7, 13)) == 0
  assert share((5, 6), (0, 2), (1, 4)) == pytest.approx(0.5)
  assert share((0, 2), (12, 20)) == pytest.approx(0.8)
  assert share((0, 40)) == 0
