"""Models and inputs of the benchmarks: three shapes with random weights, one batch of prompts.

A prompt has 64 text tokens, including the two around the image, and one image of 448 x 448 pixels
(or several images, each with two more tokens around it):

    30 text | vision start | 256 image pads | vision end | 32 text        320 tokens
"""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import NamedSharding
from tokenizers import models, pre_tokenizers

from spatial_jax import compiled, sharding
from spatial_jax.data.image import PreprocessConfig, patch_image
from spatial_jax.data.tokenizer import (
  IM_END,
  IMAGE_PAD,
  VIDEO_PAD,
  VISION_END,
  VISION_START,
  Tokenizer,
)
from spatial_jax.data.video import VideoConfig
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.hf import weights
from spatial_jax.hf.model_zoo import tower_2_5
from spatial_jax.hf.name_map import name_table
from spatial_jax.policy.config import DecoderConfig, QwenVLConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.policy.rope import mrope_positions
from spatial_jax.types import Params, PatchedImage

PROMPTS, GROUP, RESPONSE = 8, 8, 128  # rows of all benchmarks: 8 prompts, 8 rollouts each
TEXT_BEFORE, TEXT_AFTER = 30, 32
IMAGE_PX = 448
PREPROCESS = PreprocessConfig(14, 2, 2, 56 * 56, IMAGE_PX**2, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
VIDEO = VideoConfig(False, 2.0, 4, 16, 56 * 56, IMAGE_PX**2)
WINDOWS, PATCHES = 16, 1024  # of one image: windows of 4 x 4 tokens, patches of 14 x 14 pixels
VISION_BUCKETS = VisionBuckets((PROMPTS * WINDOWS,), (PROMPTS,), (PATCHES,))


def _config(
  vision: tuple[int, int, int, int],
  full_layers: tuple[int, ...],
  decoder: tuple[int, int, int, int, int],
  vocabulary: int,
  tied: bool,
) -> QwenVLConfig:
  """Vision: layers, E, heads, F. Decoder: layers, D, heads, KV heads, F."""
  special = (vocabulary - 2, vocabulary - 1, vocabulary - 4, vocabulary - 3)
  tower, words = tower_2_5(vision, full_layers), _decoder(decoder, vocabulary, tied)
  return QwenVLConfig(tower, words, *special, tokens_per_second=2, family="qwen2_5_vl")


def _decoder(sizes: tuple[int, int, int, int, int], vocabulary: int, tied: bool) -> DecoderConfig:
  layers, width, heads, kv_heads, mlp_width = sizes
  head_dim = width // heads
  return DecoderConfig(
    *(layers, width, heads, kv_heads, head_dim, mlp_width, vocabulary),
    rope_theta=1e6,
    rope_sections=(head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16),  # Qwen's proportions
    norm_eps=1e-6,
    tied=tied,
    rope_interleaved=False,
    qkv_bias=True,
    qk_norm=False,
  )


SHAPES = {
  "nano": _config((3, 96, 3, 256), (2,), (4, 128, 4, 2, 512), 2_048, tied=False),
  "mini": _config((6, 320, 5, 864), (2, 5), (8, 512, 8, 2, 2_048), 32_768, tied=True),
  "small": _config((8, 640, 10, 1_728), (3, 7), (16, 1_024, 16, 2, 4_096), 151_936, tied=True),
}


def stop_id(cfg: QwenVLConfig) -> int:
  """The token that ends a turn; it is forbidden, so that all rows have the same length."""
  return cfg.decoder.vocabulary - 5


def forbidden_ids(cfg: QwenVLConfig) -> tuple[int, ...]:
  """Ids that neither side samples: the end of a turn and the four vision tokens."""
  return tuple(range(stop_id(cfg), cfg.decoder.vocabulary))


def parameter_counts(cfg: QwenVLConfig) -> tuple[int, int]:
  """The number of parameters of the policy and of its vision tower; no array is made."""
  sizes = [(entry.path, math.prod(entry.full_shape)) for entry in name_table(cfg)]
  vision = sum(size for path, size in sizes if path.startswith("vision/"))
  return sum(size for _, size in sizes), vision


# --- checkpoints -------------------------------------------------------------------------------


def write_checkpoint(cfg: QwenVLConfig, directory: pathlib.Path) -> None:
  """Writes random float32 weights as a Hugging Face folder that both sides load."""
  init = jax.jit(make_policy(cfg, jnp.dtype(jnp.float32)).init)
  weights.save(init(jax.random.key(0)), cfg, directory)


def policy_of(cfg: QwenVLConfig) -> Policy:
  """The policy on one device; it computes in float32, as torch does."""
  policy = make_policy(cfg, jnp.dtype(jnp.float32))
  return dataclasses.replace(policy, mesh=compiled.train_mesh(policy))


def load(directory: pathlib.Path, policy: Policy) -> Params:
  """The parameters of the checkpoint, stacked, on the device of the policy."""
  mesh = compiled.train_mesh(policy)

  def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, sharding.param_spec(name, shape, mesh))

  return weights.load(directory, policy.cfg, lambda path: np.dtype(np.float32), place)


