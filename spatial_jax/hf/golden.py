"""What transformers says of a checkpoint, as plain arrays that can be kept in a file.

    golden = {"images/in/input_ids": ..., "images/out/logits": ..., "processor/out/grid": ...}

Needs transformers with torch (which stays behind it); reading golden arrays needs neither.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from spatial_jax.errors import UserError
from spatial_jax.policy.config import QwenVLConfig

Golden = dict[str, np.ndarray]
NEW_TOKENS = 8
SENTENCES = (
  "How far is the chair from the table?",
  "12.5 m,\n\n  naïve Æther",
  "<|im_start|>user\n",
)


def inputs_of(golden: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
  """What one comparison is asked."""
  start = f"{kind}/in/"
  return {key[len(start) :]: value for key, value in golden.items() if key.startswith(start)}


def make_golden(directory: pathlib.Path, cfg: QwenVLConfig) -> Golden:
  """Asks transformers about text, images, a clip and both; and its processor and tokenizer.

  Args:
    directory: Hugging Face checkpoint; processor and tokenizer are asked where it has them.
    cfg: of the checkpoint.

  Raises:
    UserError: on the host, when torch is not installed.
  """
  from transformers import AutoModelForImageTextToText
  from transformers.utils.import_utils import is_torch_available

  if not is_torch_available():
    raise UserError("verify compares with transformers and needs torch: pip install torch")
  golden = {**_processed(directory), **_tokenized(directory)}
  model = AutoModelForImageTextToText.from_pretrained(directory, dtype="float32").eval()
  for kind, inputs in sample_inputs(cfg).items():
    golden |= {f"{kind}/in/{key}": value for key, value in inputs.items()}
    answers = _answers(model, inputs, cfg)
    golden |= {f"{kind}/out/{key}": value for key, value in answers.items()}
  half = AutoModelForImageTextToText.from_pretrained(directory, dtype="bfloat16").eval()
  for kind, inputs in sample_inputs(cfg).items():
    logits = half(**_tensors(inputs, cfg)).logits[0].detach().float().numpy()
    divergence = mean_divergence(golden[f"{kind}/out/logits"], logits)
    golden[f"{kind}/out/half_divergence"] = np.asarray(divergence, np.float32)
  return golden


def sample_inputs(cfg: QwenVLConfig) -> dict[str, dict[str, np.ndarray]]:
  """Random inputs of each kind for any checkpoint, in the processor's layout."""
  rng = np.random.default_rng(0)
  special = [cfg.image_pad_id, cfg.video_pad_id, cfg.vision_start_id, cfg.vision_end_id]
  plain = np.setdiff1d(np.arange(min(cfg.decoder.vocabulary, 151_643)), special)

  def pixels(*grids: tuple[int, int, int]) -> np.ndarray:
    count = sum(t * h * w for t, h, w in grids)
    return rng.standard_normal((count, cfg.vision.patch_values), np.float32)

  def ids(*grids: tuple[int, int, int]) -> np.ndarray:
    parts: list[Any] = [rng.choice(plain, 5)]
    for t, h, w in grids:
      pad = cfg.video_pad_id if t > 1 else cfg.image_pad_id
      frames = t if cfg.video_time == "text" else 1
      for _ in range(frames):
        pads = [pad] * (t // frames * h * w // 4)
        parts += [[cfg.vision_start_id], pads, [cfg.vision_end_id], rng.choice(plain, 4)]
    return np.concatenate(parts)[None].astype(np.int64)

  images, clip = ((1, 6, 10), (1, 4, 4)), (3, 4, 6)
  seconds = {"second_per_grid_ts": np.array([1.4], np.float32)}
  of_images = {"pixel_values": pixels(*images), "image_grid_thw": np.array(images)}
  of_clip = {
    "pixel_values_videos": pixels(clip),
    "video_grid_thw": np.array([clip]),
    **(seconds if cfg.video_time == "seconds" else {}),
  }
  return {
    "text": {"input_ids": rng.choice(plain, 24)[None].astype(np.int64)},
    "images": {"input_ids": ids(*images), **of_images},
    "video": {"input_ids": ids(clip), **of_clip},
    "mixed": {"input_ids": ids(images[0], clip, images[1]), **of_images, **of_clip},
  }


def mean_divergence(exact_TV: np.ndarray, other_TV: np.ndarray) -> float:
  """KL of the second logits' distributions from the first's, mean over tokens, nats."""
  exact, other = (_log_softmax(x.astype(np.float64)) for x in (exact_TV, other_TV))
  return float((np.exp(exact) * (exact - other)).sum(axis=-1).mean())


def _log_softmax(x: np.ndarray) -> np.ndarray:
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _tensors(inputs: Mapping[str, np.ndarray], cfg: QwenVLConfig) -> Any:
  from transformers import BatchFeature

  ids = inputs["input_ids"]
  kinds = (ids == cfg.image_pad_id).astype(np.int32) + 2 * (ids == cfg.video_pad_id)
  features = {**inputs, "mm_token_type_ids": kinds.astype(np.int32)}
  return BatchFeature(features).convert_to_tensors("pt")


def _answers(model: Any, inputs: dict[str, np.ndarray], cfg: QwenVLConfig) -> Golden:
  """Positions, features of every stream (images, then clips), logits and greedy tokens."""
  tensors = _tensors(inputs, cfg)
  answers = {"logits": model(**tensors).logits[0].detach().numpy()}
  rope = {key: value for key, value in tensors.items() if not key.startswith("pixel")}
  if len(inputs) > 1:
    positions, _ = model.model.get_rope_index(**rope)
    answers["positions"] = positions[:, 0].numpy().astype(np.int32)
  streams = []
  for pixels, grids in (
    ("pixel_values", "image_grid_thw"),
    ("pixel_values_videos", "video_grid_thw"),
  ):
    if pixels in tensors:
      seen = model.model.visual(tensors[pixels], tensors[grids])
      deep = dict(seen).get("deepstack_features") or ()
      features = [one.detach().numpy() for one in (seen.pooler_output, *deep)]
      streams.append(np.stack(features, axis=1))
  if streams:
    answers["features"] = np.concatenate(streams)
  special = [cfg.image_pad_id, cfg.video_pad_id, cfg.vision_start_id, cfg.vision_end_id]
  found = model.generate(
    **tensors,
    max_new_tokens=NEW_TOKENS,
    min_new_tokens=NEW_TOKENS,
    do_sample=False,
    suppress_tokens=special,
    return_dict_in_generate=True,
    output_logits=True,
  )
  steps = np.stack([step[0].float().numpy() for step in found.logits])
  steps[:, special] = -np.inf
  top = np.sort(steps, axis=-1)
  answers["greedy"] = steps.argmax(-1).astype(np.int32)
  answers["margins"] = top[:, -1] - top[:, -2]
  return answers


def _processed(directory: pathlib.Path) -> Golden:
  if not (directory / "preprocessor_config.json").exists():
    return {}
  from transformers import AutoImageProcessor

  picture = np.random.default_rng(1).integers(0, 256, (97, 131, 3), np.uint8)
  out = AutoImageProcessor.from_pretrained(directory, backend="pil")(
    images=[picture], return_tensors="np"
  )
  return {
    "processor/in/picture": picture,
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
