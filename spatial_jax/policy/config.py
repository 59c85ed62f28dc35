"""Shape of a Qwen-VL policy. The model families differ in these values, not in code."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

from spatial_jax.checks import is_finite, is_whole
from spatial_jax.config import FieldError, check_field

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
Norm = Literal["rms", "layer"]
VisionMLP = Literal["gated", "quick_gelu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower.

  Attributes:
    layers, width (E), heads (H), mlp_width (F): sizes of the transformer.
    patch_size: side of a patch, pixels.
    merge_size: side of the block of patches that becomes one token; 2.
    temporal_size: frames per patch; 2.
    window_px: side of an attention window, pixels; 0: every layer attends over the whole frame.
    full_layers: layers that attend over the whole frame; the others attend within windows.
    norm_eps: of every norm.
    norm: "rms" (scale) or "layer" (scale and bias).
    mlp: "gated" (SwiGLU), or two matrices with "quick_gelu" or "gelu_tanh" between them.
    patch_bias: the patch embedding has a bias.
    table_side: side of the square table of learned positions, interpolated to each frame; 0: none.
    deepstack: layers, ascending, whose merged outputs are added after the first decoder layers.
  """

  layers: int
  width: int
  heads: int
  mlp_width: int
  patch_size: int
  merge_size: int
  temporal_size: int
  window_px: int
  full_layers: tuple[int, ...]
  norm_eps: float
  norm: Norm
  mlp: VisionMLP
  patch_bias: bool
  table_side: int
  deepstack: tuple[int, ...]

  def __post_init__(self):
    _check_sizes(self, ("layers", "width", "heads", "mlp_width", "patch_size"), 1)
    _check_sizes(self, ("window_px", "table_side"), 0)
    _check_epsilon(self)
    _check_flags(self, ("patch_bias",))
    for name in ("merge_size", "temporal_size"):
      check_field(self, name, is_whole(vars(self)[name], 2, 2), "be 2")
    check_field(self, "norm", self.norm in get_args(Norm), "be rms or layer")
    known = ", ".join(get_args(VisionMLP))
    check_field(self, "mlp", self.mlp in get_args(VisionMLP), f"be one of {known}")
    valid = self.width % self.heads == 0 and self.width // self.heads % 4 == 0
    check_field(self, "heads", valid, f"divide the width {self.width} into multiples of 4")
    token_px = self.patch_size * self.merge_size
    valid = self.window_px == 0 or self.window_px >= token_px
    check_field(self, "window_px", valid, f"be 0 or at least one merged token, {token_px}")
    for name in ("full_layers", "deepstack"):
      valid = _ascend_within(vars(self)[name], self.layers)
      check_field(self, name, valid, f"hold ascending layers from 0 to {self.layers - 1}")
    if not self.window_px:
      valid = self.full_layers == tuple(range(self.layers))
      check_field(self, "full_layers", valid, "hold every layer, because window_px is 0")

  @property
  def patch_values(self) -> int:
    """X: values in one patch, channels x time x height x width."""
    return 3 * self.temporal_size * self.patch_size**2

  @property
  def window_blocks(self) -> int:
    """Side of an attention window in merged tokens; 1 without windows, which adds no padding."""
    return self.window_px // (self.patch_size * self.merge_size) if self.window_px else 1

  @property
  def streams(self) -> int:
    """Y: features per merged token: of the last layer and of the layers in `deepstack`."""
    return 1 + len(self.deepstack)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The language model.

  Attributes:
    layers, width (D), heads (H), kv_heads (K), head_dim (C), mlp_width (F), vocabulary (V): sizes;
      H * C may differ from D.
    rope_theta: base of the rotary frequencies.
    rope_sections: the number of frequencies, of C/2, for time, height and width.
    norm_eps: of every RMSNorm.
    tied: the output head is the embedding table.
    rope_interleaved: the frequencies alternate between the axes, else each axis has a section.
    qkv_bias: the projections to queries, keys and values have biases.
    qk_norm: queries and keys of every head are normalised before the rotation.
  """

  layers: int
  width: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  vocabulary: int
  rope_theta: float
  rope_sections: tuple[int, int, int]
  norm_eps: float
  tied: bool
  rope_interleaved: bool
  qkv_bias: bool
  qk_norm: bool

  def __post_init__(self):
    sizes = ("layers", "width", "heads", "kv_heads", "head_dim", "mlp_width", "vocabulary")
    _check_sizes(self, sizes, 1)
    _check_epsilon(self)
    _check_flags(self, ("tied", "rope_interleaved", "qkv_bias", "qk_norm"))
    valid = is_finite(self.rope_theta) and self.rope_theta > 0
    check_field(self, "rope_theta", valid, "be finite and above 0")
    valid = self.heads % self.kv_heads == 0
    check_field(self, "kv_heads", valid, f"divide the {self.heads} heads")
    sections = self.rope_sections
    valid = isinstance(sections, tuple) and len(sections) == 3
    valid = valid and all(is_whole(section, 0) for section in sections)
    check_field(self, "rope_sections", valid, "be three whole numbers, at least 0")
    valid = 2 * sum(sections) == self.head_dim
    check_field(self, "rope_sections", valid, f"sum to half of head_dim {self.head_dim}")


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
  """A whole policy: vision tower, decoder, special tokens, and the family.

  Attributes:
    vision, decoder: the two transformers.
    image_pad_id, video_pad_id: tokens whose embeddings are replaced by image features.
    vision_start_id, vision_end_id: tokens before and after the pad tokens of one image or clip.
    tokens_per_second: rotary time steps per second of video; used if `video_time` is "seconds".
    family: `model_type` of the Hugging Face config.
  """

  vision: VisionConfig
  decoder: DecoderConfig
  image_pad_id: int
  video_pad_id: int
  vision_start_id: int
  vision_end_id: int
  tokens_per_second: int
  family: Family

  def __post_init__(self):
    check_field(
      self, "family", self.family in get_args(Family), f"be one of {', '.join(get_args(Family))}"
    )
    _check_sizes(self, ("tokens_per_second",), 1)
    last = self.decoder.vocabulary - 1
    for name in ("image_pad_id", "video_pad_id", "vision_start_id", "vision_end_id"):
      check_field(self, name, is_whole(vars(self)[name], 0, last), f"be a token id, 0 to {last}")
    if self.family == "qwen2_vl" and self.vision.mlp_width % self.vision.width:
      # The Hugging Face config of this family stores the ratio of both as a whole number.
      raise FieldError(
        f"vision.mlp_width is {self.vision.mlp_width} and must be a multiple of the width "
        f"{self.vision.width} in family qwen2_vl"
      )

  @property
  def coordinates(self) -> Literal["pixels", "per_mille"]:
    """How the family writes points: pixels of the resized image, or 0-1000 of its sides."""
    return "pixels" if self.family == "qwen2_5_vl" else "per_mille"

  @property
  def video_time(self) -> Literal["index", "seconds", "text"]:
    """The time of a video frame: rotary steps of 1, rotary steps in seconds, or written as text."""
    times: dict[Family, Literal["index", "seconds", "text"]] = {
      "qwen2_vl": "index",
      "qwen2_5_vl": "seconds",
      "qwen3_vl": "text",
    }
    return times[self.family]


def _check_sizes(config: object, names: Sequence[str], least: int) -> None:
  for name in names:
    valid = is_whole(vars(config)[name], least)
    check_field(config, name, valid, f"be a whole number, at least {least}")


def _check_epsilon(config: VisionConfig | DecoderConfig) -> None:
  valid = is_finite(config.norm_eps) and 0 < config.norm_eps < 1
  check_field(config, "norm_eps", valid, "be above 0 and below 1")


def _check_flags(config: object, names: Sequence[str]) -> None:
  for name in names:
    check_field(config, name, isinstance(vars(config)[name], bool), "be True or False")


def _ascend_within(layers: object, count: int) -> bool:
  """Whether `layers` is a tuple of ascending layer indices below `count`."""
  if not isinstance(layers, tuple) or not all(is_whole(layer, 0, count - 1) for layer in layers):
    return False
  return list(layers) == sorted(set(layers))
