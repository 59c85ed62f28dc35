"""Compares this package's policy with transformers on one checkpoint.

    python -m spatial_jax.tools.verify --checkpoint=HF_DIR                    needs torch
    python -m spatial_jax.tools.verify --checkpoint=HF_DIR --export=FILE.npz  also saves the outputs
    python -m spatial_jax.tools.verify --checkpoint=HF_DIR --golden=FILE.npz  needs no torch

`forward` takes and returns NumPy arrays in the layout of the Hugging Face processor, in float32.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from spatial_jax.cli import one_line_exits
from spatial_jax.data.image import patch_image
from spatial_jax.data.tokenizer import load_tokenizer
from spatial_jax.data.vision_packing import VisionBuckets, geometric_buckets, plan_vision
from spatial_jax.errors import UserError
from spatial_jax.hf import weights
from spatial_jax.hf.folder import check_folder
from spatial_jax.hf.golden import SENTENCES, Golden, inputs_of, make_golden, mean_divergence
from spatial_jax.hf.processor import read_processor
from spatial_jax.policy import rope
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.types import Params, PatchedImage, TokenArrays, VisionBatch
from spatial_jax.workdir import find_path, to_path

TOLERANCE = 1e-4  # in standard deviations of the reference
# Greedy tokens are compared up to the first step with a smaller margin between the best two logits.
_TIE = 1e-3
_HALF_NOISE = 1.5  # two orders of rounding differ by chance, because few tokens are averaged
_NO_FEATURES = np.zeros((0, 0, 0), np.float32)

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
  dtype: Literal["float32", "bfloat16"] = "float32",
) -> dict[str, np.ndarray]:
  """Runs the policy on one sequence; the arguments are those of transformers.

  Args:
    checkpoint_dir: Hugging Face folder.
    input_ids: int [T] or [1, T], with one pad token per merged patch.
    pixel_values, pixel_values_videos: float32 [patches, values] of all images and of all videos.
    image_grid_thw, video_grid_thw: int [n, 3], in patches.
    second_per_grid_ts: seconds per temporal patch of each video; default 1.
    video_positions: rule for positions after a video: "hf5" (transformers >= 5.3) or "max".
    dtype: of the computation.

  Returns:
    logits float32 [T, V], positions int32 [3, T], image_features float32 [M, D] (images, then
    videos); with DeepStack also deepstack_features float32 [M, Y - 1, D].

  Raises:
    CheckpointError: if the folder is not a checkpoint or its tensors do not fit its config.
    ValueError: if pad tokens and grids do not match.
  """
  directory = find_path(checkpoint_dir).resolve()
  cfg = weights.read_config(directory)
  token_ids = np.asarray(input_ids, np.int32).reshape(-1)
  images = _split(pixel_values, image_grid_thw)
  videos = _split(pixel_values_videos, video_grid_thw)
  seconds = [1.0] * len(videos) if second_per_grid_ts is None else list(second_per_grid_ts)
  grids = [(images + videos)[i].grid_3 for i in _order(token_ids, images, videos, cfg)]
  positions, _ = rope.mrope_positions(token_ids, grids, cfg, seconds, video_positions)
  policy = make_policy(cfg, jnp.dtype(dtype))
  _, params = _load(directory)  # after the checks of the arguments
  with jax.default_matmul_precision("highest"):
    features_MYD, index = _encode(policy, params, images + videos)
    feature_T = _feature_rows(token_ids, index, len(images), cfg)
    row = (token_ids[None], positions[None], features_MYD, feature_T[None])
    logits = _logits(policy, params, *row)
  rows = np.asarray([row for image_rows in index for row in image_rows], np.int32)
  features_MYD = np.asarray(features_MYD.astype(jnp.float32))[rows]
  out = {"logits": np.asarray(logits[0]), "positions": positions.T}
  out["image_features"] = features_MYD[:, 0]
  return out if cfg.vision.streams == 1 else {**out, "deepstack_features": features_MYD[:, 1:]}


def _feature_rows(
  token_ids: np.ndarray, index: Sequence[np.ndarray], images: int, cfg: QwenVLConfig
) -> np.ndarray:
  """The feature row of each pad token, -1 of other tokens; `index` has images, then videos."""
  feature_T = np.full(len(token_ids), -1, np.int32)
  for pad, rows in ((cfg.image_pad_id, index[:images]), (cfg.video_pad_id, index[images:])):
    feature_T[token_ids == pad] = [row for image_rows in rows for row in image_rows]
  return feature_T


def _encode(
  policy: Policy, params: Params, images: list[PatchedImage]
) -> tuple[jax.Array, tuple[np.ndarray, ...]]:
  """Features, and for each image the rows of its tokens."""
  if not images:
    return jnp.zeros((1, policy.cfg.vision.streams, policy.cfg.decoder.width), jnp.float32), ()
  batch, index = plan_vision(images, policy.cfg.vision.window_blocks, _BUCKETS)
  return _features(policy, params, batch), index


@functools.partial(jax.jit, static_argnums=0)
def _features(policy: Policy, params: Params, batch: VisionBatch) -> jax.Array:
  return policy.encode(params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _logits(policy: Policy, params, token_RT, position_RTA, features_MYD, feature_RT) -> jax.Array:
  valid_RT = jnp.ones(token_RT.shape, bool)
  tokens = TokenArrays(token_RT, position_RTA, valid_RT, feature_RT)
  return policy.logits(params, policy.hidden(params, tokens, features_MYD))


@functools.lru_cache(maxsize=1)
def _load(directory: pathlib.Path) -> tuple[QwenVLConfig, Params]:
  cfg = weights.read_config(directory)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return cfg, weights.load(
    directory, cfg, lambda path: np.dtype(np.float32), lambda path, shape: device
  )


def _split(patches_PX: np.ndarray | None, grids_N3: np.ndarray | None) -> list[PatchedImage]:
  """One PatchedImage per grid; only the fields that `plan_vision` reads are filled."""
  if patches_PX is None or grids_N3 is None:
    return []
  grids = [(int(t), int(h), int(w)) for t, h, w in np.asarray(grids_N3)]
  ends = np.cumsum([t * h * w for t, h, w in grids])
  if ends[-1] != len(patches_PX):
    raise ValueError(f"grids {grids} have {ends[-1]} patches, pixel values have {len(patches_PX)}")
  parts = np.split(np.asarray(patches_PX, np.float32), ends[:-1])
  empty = np.zeros((0, 0, 3), np.uint8)
  return [PatchedImage("", part, grid, empty) for part, grid in zip(parts, grids, strict=True)]


def _order(
  token_ids: np.ndarray, images: list[PatchedImage], videos: list[PatchedImage], cfg: QwenVLConfig
) -> list[int]:
  """Indices into images + videos, in the order of their pad tokens."""
  starts = []
  for pad, items in ((cfg.image_pad_id, images), (cfg.video_pad_id, videos)):
    pads = np.flatnonzero(token_ids == pad)
    ends = np.cumsum([0, *(item.tokens for item in items)])
    if len(pads) != ends[-1]:
      kind = "image" if pad == cfg.image_pad_id else "video"
      raise ValueError(f"{len(pads)} {kind} pads, but {ends[-1]} tokens of the grids")
    starts.append(pads[ends[:-1]])
  return np.argsort(np.concatenate(starts)).tolist()


# --- comparison with transformers ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Check:
  """One line of the table: it passes if `error` is at most `tolerance`."""

  kind: str
  what: str
  error: float
  tolerance: float

  @property
  def passed(self) -> bool:
    return self.error <= self.tolerance


def compare(directory: pathlib.Path, golden: Golden) -> list[Check]:
  """Compares this policy with the outputs of transformers for the same checkpoint.

  Returns one check per quantity and kind of input. Raises UserError if the folder cannot be read.
  """
  directory = directory.resolve()
  checks = _processor_checks(directory, golden) + _tokenizer_checks(directory, golden)
  kinds = dict.fromkeys(key.split("/")[0] for key in golden if key.endswith("/out/logits"))
  for kind in kinds:
    checks += _policy_checks(directory, golden, kind)
  return checks


def _policy_checks(directory: pathlib.Path, golden: Golden, kind: str) -> list[Check]:
  inputs: dict[str, Any] = inputs_of(golden, kind)
  theirs = {key.split("/")[2]: golden[key] for key in golden if key.startswith(f"{kind}/out/")}
  ours = forward(directory, **inputs)
  checks = []
  if "positions" in theirs:
    wrong = int(np.count_nonzero(ours["positions"] != theirs["positions"]))
    checks.append(Check(kind, "positions, wrong", wrong, 0))
  if "features" in theirs:
    deepstack = ours.get("deepstack_features", _NO_FEATURES)
    streams = [ours["image_features"], *np.moveaxis(deepstack, 1, 0)]
    for number in range(theirs["features"].shape[1]):
      name = f"DeepStack features {number}" if number else "vision features"
      error = _relative(streams[number], theirs["features"][:, number])
      checks.append(Check(kind, name, error, TOLERANCE))
  checks.append(Check(kind, "logits", _relative(ours["logits"], theirs["logits"]), TOLERANCE))
  ties = np.flatnonzero(theirs["margins"] < _TIE)
  steps = int(ties[0]) if len(ties) else len(theirs["margins"])
  greedy = _greedy(directory, inputs, steps)
  wrong = int(np.count_nonzero(greedy != theirs["greedy"][:steps]))
  checks.append(Check(kind, f"{steps} greedy tokens, wrong", wrong, 0))
  half = forward(directory, **inputs, dtype="bfloat16")["logits"]
  divergence, allowed = mean_divergence(theirs["logits"], half), float(theirs["half_divergence"])
  checks.append(Check(kind, "bfloat16 logits, KL", divergence, _HALF_NOISE * allowed))
  return checks


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Largest error in standard deviations of the reference."""
  return float(np.abs(ours - theirs).max() / theirs.std())


