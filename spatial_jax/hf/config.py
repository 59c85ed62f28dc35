"""Hugging Face `config.json` <-> QwenVLConfig, for the three families.

The hub's files are flat (transformers 4: the text fields at the top, `rope_scaling`) or nested
(transformers 5: `text_config`, `rope_parameters`); both are read. Written is what both load.
"""

from collections.abc import Mapping
from typing import Any, cast, get_args

from spatial_jax.policy.config import DecoderConfig, Family, QwenVLConfig, VisionConfig

_ARCHITECTURES: dict[Family, str] = {
  "qwen2_vl": "Qwen2VLForConditionalGeneration",
  "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
  "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
_VISION_EPS = 1e-6  # fixed in the reference code, not a key of the file


def from_hf(hf: Mapping[str, Any]) -> QwenVLConfig:
  """Reads a Hugging Face config.

  Args:
    hf: the parsed `config.json`.

  Returns:
    The config.

  Raises:
    ValueError: on the host, for another model family, a missing key or an unsupported setting.
  """
  family = hf.get("model_type")
  if family not in get_args(Family):
    known = ", ".join(get_args(Family))
    raise ValueError(f"config.json: model_type is {family!r}, expected one of {known}")
  family = cast(Family, family)
  text = hf.get("text_config") or hf
  try:
    tied = bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return QwenVLConfig(
      vision=_vision(hf["vision_config"], family),
      decoder=_decoder(text, tied, family),
      image_pad_id=hf["image_token_id"],
      video_pad_id=hf["video_token_id"],
      vision_start_id=hf["vision_start_token_id"],
      vision_end_id=hf["vision_end_token_id"],
      tokens_per_second=hf["vision_config"]["tokens_per_second"] if family == "qwen2_5_vl" else 1,
      family=family,
    )
  except KeyError as error:
    raise ValueError(f"config.json: {error.args[0]!r} is missing") from error


def _vision(hf: Mapping[str, Any], family: Family) -> VisionConfig:
  two, three = family == "qwen2_vl", family == "qwen3_vl"
  width = hf["embed_dim" if two else "hidden_size"]
  windows = family == "qwen2_5_vl"
  side = round(hf["num_position_embeddings"] ** 0.5) if three else 0
  if three and side**2 != hf["num_position_embeddings"]:
    raise ValueError(
      f"config.json: num_position_embeddings {hf['num_position_embeddings']} is not a square"
    )
  act = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh"}[family]
  if hf.get("hidden_act", act) != act:
    raise ValueError(f"config.json: vision hidden_act {hf['hidden_act']!r}, supported: {act!r}")
  return VisionConfig(
    layers=hf["depth"],
    width=width,
    heads=hf["num_heads"],
    mlp_width=int(width * hf["mlp_ratio"]) if two else hf["intermediate_size"],
    patch_size=hf["patch_size"],
    merge_size=hf["spatial_merge_size"],
    temporal_size=hf["temporal_patch_size"],
    window_px=hf["window_size"] if windows else 0,
    full_layers=tuple(hf["fullatt_block_indexes"]) if windows else tuple(range(hf["depth"])),
    norm_eps=_VISION_EPS,
    norm="rms" if windows else "layer",
    mlp="quick_gelu" if two else "gelu_tanh" if three else "gated",
    patch_bias=three,
    table_side=side,
    deepstack=tuple(hf["deepstack_visual_indexes"]) if three else (),
  )


def _decoder(hf: Mapping[str, Any], tied: bool, family: Family) -> DecoderConfig:
  three = family == "qwen3_vl"
  if hf.get("use_sliding_window"):
    raise ValueError("config.json: use_sliding_window is true, which is not supported")
  if hf.get("hidden_act", "silu") != "silu":
    raise ValueError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported, only 'silu'")
  if hf.get("attention_bias"):
    raise ValueError("config.json: attention_bias is true, which is not supported")
  rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "mrope"):
    raise ValueError(f"config.json: rope type {kind!r} is not supported, only 'default', 'mrope'")
  theta = rope["rope_theta"] if "rope_theta" in rope else hf["rope_theta"]
  whole = hf["hidden_size"] // hf["num_attention_heads"]
  return DecoderConfig(
    layers=hf["num_hidden_layers"],
    width=hf["hidden_size"],
    heads=hf["num_attention_heads"],
    kv_heads=hf["num_key_value_heads"],
    head_dim=hf["head_dim"] if three else whole,
    mlp_width=hf["intermediate_size"],
    vocabulary=hf["vocab_size"],
    rope_theta=float(theta),
    rope_sections=tuple(rope["mrope_section"]),
    norm_eps=hf["rms_norm_eps"],
    tied=tied,
    rope_interleaved=three,
    qkv_bias=not three,
    qk_norm=three,
  )


