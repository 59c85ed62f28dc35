"""Subtrees of a parameter tree, chosen by parameter paths ("vision/blocks/qkv/kernel")."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from spatial_jax.types import Params


def matches(path: str, patterns: Sequence[str]) -> bool:
  """Whether any of the regexes matches somewhere in the path."""
  return any(re.search(pattern, path) for pattern in patterns)


def path_name(path: Any) -> str:
  """A key path of JAX as "vision/blocks/qkv/kernel"; `sharding` has the same for its level."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(params: Params) -> dict[str, Any]:
  """The leaves of nested dicts by path."""
  return traverse_util.flatten_dict(params, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> Params:
  """The inverse of `flatten`."""
  return traverse_util.unflatten_dict(dict(leaves), sep="/")


def partition(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
  """(parameters that match any of the regexes, all other parameters), each a nested dict."""
  parts: tuple[Params, Params] = ({}, {})
  for path, leaf in flatten(params).items():
    parts[not matches(path, patterns)][path] = leaf
  return unflatten(parts[0]), unflatten(parts[1])


def merge(one: Params, other: Params) -> Params:
  """The inverse of `partition`."""
  return unflatten(flatten(one) | flatten(other))
