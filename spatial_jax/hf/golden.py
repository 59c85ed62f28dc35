"""Computes the outputs of transformers for a checkpoint, as arrays that can be saved to a file.

    golden = {"images/in/input_ids": ..., "images/out/logits": ..., "processor/out/grid": ...}

Computing them needs torch; comparing with saved arrays does not.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import log_softmax

from spatial_jax.errors import UserError
from spatial_jax.hf.processor import processor_file
from spatial_jax.policy.config import QwenVLConfig

Golden = dict[str, np.ndarray]
NEW_TOKENS = 8
SENTENCES = (
  "How far is the chair from the table?",
  "12.5 m,\n\n  naïve Æther",
  "<|im_start|>user\n",
)


def inputs_of(golden: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
  """Returns the inputs of one kind ("text", "images", "video", "mixed")."""
  start = f"{kind}/in/"
  return {key[len(start) :]: value for key, value in golden.items() if key.startswith(start)}


def make_golden(directory: pathlib.Path, cfg: QwenVLConfig) -> Golden:
  """Runs transformers on text, images, a video, and both; and its processor and tokenizer.

  Args:
    directory: Hugging Face folder; without a processor or tokenizer, these parts are left out.
    cfg: config of the checkpoint.

  Raises:
    UserError: if torch is not installed.
  """
  from transformers import AutoModelForImageTextToText
  from transformers.utils.import_utils import is_torch_available

  if not is_torch_available():
    raise UserError(
      "verify compares with transformers and needs torch, which is not installed; install the "
      "extra `bench`: pip install -e '.[bench]'"
    )
  golden = {**_processed(directory), **_tokenized(directory)}
  model = AutoModelForImageTextToText.from_pretrained(directory, dtype="float32").eval()
  for kind, inputs in sample_inputs(cfg).items():
    golden |= {f"{kind}/in/{key}": value for key, value in inputs.items()}
    outputs = _outputs(model, inputs, cfg)
    golden |= {f"{kind}/out/{key}": value for key, value in outputs.items()}
  half = AutoModelForImageTextToText.from_pretrained(directory, dtype="bfloat16").eval()
  for kind, inputs in sample_inputs(cfg).items():
    logits = half(**_tensors(inputs, cfg)).logits[0].detach().float().numpy()
    divergence = mean_divergence(golden[f"{kind}/out/logits"], logits)
    golden[f"{kind}/out/half_divergence"] = np.asarray(divergence, np.float32)
  return golden


def sample_inputs(cfg: QwenVLConfig) -> dict[str, dict[str, np.ndarray]]:
  """Returns random inputs of each kind, in the layout of the Hugging Face processor."""
  rng = np.random.default_rng(0)
  special = [cfg.image_pad_id, cfg.video_pad_id, cfg.vision_start_id, cfg.vision_end_id]
  text_ids = np.setdiff1d(np.arange(min(cfg.decoder.vocabulary, 151_643)), special)

  def pixels(*grids: tuple[int, int, int]) -> np.ndarray:
    count = sum(t * h * w for t, h, w in grids)
    return rng.standard_normal((count, cfg.vision.patch_values), np.float32)

  def ids(*grids: tuple[int, int, int]) -> np.ndarray:
    parts: list[Any] = [rng.choice(text_ids, 5)]
    for t, h, w in grids:
      pad = cfg.video_pad_id if t > 1 else cfg.image_pad_id
      frames = t if cfg.video_time == "text" else 1
      for _ in range(frames):
        pads = [pad] * (t // frames * h * w // 4)
        parts += [[cfg.vision_start_id], pads, [cfg.vision_end_id], rng.choice(text_ids, 4)]
    return np.concatenate(parts)[None].astype(np.int64)

  images, video = ((1, 6, 10), (1, 4, 4)), (3, 4, 6)
  seconds = {"second_per_grid_ts": np.array([1.4], np.float32)}
  image_inputs = {"pixel_values": pixels(*images), "image_grid_thw": np.array(images)}
  video_inputs = {
    "pixel_values_videos": pixels(video),
    "video_grid_thw": np.array([video]),
    **(seconds if cfg.video_time == "seconds" else {}),
  }
  return {
    "text": {"input_ids": rng.choice(text_ids, 24)[None].astype(np.int64)},
    "images": {"input_ids": ids(*images), **image_inputs},
    "video": {"input_ids": ids(video), **video_inputs},
    "mixed": {"input_ids": ids(images[0], video, images[1]), **image_inputs, **video_inputs},
  }


def mean_divergence(exact_TV: np.ndarray, other_TV: np.ndarray) -> float:
  """Returns KL(exact || other) of the token distributions, averaged over tokens, in nats."""
  exact, other = (log_softmax(x.astype(np.float64), axis=-1) for x in (exact_TV, other_TV))
  return float((np.exp(exact) * (exact - other)).sum(axis=-1).mean())


def _tensors(inputs: Mapping[str, np.ndarray], cfg: QwenVLConfig) -> Any:
  from transformers import BatchFeature

  ids = inputs["input_ids"]
  kinds = (ids == cfg.image_pad_id).astype(np.int32) + 2 * (ids == cfg.video_pad_id)
  features = {**inputs, "mm_token_type_ids": kinds.astype(np.int32)}
  return BatchFeature(features).convert_to_tensors("pt")


def _outputs(model: Any, inputs: dict[str, np.ndarray], cfg: QwenVLConfig) -> Golden:
  """Positions, features of every stream (images, then videos), logits and greedy tokens."""
  tensors = _tensors(inputs, cfg)
  outputs = {"logits": model(**tensors).logits[0].detach().numpy()}
  rope = {key: value for key, value in tensors.items() if not key.startswith("pixel")}
  if len(inputs) > 1:
    positions, _ = model.model.get_rope_index(**rope)
    outputs["positions"] = positions[:, 0].numpy().astype(np.int32)
  streams = []
  for pixels, grids in (
    ("pixel_values", "image_grid_thw"),
    ("pixel_values_videos", "video_grid_thw"),
  ):
    if pixels in tensors:
      vision = model.model.visual(tensors[pixels], tensors[grids])
      deepstack = dict(vision).get("deepstack_features") or ()
      features = [stream.detach().numpy() for stream in (vision.pooler_output, *deepstack)]
      streams.append(np.stack(features, axis=1))
  if streams:
    outputs["features"] = np.concatenate(streams)
  special = [cfg.image_pad_id, cfg.video_pad_id, cfg.vision_start_id, cfg.vision_end_id]
  generated = model.generate(
    **tensors,
    max_new_tokens=NEW_TOKENS,
    min_new_tokens=NEW_TOKENS,
    do_sample=False,
    suppress_tokens=special,
    return_dict_in_generate=True,
    output_logits=True,
  )
  steps = np.stack([step[0].float().numpy() for step in generated.logits])
  steps[:, special] = -np.inf
  top = np.sort(steps, axis=-1)
  outputs["greedy"] = steps.argmax(-1).astype(np.int32)
  outputs["margins"] = top[:, -1] - top[:, -2]
  return outputs


def _processed(directory: pathlib.Path) -> Golden:
  if processor_file(directory) is None:
    return {}
  from transformers import AutoImageProcessor

  image = np.random.default_rng(1).integers(0, 256, (97, 131, 3), np.uint8)
  out = AutoImageProcessor.from_pretrained(directory, backend="pil")(
    images=[image], return_tensors="np"
  )
  return {
    "processor/in/image": image,
    "processor/out/pixel_values": out["pixel_values"],
    "processor/out/grid": out["image_grid_thw"][0],
  }


def _tokenized(directory: pathlib.Path) -> Golden:
  if not (directory / "tokenizer.json").exists():
    return {}
  from transformers import AutoTokenizer

  tokenizer = AutoTokenizer.from_pretrained(directory)
  ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SENTENCES]
  return {f"tokenizer/out/{number}": np.asarray(one) for number, one in enumerate(ids)}
