"""Small policies and inputs that several policy tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.data.vision import PreprocessConfig, VisionBuckets, patch_image, plan_vision
from spatial_jax.policy.config import DecoderConfig, QwenVLConfig, VisionConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.policy.rope import mrope_positions

IMAGE, VIDEO, START, END = 92, 93, 94, 95
PREPROCESS = PreprocessConfig(4, 2, 2, 64, 4096, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
BUCKETS = VisionBuckets((8, 16, 32, 64), (2, 4, 8, 16), (64, 128))


def small_config(tied: bool) -> QwenVLConfig:
  """Three vision blocks (one of them full), three decoder layers, 96 tokens."""
  vision = VisionConfig(
    layers=3,
    width=32,
    heads=2,
    mlp_width=48,
    patch_size=4,
    merge_size=2,
    temporal_size=2,
    window_px=16,
    full_layers=(1,),
    norm_eps=1e-6,
  )
  decoder = DecoderConfig(
    layers=3,
    width=48,
    heads=6,
    kv_heads=2,
    head_dim=8,
    mlp_width=64,
    vocabulary=96,
    rope_theta=10000.0,
    rope_sections=(2, 1, 1),
    norm_eps=1e-6,
    tied=tied,
  )
  return QwenVLConfig(vision, decoder, IMAGE, VIDEO, START, END, 2, "pixels")


def picture(seed: int, height: int, width: int) -> np.ndarray:
  """Smooth-ish uint8 noise."""
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def small_policy(tied: bool = True) -> Policy:
  return make_policy(small_config(tied), jnp.float32)


def random_params(policy: Policy, seed: int):
  """Parameters in which every bias and norm scale is random too, so that none can be forgotten."""
  leaves, tree = jax.tree.flatten(policy.init(jax.random.key(seed)))
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(
    tree, [leaf + np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
  )


def sequence(parts: list, cfg: QwenVLConfig):
  """Token ids, positions, and per token which image (-1: none) and which of its tokens it is.

  A part is an int (so many text tokens) or a PatchedImage.
  """
  rng = np.random.default_rng(len(parts))
  ids, image_of, images = [], [], []
  for part in parts:
    if isinstance(part, int):
      ids += rng.integers(0, IMAGE, part).tolist()
      image_of += [(-1, 0)] * part
    else:
      ids += [START] + [IMAGE] * part.tokens + [END]
      image_of += [(-1, 0)] + [(len(images), i) for i in range(part.tokens)] + [(-1, 0)]
      images.append(part)
  ids = np.asarray(ids, np.int32)
  positions, following = mrope_positions(ids, [image.grid_3 for image in images], cfg, (), "max")
  return ids, positions, following, np.asarray(image_of), images


def features_of(image_of: np.ndarray, index: list) -> np.ndarray:
  """feature_T of a sequence, given the feature indices of its images."""
  return np.asarray([index[i][j] if i >= 0 else -1 for i, j in image_of], np.int32)


def pad_rows(rows: list, length: int, fill=0) -> np.ndarray:
  """Stacks arrays of different lengths, right-padded."""
  width = ((0, 0),) * (rows[0].ndim - 1)
  return np.stack(
    [np.pad(row, ((0, length - len(row)), *width), constant_values=fill) for row in rows]
  )


__all__ = ["jax", "patch_image", "plan_vision"]
