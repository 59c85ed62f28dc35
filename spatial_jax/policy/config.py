"""What fixes the shape of a Qwen-VL policy; the families differ in data, not in code."""

import dataclasses
from typing import Literal

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower.

  Attributes:
    layers, width (E), heads (H), mlp_width (F): sizes of the transformer.
    patch_size: side of a patch, pixels.
    merge_size: side of the block of patches that becomes one token; 2.
    temporal_size: frames per patch; 2.
    window_px: side of an attention window, pixels; 0 where every layer sees the whole frame.
    full_layers: layers that attend over the whole frame; the others attend within windows.
    norm_eps: of every norm.
    norm: "rms" (scale) or "layer" (scale and bias).
    mlp: "gated" (SwiGLU), or two matrices with "quick_gelu" or "gelu_tanh" between.
    patch_bias: the patch embedding has a bias.
    table_side: side of the square table of learned positions, interpolated to each frame; 0: none.
    deepstack: layers whose output, merged, is added behind the first decoder layers.
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
  norm: Literal["rms", "layer"]
  mlp: Literal["gated", "quick_gelu", "gelu_tanh"]
  patch_bias: bool
  table_side: int
  deepstack: tuple[int, ...]

  @property
  def patch_values(self) -> int:
    """X: values in one patch, channels x time x height x width."""
    return 3 * self.temporal_size * self.patch_size**2

  @property
  def window_blocks(self) -> int:
    """Side of an attention window in merged tokens; 1 without windows, which pads nothing."""
    return self.window_px // (self.patch_size * self.merge_size) if self.window_px else 1

  @property
  def streams(self) -> int:
    """Y: features per merged token, that of the last layer and those of `deepstack`."""
    return 1 + len(self.deepstack)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The language model.

  Attributes:
    layers, width (D), heads (H), kv_heads (K), head_dim (C), mlp_width (F), vocabulary (V): sizes;
      H * C may differ from D.
    rope_theta: base of the rotary frequencies.
    rope_sections: how many of the C/2 frequencies turn with time, height and width.
    norm_eps: of every RMSNorm.
    tied: the output head is the embedding table.
    rope_interleaved: the axes take turns among the frequencies, else each has a run of them.
    qkv_bias: the projections to queries, keys and values have biases.
    qk_norm: every head's queries and keys are normalised before they are rotated.
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


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
  """A whole policy: vision tower, decoder, special tokens, conventions of the family.

  Attributes:
    image_pad_id, video_pad_id: tokens whose embedding is replaced by visual features.
    vision_start_id, vision_end_id: tokens around the pads of one image or clip.
    tokens_per_second: rotary time steps per second of video, where `video_time` is "seconds".
    family: the `model_type` of the Hugging Face config.
  """

  vision: VisionConfig
  decoder: DecoderConfig
  image_pad_id: int
  video_pad_id: int
  vision_start_id: int
  vision_end_id: int
  tokens_per_second: int
  family: Family

  @property
  def coordinates(self) -> Literal["pixels", "per_mille"]:
    """How the family writes points: pixels of the resized picture, or 0-1000 of its sides."""
    return "pixels" if self.family == "qwen2_5_vl" else "per_mille"

  @property
  def video_time(self) -> Literal["index", "seconds", "text"]:
    """What tells the frames of a clip apart: rotary steps of one, of seconds, or written times."""
    times: dict[Family, Literal["index", "seconds", "text"]] = {
      "qwen2_vl": "index",
      "qwen2_5_vl": "seconds",
      "qwen3_vl": "text",
    }
    return times[self.family]

  def __post_init__(self):
    problems = _vision_problems(self.vision) + _decoder_problems(self.decoder)
    if self.family == "qwen2_vl" and self.vision.mlp_width % self.vision.width:
      # Its files say the ratio, a whole number.
      problems.append(f"vision mlp width {self.vision.mlp_width} is no multiple of the width")
    if problems:
      raise ValueError("policy config: " + "; ".join(problems))


def _vision_problems(cfg: VisionConfig) -> list[str]:
  problems = []
  if cfg.width % cfg.heads or (cfg.width // cfg.heads) % 4:
    problems.append(f"vision width {cfg.width} over {cfg.heads} heads is no multiple of 4")
  if cfg.window_blocks < 1:
    problems.append(f"vision window of {cfg.window_px} px holds no merged token")
  if not cfg.window_px and cfg.full_layers != tuple(range(cfg.layers)):
    problems.append("without windows, every vision layer must be a full one")
  for name, layers in (("full", cfg.full_layers), ("deepstack", cfg.deepstack)):
    if any(not 0 <= layer < cfg.layers for layer in layers):
      problems.append(f"{name} layers {layers} are not among the {cfg.layers} of the tower")
  if list(cfg.deepstack) != sorted(set(cfg.deepstack)):
    problems.append(f"deepstack layers {cfg.deepstack} must ascend")
  if (cfg.merge_size, cfg.temporal_size) != (2, 2):
    problems.append(f"merge size {cfg.merge_size} and temporal size {cfg.temporal_size} must be 2")
  return problems


def _decoder_problems(cfg: DecoderConfig) -> list[str]:
  problems = []
  if cfg.heads % cfg.kv_heads:
    problems.append(f"{cfg.heads} heads do not divide into {cfg.kv_heads} KV heads")
  if sum(cfg.rope_sections) * 2 != cfg.head_dim:
    problems.append(f"rope sections {cfg.rope_sections} must sum to {cfg.head_dim} / 2")
  return problems