def _greedy(directory: pathlib.Path, inputs: dict[str, Any], steps: int) -> np.ndarray:
  """Greedy tokens without a KV cache: the whole sequence is computed again for each token."""
  cfg, _ = _load(directory)
  special = [cfg.image_pad_id, cfg.video_pad_id, cfg.vision_start_id, cfg.vision_end_id]
  ids = np.asarray(inputs["input_ids"]).reshape(-1)
  # One padded length for all steps. Attention is causal, so later tokens change nothing.
  length, ids = len(ids), np.append(ids, np.zeros(steps, ids.dtype))
  for step in range(steps):
    logits_TV = forward(directory, **{**inputs, "input_ids": ids})["logits"]
    allowed_V = np.delete(np.arange(logits_TV.shape[1]), special)
    ids[length + step] = allowed_V[logits_TV[length + step - 1, allowed_V].argmax()]
  return ids[length:]


def _processor_checks(directory: pathlib.Path, golden: Golden) -> list[Check]:
  if "processor/in/image" not in golden:
    return []
  ours = patch_image(golden["processor/in/image"], read_processor(directory))
  theirs = golden["processor/out/pixel_values"]
  same = ours.grid_3 == tuple(golden["processor/out/grid"].tolist())
  wrong = int(np.count_nonzero(ours.patches_PX != theirs)) if same else theirs.size
  return [Check("processor", "pixels, wrong", wrong, 0)]


