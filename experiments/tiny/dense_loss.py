"""Dense losses of pretraining: temporary heads read the truth from features and hidden states.

    dense      category = feature . embedding of the category's name; the rest = feature @ head
    pointing   one attention head: tokens about a bed attend to visual tokens that show a bed
    finding    after this layer, the hidden states of these tokens encode the place of the bed

Without these losses the embedded policy learned in 4,000 steps the usual answers about beds, but
not to attend to the bed. A policy that starts from random parameters needs them; pretraining
removes the heads at its end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spatial_jax.learn.losses import Metrics
from spatial_jax.types import Array, Params

# Box errors are a few percent of the image; the weight makes them as large as the other terms.
_BOX_WEIGHT = 10.0
# Logits are this factor times the product of feature and embedding.
_NAME_SCALE = 2.0


class DenseBatch(NamedTuple):
  """Dense targets in the order in which the tower returns features; see DenseTargets.

  Attributes:
    category_M: int32, 0 for the room.
    log_depth_M: float32, log metres.
    box_M4: float32, box of the object relative to the cell, in image sides.
    extent_M2: float32, log metres (distance, longest dimension).
    place_M6: float32, box in image sides from the corner of the image; (right, ahead) in metres.
    object_M: bool, whether an object fills the cell.
    valid_M: bool, whether the feature has targets.
  """

  category_M: Array
  log_depth_M: Array
  box_M4: Array
  extent_M2: Array
  place_M6: Array
  object_M: Array
  valid_M: Array


def init_heads(width: int) -> Params:
  """Zero heads: "cell" (logit of the room, depth, box, extent, place), "word" (extent, place)."""
  values = {"cell": 1 + 1 + 4 + 2 + 6, "word": 2 + 2}
  return {
    name: {"kernel": jnp.zeros((width, count)), "bias": jnp.zeros(count)}
    for name, count in values.items()
  }


def dense_loss(
  head: Params, features_MD: Array, names_ZD: Array, truth: DenseBatch
) -> tuple[jax.Array, Metrics]:
  """Cross-entropy of the category plus absolute errors of depth, box, extent and place.

  Args:
    head: the head "cell" of `init_heads`.
    features_MD: of the tower.
    names_ZD: embeddings of the names of the categories; they get no gradient.
    truth: targets per feature.

  Returns:
    The loss, and metrics: accuracy on object cells, mean absolute errors.
  """
  features_MD = features_MD.astype(jnp.float32)
  output_MK = features_MD @ head["kernel"] + head["bias"][None]
  room_M1, depth_M, box_M4, extent_M2, place_M6 = jnp.split(output_MK, [1, 2, 6, 8], axis=1)
  named_MZ = _NAME_SCALE * features_MD @ jax.lax.stop_gradient(names_ZD).T
  logits_MK = jnp.concatenate([room_M1, named_MZ], axis=1)
  log_p_MK = jax.nn.log_softmax(logits_MK)
  chosen_M = jnp.take_along_axis(log_p_MK, truth.category_M[:, None], axis=1)[:, 0]
  hit_M = (jnp.argmax(logits_MK, axis=1) == truth.category_M).astype(jnp.float32)
  depth_error_M = jnp.abs(depth_M[:, 0] - truth.log_depth_M)
  box_error_M = jnp.mean(jnp.abs(box_M4 - truth.box_M4), axis=1)
  extent_error_M = jnp.mean(jnp.abs(extent_M2 - truth.extent_M2), axis=1)
  place_error_M6 = jnp.abs(place_M6 - truth.place_M6)
  valid_M = jnp.asarray(truth.valid_M).astype(jnp.float32)
  object_M = valid_M * jnp.asarray(truth.object_M).astype(jnp.float32)
  category = -_mean(chosen_M, valid_M)
  depth, box = _mean(depth_error_M, valid_M), _mean(box_error_M, object_M)
  extent = _mean(extent_error_M, object_M)
  corner = _mean(jnp.mean(place_error_M6[:, :4], axis=1), object_M)
  floor = _mean(jnp.mean(place_error_M6[:, 4:], axis=1), object_M)
  metrics = {
    "dense_category": _mean(hit_M, object_M),
    "dense_log_depth": depth,
    "dense_box": box,
    "dense_extent": extent,
    "dense_corner": corner,
    "dense_floor_m": floor,
  }
  return category + depth + _BOX_WEIGHT * (box + corner) + extent + floor, metrics


def subjects(name_BT: Array, reach: int) -> jax.Array:
  """The category that each token refers to: the last name, at most `reach` tokens before it.

  tokens    the  bed  -  0  .  4  ;  bin          reach 4
  names      0    7   0  0  0  0  0   2
  subjects   0    7   7  7  7  7  0   2
  """
  name_BT = jnp.asarray(name_BT)
  found_BT = name_BT
  for back in range(1, reach + 1):
    before_BT = jnp.pad(name_BT, ((0, 0), (back, 0)))[:, : name_BT.shape[1]]
    found_BT = jnp.where(found_BT > 0, found_BT, before_BT)
  return found_BT


def pointing_loss(
  log_attention_BTS: Array, subject_BT: Array, category_BS: Array
) -> tuple[jax.Array, Metrics]:
  """Minus log of the attention from tokens to the visual tokens that show their subject.

  Args:
    log_attention_BTS: log attention of tokens over the prompt.
    subject_BT: int32, category that a token refers to, 0 for none.
    category_BS: int32, category that fills a visual token, 0 for none and for text.

  Returns:
    The mean over tokens with a visible subject, and the mean attention to it.
  """
  match_BTS = _matches(subject_BT, category_BS)
  log_mass_BT = jax.nn.logsumexp(jnp.where(match_BTS, log_attention_BTS, -1e30), axis=-1)
  visible_BT = jnp.any(match_BTS, axis=-1)
  weight_BT = visible_BT.astype(jnp.float32)
  log_mass_BT = jnp.where(visible_BT, log_mass_BT, 0.0)
  return -_mean(log_mass_BT, weight_BT), {"pointing": _mean(jnp.exp(log_mass_BT), weight_BT)}


def finding_loss(
  head: Params,
  hidden_BTD: Array,
  log_attention_BTS: Array,
  subject_BT: Array,
  category_BS: Array,
  extent_place_BS4: Array,
) -> tuple[jax.Array, Metrics]:
  """Absolute errors of extent and place of the subject, read from the hidden states of tokens.

  If several visual tokens show the subject, the truth is their mean, weighted by attention.

  Args:
    head: the head "word" of `init_heads`.
    hidden_BTD: hidden states of the tokens after the pointing layer.
    log_attention_BTS, subject_BT, category_BS: as in `pointing_loss`.
    extent_place_BS4: log metres (distance, longest dimension) and metres (right, ahead) per token
      of the prompt.

  Returns:
    The mean over tokens with a visible subject, and the error of places in metres.
  """
  match_BTS = _matches(subject_BT, category_BS)
  share_BTS = jax.nn.softmax(jnp.where(match_BTS, log_attention_BTS, -1e30), axis=-1)
  truth_BT4 = jax.lax.stop_gradient(share_BTS) @ extent_place_BS4
  output_BT4 = hidden_BTD.astype(jnp.float32) @ head["kernel"] + head["bias"][None, None]
  error_BT4 = jnp.abs(output_BT4 - truth_BT4)
  weight_BT = jnp.any(match_BTS, axis=-1).astype(jnp.float32)
  extent = _mean(jnp.mean(error_BT4[..., :2], axis=-1), weight_BT)
  place = _mean(jnp.mean(error_BT4[..., 2:], axis=-1), weight_BT)
  return extent + place, {"found_m": place}


def _matches(subject_BT: Array, category_BS: Array) -> jax.Array:
  """bool [B, T, S]: whether visual token s shows the subject of token t."""
  subject_BT1 = jnp.asarray(subject_BT)[:, :, None]
  return (subject_BT1 == jnp.asarray(category_BS)[:, None, :]) & (subject_BT1 > 0)


def _mean(x_M: Array, weight_M: Array) -> jax.Array:
  return jnp.sum(x_M * weight_M) / jnp.maximum(jnp.sum(weight_M), 1.0)
