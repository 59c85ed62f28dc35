"""The attention reward of the rollouts of a batch: measured between rollout and score.

TrainBatch ──► prefix, rows in microbatches ──► attention mass [R, S + T] ──► reward [R]
"""

import math

import jax
import jax.numpy as jnp

from spatial_jax.learn.gradient import features_of, make_order, truncated
from spatial_jax.learn.train_batch import Microbatches
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.reward.attention import attention_reward
from spatial_jax.reward.config import AttentionConfig
from spatial_jax.types import Array, Params, TokenArrays, TrainBatch, TrainRows


def batch_attention(
  policy: Policy, micro: Microbatches, cfg: AttentionConfig, params: Params, batch: TrainBatch
) -> jax.Array:
  """The attention reward of each row before its gate, float32 [R]; no gradient is taken."""
  features_MYD = features_of(policy, params, batch.vision)
  _, prefix = policy.prefill(params, batch.prefix, features_MYD)
  order = make_order(policy, batch, micro)
  layers = policy.cfg.decoder.layers
  first_layer = layers - max(1, math.ceil(cfg.layers * layers))

  def measure(rows: TrainRows) -> jax.Array:
    row_prefix = order.prefix_of(rows, prefix)
    before = order.prefix_of(rows, batch.prefix)
    mass = policy.attention_mass(
      params, row_prefix, rows.tokens, features_MYD, rows.trained_RT, first_layer
    )
    image_RS = jnp.concatenate([_is_image(before), _is_image(rows.tokens)], axis=1)
    mass_RS = jnp.concatenate([mass.prefix_RS, mass.suffix_RT], axis=1)
    share_R = _image_share(before, rows)

    def one(mass_S: Array, image_S: Array, share: Array) -> jax.Array:
      return attention_reward(mass_S, image_S, share, cfg)

    return jax.vmap(one)(mass_RS, image_RS, share_R)[:, None]

  parts = jax.lax.map(truncated(measure, micro.lengths), order.split(batch.rows))
  return order.join(parts)[:, 0]


def _is_image(tokens: TokenArrays) -> jax.Array:
  return (jnp.asarray(tokens.feature_RT) >= 0) & jnp.asarray(tokens.valid_RT)


def _image_share(before: TokenArrays, rows: TrainRows) -> jax.Array:
  """Mean over the sampled tokens of the share of image tokens in their context, float32 [R]."""
  prefix_R1 = jnp.sum(jnp.asarray(before.valid_RT), axis=1, keepdims=True)
  images_R1 = jnp.sum(_is_image(before), axis=1, keepdims=True)
  context_RT = prefix_R1 + jnp.arange(1, rows.trained_RT.shape[1] + 1)[None]
  images_RT = images_R1 + jnp.cumsum(_is_image(rows.tokens), axis=1)
  share_RT = images_RT.astype(jnp.float32) / context_RT.astype(jnp.float32)
  count_R = jnp.sum(rows.trained_RT, axis=1).astype(jnp.float32)
  total_R = jnp.sum(jnp.where(rows.trained_RT, share_RT, 0.0), axis=1)
  return total_R / jnp.maximum(count_R, 1.0)
