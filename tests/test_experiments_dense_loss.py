"""Dense losses of pretraining against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tiny.dense_loss import (
  DenseBatch,
  dense_loss,
  finding_loss,
  init_heads,
  pointing_loss,
  subjects,
)


def test_dense_loss_is_the_mean_over_features_with_targets():
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
  names_ZD = jnp.asarray(generator.normal(size=(2, 6)).astype(np.float32))
  head = init_heads(6)["cell"]
  assert head["kernel"].shape == (6, 1 + 13)
  value, metrics = dense_loss(head, features_MD, names_ZD, truth)
  valid, filled = truth.valid_M, truth.valid_M & truth.object_M
  box, extent = np.abs(truth.box_M4[filled]).mean(), np.abs(truth.extent_M2[filled]).mean()
  depth = np.abs(truth.log_depth_M[valid]).mean()
  place_Z6 = np.abs(truth.place_M6[filled])
  corner, floor = place_Z6[:, :4].mean(), place_Z6[:, 4:].mean()
  logits_MK = np.concatenate([np.zeros((40, 1)), 2 * features_MD @ names_ZD.T], axis=1)
  chosen_M = logits_MK[np.arange(40), truth.category_M] - np.log(np.exp(logits_MK).sum(1))
  expected = -chosen_M[valid].mean() + depth + 10 * (box + corner) + extent + floor
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["dense_box"], box, rtol=1e-5)
  np.testing.assert_allclose(metrics["dense_corner"], corner, rtol=1e-5)
  np.testing.assert_allclose(metrics["dense_floor_m"], floor, rtol=1e-5)
  wild = DenseBatch(*(np.where(_along(valid, x), x, 99).astype(x.dtype) for x in truth))
  wild = wild._replace(valid_M=valid, category_M=np.where(valid, truth.category_M, 0))
  other, _ = dense_loss(head, features_MD, names_ZD, wild)
  np.testing.assert_allclose(other, value, rtol=1e-6)
  kernel = jnp.asarray(generator.normal(size=(6, 14)).astype(np.float32))
  head = {"kernel": kernel, "bias": head["bias"]}
  grads = jax.grad(lambda f, names: dense_loss(head, f, names, truth)[0], (0, 1))
  features_grad, names_grad = grads(features_MD, names_ZD)
  np.testing.assert_array_equal(np.abs(np.asarray(features_grad)).max(1) > 0, valid)
  assert not np.asarray(names_grad).any(), "embeddings get no gradient"


def _along(mask_M, x):
  return mask_M.reshape(-1, *(1,) * (x.ndim - 1))


def test_a_subject_lasts_until_the_next_name_or_the_end_of_its_reach():
  names = np.array([[0, 7, 0, 0, 0, 2, 0, 3], [5, 0, 0, 0, 0, 0, 0, 0]], np.int32)
  found = [[0, 7, 7, 7, 0, 2, 2, 3], [5, 5, 5, 0, 0, 0, 0, 0]]
  np.testing.assert_array_equal(subjects(names, 2), found)
  np.testing.assert_array_equal(subjects(names, 0), names)


def test_pointing_loss_is_the_attention_to_the_named_category():
  generator = np.random.default_rng(2)
  log_BTS = jax.nn.log_softmax(jnp.asarray(generator.normal(size=(2, 4, 5)).astype(np.float32)))
  name_BT = np.array([[0, 1, 2, 1], [3, 0, 0, 2]], np.int32)
  category_BS = np.array([[0, 1, 1, 2, 0], [0, 0, 2, 0, 1]], np.int32)
  shown = {(0, 1): [1, 2], (0, 2): [3], (0, 3): [1, 2], (1, 3): [2]}  # no token shows a 3
  mass = [np.exp(np.asarray(log_BTS)[b, t, where]).sum() for (b, t), where in shown.items()]
  value, metrics = pointing_loss(log_BTS, name_BT, category_BS)
  np.testing.assert_allclose(value, -np.log(mass).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["pointing"], np.mean(mass), rtol=1e-5)
  grads = jax.grad(lambda x: pointing_loss(x, name_BT, category_BS)[0])(log_BTS)
  assert np.isfinite(grads).all()
  none = np.zeros_like(name_BT)
  assert pointing_loss(log_BTS, none, category_BS)[0] == 0


def test_finding_loss_reads_the_attended_objects():
  generator = np.random.default_rng(3)
  log_BTS = jax.nn.log_softmax(jnp.asarray(generator.normal(size=(1, 3, 4)).astype(np.float32)))
  subject_BT, category_BS = np.array([[1, 2, 0]], np.int32), np.array([[1, 0, 1, 3]], np.int32)
  truth_BS4 = generator.normal(size=(1, 4, 4)).astype(np.float32)
  head = init_heads(6)["word"]
  hidden_BTD = jnp.asarray(generator.normal(size=(1, 3, 6)).astype(np.float32))
  mass_S = np.exp(np.asarray(log_BTS)[0, 0]) * [1, 0, 1, 0]
  truth_4 = mass_S / mass_S.sum() @ truth_BS4[0]  # no token shows a 2; the last has no subject
  value, metrics = finding_loss(head, hidden_BTD, log_BTS, subject_BT, category_BS, truth_BS4)
  np.testing.assert_allclose(metrics["found_m"], np.abs(truth_4[2:]).mean(), rtol=1e-5)
  extent = np.abs(truth_4[:2]).mean()
  np.testing.assert_allclose(value, extent + metrics["found_m"], rtol=1e-5)

  def loss(hidden_BTD, log_BTS):
    head = {"kernel": jnp.eye(6, 4), "bias": jnp.zeros(4)}
    return finding_loss(head, hidden_BTD, log_BTS, subject_BT, category_BS, truth_BS4)[0]

  hidden_grad, log_grad = jax.grad(loss, (0, 1))(hidden_BTD, log_BTS)
  assert np.abs(np.asarray(hidden_grad)[0]).max(1).astype(bool).tolist() == [True, False, False]
  assert not np.asarray(log_grad).any(), "attention is trained by the pointing loss alone"
