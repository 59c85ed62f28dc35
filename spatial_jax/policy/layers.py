"""Norms, feed-forward layers and the scan over layers, for decoder and vision tower."""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) in float32, rounded to the compute dtype, times scale."""

  eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
    scale = scale.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return x.astype(self.dtype) * scale


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(variance + eps) * scale + bias in float32, rounded to the compute dtype.

  `flax.linen.LayerNorm` does not trace in bfloat16 under strict promotion.
  """

  eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
    scale, bias = (part.astype(jnp.float32).reshape(shape) for part in (scale, bias))
    return (x * scale + bias).astype(self.dtype)


def make_norm(kind: Literal["rms", "layer"], eps: float, dtype: jnp.dtype, name: str) -> nn.Module:
  """RMSNorm for "rms", LayerNorm for "layer"."""
  if kind == "rms":
    return RMSNorm(eps, dtype, name=name)
  return LayerNorm(eps, dtype, name=name)


class GatedMLP(nn.Module):
  """down(silu(gate(x)) * up(x))."""

  mlp_width: int
  use_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def dense(width: int, name: str) -> nn.Dense:
      return nn.Dense(width, use_bias=self.use_bias, dtype=self.dtype, name=name)

    shape = x.shape
    x = one_axis_of_tokens(x)
    gate = _in_float32(nn.silu, dense(self.mlp_width, "gate")(x))
    return dense(shape[-1], "down")(gate * dense(self.mlp_width, "up")(x)).reshape(shape)


class PlainMLP(nn.Module):
  """down(act(up(x))) with biases; "gelu" is the exact form with the error function."""

  mlp_width: int
  width: int
  act: Literal["quick_gelu", "gelu_tanh", "gelu"]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    tokens = x.shape[:-1]
    x = one_axis_of_tokens(x)
    x = _in_float32(self._act, nn.Dense(self.mlp_width, dtype=self.dtype, name="up")(x))
    return nn.Dense(self.width, dtype=self.dtype, name="down")(x).reshape(*tokens, self.width)

  def _act(self, x: jax.Array) -> jax.Array:
    if self.act == "quick_gelu":
      return x * nn.sigmoid(1.702 * x)
    return nn.gelu(x, approximate=self.act == "gelu_tanh")


def one_axis_of_tokens(x: jax.Array) -> jax.Array:
  """x [..., D] -> [tokens, D].

  With two axes of tokens, XLA on a CPU writes a transposed copy of each cotangent to compute the
  gradient of a kernel. In the feed-forward layers that took half of the time of the backward pass.
  """
  return x.reshape(-1, x.shape[-1])


def _in_float32(act: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
  """act(x), rounded once at the end instead of after each of its operations."""
  return act(x.astype(jnp.float32)).astype(x.dtype)


def scanned(layer: type[nn.Module], length: int, in_axes: tuple, remat: bool) -> type[nn.Module]:
  """`layer` applied `length` times by scan over stacked parameters, optionally rematerialised."""
  body = nn.remat(layer, prevent_cse=False) if remat else layer
  return nn.scan(
    body,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=in_axes,  # pyright: ignore[reportArgumentType]  (a tuple is documented)
    length=length,
  )
