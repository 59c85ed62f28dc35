"""Converts between the `config.json` of Hugging Face and QwenVLConfig, for three model families.

Reads the flat form of transformers 4 (the fields of the decoder at the top, `rope_scaling`) and the
nested form of transformers 5 (`text_config`, `rope_parameters`). Writes a form that both load.
"""

from collections.abc import Mapping
from typing import Any, cast, get_args

from spatial_jax.policy.config import DecoderConfig, Family, QwenVLConfig, VisionConfig

_ARCHITECTURES: dict[Family, str] = {
  "qwen2_vl": "Qwen2VLForConditionalGeneration",
  "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
  "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
_VISION_EPS = 1e-6  # a constant of the reference code, not a key of the file


def from_hf(hf: Mapping[str, Any]) -> QwenVLConfig:
  """Reads a parsed `config.json`.

  Raises:
    ValueError: if the model is of another family or quantised, if a key is missing or has a value
      of the wrong type, or if a setting is not supported.
  """
  if not isinstance(hf, Mapping):
    raise ValueError("config.json is not a mapping; copy or download it again")
  family = hf.get("model_type")
  if family not in get_args(Family):
    families = ", ".join(get_args(Family))
    raise ValueError(
      f"config.json: model_type is {family!r} and must be one of {families}; "
      "give the folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model"
    )
  family = cast(Family, family)
  text = hf.get("text_config") or hf
  try:
    _refuse_quantised(hf.get("quantization_config") or text.get("quantization_config"))
    return QwenVLConfig(
      vision=_vision(hf["vision_config"], family),
      decoder=_decoder(text, _tied(hf, text, family), family),
      image_pad_id=_token_id(hf, "image_token_id", text),
      video_pad_id=_token_id(hf, "video_token_id", text),
      vision_start_id=_token_id(hf, "vision_start_token_id", text),
      vision_end_id=_token_id(hf, "vision_end_token_id", text),
      tokens_per_second=hf["vision_config"]["tokens_per_second"] if family == "qwen2_5_vl" else 1,
      family=family,
    )
  except KeyError as error:
    raise ValueError(f"config.json: {error.args[0]!r} is missing") from error
  except (TypeError, AttributeError) as error:
    raise ValueError(f"config.json: a value has the wrong type ({error})") from error


def _refuse_quantised(quantization: Mapping[str, Any] | None) -> None:
  if quantization:
    method = quantization.get("quant_method", "unknown method")
    raise ValueError(
      f"config.json: the weights are quantised ({method}), which cannot be trained; "
      "give the model's folder without quantisation"
    )


def _tied(hf: Mapping[str, Any], text: Mapping[str, Any], family: Family) -> bool:
  """Whether the output head is the embedding, by the rules of transformers 5.

  Qwen3-VL: the outer value decides. Qwen2-VL and Qwen2.5-VL: one of the two values is enough,
  because transformers 4 wrote it into `text_config`.
  """
  outer, inner = hf.get("tie_word_embeddings"), text.get("tie_word_embeddings")
  if family == "qwen3_vl" and outer is not None:
    return bool(outer)
  return bool(outer or inner)


def _size(hf: Mapping[str, Any], key: str) -> int:
  """A whole number of at least 1."""
  value = hf[key]
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise ValueError(f"config.json: {key} is {value!r} and must be a whole number of at least 1")
  return value


def _token_id(hf: Mapping[str, Any], key: str, text: Mapping[str, Any]) -> int:
  """An id below the vocabulary size."""
  value, size = hf[key], _size(text, "vocab_size")
  if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
    raise ValueError(f"config.json: {key} is {value!r} and must be below vocab_size {size}")
  return value


def _vision(hf: Mapping[str, Any], family: Family) -> VisionConfig:
  two, three = family == "qwen2_vl", family == "qwen3_vl"
  width, layers = _size(hf, "embed_dim" if two else "hidden_size"), _size(hf, "depth")
  windows = family == "qwen2_5_vl"
  table = _size(hf, "num_position_embeddings") if three else 0
  side = round(table**0.5)
  if side**2 != table:
    raise ValueError(f"config.json: num_position_embeddings is {table} and must be a square")
  act = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh"}[family]
  if hf.get("hidden_act", act) != act:
    raise ValueError(
      f"config.json: hidden_act of vision_config is {hf['hidden_act']!r} and must be {act!r}"
    )
  return VisionConfig(
    layers=layers,
    width=width,
    heads=_size(hf, "num_heads"),
    mlp_width=int(width * hf["mlp_ratio"]) if two else _size(hf, "intermediate_size"),
    patch_size=_size(hf, "patch_size"),
    merge_size=_size(hf, "spatial_merge_size"),
    temporal_size=_size(hf, "temporal_patch_size"),
    window_px=_size(hf, "window_size") if windows else 0,
    full_layers=tuple(hf["fullatt_block_indexes"]) if windows else tuple(range(layers)),
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
    raise ValueError("config.json: use_sliding_window is true and must be false")
  if hf.get("hidden_act", "silu") != "silu":
    raise ValueError(f"config.json: hidden_act is {hf['hidden_act']!r} and must be 'silu'")
  if hf.get("attention_bias"):
    raise ValueError("config.json: attention_bias is true and must be false")
  rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "mrope"):
    raise ValueError(f"config.json: rope type is {kind!r} and must be 'default' or 'mrope'")
  theta = rope["rope_theta"] if "rope_theta" in rope else hf["rope_theta"]
  width, heads = _size(hf, "hidden_size"), _size(hf, "num_attention_heads")
  return DecoderConfig(
    layers=_size(hf, "num_hidden_layers"),
    width=width,
    heads=heads,
    kv_heads=_size(hf, "num_key_value_heads"),
    head_dim=_size(hf, "head_dim") if three else width // heads,
    mlp_width=_size(hf, "intermediate_size"),
    vocabulary=_size(hf, "vocab_size"),
    rope_theta=float(theta),
    rope_sections=tuple(rope["mrope_section"]),
    norm_eps=float(hf["rms_norm_eps"]),
    tied=tied,
    rope_interleaved=three,
    qkv_bias=not three,
    qk_norm=three,
  )


def to_hf(cfg: QwenVLConfig) -> dict[str, Any]:
  """Writes a `config.json` that transformers 4 and 5 load, in the form of the hub.

  It is flat for Qwen2-VL and Qwen2.5-VL, nested for Qwen3-VL.
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
    # In this family "embed_dim" is the width of the tower, "hidden_size" that of the decoder.
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
