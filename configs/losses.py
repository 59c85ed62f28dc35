"""Policy losses as published, for cfg.learn.loss; a config changes single values after that.

from configs import losses
cfg.learn.loss = losses.gspo()
"""

from ml_collections import ConfigDict


def grpo() -> ConfigDict:
  """GRPO without a KL term, with ViLaSR's clip range.

  Source: DeepSeekMath (arXiv:2402.03300); clip 0.2 and 0.3 are EasyR1's, which trained ViLaSR.
  """
  return ConfigDict(
    {
      "kind": "clip",
      "clip_low": 0.2,
      "clip_high": 0.3,
      "dual_clip": 0.0,  # EasyR1 has 3; with one update per batch it never acts
      "sapo_positive": 1.0,
      "sapo_negative": 1.05,
      "normalise": "sequence",
      "length_constant": 0,
      "kl": {
        "weight": 0.0,
        "final_weight": 0.0,
        "steps": 0,
        "estimate": "k3",
        "place": "loss",
        "reference": "start",
      },
      # Sampler and trainer are one function here and differ by rounding alone, unless decode
      # weights are int8.
      "importance": {"kind": "none", "cap": 2.0, "floor": 0.5},
      "entropy": {"weight": 0.0, "target": 1.0},
    }
  )


def dr_grpo(max_tokens: int) -> ConfigDict:
  """Dr. GRPO: every token of every batch has the same weight; use it with advantage.by_std=False.

  Source: arXiv:2503.20783. `max_tokens`: the largest number of tokens of a response.
  """
  return _changed(kind="clip", clip_high=0.2, normalise="constant", length_constant=max_tokens)


def dapo() -> ConfigDict:
  """DAPO: clip-higher and a mean over tokens.

  learn.max_refills and learn.mask_truncated are the rest of it.

  Source: arXiv:2503.14476.
  """
  return _changed(clip_high=0.28, normalise="token")


def gspo() -> ConfigDict:
  """GSPO: one ratio per response. Source: arXiv:2507.18071."""
  return _changed(kind="gspo", clip_low=3e-4, clip_high=4e-4)


def gspo_token() -> ConfigDict:
  """GSPO-token: the ratio of the response, with a gradient per token. Source: arXiv:2507.18071."""
  return _changed(kind="gspo_token", clip_low=3e-4, clip_high=4e-4)


def cispo() -> ConfigDict:
  """CISPO: a clipped weight on the log-likelihood, without a lower limit.

  Source: MiniMax-M1 (arXiv:2506.13585), which states no upper limit; 4 is that of ScaleRL's
  reproduction (arXiv:2510.13786: a ratio of at most 5).
  """
  return _changed(kind="cispo", clip_low=1.0, clip_high=4.0, normalise="token")


def sapo() -> ConfigDict:
  """SAPO: a smooth gate instead of a clip. Source: arXiv:2511.20347."""
  return _changed(kind="sapo")


def _changed(**changes: float | str) -> ConfigDict:
  cfg = grpo()
  cfg.update(changes)
  return cfg
