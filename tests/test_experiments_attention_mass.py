"""Attention weights of a layer against queries and keys computed in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiny.attention_mass import log_attention, truncate
from spatial_jax.policy import rope
from spatial_jax.types import TokenArrays
from tests.test_policy import TIED, cut, four_rows, setting

LAYER = 2


def expected_weights(name: str, row: int, prompt_length: int) -> np.ndarray:
  """Attention [H, T, S] from response tokens to prompt tokens, computed from the whole row."""
  policy, params, _, _, features_MYD = setting(name)
  (token_RT, position_RTA, valid_RT, feature_RT), *_ = four_rows(name)
  cfg, layers = policy.cfg.decoder, params["decoder"]["layers"]
  lower, lower_params = truncate(policy, params, LAYER)
  tokens = TokenArrays(token_RT, position_RTA, valid_RT, feature_RT)
  hidden_TD = lower.hidden(lower_params, tokens, features_MYD)[row]
  x_TD = np.asarray(hidden_TD / params["decoder"]["norm"]["scale"][None])
  x_TD = x_TD * np.asarray(layers["attn_norm"]["scale"])[LAYER]
  angles = policy.angles(position_RTA[row])

  def heads(part: str) -> np.ndarray:
    weights = jax.tree.map(lambda x: np.asarray(x)[LAYER], layers["attn"])
    out_THC = np.einsum("TD,DHC->THC", x_TD, weights[part]["kernel"])
    if cfg.qkv_bias:
      out_THC = out_THC + weights[part]["bias"]
    if cfg.qk_norm:
      size = np.sqrt(np.square(out_THC).mean(-1, keepdims=True) + cfg.norm_eps)
      out_THC = out_THC / size * weights[f"{part}_norm"]["scale"]
    return np.asarray(rope.rotate(jnp.asarray(out_THC), *(a[:, None] for a in angles)))

  q_THC, k_TKC = heads("q"), heads("k")
  length = int(valid_RT[row].sum())
  found = []
  for h in range(cfg.heads):
    k_SC = k_TKC[:prompt_length, h // (cfg.heads // cfg.kv_heads)]
    weight_TS = np.exp(q_THC[prompt_length:length, h] @ k_SC.T / np.sqrt(cfg.head_dim))
    found.append(weight_TS / weight_TS.sum(-1, keepdims=True))
  return np.stack(found)


@pytest.mark.parametrize("name", [TIED, pytest.param("qwen3_vl/tied", marks=pytest.mark.slow)])
def test_log_attention_equals_the_layer_s_attention(name):
  """Two prompts of different lengths, two rows each: every head of every row."""
  policy, params, _, _, features_MYD = setting(name)
  batch, lengths, prompt_lengths, _ = four_rows(name)
  prompts = cut(batch, (0, 2), (0, 0), prompt_lengths, max(prompt_lengths))
  _, prefix = policy.prefill(params, TokenArrays(*prompts), features_MYD)
  starts = [prompt_lengths[r // 2] for r in range(4)]
  width = max(end - start for start, end in zip(starts, lengths, strict=True))
  rows = cut(batch, range(4), starts, lengths, width)
  found = log_attention(policy, params, LAYER, prefix, TokenArrays(*rows), features_MYD)
  for r in range(4):
    expected = expected_weights(name, r, starts[r])
    weight_HTS = np.exp(found[r, :, : lengths[r] - starts[r]])
    np.testing.assert_allclose(weight_HTS[..., : starts[r]], expected, atol=1e-5)
    assert not weight_HTS[..., starts[r] :].any()
