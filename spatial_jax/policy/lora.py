"""Low-rank adapters beside chosen kernels, through qwix.

    y = W x + alpha / rank * B A x        W as it was loaded, B = 0 at first

Adapters are parameters beside their kernel ("decoder/layers/attn/q/kernel_lora_a"). Without them
the same tree is the policy that training began with: a reference that needs no second copy.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix

from spatial_jax.config import ConfigError
from spatial_jax.policy import param_tree
from spatial_jax.types import Params

ADAPTERS = r"/kernel_lora_[ab]$"
BASE = r"(?<!_lora_[ab])$"  # every other parameter


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which kernels get adapters.

  Attributes:
    paths: regexes of kernels' paths ("^decoder/layers/attn/[qkvo]/kernel"); (): no adapters.
    rank: of each adapter.
    alpha: adapters count alpha / rank.
  """

  paths: tuple[str, ...]
  rank: int
  alpha: float

  def __post_init__(self):
    if self.rank < 1:
      raise ConfigError(f"config.lora.rank must be at least 1, got {self.rank}")


OFF = LoraConfig(paths=(), rank=1, alpha=1.0)


def adapted(module: nn.Module, inside: str, cfg: LoraConfig, paths: Sequence[str]) -> nn.Module:
  """The module, with adapters beside those of its kernels that `cfg` names.

  Args:
    module: whose parameters' paths begin with `inside`.
    inside: "vision/", or "decoder/layers/" for the stack of layers or one of them.
    cfg: which; nothing changes when it names none of these.
    paths: of the kernels of the policy.

  Raises:
    ConfigError: at trace, for a regex that matches no kernel of the policy.
  """
  chosen = [path.removeprefix(inside) for path in kernels(cfg, paths) if path.startswith(inside)]
  if not chosen:
    return module
  names = "|".join(re.escape(path.removesuffix("/kernel")) for path in chosen)
  rule = qwix.LoraRule(module_path=f"(layers/)?({names})", rank=cfg.rank, alpha=cfg.alpha)
  return cast(nn.Module, qwix.apply_lora_to_model(module, qwix.LoraProvider(rules=[rule])))


def kernels(cfg: LoraConfig, paths: Sequence[str]) -> list[str]:
  """Those of the kernels' paths that get adapters.

  Raises:
    ConfigError: on the host, for a regex that matches none.
  """
  for pattern in cfg.paths:
    if not any(param_tree.matches(path, (pattern,)) for path in paths):
      raise ConfigError(f"config.lora.paths: no kernel's path matches {pattern!r}")
  return [path for path in paths if param_tree.matches(path, cfg.paths)]


def split(params: Params) -> tuple[Params, Params]:
  """(base, adapters): the same arrays, the first the parameters with the adapters off."""
  adapters, base = param_tree.partition(params, (ADAPTERS,))
  return base, adapters


def merged(params: Params, cfg: LoraConfig) -> Params:
  """Parameters without adapters that compute the same: W + alpha / rank * A B for each.

  Args:
    params: stacked, with or without adapters.
    cfg: of the adapters.
  """
  base, adapters = split(params)
  return _add(base, adapters, cfg.alpha / cfg.rank) if adapters else base


def _add(base: Params, adapters: Params, scale: float) -> Params:
  if "kernel_lora_a" in adapters:
    kernel = base["kernel"]
    change = scale * (adapters["kernel_lora_a"] @ adapters["kernel_lora_b"])
    change = change.reshape(kernel.shape).astype(kernel.dtype)
    return {**base, "kernel": kernel + change}
  return {**base, **{key: _add(base[key], adapters[key], scale) for key in adapters}}


def rounded(params: Params, dtype: jnp.dtype) -> Params:
  """Adapters in the compute dtype, as qwix needs them under strict promotion; the base as it is."""
  base, adapters = split(params)
  return (
    param_tree.merge(base, jax.tree.map(lambda x: x.astype(dtype), adapters))
    if adapters
    else params
  )


def frozen_paths(cfg: LoraConfig, frozen: Sequence[str]) -> tuple[str, ...]:
  """What does not learn: with adapters, everything else beside what is frozen anyway."""
  return (*frozen, BASE) if cfg.paths else tuple(frozen)
