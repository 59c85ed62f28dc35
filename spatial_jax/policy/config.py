"""Shape of a Qwen-VL policy. The model families differ in these values, not in code."""

import dataclasses
from typing import Literal

from spatial_jax.checks import is_ascending, is_whole
from spatial_jax.config import FieldError, check_choice, check_field, check_number, check_whole

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower."""

  layers: int
  width: int  # E
  heads: int  # H
  mlp_width: int  # F
  patch_size: int  # side of a patch, pixels
  merge_size: int  # side of the block of patches that becomes one token; 2
  temporal_size: int  # frames per patch; 2
  window_px: int  # side of an attention window; 0: every layer attends over the whole frame
  full_layers: tuple[int, ...]  # that attend over the whole frame; the others: within windows
  norm_eps: float  # of every norm
  norm: Literal["rms", "layer"]  # scale; or scale and bias
  mlp: Literal["gated", "quick_gelu", "gelu_tanh"]  # SwiGLU; or two matrices with this between them
  patch_bias: bool  # the patch embedding has a bias
  table_side: int  # of the square table of learned positions, interpolated to each frame; 0: none
  deepstack: tuple[int, ...]  # layers with a merged output that early decoder layers add

  def __post_init__(self):
    check_whole(self, "layers", "width", "heads", "mlp_width", "patch_size", at_least=1)
    check_whole(self, "window_px", "table_side", at_least=0)
    check_number(self, "norm_eps", above=0, below=1)
    check_choice(self, "norm", "mlp")
    valid = self.width % self.heads == 0 and self.width // self.heads % 4 == 0
    check_field(self, "heads", valid, f"divide the width {self.width} into multiples of 4")
    token_px = self.patch_size * self.merge_size
    valid = self.window_px == 0 or self.window_px >= token_px
    check_field(self, "window_px", valid, f"be 0 or at least one merged token, {token_px}")
    for name in ("merge_size", "temporal_size"):
      check_field(self, name, is_whole(vars(self)[name], 2, 2), "be 2")
    for name in ("full_layers", "deepstack"):
      layers = vars(self)[name]
      valid = layers == () or (is_ascending(layers, 0) and layers[-1] < self.layers)
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
  def window_patches(self) -> int:
    """Patches in one attention window."""
    return (self.window_blocks * self.merge_size) ** 2

  @property
  def streams(self) -> int:
    """Y: features per merged token: of the last layer and of the layers in `deepstack`."""
    return 1 + len(self.deepstack)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The language model."""

  layers: int
  width: int  # D
  heads: int  # H
  kv_heads: int  # K
  head_dim: int  # C; H * C may differ from D
  mlp_width: int  # F
  vocabulary: int  # V
  rope_theta: float  # base of the rotary frequencies
  rope_sections: tuple[int, int, int]  # frequencies, of C/2, for time, height and width
  norm_eps: float  # of every RMSNorm
  tied: bool  # the output head is the embedding table
  rope_interleaved: bool  # the frequencies alternate between the axes, else each has a section
  qkv_bias: bool  # the projections to queries, keys and values have biases
  qk_norm: bool  # queries and keys of every head are normalised before the rotation

  def __post_init__(self):
    check_whole(self, "layers", "width", "heads", "kv_heads", "head_dim", at_least=1)
    check_whole(self, "mlp_width", "vocabulary", at_least=1)
    check_number(self, "norm_eps", above=0, below=1)
    check_number(self, "rope_theta", above=0)
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
  """A whole policy: vision tower, decoder, special tokens, and the family."""

  vision: VisionConfig
  decoder: DecoderConfig
  image_pad_id: int  # the embeddings of pad tokens are replaced by image features
  video_pad_id: int
  vision_start_id: int  # before and after the pad tokens of one image or clip
  vision_end_id: int
  tokens_per_second: int  # rotary time steps; used if `video_time` is "seconds"
  family: Family  # `model_type` of the Hugging Face config

  def __post_init__(self):
    check_choice(self, "family")
    check_whole(self, "tokens_per_second", at_least=1)
    ids = ("image_pad_id", "video_pad_id", "vision_start_id", "vision_end_id")
    check_whole(self, *ids, at_least=0, at_most=self.decoder.vocabulary - 1)
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
