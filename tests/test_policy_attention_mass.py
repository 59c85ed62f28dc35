"""Where a layer looks, against its own keys and queries written out."""

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.policy import rope
from spatial_jax.policy.attention_mass import log_attention
from tests.test_policy import cut, four_rows, setting

LAYER = 2


def by_hand(row: int, prompt_length: int) -> np.ndarray:
  """Attention [H, T, S] of the tokens behind the prompt over the prompt, from the whole row."""
  policy, params, _, _, features_MYD = setting()
  (token_RT, position_RTA, valid_RT, feature_RT), *_ = four_rows()
  cfg, layers = policy.cfg.decoder, params["decoder"]["layers"]
  before, before_params = policy.first_layers(params, LAYER)
  hidden_TD = before.hidden(
    before_params, token_RT, position_RTA, valid_RT, features_MYD, feature_RT
  )[row]
  x_TD = np.asarray(hidden_TD / params["decoder"]["norm"]["scale"][None])
  x_TD = x_TD * np.asarray(layers["attn_norm"]["scale"])[LAYER]
  angles = rope.mrope_angles(jnp.asarray(position_RTA[row]), cfg.rope_theta, cfg.rope_sections)

  def heads(name: str) -> np.ndarray:
    weight = jax.tree.map(lambda x: np.asarray(x)[LAYER], layers["attn"][name])
    out_THC = np.einsum("TD,DHC->THC", x_TD, weight["kernel"]) + weight["bias"]
    return np.asarray(rope.rotate(jnp.asarray(out_THC), *(a[:, None] for a in angles)))

  q_THC, k_TKC = heads("q"), heads("k")
  length = int(valid_RT[row].sum())
  found = []
  for h in range(cfg.heads):
    k_SC = k_TKC[:prompt_length, h // (cfg.heads // cfg.kv_heads)]
    weight_TS = np.exp(q_THC[prompt_length:length, h] @ k_SC.T / np.sqrt(cfg.head_dim))
    found.append(weight_TS / weight_TS.sum(-1, keepdims=True))
  return np.stack(found)


def test_log_attention_is_that_of_the_layer():
  """Two prompts of different lengths, two rows each: every head of every row."""
  policy, params, _, _, features_MYD = setting()
  batch, lengths, prompt_lengths, _ = four_rows()
  prompts = cut(batch, (0, 2), (0, 0), prompt_lengths, max(prompt_lengths))
  _, prefix = policy.prefill(params, *prompts[:3], features_MYD, prompts[3])
  starts = [prompt_lengths[r // 2] for r in range(4)]
  width = max(end - start for start, end in zip(starts, lengths, strict=True))
  rows = cut(batch, range(4), starts, lengths, width)
  found = log_attention(policy, params, LAYER, prefix, *rows[:3], features_MYD, rows[3])
  for r in range(4):
    expected = by_hand(r, starts[r])
    weight_HTS = np.exp(found[r, :, : lengths[r] - starts[r]])
    np.testing.assert_allclose(weight_HTS[..., : starts[r]], expected, atol=1e-5)
    assert not weight_HTS[..., starts[r] :].any()
