"""Configs of losses for tests: those of `configs/losses.py` with single values changed."""

from typing import Any

from configs import losses
from spatial_jax.config import build
from spatial_jax.learn.losses import LossConfig


def loss_config(changes: dict[str, Any] | None = None, **more: Any) -> LossConfig:
  """GRPO's loss; `changes` have dotted keys ("kl.weight")."""
  cfg = losses.grpo()
  cfg.update_from_flattened_dict((changes or {}) | more)
  return build(LossConfig, cfg.to_dict())