def _tokenizer_checks(directory: pathlib.Path, golden: Golden) -> list[Check]:
  if "tokenizer/out/0" not in golden:
    return []
  tokenizer, wrong = load_tokenizer(directory), 0
  for number, text in enumerate(SENTENCES):
    wrong += tokenizer.encode(text) != golden[f"tokenizer/out/{number}"].tolist()
  return [Check("tokenizer", "sentences, wrong", wrong, 0)]


def _table(checks: list[Check]) -> Table:
  table = Table("input", "what", "error", "tolerance", "")
  for check in checks:
    verdict = "[green]equal[/]" if check.passed else "[red]DIFFERENT[/]"
    numbers = (f"{check.error:.1e}", f"{check.tolerance:.1e}")
    table.add_row(check.kind, check.what, *numbers, verdict)
  return table


def main() -> None:
  """Reads the command line and prints the table; exit code 1 if a check fails."""
  parser = argparse.ArgumentParser(description="Compares a checkpoint with transformers.")
  parser.add_argument("--checkpoint", required=True, help="Hugging Face folder")
  parser.add_argument("--export", help="save the outputs of transformers (.npz)")
  parser.add_argument("--golden", help="file of --export; needs no torch")
  arguments = parser.parse_args()
  with one_line_exits("stopped"):
    directory = find_path(arguments.checkpoint)
    check_folder(directory)
    out = to_path(arguments.export) if arguments.export else None
    if out is not None and not out.parent.is_dir():
      raise UserError(f"--export={out}: {out.parent} is not a folder; create it")
    if arguments.golden:
      golden = _read_golden(to_path(arguments.golden))
    else:
      golden = make_golden(directory, weights.read_config(directory))
    if out is not None:
      np.savez_compressed(out, **golden)  # pyright: ignore[reportArgumentType]
    checks = compare(directory, golden)
  Console().print(_table(checks))
  sys.exit(int(not all(check.passed for check in checks)))


def _read_golden(path: pathlib.Path) -> Golden:
  try:
    with np.load(path) as file:
      return dict(file)
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}); write it again with --export") from error


if __name__ == "__main__":
  main()
