"""The reward of attention to images: how much of it, and on how small a region.

    a_tj    attention of the sampled token t to the context position j, mean over heads and layers
    I_t     image tokens before t,   N_t: all tokens before t, and t

    A1 mass            m = mean_t sum_{j in I_t} a_tj
    A2 relative mass   clip(m / mean_t(|I_t| / N_t) / c, 0, 1)      1 at c = 1: uniform attention
    A3 concentration   1 - H(p) / log |I|,   p_j = sum_t a_tj over the image tokens, normalised
    A4 gated           the sum, multiplied by the score

    reward = (w1 A1 + w2 A2 + w3 A3) / (w1 + w2 + w3)

It is a reward and not a loss: no gradient goes through the attention.

Source: "Reward design for physical reasoning" (arXiv:2604.13993) rewards attention weights over
input image regions without annotations; its formula was not available, the forms are ours.
"""

import jax
import jax.numpy as jnp

from spatial_jax.reward.config import AttentionConfig
from spatial_jax.types import Array


def attention_reward(
  mass_S: Array, image_S: Array, share: Array, cfg: AttentionConfig
) -> jax.Array:
  """The reward of one rollout, in [0, 1], before the gate.

  Args:
    mass_S: float32, attention to each position: mean over sampled tokens, heads and layers; it sums
      to 1.
    image_S: bool, image tokens.
    share: float32 [], mean over the sampled tokens of |I_t| / N_t, in [0, 1].

  Returns:
    float32 []; 0 without image tokens.
  """
  image_mass_S = jnp.where(image_S, mass_S, 0.0)
  mass = jnp.sum(image_mass_S)
  has_image = (share > 0.0) & (mass > 0.0)
  relative = jnp.clip(mass / jnp.where(share > 0.0, share, 1.0) / cfg.full_ratio, 0.0, 1.0)
  forms = (
    cfg.mass * mass,
    cfg.relative * relative,
    cfg.concentration * concentration(image_mass_S, image_S),
  )
  total = cfg.mass + cfg.relative + cfg.concentration
  return jnp.where(has_image, sum(forms[1:], forms[0]) / max(total, 1e-30), 0.0)


def concentration(mass_S: Array, image_S: Array) -> jax.Array:
  """1 - H(p) / log |I| of the mass over the image tokens: 0 if even, 1 on a single token.

  Returns:
    float32 [] in [0, 1]; 0 with fewer than two image tokens or without mass.
  """
  total, count = jnp.sum(mass_S), jnp.sum(image_S).astype(jnp.float32)
  p_S = mass_S / jnp.where(total > 0.0, total, 1.0)
  entropy = -jnp.sum(jnp.where(p_S > 0.0, p_S * jnp.log(jnp.where(p_S > 0.0, p_S, 1.0)), 0.0))
  most = jnp.log(jnp.maximum(count, 2.0))
  found = jnp.clip(1.0 - entropy / most, 0.0, 1.0)
  return jnp.where((count > 1.0) & (total > 0.0), found, 0.0)
