"""Small policies, inputs and parity cases for the policy tests and the golden files.

Weights and pixels are computed by an integer hash. They have the same bits on every machine, so the
golden files contain outputs only.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.data.image import PreprocessConfig, patch_frames, patch_image
from spatial_jax.data.tokenizer import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, Tokenizer
from spatial_jax.data.video import VideoConfig
from spatial_jax.data.vision_packing import VisionBuckets, plan_vision
from spatial_jax.hf import name_map
from spatial_jax.policy import cache as cache_lib
from spatial_jax.policy import param_tree
from spatial_jax.policy.config import DecoderConfig, QwenVLConfig, VisionConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.policy.rope import VideoRule, mrope_positions
from spatial_jax.types import Params, PatchedImage, TokenArrays

IMAGE, VIDEO, START, END = 92, 93, 94, 95
SPECIAL = (IMAGE, VIDEO, START, END)
PREPROCESS = PreprocessConfig(4, 2, 2, 64, 4096, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
VIDEO_CONFIG = VideoConfig(False, 2.0, 4, 16, 64, 4096)
BUCKETS = VisionBuckets((8, 16, 32, 64), (2, 4, 8, 16), (64, 128))
NEW_TOKENS = 32


# The values that differ between families. Vision: norm, mlp, patch_bias, table_side, deepstack.
# Decoder: rope_interleaved, qkv_bias, qk_norm.
QWEN2_TOWER = ("layer", "quick_gelu", False, 0, ())
QWEN2_5_TOWER = ("rms", "gated", False, 0, ())
QWEN2_DECODER = (False, True, False)
QWEN3_DECODER = (True, False, True)
IDS = (IMAGE, VIDEO, START, END)
SEEDS = {"qwen2_5_vl/untied": 2}


def small_config(tied: bool) -> QwenVLConfig:
  """Qwen2.5-VL: three vision blocks (one of them full), three decoder layers, 96 tokens."""
  vision = VisionConfig(3, 32, 2, 48, 4, 2, 2, 16, (1,), 1e-6, *QWEN2_5_TOWER)
  decoder = DecoderConfig(3, 48, 6, 2, 8, 64, 96, 1e4, (2, 1, 1), 1e-6, tied, *QWEN2_DECODER)
  return QwenVLConfig(vision, decoder, *IDS, 2, "qwen2_5_vl")


def _qwen2(heads: int, kv_heads: int, head_dim: int, tied: bool, *tower: int) -> QwenVLConfig:
  """Qwen2-VL; `tower` is layers, width, heads and feed-forward width."""
  layers, width, tower_heads, mlp_width = tower
  full = tuple(range(layers))
  vision = VisionConfig(
    *(layers, width, tower_heads, mlp_width, 4, 2, 2, 0, full, 1e-6), *QWEN2_TOWER
  )
  sections = (head_dim // 4, head_dim // 8, head_dim // 8)
  decoder = DecoderConfig(
    *(3, heads * head_dim, heads, kv_heads, head_dim, 64, 96, 1e4, sections, 1e-6, tied),
    *QWEN2_DECODER,
  )
  return QwenVLConfig(vision, decoder, *IDS, 1, "qwen2_vl")


def _qwen3(
  heads: int, kv_heads: int, tied: bool, side: int, deepstack: tuple[int, ...], tower_heads: int
) -> QwenVLConfig:
  """Qwen3-VL of width 48 with heads of 16 channels."""
  vision = VisionConfig(
    *(3, 16 * tower_heads, tower_heads, 56, 4, 2, 2, 0, (0, 1, 2), 1e-6),
    *("layer", "gelu_tanh", True, side, deepstack),
  )
  decoder = DecoderConfig(
    *(3, 48, heads, kv_heads, 16, 64, 96, 5e5, (4, 2, 2), 1e-6, tied), *QWEN3_DECODER
  )
  return QwenVLConfig(vision, decoder, *IDS, 1, "qwen3_vl")


def family_configs() -> dict[str, QwenVLConfig]:
  """At least three shapes of each family.

  Odd: an odd number of heads; in Qwen2.5-VL windows of three tokens, which divide no grid, and
  full attention in the last block alone; in Qwen3-VL H * C is never D.
  """
  odd_vision = VisionConfig(3, 36, 3, 50, 4, 2, 2, 24, (2,), 1e-6, *QWEN2_5_TOWER)
  odd_decoder = DecoderConfig(2, 48, 3, 1, 16, 60, 96, 1e6, (2, 3, 3), 1e-6, False, *QWEN2_DECODER)
  return {
    "qwen2_vl/tied": _qwen2(6, 2, 8, True, 3, 32, 2, 64),
    "qwen2_vl/untied": _qwen2(4, 4, 16, False, 2, 32, 4, 96),
    "qwen2_vl/odd": _qwen2(3, 1, 16, False, 2, 36, 3, 72),
    "qwen2_5_vl/tied": small_config(True),
    "qwen2_5_vl/untied": small_config(False),
    "qwen2_5_vl/odd": QwenVLConfig(odd_vision, odd_decoder, *IDS, 4, "qwen2_5_vl"),
    "qwen3_vl/tied": _qwen3(4, 2, True, 6, (0, 2), 2),
    "qwen3_vl/untied": _qwen3(6, 2, False, 4, (0, 1), 2),
    "qwen3_vl/odd": _qwen3(5, 1, False, 5, (1,), 3),
  }


def with_ids(vision: VisionConfig, decoder: DecoderConfig, tokenizer: Tokenizer) -> QwenVLConfig:
  """A configuration whose special tokens are those of a tokenizer."""
  ids = map(tokenizer.id, (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END))
  return QwenVLConfig(vision, decoder, *ids, 2, "qwen2_5_vl")


def small_params(cfg: QwenVLConfig) -> Params:
  """The weights of the parity cases; with these seeds greedy decoding has no near ties."""
  name = next((name for name, other in family_configs().items() if other == cfg), "")
  return hashed_params(cfg, SEEDS.get(name, 1))


def small_policy(tied: bool = True) -> Policy:
  return make_policy(small_config(tied), jnp.float32)


def hashed(shape: Sequence[int], seed: int) -> np.ndarray:
  """uint32 pseudo-random numbers, computed with integers alone."""
  x = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed * 0x9E3779B9)
  for multiplier in (0x7FEB352D, 0x846CA68B):
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(multiplier)) & np.uint64(0xFFFFFFFF)
  return (x ^ (x >> np.uint64(15))).astype(np.uint32).reshape(shape)


def hashed_params(cfg: QwenVLConfig, seed: int) -> Params:
  """Parameters in which biases and scales are random too, so that every one affects the output.

  Kernels are uniform with deviation 1.5 / sqrt(inputs). Logits then spread widely, and greedy
  decoding rarely has near ties.
  """
  params = {}
  for number, entry in enumerate(name_map.name_table(cfg)):
    unit = hashed(entry.full_shape, seed * 1000 + number).astype(np.float64) / 2**31 - 1
    if entry.path.endswith("scale"):
      array = 1 + 0.3 * unit
    elif entry.kernel:
      array = unit * 1.5 * np.sqrt(3 / np.prod(entry.file_shape[1:]))
    else:
      array = unit * (1.0 if "embedding" in entry.path else 0.2)
    params[entry.path] = jnp.asarray(array.astype(np.float32))
  return param_tree.unflatten(params)


def pixels(seed: int, height: int, width: int) -> np.ndarray:
  """uint8 [height, width, 3] noise."""
  return (hashed((height, width, 3), seed) >> 24).astype(np.uint8)


def image(seed: int, height: int, width: int) -> PatchedImage:
  return patch_image(pixels(seed, height, width), PREPROCESS)


# --- sequences ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
  """One prompt. `source` is (image, token of the image) for each token, (-1, 0) for text."""

  ids: np.ndarray
  positions: np.ndarray
  following: int
  source: np.ndarray
  images: tuple[PatchedImage, ...]

  def feature(self, index: Sequence[np.ndarray]) -> np.ndarray:
    """feature_T, given the feature indices of each image."""
    return np.asarray([index[i][j] if i >= 0 else -1 for i, j in self.source], np.int32)


def sequence(
  parts: Sequence[int | PatchedImage],
  cfg: QwenVLConfig,
  rule: VideoRule = "max",
  second_per_grid: Sequence[float] = (),
) -> Row:
  """A prompt from parts: a number of text tokens, an image, or a clip (several temporal patches).

  In families that write the time of frames as text, three text tokens precede each temporal patch.
  """
  ids, source, images = [], [], []

  def text(count: int, seed: int) -> None:
    ids.extend((hashed((count,), seed) % IMAGE).tolist())
    source.extend([(-1, 0)] * count)

  def image_tokens(pad: int, first: int, count: int) -> None:
    ids.extend([START] + [pad] * count + [END])
    numbers = [(len(images), first + i) for i in range(count)]
    source.extend([(-1, 0), *numbers, (-1, 0)])

  for number, part in enumerate(parts):
    if isinstance(part, int):
      text(part, number + 7)
      continue
    times = part.grid_3[0]
    if times > 1 and cfg.video_time == "text":
      for time in range(times):
        text(3, 100 * number + time)
        image_tokens(VIDEO, time * part.tokens // times, part.tokens // times)
    else:
      image_tokens(VIDEO if times > 1 else IMAGE, 0, part.tokens)
    images.append(part)
  ids = np.asarray(ids, np.int32)
  grids = [one.grid_3 for one in images]
  positions, following = mrope_positions(ids, grids, cfg, second_per_grid, rule)
  return Row(ids, positions, following, np.asarray(source), tuple(images))


def pad_rows(rows: Sequence[np.ndarray], length: int, fill: int = 0) -> np.ndarray:
  """Stacks arrays of different lengths, right-padded."""
  width = ((0, 0),) * (rows[0].ndim - 1)
  return np.stack(
    [np.pad(row, ((0, length - len(row)), *width), constant_values=fill) for row in rows]
  )


# --- parity cases ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
  """One comparison with transformers.

  Attributes:
    config: key of `family_configs`.
    kind: name of the input.
    parts: of the prompt, see `sequence`.
    rule: of video positions; with "max" the reference gets explicit positions.
    second_per_grid: of the clips.
    live: number of tokens for prefill; `append` adds the rest, with an image. 0: all tokens.
  """

  config: str
  kind: str
  parts: tuple
  rule: VideoRule = "max"
  second_per_grid: tuple[float, ...] = ()
  live: int = 0

  @property
  def name(self) -> str:
    return f"{self.config}/{self.kind}"

  @property
  def cfg(self) -> QwenVLConfig:
    return family_configs()[self.config]

  def sequence(self) -> Row:
    return sequence(self.parts, self.cfg, self.rule, self.second_per_grid)


def clip_of(frames: int) -> PatchedImage:
  """Frames of 16 x 24 pixels."""
  return patch_frames([pixels(3 + i, 16, 24) for i in range(frames)], PREPROCESS)


def cases() -> list[Case]:
  one, other = image(1, 24, 40), image(2, 16, 16)
  five = [image(seed, *size) for seed, size in enumerate([(8, 8), (24, 8), (16, 16), (8, 40)])]
  odd, even = clip_of(7), clip_of(4)
  found = []
  for name, cfg in family_configs().items():
    seconds = {1: (1.4,), 2: (1.4, 0.5)} if cfg.video_time == "seconds" else {1: (), 2: ()}
    found += [
      Case(name, "text", (24,)),
      Case(name, "one_image", (3, one, 6)),
      Case(name, "two_images", (2, one, 4, other, 5)),
      Case(name, "five_images", (1, five[0], five[1], 2, five[2], five[3], 1, other, 3)),
      Case(name, "video_hf5", (4, odd, 5), "hf5", seconds[1]),
      Case(name, "image_video", (2, other, 3, even, 4, odd, 2), "hf5", seconds[2]),
      Case(name, "live_image", (3, one, 9, other, 3), live=22),
    ]
    if cfg.video_time != "text":  # each frame is a grid of its own: the rules agree
      found.append(Case(name, "video_max", (4, odd, 5), "max", seconds[1]))
  return found


def run_case(case: Case, policy: Policy, params: Params) -> tuple[np.ndarray, np.ndarray]:
  """Logits [T, V] of the case's sequence, and 32 greedy tokens decoded with the cache."""
  seq = case.sequence()
  features_MYD, index = jnp.zeros((1, policy.cfg.vision.streams, policy.cfg.decoder.width)), ()
  if seq.images:
    batch, index = plan_vision(seq.images, policy.cfg.vision.window_blocks, BUCKETS)
    features_MYD = jax.jit(policy.encode)(params, batch)
  inputs = (seq.ids, seq.positions, np.ones(len(seq.ids), bool), seq.feature(index))
  end = case.live or len(seq.ids)
  hidden, prefix = jax.jit(policy.prefill)(
    params, TokenArrays(*(x[None, :end] for x in inputs)), features_MYD
  )
  cache = cache_lib.put_prefix(policy.init_cache(1, 1, 1, 96, (32, 64)), prefix, jnp.arange(1))
  if case.live:
    rest, cache = jax.jit(policy.append)(
      params, cache, None, TokenArrays(*(x[None, end:] for x in inputs)), features_MYD
    )
    hidden = jnp.concatenate([hidden, rest], axis=1)
  logits = policy.logits(params, hidden[0])
  return np.asarray(logits), _greedy(policy, params, cache, logits[-1], seq.following)


def _greedy(policy, params, cache, logits_V, position) -> np.ndarray:
  forbidden_V = jnp.zeros(logits_V.shape, bool).at[jnp.asarray(SPECIAL)].set(True)

  def step(carry, _):
    cache, logits_V, position = carry
    token = jnp.argmax(jnp.where(forbidden_V, -jnp.inf, logits_V)).astype(jnp.int32)
    hidden, cache = policy.decode(
      params, cache, token[None], jnp.full((1, 3), position), jnp.ones(1, bool)
    )
    return (cache, policy.logits(params, hidden[0]), position + 1), token

  first = (cache, logits_V, jnp.int32(position))
  return np.asarray(jax.jit(lambda c: jax.lax.scan(step, c, None, NEW_TOKENS))(first)[1])


def compared_steps(margins: np.ndarray) -> int:
  """The number of greedy steps that must agree: up to the first near tie of the reference."""
  ties = np.flatnonzero(margins < 1e-3)
  return int(ties[0]) if len(ties) else len(margins)
