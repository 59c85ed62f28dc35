"""Decoder kernels in 8 bits, through qwix: half the bytes that a decode step reads.

    W ≈ q * scale        q int8; scale = max |W| / 127, one for each output channel

Weights alone: q * scale is made in the compute dtype where it is multiplied, so that nothing is
rounded but the weights. A policy that samples so is not quite the one that learns; the difference
is among the metrics of a step.
"""

import re

import jax
import jax.numpy as jnp
import qwix

from spatial_jax.policy import param_tree
from spatial_jax.types import Params

# Axes that the product sums over, of a layer's kernels: outputs are what is left.
_SUMMED = (
  (r"decoder/layers/.*[qkv]/kernel$", (0,)),  # D, H, C
  (r"decoder/layers/.*o/kernel$", (0, 1)),  # H, C, D
  (r"decoder/layers/.*mlp/\w+/kernel$", (0,)),  # D, F or F, D
)


def quantized(params: Params) -> Params:
  """Unstacked parameters with each kernel of the decoder's layers as a `qwix.QArray`."""

  def one(path, leaf: jax.Array) -> jax.Array | qwix.QArray:
    name = param_tree.path_name(path)
    summed = next((axes for pattern, axes in _SUMMED if re.search(pattern, name)), None)
    if summed is None:
      return leaf
    kept = [axis for axis in range(leaf.ndim) if axis not in summed]
    return qwix.quantize(leaf, jnp.int8, channelwise_axes=kept)

  return jax.tree_util.tree_map_with_path(one, params)


def restored(params: Params) -> Params:
  """The inverse, but for rounding; of any part of the tree, quantized or not."""

  def one(leaf: jax.Array | qwix.QArray) -> jax.Array:
    return qwix.dequantize(leaf) if isinstance(leaf, qwix.QArray) else leaf

  return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, qwix.QArray))
