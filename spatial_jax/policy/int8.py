"""Decoder kernels in 8 bits, with qwix: a decode step reads half the bytes.

    W ≈ q * scale        q int8; scale = max |W| / 127, one for each output channel

Only weights are rounded: q * scale is computed in the compute dtype where it is multiplied. The
policy that samples then differs slightly from the policy that is trained; a metric of every step
measures the difference.
"""

import re

import jax
import jax.numpy as jnp
import qwix

from spatial_jax.policy.param_tree import path_name
from spatial_jax.types import Params

# (path regex, axes that the matrix product sums over). The other axes are output channels.
_SUMMED = (
  (r"decoder/layers/.*[qkv]/kernel$", (0,)),  # D, H, C
  (r"decoder/layers/.*o/kernel$", (0, 1)),  # H, C, D
  (r"decoder/layers/.*mlp/\w+/kernel$", (0,)),  # D, F or F, D
)


def quantized(params: Params) -> Params:
  """The parameters (unstacked) with every kernel of the decoder layers as a `qwix.QArray`."""

  def one(path, leaf: jax.Array) -> jax.Array | qwix.QArray:
    name = path_name(path)
    summed = next((axes for pattern, axes in _SUMMED if re.search(pattern, name)), None)
    if summed is None:
      return leaf
    channels = [axis for axis in range(leaf.ndim) if axis not in summed]
    return qwix.quantize(leaf, jnp.int8, channelwise_axes=channels)

  return jax.tree_util.tree_map_with_path(one, params)


def restored(params: Params) -> Params:
  """The inverse of `quantized` up to rounding, for any subtree; other arrays do not change."""

  def one(leaf: jax.Array | qwix.QArray) -> jax.Array:
    return qwix.dequantize(leaf) if isinstance(leaf, qwix.QArray) else leaf

  return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, qwix.QArray))
