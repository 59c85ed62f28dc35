"""Small policies, inputs and parity cases that the policy tests and the golden script share.

Weights and pixels come from an integer hash, so that they are the same bits everywhere and the
golden files need to hold outputs only.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.data.text import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, Tokenizer
from spatial_jax.data.vision import (
  PreprocessConfig,
  VisionBuckets,
  patch_frames,
  patch_image,
  plan_vision,
)
from spatial_jax.policy import cache as cache_lib
from spatial_jax.policy import weights
from spatial_jax.policy.config import DecoderConfig, QwenVLConfig, VisionConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.policy.rope import VideoRule, mrope_positions
from spatial_jax.types import Params, PatchedImage

IMAGE, VIDEO, START, END = 92, 93, 94, 95
SPECIAL = (IMAGE, VIDEO, START, END)
PREPROCESS = PreprocessConfig(4, 2, 2, 64, 4096, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
BUCKETS = VisionBuckets((8, 16, 32, 64), (2, 4, 8, 16), (64, 128))
NEW_TOKENS = 32


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


def with_ids(vision: VisionConfig, decoder: DecoderConfig, tokenizer: Tokenizer) -> QwenVLConfig:
  """A configuration whose special tokens are those of a tokenizer."""
  ids = map(tokenizer.id, (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END))
  return QwenVLConfig(vision, decoder, *ids, 2, "pixels")


def small_params(cfg: QwenVLConfig) -> Params:
  """The weights of the parity cases; these seeds meet no near tie in 28 greedy steps."""
  return hashed_params(cfg, 1 if cfg.decoder.tied else 2)


def small_policy(tied: bool = True) -> Policy:
  return make_policy(small_config(tied), jnp.float32)


def hashed(shape: Sequence[int], seed: int) -> np.ndarray:
  """uint32 pseudo-random numbers by integer arithmetic alone."""
  x = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed * 0x9E3779B9)
  for multiplier in (0x7FEB352D, 0x846CA68B):
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(multiplier)) & np.uint64(0xFFFFFFFF)
  return (x ^ (x >> np.uint64(15))).astype(np.uint32).reshape(shape)


def hashed_params(cfg: QwenVLConfig, seed: int) -> Params:
  """Parameters of which every one matters: biases and scales are random too.

  Kernels are uniform with deviation 1.5 / sqrt(inputs): logits then spread widely, and greedy
  decoding rarely meets a near tie.
  """
  params: Params = {}
  for number, entry in enumerate(weights.name_table(cfg)):
    unit = hashed(entry.full_shape, seed * 1000 + number).astype(np.float64) / 2**31 - 1
    if entry.path.endswith("scale"):
      array = 1 + 0.3 * unit
    elif entry.kernel:
      array = unit * 1.5 * np.sqrt(3 / np.prod(entry.file_shape[1:]))
    else:
      array = unit * (1.0 if "embedding" in entry.path else 0.2)
    weights.insert(params, entry.path, jnp.asarray(array.astype(np.float32)))
  return params


def picture(seed: int, height: int, width: int) -> np.ndarray:
  """uint8 [height, width, 3] noise."""
  return (hashed((height, width, 3), seed) >> 24).astype(np.uint8)


def image(seed: int, height: int, width: int) -> PatchedImage:
  return patch_image(picture(seed, height, width), PREPROCESS)


# --- sequences ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
  """One prompt: ids and positions, its images, and per token (image, token of it) or (-1, 0)."""

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
  """A part is a number of text tokens, an image, or (more than one temporal patch) a clip."""
  ids, source, images = [], [], []
  for number, part in enumerate(parts):
    if isinstance(part, int):
      ids += (hashed((part,), number + 7) % IMAGE).tolist()
      source += [(-1, 0)] * part
    else:
      pad = VIDEO if part.grid_3[0] > 1 else IMAGE
      ids += [START] + [pad] * part.tokens + [END]
      source += [(-1, 0)] + [(len(images), i) for i in range(part.tokens)] + [(-1, 0)]
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
    name: of the golden entry.
    tied: embeddings.
    rule: of video positions; under "max" the reference is given explicit positions.
    live: tokens read by prefill; the rest (with an image) arrives through a live cache. 0: all.
  """

  name: str
  tied: bool
  parts: tuple
  rule: VideoRule
  second_per_grid: tuple[float, ...]
  live: int

  def sequence(self, cfg: QwenVLConfig) -> Row:
    return sequence(self.parts, cfg, self.rule, self.second_per_grid)


def cases() -> list[Case]:
  one, other = image(1, 24, 40), image(2, 16, 16)
  clip = patch_frames([picture(3 + i, 16, 24) for i in range(7)], PREPROCESS)
  found = []
  for tied in (True, False):
    kind = "tied" if tied else "untied"
    found += [
      Case(f"text_{kind}", tied, (24,), "max", (), 0),
      Case(f"one_image_{kind}", tied, (3, one, 6), "max", (), 0),
      Case(f"two_images_{kind}", tied, (2, one, 4, other, 5), "max", (), 0),
      Case(f"video_hf5_{kind}", tied, (4, clip, 5), "hf5", (1.4,), 0),
      Case(f"video_max_{kind}", tied, (4, clip, 5), "max", (1.4,), 0),
      Case(f"live_image_{kind}", tied, (3, one, 9, other, 3), "max", (), 22),
    ]
  return found


def run_case(case: Case, policy: Policy, params: Params) -> tuple[np.ndarray, np.ndarray]:
  """Logits [T, V] of the case's sequence and 32 greedy tokens, both through the live cache."""
  seq = case.sequence(policy.cfg)
  features_MD, index = jnp.zeros((1, policy.cfg.decoder.width)), ()
  if seq.images:
    batch, index = plan_vision(seq.images, policy.cfg.vision.window_blocks, BUCKETS)
    features_MD = jax.jit(policy.encode)(params, batch)
  inputs = (seq.ids, seq.positions, np.ones(len(seq.ids), bool))
  feature = seq.feature(index)
  end = case.live or len(seq.ids)
  hidden, prefix = jax.jit(policy.prefill)(
    params, *(x[None, :end] for x in inputs), features_MD, feature[None, :end]
  )
  cache = cache_lib.admit(policy.init_cache(1, 1, 64, 96), prefix, jnp.arange(1))
  if case.live:
    rest, cache = jax.jit(policy.append)(
      params, cache, None, *(x[None, end:] for x in inputs), features_MD, feature[None, end:]
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
  """Greedy steps that must agree: up to the reference's first near tie."""
  ties = np.flatnonzero(margins < 1e-3)
  return int(ties[0]) if len(ties) else len(margins)