def to_hf(cfg: QwenVLConfig) -> dict[str, Any]:
  """The config as a `config.json` that transformers 4 and 5 both load.

  Qwen2-VL and Qwen2.5-VL are written flat, as on the hub; Qwen3-VL was nested from its first day.
  """
  top = {
    "architectures": [_ARCHITECTURES[cfg.family]],
    "model_type": cfg.family,
    "tie_word_embeddings": cfg.decoder.tied,
    "image_token_id": cfg.image_pad_id,
    "video_token_id": cfg.video_pad_id,
    "vision_start_token_id": cfg.vision_start_id,
    "vision_end_token_id": cfg.vision_end_id,
    "torch_dtype": "float32",
    "vision_config": _vision_to_hf(cfg),
  }
  text = _decoder_to_hf(cfg.decoder)
  if cfg.family == "qwen3_vl":
    return {**top, "text_config": {"model_type": "qwen3_vl_text", **text}}
  return {**top, **text, "use_sliding_window": False}


def _decoder_to_hf(cfg: DecoderConfig) -> dict[str, Any]:
  hf = {
    "hidden_size": cfg.width,
    "intermediate_size": cfg.mlp_width,
    "num_hidden_layers": cfg.layers,
    "num_attention_heads": cfg.heads,
    "num_key_value_heads": cfg.kv_heads,
    "vocab_size": cfg.vocabulary,
    "hidden_act": "silu",
    "rms_norm_eps": cfg.norm_eps,
    "rope_theta": cfg.rope_theta,
    "bos_token_id": None,
    "eos_token_id": None,
  }
  sections = {"mrope_section": list(cfg.rope_sections)}
  if cfg.rope_interleaved:
    rope = {"rope_type": "default", "mrope_interleaved": True, **sections}
    tied = {"tie_word_embeddings": cfg.tied}
    return {**hf, **tied, "head_dim": cfg.head_dim, "attention_bias": False, "rope_scaling": rope}
  return {**hf, "rope_scaling": {"type": "mrope", **sections}}


def _vision_to_hf(cfg: QwenVLConfig) -> dict[str, Any]:
  vision = cfg.vision
  hf = {
    "model_type": cfg.family,
    "depth": vision.layers,
    "num_heads": vision.heads,
    "in_channels": 3,
    "patch_size": vision.patch_size,
    "spatial_merge_size": vision.merge_size,
    "temporal_patch_size": vision.temporal_size,
  }
  if cfg.family == "qwen2_vl":
    # Its "hidden_size" is the decoder's width; the tower's is "embed_dim".
    return {
      **hf,
      "embed_dim": vision.width,
      "hidden_size": cfg.decoder.width,
      "mlp_ratio": vision.mlp_width // vision.width,
      "hidden_act": "quick_gelu",
    }
  hf |= {
    "hidden_size": vision.width,
    "intermediate_size": vision.mlp_width,
    "out_hidden_size": cfg.decoder.width,
  }
  if cfg.family == "qwen2_5_vl":
    return {
      **hf,
      "hidden_act": "silu",
      "window_size": vision.window_px,
      "fullatt_block_indexes": list(vision.full_layers),
      "tokens_per_second": cfg.tokens_per_second,
    }
  return {
    **hf,
    "hidden_act": "gelu_pytorch_tanh",
    "num_position_embeddings": vision.table_side**2,
    "deepstack_visual_indexes": list(vision.deepstack),
  }
