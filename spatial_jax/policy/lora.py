"""Low-rank adapters of chosen kernels, with qwix.

    y = W x + alpha / rank * B A x        W as it was loaded, B = 0 at the start

An adapter is stored next to its kernel ("decoder/layers/attn/q/kernel_lora_a"). The same parameters
without their adapters are the initial policy, so that a reference policy needs no second copy.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix

from spatial_jax.checks import is_regex
from spatial_jax.config import ConfigError, check_field, check_number, check_whole
from spatial_jax.policy import param_tree
from spatial_jax.types import Params

ADAPTERS = r"/kernel_lora_[ab]$"
BASE = r"(?<!_lora_[ab])$"  # every other parameter


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which kernels get adapters, and of which size."""

  paths: tuple[str, ...]  # regexes of kernel paths ("decoder/.*/[qkvo]/kernel"); (): no adapters
  rank: int  # of each adapter, >= 1
  alpha: float  # > 0; the product of an adapter is scaled by alpha / rank

  def __post_init__(self):
    check_whole(self, "rank", at_least=1)
    check_number(self, "alpha", above=0)
    check_field(self, "paths", isinstance(self.paths, tuple), "be a list of regexes")
    for pattern in self.paths:
      check_field(self, "paths", is_regex(pattern), f"hold regexes; {pattern!r} is not one")


OFF = LoraConfig(paths=(), rank=1, alpha=1.0)


def adapted(module: nn.Module, prefix: str, cfg: LoraConfig, paths: Sequence[str]) -> nn.Module:
  """The module with adapters for the kernels that `cfg` names.

  Args:
    module: a part of the policy.
    prefix: of its parameter paths: "vision/", or "decoder/layers/" for one layer or all of them.
    cfg: if it names no kernel of the module, the module is returned unchanged.
    paths: of all kernels of the policy.

  Raises:
    ConfigError: if a regex matches no kernel of the policy.
  """
  chosen = [path.removeprefix(prefix) for path in kernels(cfg, paths) if path.startswith(prefix)]
  if not chosen:
    return module
  names = "|".join(re.escape(path.removesuffix("/kernel")) for path in chosen)
  rule = qwix.LoraRule(module_path=f"(layers/)?({names})", rank=cfg.rank, alpha=cfg.alpha)
  return cast(nn.Module, qwix.apply_lora_to_model(module, qwix.LoraProvider(rules=[rule])))


def kernels(cfg: LoraConfig, paths: Sequence[str]) -> list[str]:
  """The kernel paths that get adapters; ConfigError if a regex matches no path."""
  for pattern in cfg.paths:
    if not any(param_tree.matches(path, (pattern,)) for path in paths):
      raise ConfigError(
        f"config.lora.paths: {pattern!r} matches no kernel path; the paths look like {paths[0]}"
      )
  return [path for path in paths if param_tree.matches(path, cfg.paths)]


def split(params: Params) -> tuple[Params, Params]:
  """(base, adapters): the parameters without adapters, and the adapters; no array is copied."""
  adapters, base = param_tree.partition(params, (ADAPTERS,))
  return base, adapters


def merged(params: Params, cfg: LoraConfig) -> Params:
  """Equivalent parameters without adapters: W + alpha / rank * A B for each kernel, in float32.

  `params` are stacked, or those of one layer.
  """
  base, adapters = split(params)
  return _add(base, adapters, cfg.alpha / cfg.rank) if adapters else base


def _add(base: Params, adapters: Params, scale: float) -> Params:
  if "kernel_lora_a" in adapters:
    kernel = base["kernel"]
    change = scale * (adapters["kernel_lora_a"] @ adapters["kernel_lora_b"])
    return {**base, "kernel": kernel.astype(change.dtype) + change.reshape(kernel.shape)}
  return {**base, **{key: _add(base[key], adapters[key], scale) for key in adapters}}


def rounded(params: Params, dtype: jnp.dtype) -> Params:
  """The parameters with adapters in the compute dtype, which qwix needs under strict promotion."""
  base, adapters = split(params)
  if not adapters:
    return params
  return param_tree.merge(base, jax.tree.map(lambda x: x.astype(dtype), adapters))


def frozen_paths(cfg: LoraConfig, frozen: Sequence[str]) -> tuple[str, ...]:
  """Regexes of the parameters that are not trained; with adapters, all other parameters."""
  return (*frozen, BASE) if cfg.paths else tuple(frozen)
