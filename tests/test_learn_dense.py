"""The heads that teach a small policy to see."""

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.learn.dense import DenseBatch, dense_loss, init_head, place_loss


def test_dense_loss_learns_and_leaves_out_what_has_no_truth():
  generator = np.random.default_rng(0)
  features_MD = jnp.asarray(generator.normal(size=(40, 6)).astype(np.float32))
  truth = DenseBatch(
    category_M=generator.integers(0, 3, 40).astype(np.int32),
    log_depth_M=generator.normal(size=40).astype(np.float32),
    box_M4=generator.normal(size=(40, 4)).astype(np.float32),
    extent_M2=generator.normal(size=(40, 2)).astype(np.float32),
    place_M6=generator.normal(size=(40, 6)).astype(np.float32),
    object_M=generator.random(40) < 0.5,
    valid_M=np.arange(40) < 30,
  )
  head = init_head(6, 2)
  assert head["kernel"].shape == (6, 3 + 7)
  value, metrics = dense_loss(head, features_MD, truth)
  valid, known = truth.valid_M, truth.valid_M & truth.object_M
  box, extent = np.abs(truth.box_M4[known]).mean(), np.abs(truth.extent_M2[known]).mean()
  depth = np.abs(truth.log_depth_M[valid]).mean()
  np.testing.assert_allclose(value, np.log(3) + depth + 10 * box + extent, rtol=1e-5)
  np.testing.assert_allclose(metrics["dense_box"], box, rtol=1e-5)
  wild = DenseBatch(*(np.where(_along(valid, x), x, 99).astype(x.dtype) for x in truth))
  wild = wild._replace(valid_M=valid, category_M=np.where(valid, truth.category_M, 0))
  other, _ = dense_loss(head, features_MD, wild)
  np.testing.assert_allclose(other, value, rtol=1e-6)
  kernel = jnp.asarray(generator.normal(size=(6, 10)).astype(np.float32))
  grads = jax.grad(lambda f: dense_loss({"kernel": kernel, "bias": head["bias"]}, f, truth)[0])
  moved = np.abs(np.asarray(grads(features_MD))).max(1) > 0
  np.testing.assert_array_equal(moved, valid)


def test_place_loss_is_over_the_tokens_of_known_objects():
  generator = np.random.default_rng(1)
  hidden_BTD = jnp.asarray(generator.normal(size=(2, 5, 4)).astype(np.float32))
  feature_BT = np.array([[-1, 2, 0, 1, -1], [-1, 3, 3, 4, 5]], np.int32)
  truth = DenseBatch(*[np.zeros(6)] * 4, np.zeros((6, 6), np.float32), None, None)
  truth = truth._replace(
    place_M6=generator.normal(size=(6, 6)).astype(np.float32),
    object_M=np.array([1, 1, 0, 1, 1, 1], bool),
    valid_M=np.array([1, 1, 1, 1, 0, 1], bool),
  )
  head = {
    "kernel": jnp.asarray(generator.normal(size=(4, 6)).astype(np.float32)),
    "bias": jnp.ones(6),
  }
  value, metrics = place_loss(head, hidden_BTD, feature_BT, truth)
  tokens = [(0, 2, 0), (0, 3, 1), (1, 1, 3), (1, 2, 3), (1, 4, 5)]  # 2 is the room, 4 unknown
  errors = [np.abs(hidden_BTD[b, t] @ head["kernel"] + 1 - truth.place_M6[m]) for b, t, m in tokens]
  box, floor = np.mean([e[:4] for e in errors]), np.mean([e[4:] for e in errors])
  np.testing.assert_allclose(metrics["place_box"], box, rtol=1e-5)
  np.testing.assert_allclose(metrics["place_floor_m"], floor, rtol=1e-5)
  np.testing.assert_allclose(value, 10 * box + floor, rtol=1e-5)


def _along(mask_M, x):
  return mask_M.reshape(-1, *(1,) * (x.ndim - 1))
