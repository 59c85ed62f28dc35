"""The peer of the benchmarks: the same checkpoint in transformers, on torch."""

import dataclasses
import functools
import pathlib
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from benchmarks import measure, shapes
from benchmarks.update_work import LOSS
from spatial_jax.policy.config import QwenVLConfig

LOGIT_CHUNK = 32  # tokens per row whose logits exist at once in the chunked variants


def load(directory: pathlib.Path) -> Qwen2_5_VLForConditionalGeneration:
  """The model in float32, on all threads, with torch's fused attention."""
  logging.disable_progress_bar()
  torch.set_num_threads(measure.threads())
  model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
    directory, dtype=torch.float32, attn_implementation="sdpa"
  )
  with torch.no_grad():
    for parameter in model.parameters():
      # RssAnon does not include weights that are mapped from the file.
      parameter.data = parameter.data.clone()
  return model


def prompt_tensors(cfg: QwenVLConfig, questions: list[shapes.Question]) -> dict[str, torch.Tensor]:
  """The prompts in the form of the Hugging Face processor."""
  ids_BT = torch.tensor(np.stack([question.token_ids_T for question in questions])).long()
  return {
    "input_ids": ids_BT,
    "attention_mask": torch.ones_like(ids_BT),
    # Without it transformers uses text positions for images, without an error.
    "mm_token_type_ids": (ids_BT == cfg.image_pad_id).int(),
    "pixel_values": torch.tensor(
      np.concatenate([i.patches_PX for q in questions for i in q.images])
    ),
    "image_grid_thw": torch.tensor([i.grid_3 for q in questions for i in q.images]),
  }


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """Rows of one prompt: int64 tokens of prompt and response, rotary positions of one row."""

  question: shapes.Question
  token_RT: torch.Tensor
  position_TA: torch.Tensor
  forbidden_ids: tuple[int, ...]


def rows(cfg: QwenVLConfig, question: shapes.Question, response_RT: np.ndarray) -> Rows:
  """The rows of several responses to one prompt."""
  count, length = response_RT.shape
  prompt_RT = np.tile(question.token_ids_T, (count, 1))
  following_TA = question.next_position + np.arange(length)[:, None].repeat(3, axis=1)
  return Rows(
    question=question,
    token_RT=torch.tensor(np.concatenate([prompt_RT, response_RT], axis=1)).long(),
    position_TA=torch.tensor(np.concatenate([question.position_TA, following_TA])).long(),
    forbidden_ids=shapes.forbidden_ids(cfg),
  )


def logprobs(
  model: Qwen2_5_VLForConditionalGeneration, rows: Rows, chunked: bool, share_image: bool
) -> torch.Tensor:
  """Log-probabilities of the responses, from whole rows; logits are computed of responses alone.

  Args:
    model: with or without gradient checkpointing.
    rows: of one prompt.
    chunked: logits of a few tokens exist at once; the backward pass computes them again.
    share_image: the vision tower runs once for all rows; else once per row, as in other trainers.

  Returns:
    float32 [R, response].
  """
  count, prompt = len(rows.token_RT), len(rows.question.token_ids_T)
  images = rows.question.images
  patches_PX = torch.tensor(np.concatenate([image.patches_PX for image in images]))
  grid_N3 = torch.tensor([image.grid_3 for image in images])
  if share_image:
    features_MD = model.model.visual(patches_PX, grid_thw=grid_N3).pooler_output
    # The model accepts the features of each image in place of the output of its vision tower.
    image_inputs = {
      "mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=[features_MD] * count)}
    }
  else:
    image_inputs = {
      "pixel_values": patches_PX.repeat(count, 1),
      "image_grid_thw": grid_N3.repeat(count, 1),
    }
  positions = rows.position_TA.T[:, None].expand(-1, count, -1)
  out = model.model(
    input_ids=rows.token_RT, position_ids=positions, use_cache=False, **image_inputs
  )
  hidden_RTD, target_RT = out.last_hidden_state[:, prompt - 1 : -1], rows.token_RT[:, prompt:]
  score = functools.partial(_score, model.lm_head.weight, rows.forbidden_ids)
  if not chunked:
    return score(hidden_RTD, target_RT)
  pairs = zip(hidden_RTD.split(LOGIT_CHUNK, 1), target_RT.split(LOGIT_CHUNK, 1), strict=True)
  parts = [checkpoint(score, hidden, target, use_reentrant=False) for hidden, target in pairs]
  return torch.cat(parts, dim=1)


def _score(
  table_VD: torch.Tensor,
  forbidden_ids: tuple[int, ...],
  hidden_RTD: torch.Tensor,
  target_RT: torch.Tensor,
) -> torch.Tensor:
  """Log-probability of each target; the logits are masked in place."""
  logits = torch.nn.functional.linear(hidden_RTD, table_VD)
  logits[..., list(forbidden_ids)] = -torch.inf
  chosen_RT = logits.gather(-1, target_RT[..., None])[..., 0]
  return chosen_RT - logits.logsumexp(-1)


def policy_loss(
  logp_RT: torch.Tensor, old_logp_RT: torch.Tensor, advantage_R: torch.Tensor
) -> torch.Tensor:
  """`spatial_jax.learn.losses.policy_loss`: summed over the tokens of a microbatch."""
  ratio_RT = torch.exp(logp_RT - old_logp_RT)
  clipped_RT = ratio_RT.clamp(1.0 - LOSS.clip_low, 1.0 + LOSS.clip_high)
  surrogate_RT = torch.minimum(ratio_RT * advantage_R[:, None], clipped_RT * advantage_R[:, None])
  return -surrogate_RT.sum()
