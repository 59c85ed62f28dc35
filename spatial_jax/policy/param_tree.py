"""Subtrees of a parameter tree, chosen by parameter paths ("vision/blocks/qkv/kernel")."""

import re
from collections.abc import Sequence
from typing import Any

import jax
from flax import traverse_util

from spatial_jax.types import Params


def matches(path: str, patterns: Sequence[str]) -> bool:
  """Whether any of the regexes matches somewhere in the path."""
  return any(re.search(pattern, path) for pattern in patterns)


def path_name(path: Any) -> str:
  """A key path of JAX as "vision/blocks/qkv/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def partition(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
  """(parameters that match any of the regexes, all other parameters), each a nested dict."""
  parts: tuple[Params, Params] = ({}, {})
  for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
    parts[not matches(path, patterns)][path] = leaf
  one, other = (traverse_util.unflatten_dict(part, sep="/") for part in parts)
  return one, other


def merge(one: Params, other: Params) -> Params:
  """The inverse of `partition`."""
  flat = (traverse_util.flatten_dict(part, sep="/") for part in (one, other))
  return traverse_util.unflatten_dict(dict(kv for part in flat for kv in part.items()), sep="/")
