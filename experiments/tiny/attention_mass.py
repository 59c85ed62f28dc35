"""Attention weights of one decoder layer from response tokens to prompt tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from spatial_jax.policy import rope
from spatial_jax.policy.cache import Prefix
from spatial_jax.policy.layers import RMSNorm
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.types import Array, Params, TokenArrays


def truncate(policy: Policy, params: Params, count: int) -> tuple[Policy, Params]:
  """The policy with its first `count` decoder layers alone, and its parameters (stacked)."""
  decoder = dataclasses.replace(policy.cfg.decoder, layers=count)
  cut = dataclasses.replace(policy, cfg=dataclasses.replace(policy.cfg, decoder=decoder))
  layers = jax.tree.map(lambda x: x[:count], params["decoder"]["layers"])
  return cut, {**params, "decoder": {**params["decoder"], "layers": layers}}


def log_attention(
  policy: Policy,
  params: Params,
  layer: int,
  prefix: Prefix,
  tokens: TokenArrays,
  features_MYD: Array,
) -> jax.Array:
  """Log attention weights of one decoder layer, normalised over the prefix alone; differentiable.

      log softmax_s ( q_t . k_s / sqrt(C) ),   s in the prefix of the row's prompt

  Args:
    policy, params: params stacked.
    layer: index of the layer, >= 1, static.
    prefix: from `prefill`, with more than `layer` layers.
    tokens, features_MYD: as in `Policy.hidden_with_prefix`.

  Returns:
    float32 [R, H, T, S]; -1e30 for padding of the prefix.
  """
  cfg = policy.cfg.decoder
  lower, lower_params = truncate(policy, params, layer)
  lower_prefix = Prefix(prefix.layers[:layer], prefix.length_B)
  hidden_RTD = lower.hidden_with_prefix(lower_params, lower_prefix, tokens, features_MYD)
  q_RTHC = _queries(policy, params, layer, hidden_RTD, tokens.position_RTA)
  k_BKSC = prefix.layers[layer].k_RKSC.astype(jnp.float32)
  rows, length = q_RTHC.shape[:2]
  group, size = rows // len(k_BKSC), k_BKSC.shape[2]
  q_BGTKQC = q_RTHC.reshape(
    -1, group, length, cfg.kv_heads, cfg.heads // cfg.kv_heads, cfg.head_dim
  )
  score = jnp.einsum("BGTKQC,BKSC->BGKQTS", q_BGTKQC, k_BKSC) * cfg.head_dim**-0.5
  score_RHTS = score.reshape(rows, cfg.heads, length, size)
  length_R = jnp.repeat(prefix.length_B, group)
  visible_RS = jnp.arange(size)[None] < length_R[:, None]
  return jax.nn.log_softmax(jnp.where(visible_RS[:, None, None], score_RHTS, -1e30), axis=-1)


def _queries(
  policy: Policy, params: Params, layer: int, hidden_RTD: jax.Array, position_RTA: Array
) -> jax.Array:
  """Rotated queries of a layer, float32 [R, T, H, C], from the output of the layers before it.

  `hidden_RTD` went through the last norm of the truncated policy, not through the layer's own norm.
  """
  cfg = policy.cfg.decoder
  # Both norms divide by the same root mean square; only their scales differ.
  weights = jax.tree.map(lambda x: x[layer], params["decoder"]["layers"])
  scale_D = weights["attn_norm"]["scale"] / params["decoder"]["norm"]["scale"]
  query = weights["attn"]["q"]
  x_RTD = hidden_RTD.astype(jnp.float32) * scale_D[None, None]
  q_RTHC = jnp.einsum("RTD,DHC->RTHC", x_RTD, query["kernel"])
  if cfg.qkv_bias:
    q_RTHC += query["bias"][None, None]
  if cfg.qk_norm:
    norm = RMSNorm(cfg.norm_eps, jnp.dtype("float32"))
    q_RTHC = jnp.asarray(norm.apply({"params": weights["attn"]["q_norm"]}, q_RTHC))
  return rope.rotate(q_RTHC, *(angle[:, :, None] for angle in policy.angles(position_RTA)))
