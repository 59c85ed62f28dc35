"""What fixes the shape of a Qwen-VL policy, read from and written to Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

MODEL_TYPE = "qwen2_5_vl"


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower.

  Attributes:
    layers, width (E), heads (H), mlp_width (F): sizes of the transformer.
    patch_size: side of a patch, pixels.
    merge_size: side of the block of patches that becomes one token; 2.
    temporal_size: frames per patch; 2.
    window_px: side of an attention window, pixels.
    full_layers: layers that attend over the whole frame; the others attend within windows.
    norm_eps: of every RMSNorm.
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

  @property
  def patch_values(self) -> int:
    """X: values in one patch, channels x time x height x width."""
    return 3 * self.temporal_size * self.patch_size**2

  @property
  def window_blocks(self) -> int:
    """Side of an attention window in merged tokens."""
    return self.window_px // (self.patch_size * self.merge_size)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The language model.

  Attributes:
    layers, width (D), heads (H), kv_heads (K), head_dim (C), mlp_width (F), vocabulary (V): sizes.
    rope_theta: base of the rotary frequencies.
    rope_sections: how many of the C/2 frequencies turn with time, height and width.
    norm_eps: of every RMSNorm.
    tied: the output head is the embedding table.
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


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
  """A whole policy: vision tower, decoder, special tokens, conventions of the family.

  Attributes:
    image_pad_id, video_pad_id: tokens whose embedding is replaced by visual features.
    vision_start_id, vision_end_id: tokens around the pads of one image or clip.
    tokens_per_second: rotary time steps per second of video.
    coordinates: how the family writes points: "pixels" of the resized picture.
  """

  vision: VisionConfig
  decoder: DecoderConfig
  image_pad_id: int
  video_pad_id: int
  vision_start_id: int
  vision_end_id: int
  tokens_per_second: int
  coordinates: Literal["pixels"]

  def __post_init__(self):
    problems = _inconsistencies(self)
    if problems:
      raise ValueError("policy config: " + "; ".join(problems))


def _inconsistencies(cfg: QwenVLConfig) -> list[str]:
  vision, decoder = cfg.vision, cfg.decoder
  problems = []
  if vision.width % vision.heads or (vision.width // vision.heads) % 4:
    problems.append(f"vision width {vision.width} over {vision.heads} heads is no multiple of 4")
  if vision.window_blocks < 1:
    problems.append(f"vision window of {vision.window_px} px holds no merged token")
  if decoder.heads % decoder.kv_heads:
    problems.append(f"{decoder.heads} heads do not divide into {decoder.kv_heads} KV heads")
  if sum(decoder.rope_sections) * 2 != decoder.head_dim:
    problems.append(f"rope sections {decoder.rope_sections} must sum to {decoder.head_dim} / 2")
  return problems


def from_hf(hf: Mapping[str, Any]) -> QwenVLConfig:
  """Reads a Hugging Face config, flat (transformers 4 and the hub) or nested (transformers 5).

  Args:
    hf: the parsed `config.json`.

  Returns:
    The config.

  Raises:
    ValueError: on the host, for another model family, a missing key or an unsupported setting.
  """
  if hf.get("model_type") != MODEL_TYPE:
    raise ValueError(
      f"config.json: model_type is {hf.get('model_type')!r}, expected {MODEL_TYPE!r}"
    )
  text = hf.get("text_config") or hf
  try:
    return QwenVLConfig(
      vision=_vision_from_hf(hf["vision_config"]),
      decoder=_decoder_from_hf(
        text, bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
      ),
      image_pad_id=hf["image_token_id"],
      video_pad_id=hf["video_token_id"],
      vision_start_id=hf["vision_start_token_id"],
      vision_end_id=hf["vision_end_token_id"],
      tokens_per_second=hf["vision_config"]["tokens_per_second"],
      coordinates="pixels",
    )
  except KeyError as error:
    raise ValueError(f"config.json: {error.args[0]!r} is missing") from error


def _vision_from_hf(hf: Mapping[str, Any]) -> VisionConfig:
  return VisionConfig(
    layers=hf["depth"],
    width=hf["hidden_size"],
    heads=hf["num_heads"],
    mlp_width=hf["intermediate_size"],
    patch_size=hf["patch_size"],
    merge_size=hf["spatial_merge_size"],
    temporal_size=hf["temporal_patch_size"],
    window_px=hf["window_size"],
    full_layers=tuple(hf["fullatt_block_indexes"]),
    norm_eps=1e-6,  # fixed in the reference code, not a key of the file
  )


def _decoder_from_hf(hf: Mapping[str, Any], tied: bool) -> DecoderConfig:
  if hf.get("use_sliding_window"):
    raise ValueError("config.json: use_sliding_window is true, which is not supported")
  rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  theta = rope["rope_theta"] if "rope_theta" in rope else hf["rope_theta"]
  return DecoderConfig(
    layers=hf["num_hidden_layers"],
    width=hf["hidden_size"],
    heads=hf["num_attention_heads"],
    kv_heads=hf["num_key_value_heads"],
    head_dim=hf["hidden_size"] // hf["num_attention_heads"],
    mlp_width=hf["intermediate_size"],
    vocabulary=hf["vocab_size"],
    rope_theta=float(theta),
    rope_sections=tuple(rope["mrope_section"]),
    norm_eps=hf["rms_norm_eps"],
    tied=tied,
  )


def to_hf(cfg: QwenVLConfig) -> dict[str, Any]:
  """The config as the flat `config.json` of the hub, which transformers 4 and 5 both load."""
  vision, decoder = cfg.vision, cfg.decoder
  return {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": MODEL_TYPE,
    "hidden_size": decoder.width,
    "intermediate_size": decoder.mlp_width,
    "num_hidden_layers": decoder.layers,
    "num_attention_heads": decoder.heads,
    "num_key_value_heads": decoder.kv_heads,
    "vocab_size": decoder.vocabulary,
    "hidden_act": "silu",
    "rms_norm_eps": decoder.norm_eps,
    "rope_theta": decoder.rope_theta,
    "rope_scaling": {"type": "mrope", "mrope_section": list(decoder.rope_sections)},
    "use_sliding_window": False,
    "tie_word_embeddings": decoder.tied,
    "image_token_id": cfg.image_pad_id,
    "video_token_id": cfg.video_pad_id,
    "vision_start_token_id": cfg.vision_start_id,
    "vision_end_token_id": cfg.vision_end_id,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "float32",
    "vision_config": {
      "model_type": MODEL_TYPE,
      "depth": vision.layers,
      "hidden_size": vision.width,
      "num_heads": vision.heads,
      "intermediate_size": vision.mlp_width,
      "out_hidden_size": decoder.width,
      "in_channels": 3,
      "hidden_act": "silu",
      "patch_size": vision.patch_size,
      "spatial_merge_size": vision.merge_size,
      "temporal_patch_size": vision.temporal_size,
      "window_size": vision.window_px,
      "fullatt_block_indexes": list(vision.full_layers),
      "tokens_per_second": cfg.tokens_per_second,
    },
  }
