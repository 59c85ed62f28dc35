"""Proves the port: one sequence through this policy and through transformers, from one checkpoint.

    python -m spatial_jax.policy.verify --checkpoint=HF_DIR

`forward` takes and gives NumPy in the layout of the Hugging Face processor, always in float32.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.data.vision import VisionBuckets, geometric_buckets, plan_vision
from spatial_jax.errors import UserError
from spatial_jax.policy import rope, weights
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.types import Params, PatchedImage

TOLERANCE = 1e-4  # of the reference's standard deviation

_BUCKETS = VisionBuckets(
  geometric_buckets(1, 1 << 16), geometric_buckets(1, 1 << 12), geometric_buckets(64, 1 << 16)
)


def forward(
  checkpoint_dir: str | pathlib.Path,
  input_ids: np.ndarray,
  pixel_values: np.ndarray | None = None,
  image_grid_thw: np.ndarray | None = None,
  pixel_values_videos: np.ndarray | None = None,
  video_grid_thw: np.ndarray | None = None,
  second_per_grid_ts: Sequence[float] | np.ndarray | None = None,
  video_positions: rope.VideoRule = "hf5",
) -> dict[str, np.ndarray]:
  """The policy on one sequence, as transformers would be called.

  Args:
    checkpoint_dir: Hugging Face checkpoint.
    input_ids: int [T] or [1, T], pads expanded.
    pixel_values, pixel_values_videos: float32 [patches, values] of all images, all clips.
    image_grid_thw, video_grid_thw: int [n, 3], in patches.
    second_per_grid_ts: seconds per temporal patch of each clip; 1 where not given.
    video_positions: "hf5" as transformers >= 5.3 counts behind a clip, or "max".

  Returns:
    logits float32 [T, V], positions int32 [3, T], image_features float32 [M, D]: images, clips.

  Raises:
    CheckpointError: on the host, I/O: the checkpoint does not fit.
    ValueError: on the host: pads and grids do not match.
  """
  cfg, params = _load(pathlib.Path(checkpoint_dir).resolve())
  policy = make_policy(cfg, jnp.float32)
  token_ids = np.asarray(input_ids, np.int32).reshape(-1)
  images = _split(pixel_values, image_grid_thw)
  clips = _split(pixel_values_videos, video_grid_thw)
  seconds = [1.0] * len(clips) if second_per_grid_ts is None else list(second_per_grid_ts)
  order = _order(token_ids, images, clips, cfg)
  grids = [(images + clips)[i].grid_3 for i in order]
  positions, _ = rope.mrope_positions(token_ids, grids, cfg, seconds, video_positions)
  with jax.default_matmul_precision("highest"):
    features_MYD, index = _encode(policy, params, images + clips)
    feature_T = np.full(len(token_ids), -1, np.int32)
    for pad, rows in (
      (cfg.image_pad_id, index[: len(images)]),
      (cfg.video_pad_id, index[len(images) :]),
    ):
      feature_T[token_ids == pad] = [row for one in rows for row in one]
    logits = jax.jit(functools.partial(_logits, policy))(
      params, token_ids[None], positions[None], features_MYD, feature_T[None]
    )
  rows = [row for rows in index for row in rows]
  return {
    "logits": np.asarray(logits[0]),
    "positions": positions.T,
    "image_features": np.asarray(features_MYD[:, 0])[np.asarray(rows, np.int32)],
  }


def _encode(
  policy: Policy, params: Params, images: list[PatchedImage]
) -> tuple[jax.Array, tuple[np.ndarray, ...]]:
  """Features and, per image, the rows that hold its tokens."""
  if not images:
    return jnp.zeros((1, policy.cfg.vision.streams, policy.cfg.decoder.width), jnp.float32), ()
  batch, index = plan_vision(images, policy.cfg.vision.window_blocks, _BUCKETS)
  return jax.jit(policy.encode)(params, batch), index


def _logits(policy: Policy, params, token_RT, position_RTA, features_MYD, feature_RT) -> jax.Array:
  valid_RT = jnp.ones(token_RT.shape, bool)
  hidden = policy.hidden(params, token_RT, position_RTA, valid_RT, features_MYD, feature_RT)
  return policy.logits(params, hidden)


@functools.lru_cache(maxsize=1)
def _load(directory: pathlib.Path) -> tuple[QwenVLConfig, Params]:
  cfg = weights.read_config(directory)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return cfg, weights.load(directory, cfg, np.dtype(np.float32), lambda path, shape: device)


def _split(patches_PX: np.ndarray | None, grids_N3: np.ndarray | None) -> list[PatchedImage]:
  """One PatchedImage per grid; only what the planner reads of it is filled."""
  if patches_PX is None or grids_N3 is None:
    return []
  grids = [(int(t), int(h), int(w)) for t, h, w in np.asarray(grids_N3)]
  ends = np.cumsum([t * h * w for t, h, w in grids])
  if ends[-1] != len(patches_PX):
    raise ValueError(f"grids {grids} hold {ends[-1]} patches, pixel values have {len(patches_PX)}")
  parts = np.split(np.asarray(patches_PX, np.float32), ends[:-1])
  nothing = np.zeros((0, 0, 3), np.uint8)
  return [PatchedImage("", part, grid, nothing) for part, grid in zip(parts, grids, strict=True)]


def _order(
  token_ids: np.ndarray, images: list[PatchedImage], clips: list[PatchedImage], cfg: QwenVLConfig
) -> list[int]:
  """Which of images + clips stands where its first pad does, in order of appearance."""
  starts = []
  for pad, pictures in ((cfg.image_pad_id, images), (cfg.video_pad_id, clips)):
    pads = np.flatnonzero(token_ids == pad)
    ends = np.cumsum([0, *(picture.tokens for picture in pictures)])
    if len(pads) != ends[-1]:
      kind = "image" if pad == cfg.image_pad_id else "video"
      raise ValueError(
        f"{len(pads)} {kind} pads, but {ends[-1]} tokens of the grids that were given"
      )
    starts.append(pads[ends[:-1]])
  return np.argsort(np.concatenate(starts)).tolist()


# --- against transformers ----------------------------------------------------------------------


def sample_inputs(cfg: QwenVLConfig) -> dict[str, dict[str, Any]]:
  """Random inputs of each kind for any checkpoint of the family."""
  rng = np.random.default_rng(0)
  special = [cfg.image_pad_id, cfg.video_pad_id, cfg.vision_start_id, cfg.vision_end_id]
  plain = np.setdiff1d(np.arange(cfg.decoder.vocabulary), special)

  def pixels(*grids: tuple[int, int, int]) -> np.ndarray:
    count = sum(t * h * w for t, h, w in grids)
    return rng.standard_normal((count, cfg.vision.patch_values), np.float32)

  def ids(pad: int, *grids: tuple[int, int, int]) -> np.ndarray:
    parts = [rng.choice(plain, 5)]
    if cfg.video_time == "text":
      grids = tuple((1, h, w) for t, h, w in grids for _ in range(t))
    for t, h, w in grids:
      parts += [[cfg.vision_start_id], [pad] * (t * h * w // 4), [cfg.vision_end_id]]
      parts += [rng.choice(plain, 4)]
    return np.concatenate(parts)[None].astype(np.int64)

  images, clip = ((1, 6, 10), (1, 4, 4)), (3, 4, 6)
  seconds = {"second_per_grid_ts": np.array([1.4], np.float32)}
  return {
    "text": {"input_ids": rng.choice(plain, 24)[None].astype(np.int64)},
    "images": {
      "input_ids": ids(cfg.image_pad_id, *images),
      "pixel_values": pixels(*images),
      "image_grid_thw": np.array(images),
    },
    "video": {
      "input_ids": ids(cfg.video_pad_id, clip),
      "pixel_values_videos": pixels(clip),
      "video_grid_thw": np.array([clip]),
      **(seconds if cfg.video_time == "seconds" else {}),
    },
  }


def reference(model: Any, inputs: dict[str, np.ndarray], cfg: QwenVLConfig) -> np.ndarray:
  """Logits [T, V] of a transformers model (torch stays behind transformers)."""
  from transformers import BatchFeature

  ids = inputs["input_ids"]
  kinds = (ids == cfg.image_pad_id).astype(np.int32) + 2 * (ids == cfg.video_pad_id)
  features = BatchFeature({**inputs, "mm_token_type_ids": kinds.astype(np.int32)})
  return model(**features.convert_to_tensors("pt")).logits[0].detach().numpy()


def verify(directory: pathlib.Path) -> dict[str, float]:
  """The largest error of the logits for each kind of input, relative to their deviation.

  Raises:
    UserError: on the host, when there is no checkpoint or torch is not installed.
  """
  cfg = weights.read_config(directory)
  from transformers import AutoModelForImageTextToText
  from transformers.utils.import_utils import is_torch_available

  if not is_torch_available():
    raise UserError("verify compares with transformers and needs torch: pip install torch")
  model = AutoModelForImageTextToText.from_pretrained(directory, dtype="float32").eval()
  errors = {}
  for kind, inputs in sample_inputs(cfg).items():
    expected = reference(model, inputs, cfg)
    ours = forward(directory, **inputs)["logits"]
    errors[kind] = float(np.abs(ours - expected).max() / expected.std())
  return errors


def main() -> None:
  """Reads the command line, prints the table; exit code 1 when something does not agree."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
  try:
    errors = verify(parser.parse_args().checkpoint)
  except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
  for kind, error in errors.items():
    print(f"{kind:8} {error:.1e}  {'equal' if error <= TOLERANCE else 'DIFFERENT'}")
  sys.exit(int(max(errors.values()) > TOLERANCE))


if __name__ == "__main__":
  main()
