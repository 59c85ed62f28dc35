"""The outputs of transformers for a parity case; needs torch."""

import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
import transformers

from spatial_jax.hf import name_map, weights
from spatial_jax.policy import param_tree
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.types import Params, PatchedImage
from tests import policy_fixtures as fixtures

CLASSES = {
  "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
  "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
  "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
}


def model(cfg: QwenVLConfig, params: Params):
  """The parameters as a transformers model, through a saved checkpoint."""
  with tempfile.TemporaryDirectory() as directory:
    weights.save(params, cfg, pathlib.Path(directory))
    loaded = CLASSES[cfg.family].from_pretrained(
      directory, dtype=torch.float32, attn_implementation="eager"
    )
  return loaded.eval()


def visual_inputs(images: Sequence[PatchedImage]) -> dict[str, torch.Tensor]:
  """Patches and grids of images and clips, each in its own stream."""
  inputs = {}
  for pixels, grids, is_clip in (
    ("pixel_values", "image_grid_thw", False),
    ("pixel_values_videos", "video_grid_thw", True),
  ):
    some = [image for image in images if (image.grid_3[0] > 1) == is_clip]
    if some:
      inputs[pixels] = torch.tensor(np.concatenate([image.patches_PX for image in some]))
      inputs[grids] = torch.tensor([image.grid_3 for image in some])
  return inputs


def _inputs(case: fixtures.Case, row: fixtures.Row) -> dict:
  ids = torch.tensor(row.ids)[None].long()
  inputs = {
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "mm_token_type_ids": token_types(ids),
    **visual_inputs(row.images),
  }
  if case.second_per_grid:
    inputs["second_per_grid_ts"] = torch.tensor(case.second_per_grid)
  return inputs


def token_types(ids: torch.Tensor) -> torch.Tensor:
  """0 text, 1 image, 2 video."""
  return (ids == fixtures.IMAGE).int() + 2 * (ids == fixtures.VIDEO).int()


@torch.no_grad()
def reference(case: fixtures.Case, hf) -> dict[str, np.ndarray]:
  """positions [T, 3], logits [T, V], greedy tokens and the margin of the first over the second.

  Under rule "max" transformers >= 5.3 needs explicit positions; greedy decoding then runs without
  a cache.
  """
  row = case.sequence()
  inputs = _inputs(case, row)
  explicit = case.rule == "max" and "video" in case.kind
  if explicit:
    positions = torch.tensor(row.positions).T[:, None].long()
    inputs["position_ids"] = positions
  elif row.images:
    rope = {
      k: v for k, v in inputs.items() if k.endswith(("_thw", "_ts", "_ids")) and k != "input_ids"
    }
    positions, _ = hf.model.get_rope_index(inputs["input_ids"], **rope)
  else:
    positions = torch.arange(len(row.ids)).expand(3, 1, -1)
  logits = hf(**inputs).logits[0]
  greedy = _greedy_explicit(hf, inputs, row) if explicit else _generate(hf, inputs)
  top = torch.topk(greedy, 2).values
  return {
    "positions": positions[:, 0].T.numpy().astype(np.int32),
    "logits": logits.numpy(),
    "greedy": greedy.argmax(-1).numpy().astype(np.int32),
    "margins": (top[:, 0] - top[:, 1]).numpy(),
  }


def _suppressed(logits: torch.Tensor) -> torch.Tensor:
  logits = logits.clone()
  logits[..., list(fixtures.SPECIAL)] = -torch.inf
  return logits


def _generate(hf, inputs: dict) -> torch.Tensor:
  """Logits of each step of `generate`."""
  out = hf.generate(
    **inputs,
    max_new_tokens=fixtures.NEW_TOKENS,
    do_sample=False,
    suppress_tokens=list(fixtures.SPECIAL),
    return_dict_in_generate=True,
    output_logits=True,
  )
  return _suppressed(torch.cat(out.logits))


def _greedy_explicit(hf, inputs: dict, row: fixtures.Row) -> torch.Tensor:
  steps, inputs = [], dict(inputs)
  for step in range(fixtures.NEW_TOKENS):
    steps.append(_suppressed(hf(**inputs).logits[0, -1]))
    token = steps[-1].argmax().reshape(1, 1)
    position = torch.full((3, 1, 1), row.following + step)
    for name, more in (
      ("input_ids", token),
      ("attention_mask", torch.ones_like(token)),
      ("mm_token_type_ids", torch.zeros_like(token).int()),
      ("position_ids", position),
    ):
      inputs[name] = torch.cat([inputs[name], more], dim=-1)
  return torch.stack(steps)


def gradients(cfg: QwenVLConfig, hf) -> Params:
  """The gradients of a transformers model, in the layout of the parameters."""
  found = {name_map.short_name(name): weight.grad for name, weight in hf.named_parameters()}
  result = {}
  for entry in name_map.name_table(cfg):
    parts = [entry.read(found[name_map.short_name(name)].numpy()) for name in entry.names]
    result[entry.path] = np.stack(parts) if entry.layers else parts[0]
  return param_tree.unflatten(result)