# --- prompts -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
  """A prompt of random tokens and random images; fields as in `types.Prompt`."""

  token_ids_T: np.ndarray
  position_TA: np.ndarray
  next_position: int
  images: tuple[PatchedImage, ...]
  image_starts: tuple[int, ...]

  @property
  def image(self) -> PatchedImage:
    """The only image."""
    (image,) = self.images
    return image

  @property
  def image_start(self) -> int:
    """The first token of the only image."""
    (start,) = self.image_starts
    return start


def questions(
  cfg: QwenVLConfig,
  count: int = PROMPTS,
  images: int = 1,
  side_px: int = IMAGE_PX,
  text_after: int = TEXT_AFTER,
) -> list[Question]:
  """The prompts of all benchmarks; the same for both sides."""
  random = np.random.default_rng(0)
  return [_question(cfg, random, images, side_px, text_after) for _ in range(count)]


def words(cfg: QwenVLConfig, count: int, random: np.random.Generator) -> np.ndarray:
  """Random token ids that are not forbidden, int32."""
  return random.integers(0, stop_id(cfg), count).astype(np.int32)


def _question(
  cfg: QwenVLConfig, random: np.random.Generator, images: int, side_px: int, text_after: int
) -> Question:
  shape = (side_px, side_px, 3)
  patched = [
    patch_image(random.integers(0, 256, shape, np.uint8), PREPROCESS) for _ in range(images)
  ]
  tokens = patched[0].tokens
  image_ids = [cfg.vision_start_id, *[cfg.image_pad_id] * tokens, cfg.vision_end_id] * images
  before, after = words(cfg, TEXT_BEFORE, random), words(cfg, text_after, random)
  token_ids_T = np.concatenate([before, np.asarray(image_ids, np.int32), after])
  grids = [image.grid_3 for image in patched]
  position_TA, following = mrope_positions(token_ids_T, grids, cfg, (), "max")
  starts = tuple(TEXT_BEFORE + 1 + i * (tokens + 2) for i in range(images))
  return Question(token_ids_T, position_TA, following, tuple(patched), starts)


def tokenizer(cfg: QwenVLConfig) -> Tokenizer:
  """A tokenizer in which every id is a word, with the special tokens of the shape."""
  words = {f"w{i}": i for i in range(cfg.decoder.vocabulary)}
  special = {
    IM_END: stop_id(cfg),
    IMAGE_PAD: cfg.image_pad_id,
    VIDEO_PAD: cfg.video_pad_id,
    VISION_START: cfg.vision_start_id,
    VISION_END: cfg.vision_end_id,
  }
  special_ids = set(special.values())
  words = {word: i for word, i in words.items() if i not in special_ids} | special
  inner = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
  inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  inner.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
  return Tokenizer(inner)
