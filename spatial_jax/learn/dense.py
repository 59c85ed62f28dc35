"""Teaches a small policy to see: temporary heads read dense truth off every visual token.

    feature of the tower            what a cell shows: category, depth, the box around it, extent
    hidden state inside the decoder where it is: box in the picture, place on the floor

A tower with rotary positions knows what lies beside a cell, not where the cell lies; the decoder
can tell from the tokens before it. Needed where a policy starts from nothing (the embedded one);
the heads end with pretraining.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax.learn.loss import Metrics
from spatial_jax.types import Array, Params

# Boxes are errors of a few percent of the picture: weighted to the size of the other parts.
_BOX_WEIGHT = 10.0


class DenseBatch(NamedTuple):
  """Truth per feature, in the order the tower returns features.

  Attributes:
    category_M: int32, 0 for the room.
    log_depth_M: float32, log metres.
    box_M4: float32, box of the object relative to the cell, in picture sides.
    extent_M2: float32, log metres (distance, longest dimension).
    place_M6: float32, box in picture sides from the picture's corner; (right, ahead) in metres.
    object_M: bool, an object fills the cell.
    valid_M: bool, the feature has a truth.
  """

  category_M: Array
  log_depth_M: Array
  box_M4: Array
  extent_M2: Array
  place_M6: Array
  object_M: Array
  valid_M: Array


def init_head(width: int, categories: int) -> Params:
  """A zero head: category logits (one more for the room), depth, box, extent."""
  values = categories + 1 + 1 + 4 + 2
  return {"kernel": jnp.zeros((width, values)), "bias": jnp.zeros(values)}


def init_place_head(width: int) -> Params:
  """A zero head: box, place on the floor."""
  return {"kernel": jnp.zeros((width, 6)), "bias": jnp.zeros(6)}


def place_loss(
  head: Params, hidden_BTD: Array, feature_BT: Array, truth: DenseBatch
) -> tuple[jax.Array, Metrics]:
  """Absolute errors of the box and of the place on the floor, over the tokens of objects.

  Args:
    head: from `init_place_head`.
    hidden_BTD: hidden states of prompts.
    feature_BT: int32, the feature each token stands for, -1 for text.
    truth: by feature.
  """
  read_BT6 = hidden_BTD.astype(jnp.float32) @ head["kernel"] + head["bias"][None, None]
  place_BT6 = jnp.take(jnp.asarray(truth.place_M6), feature_BT, axis=0, mode="clip")
  known_M = jnp.asarray(truth.object_M) & jnp.asarray(truth.valid_M)
  known_BT = jnp.take(known_M, feature_BT, mode="clip") & (jnp.asarray(feature_BT) >= 0)
  error_BT6 = jnp.abs(read_BT6 - place_BT6)
  weight_BT = known_BT.astype(jnp.float32)
  box = _mean(jnp.mean(error_BT6[..., :4], axis=-1), weight_BT)
  floor = _mean(jnp.mean(error_BT6[..., 4:], axis=-1), weight_BT)
  return _BOX_WEIGHT * box + floor, {"place_box": box, "place_floor_m": floor}


def dense_loss(head: Params, features_MD: Array, truth: DenseBatch) -> tuple[jax.Array, Metrics]:
  """Cross-entropy of the category plus absolute errors of depth, box and extent.

  Returns:
    The loss, and metrics: accuracy on object cells, mean absolute error of log depth and of boxes.
  """
  read_MK = features_MD.astype(jnp.float32) @ head["kernel"] + head["bias"][None]
  logits_MK, depth_M, box_M4, extent_M2 = jnp.split(
    read_MK, [read_MK.shape[1] - 7, read_MK.shape[1] - 6, read_MK.shape[1] - 2], axis=1
  )
  log_p_MK = jax.nn.log_softmax(logits_MK)
  chosen_M = jnp.take_along_axis(log_p_MK, truth.category_M[:, None], axis=1)[:, 0]
  hit_M = (jnp.argmax(logits_MK, axis=1) == truth.category_M).astype(jnp.float32)
  depth_error_M = jnp.abs(depth_M[:, 0] - truth.log_depth_M)
  box_error_M = jnp.mean(jnp.abs(box_M4 - truth.box_M4), axis=1)
  extent_error_M = jnp.mean(jnp.abs(extent_M2 - truth.extent_M2), axis=1)
  valid_M = jnp.asarray(truth.valid_M).astype(jnp.float32)
  object_M = valid_M * jnp.asarray(truth.object_M).astype(jnp.float32)
  category = -_mean(chosen_M, valid_M)
  depth, box = _mean(depth_error_M, valid_M), _mean(box_error_M, object_M)
  extent = _mean(extent_error_M, object_M)
  metrics = {
    "dense_category": _mean(hit_M, object_M),
    "dense_log_depth": depth,
    "dense_box": box,
    "dense_extent": extent,
  }
  return category + depth + _BOX_WEIGHT * box + extent, metrics


def _mean(x: Array, weight: Array) -> jax.Array:
  return jnp.sum(x * weight) / jnp.maximum(jnp.sum(weight), 1.0)
