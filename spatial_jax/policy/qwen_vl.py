"""The policy as pure functions of its parameters; sampler and trainer share them.

patches ──encode──► features ─┐
tokens, positions ────────────┴─prefill─► prefix ─┐
                          hidden_with_prefix ─────┼─► hidden ──logprobs──► log-probs    (update)
                          append, decode ─────────┴─► cache, hidden ──logits          (rollout)
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spatial_jax.policy import attention_modes, int8, lora, param_tree, rope
from spatial_jax.policy import cache as cache_lib
from spatial_jax.policy.attention_mass import AttentionMass
from spatial_jax.policy.attention_modes import AttentionMode, CausalAttention
from spatial_jax.policy.cache import Cache, Prefix
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.decoder import Angles, DecoderLayer, DecoderStack, DeepStackFeatures
from spatial_jax.policy.layers import RMSNorm, one_axis_of_tokens
from spatial_jax.policy.logprobs import TokenScores, score_targets
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.vision import VisionTower
from spatial_jax.types import Array, Params, TokenArrays, VisionBatch


@dataclasses.dataclass(frozen=True)
class Policy:
  """A Qwen-VL model as pure functions; every array argument may be NumPy.

  Rows are left-aligned: `valid_RT` is true, then false. Outputs of invalid tokens are finite and
  meaningless. Parameters may be stacked (layers are scanned) or unstacked (layers are unrolled).
  """

  cfg: QwenVLConfig
  compute_dtype: jnp.dtype  # of activations and caches; parameters keep their own dtype
  mesh: Mesh | None  # its platform chooses the attention kernel; None: one device, XLA
  remat: bool  # recompute each layer in the backward pass
  logprob_chunk: int  # tokens per row whose logits exist at once in `logprobs`
  frozen: tuple[str, ...]  # regexes of parameter paths ("^vision/") that are not trained
  frozen_dtype: jnp.dtype  # of the frozen parameters; the trained ones are float32
  gradient_dtype: jnp.dtype  # of the sum of the gradients of microbatches
  lora: LoraConfig  # the kernels with adapters; the parameters then contain the adapters

  @property
  def without_adapters(self) -> "Policy":
    """The policy without adapters: for merged parameters and for the initial parameters."""
    return dataclasses.replace(self, lora=lora.OFF)

  @property
  def vision_trainable(self) -> bool:
    """Whether any vision parameter is trained; if not, the features of an image never change."""
    tower = self.abstract_params()["vision"]
    return bool(param_tree.partition({"vision": tower}, self.frozen)[1])

  @property
  def head_path(self) -> str:
    """The path of the only parameter that `logits` reads."""
    return f"decoder/{self._head}/embedding"

  @functools.cached_property
  def kernel_paths(self) -> tuple[str, ...]:
    """Paths of the parameters that can have adapters ("decoder/layers/attn/q/kernel")."""
    params = self.without_adapters.abstract_params()
    return tuple(path for path in param_tree.flatten(params) if path.endswith("/kernel"))

  # --- parameters --------------------------------------------------------------------------------

  def param_dtype(self, path: str) -> jnp.dtype:
    """The dtype in which training stores a parameter."""
    return self.frozen_dtype if param_tree.matches(path, self.frozen) else jnp.dtype(jnp.float32)

  def init(self, key: jax.Array) -> Params:
    """Random parameters, layers stacked: kernels LeCun-normal, embeddings normal 0.02."""
    leaves = param_tree.flatten(self._init_float32(key))
    return param_tree.unflatten(
      {path: leaf.astype(self.param_dtype(path)) for path, leaf in leaves.items()}
    )

  def abstract_params(self) -> Params:
    """The result of `init` as ShapeDtypeStruct; traced once for each shape and its adapters."""
    leaves = _float32_shapes(self.cfg, self.lora)
    return param_tree.unflatten(
      {path: jax.ShapeDtypeStruct(x.shape, self.param_dtype(path)) for path, x in leaves.items()}
    )

  def _init_float32(self, key: jax.Array) -> Params:
    cfg = self.cfg.decoder
    # The attention kernels refuse one token; new adapters get the compute dtype.
    plain = dataclasses.replace(self, mesh=None, compute_dtype=jnp.dtype("float32"))
    keys = jax.random.split(key, 4)
    x_RTD = jnp.zeros((1, 1, cfg.width), jnp.float32)
    angles = self.angles(jnp.zeros((1, 1, 3), jnp.int32))
    arguments = (x_RTD, angles, None, CausalAttention(jnp.ones((1, 1), bool)))
    table = nn.initializers.normal(0.02)
    decoder = {
      "embed": {"embedding": table(keys[0], (cfg.vocabulary, cfg.width), jnp.float32)},
      "layers": plain._stack(return_kv=False).init(keys[1], *arguments)["params"]["layers"],
      "norm": {"scale": jnp.ones(cfg.width, jnp.float32)},
    }
    if not cfg.tied:
      head = table(keys[2], (cfg.vocabulary, cfg.width), jnp.float32)
      decoder["head"] = {"embedding": head}
    vision = plain._tower().init(keys[3], self._one_window())["params"]
    return {"decoder": decoder, "vision": vision}

  def unstack(self, params: Params) -> Params:
    """The same parameters with a tuple of layers at decoder/layers; `decode` is fastest with it."""
    layers = params["decoder"]["layers"]
    layers = tuple(
      jax.tree.map(lambda x, i=i: x[i], layers) for i in range(self.cfg.decoder.layers)
    )
    return {**params, "decoder": {**params["decoder"], "layers": layers}}

  def init_cache(
    self, prompts: int, group: int, rows: int, prefix_size: int, suffix_block_sizes: Sequence[int]
  ) -> Cache:
    """An empty cache; see `cache.init_cache`."""
    return cache_lib.init_cache(
      self.cfg.decoder, prompts, group, rows, prefix_size, suffix_block_sizes, self.compute_dtype
    )

  # --- forward -----------------------------------------------------------------------------------

  def encode(self, params: Params, vision: VisionBatch) -> jax.Array:
    """Features of all images, [M, Y, D] in the order of the batch (M = P / 4)."""
    return self._apply(self._tower(), params["vision"], vision)

  def hidden(self, params: Params, tokens: TokenArrays, features_MYD: Array) -> jax.Array:
    """Hidden states of whole rows after the last norm, causal.

    Args:
      params: stacked or unstacked.
      tokens: left-aligned rows. With an int32 `valid_RT`, several sequences share a row: the number
        of the sequence of each token, 0 for padding.
      features_MYD: image features of every stream, which `tokens.feature_RT` points into.

    Returns:
      [R, T, D] in the compute dtype.
    """
    modes = attention_modes.causal(tokens.valid_RT, self.cfg.decoder.layers)
    return self._forward(params, tokens, features_MYD, modes, return_kv=False)[0]

  def prefill(
    self, params: Params, prompts: TokenArrays, features_MYD: Array
  ) -> tuple[jax.Array, Prefix]:
    """`hidden` of prompts, and the prefix that their rollouts share (see `cache.put_prefix`)."""
    modes = attention_modes.causal(prompts.valid_RT, self.cfg.decoder.layers)
    hidden_BTD, layers = self._forward(params, prompts, features_MYD, modes, return_kv=True)
    length_B = jnp.sum(jnp.asarray(prompts.valid_RT), axis=1, dtype=jnp.int32)
    return hidden_BTD, Prefix(layers, length_B)

  def hidden_with_prefix(
    self, params: Params, prefix: Prefix, tokens: TokenArrays, features_MYD: Array
  ) -> jax.Array:
    """`hidden` of rows that continue a prefix; differentiable.

    R is a multiple of B, rows ordered by prefix. The update passes one prefix per row: R = B.
    """
    modes = attention_modes.with_prefix(tokens.valid_RT, prefix)
    return self._forward(params, tokens, features_MYD, modes, return_kv=False)[0]

  def attention_mass(
    self,
    params: Params,
    prefix: Prefix,
    tokens: TokenArrays,
    features_MYD: Array,
    sampled_RT: Array,
    first_layer: int,
  ) -> AttentionMass:
    """Attention to each position, a mean over sampled tokens, heads and layers from `first_layer`.

    There is one prefix per row. The sum of a row is 1, or 0 without sampled tokens.
    """
    modes = attention_modes.measured(tokens.valid_RT, prefix, sampled_RT, first_layer)
    _, layers = self._forward(params, tokens, features_MYD, modes, return_kv=True)
    count_R1 = jnp.sum(jnp.asarray(sampled_RT), axis=1, keepdims=True).astype(jnp.float32)
    total = jnp.maximum(count_R1, 1.0) * (len(modes) - first_layer)
    return jax.tree.map(lambda *of_layers: sum(of_layers[1:], of_layers[0]) / total, *layers)

  def append(
    self,
    params: Params,
    cache: Cache,
    row_R: Array | None,
    tokens: TokenArrays,
    features_MYD: Array | None,
  ) -> tuple[jax.Array, Cache]:
    """Appends tokens to some rows of the cache (observations, drawn images).

    Args:
      params: unstacked or stacked.
      cache: read, and extended at the length of each row.
      row_R: int32, the cache row of each given row, distinct; an index beyond the cache is padding.
        None: all rows of the cache in order (cheaper, because prefixes are read in place).
      tokens: only valid ones are written, and none beyond the end of the cache: the caller checks
        that they fit.
      features_MYD: as in `hidden`; None if all tokens are text.

    Returns:
      hidden_RTD of the given rows, and the cache.
    """
    modes, length_R = attention_modes.with_cache(tokens.valid_RT, cache, row_R)
    hidden_RTD, layers = self._forward(params, tokens, features_MYD, modes, return_kv=True)
    return hidden_RTD, cache._replace(layers=layers, length_R=length_R)

  def decode(
    self, params: Params, cache: Cache, token_R: Array, position_RA: Array, active_R: Array
  ) -> tuple[jax.Array, Cache]:
    """Appends one text token to every active row of the cache; the other rows do not change.

    Tokens and positions are int32; unstacked `params` are faster. Returns hidden_RD and the cache.
    """
    rows = (token_R[:, None], position_RA[:, None], active_R[:, None])
    tokens = TokenArrays(*rows, feature_RT=np.full((len(token_R), 1), -1, np.int32))
    hidden_RTD, cache = self.append(params, cache, None, tokens, features_MYD=None)
    return hidden_RTD[:, 0], cache

  def angles(self, position_RTA: Array) -> Angles:
    """The decoder's rotary angles of positions, int32 [..., 3]."""
    cfg = self.cfg.decoder
    position_RTA = jnp.asarray(position_RTA)
    return Angles(
      *rope.mrope_angles(position_RTA, cfg.rope_theta, cfg.rope_sections, cfg.rope_interleaved)
    )

  # --- outputs -----------------------------------------------------------------------------------

  def logits(self, params: Params, hidden: Array) -> jax.Array:
    """float32 [..., V] of hidden [..., D]."""
    table_VD = params["decoder"][self._head]["embedding"]
    logits = jnp.einsum(
      "ND,VD->NV",
      one_axis_of_tokens(jnp.asarray(hidden)),
      table_VD.astype(self.compute_dtype),
      preferred_element_type=jnp.float32,
    )
    return logits.reshape(*hidden.shape[:-1], len(table_VD))

  def logprobs(
    self,
    params: Params,
    hidden_RTD: Array,
    target_RT: Array,
    temperature_R: Array,
    forbidden_V: Array,
    with_entropy: bool = False,
  ) -> TokenScores:
    """Log-probability of each target under the policy, in chunks of T under remat.

    logp = log_softmax(where(forbidden, -inf, logits) / temperature)[target]

    Args:
      hidden_RTD: hidden_RTD[r, t] predicts target_RT[r, t].
      target_RT: int32.
      temperature_R: float32 > 0.
      forbidden_V: bool, tokens that cannot be sampled; such a target gives -inf.
      with_entropy: whether the entropy of the distribution is computed too; else it is None.

    Returns:
      float32 [R, T] each. Logits [R, T, V] never exist at once.
    """
    inputs = (hidden_RTD, target_RT, temperature_R, forbidden_V, self.logprob_chunk)
    return score_targets(functools.partial(self.logits, params), *inputs, with_entropy)

  # --- private -----------------------------------------------------------------------------------

  @property
  def _head(self) -> str:
    return "embed" if self.cfg.decoder.tied else "head"

  def _apply(self, module: nn.Module, params: Params, *arguments: Any) -> Any:
    params = int8.restored(lora.rounded(params, self.compute_dtype))
    return module.apply({"params": params}, *arguments)

  def _adapt(self, module: nn.Module, path: str) -> nn.Module:
    """The module at `path`, with the adapters that `lora` names."""
    if not self.lora.paths:
      return module
    return lora.adapted(module, path, self.lora, self.kernel_paths)

  def _tower(self) -> nn.Module:
    tower = VisionTower(self.cfg, self.compute_dtype, self.mesh, self.remat)
    return self._adapt(tower, "vision/")

  def _stack(self, return_kv: bool) -> nn.Module:
    stack = DecoderStack(self.cfg.decoder, self.compute_dtype, self.mesh, return_kv, self.remat)
    return self._adapt(stack, "decoder/layers/")

  def _layer(self, return_kv: bool) -> nn.Module:
    layer = DecoderLayer(self.cfg.decoder, self.compute_dtype, self.mesh, return_kv)
    return self._adapt(layer, "decoder/layers/")

  def _forward(
    self,
    params: Params,
    tokens: TokenArrays,
    features_MYD: Array | None,
    modes: Sequence[AttentionMode],
    return_kv: bool,
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    """Hidden states after the last norm, and the keys and values of each layer."""
    x_RTD = self._embed(params, tokens, features_MYD)
    deepstack = None if features_MYD is None else _deepstack(features_MYD, tokens.feature_RT)
    angles = self.angles(tokens.position_RTA)
    x_RTD, layers = self._layers(params, x_RTD, angles, deepstack, modes, return_kv)
    return self._last_norm(params, x_RTD), layers

  def _layers(
    self,
    params: Params,
    x_RTD: jax.Array,
    angles: Angles,
    deepstack: DeepStackFeatures | None,
    modes: Sequence[AttentionMode],
    return_kv: bool,
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    """All decoder layers, `modes` one for each; returns x and the keys and values of each layer."""
    weights = params["decoder"]["layers"]
    if isinstance(weights, tuple):
      layer, layers = self._layer(return_kv), []
      for index, (weight, mode) in enumerate(zip(weights, modes, strict=True)):
        x_RTD, kv = self._apply(layer, weight, x_RTD, angles, deepstack, mode, jnp.int32(index))
        layers.append(kv)
      return x_RTD, tuple(layers)
    arguments = (x_RTD, angles, deepstack, attention_modes.stack_layers(modes))
    x_RTD, kv = self._apply(self._stack(return_kv), {"layers": weights}, *arguments)
    return x_RTD, tuple(jax.tree.map(lambda x, i=i: x[i], kv) for i in range(len(modes)))

  def _embed(self, params: Params, tokens: TokenArrays, features_MYD: Array | None) -> jax.Array:
    table_VD, feature_RT = params["decoder"]["embed"]["embedding"], tokens.feature_RT
    x_RTD = jnp.take(table_VD, tokens.token_RT, axis=0, mode="clip").astype(self.compute_dtype)
    if features_MYD is None:
      return x_RTD
    image_RTD = jnp.take(jnp.asarray(features_MYD[:, 0]), feature_RT, axis=0, mode="clip")
    return jnp.where(feature_RT[..., None] >= 0, image_RTD.astype(self.compute_dtype), x_RTD)

  def _last_norm(self, params, x_RTD) -> jax.Array:
    norm = RMSNorm(self.cfg.decoder.norm_eps, self.compute_dtype)
    return self._apply(norm, params["decoder"]["norm"], x_RTD)

  def _one_window(self) -> VisionBatch:
    """The smallest batch of images, for `init`."""
    vision = self.cfg.vision
    window = vision.window_patches
    return VisionBatch.build(jnp.zeros, window, vision.patch_values, 1, window)


@functools.lru_cache(maxsize=32)
def _float32_shapes(cfg: QwenVLConfig, adapters: LoraConfig) -> dict[str, Any]:
  """Path -> shape of the parameters of a policy with adapters."""
  policy = dataclasses.replace(make_policy(cfg, jnp.dtype(jnp.float32)), lora=adapters)
  return param_tree.flatten(jax.eval_shape(policy.init, jax.random.key(0)))


def _deepstack(features_MYD: Array, feature_RT: Array) -> DeepStackFeatures | None:
  """The features for DeepStack; None if there is only one stream."""
  if features_MYD.shape[1] == 1:
    return None
  return DeepStackFeatures(jnp.asarray(features_MYD), jnp.asarray(feature_RT))


def make_policy(
  cfg: QwenVLConfig,
  compute_dtype: jnp.dtype,
  mesh: Mesh | None = None,
  remat: bool = True,
  logprob_chunk: int = 256,
) -> Policy:
  """The policy's functions for one configuration; see `Policy`. All parameters are trained."""
  float32 = jnp.dtype(jnp.float32)
  return Policy(
    cfg, jnp.dtype(compute_dtype), mesh, remat, logprob_chunk, (), float32, float32, lora.OFF
  )
