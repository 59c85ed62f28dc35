"""Saved groups of rollouts as the report page shows them: plain values, images as data URIs."""

import base64
import functools
import io
import re
from typing import Any

import numpy as np
from PIL import Image

from spatial_jax.rollout.saved_groups import Group, SavedRollout

_PIECES = re.compile(r"(<think>.*?</think>|```.*?(?:```|$)|<answer>.*?</answer>)", re.DOTALL)


_KINDS = {"<think>": "think", "```": "code", "<answer>": "answer"}


def group_view(group: Group) -> dict[str, Any]:
  """What the template shows of a group: plain values, pictures as data URIs, texts unescaped."""
  first = group.rollouts[0].trajectory
  rewards = [s.reward for s in group.rollouts if s.valid and s.reward is not None]
  return {
    "question_type": group.question_type.replace("_", " "),
    "task_id": group.task_id,
    "question": group.question,
    "options": group.options,
    "truth": group.truth,
    "images": [data_uri(image.pixels) for image in first.images[: first.prompt_images]],
    "mean": float(np.mean(rewards)) if rewards and group.step is not None else None,
    "rollouts": [rollout_view(sibling) for sibling in group.rollouts],
  }


def rollout_view(sibling: SavedRollout) -> dict[str, Any]:
  """What the template shows of one rollout; its drawn pictures count on from the prompt's."""
  trajectory = sibling.trajectory
  pixels = {image.content_hash: image.pixels for image in trajectory.images}
  shown, turns = trajectory.prompt_images, []
  for turn in trajectory.turns:
    turns.append(
      {
        "pieces": pieces(turn.text),
        "operations": turn.operations,
        "errors": turn.errors,
        "images": [
          {"number": shown + index, "uri": data_uri(pixels[name])}
          for index, name in enumerate(turn.produced, 1)
        ],
      }
    )
    shown += len(turn.produced)
  return {
    "sample": trajectory.sample,
    "answer": sibling.answer,
    "reward": sibling.reward,
    "advantage": sibling.advantage,
    "greedy": sibling.greedy,
    "score": sibling.score_,
    "format": sibling.format > 0,
    "usable": sibling.valid,
    "end_reason": trajectory.end_reason.replace("_", " "),
    "tokens": int(trajectory.trained_T.sum()),
    "turns": turns,
  }


def pieces(text: str) -> list[tuple[str, str]]:
  """Model text cut for styling, nothing added or lost but outer blanks: ("think", ...), ..."""
  return [
    (
      next((kind for mark, kind in _KINDS.items() if piece.startswith(mark)), "plain"),
      piece.strip(),
    )
    for piece in _PIECES.split(text)
    if piece.strip()
  ]


def data_uri(pixels: np.ndarray) -> str:
  """uint8 [height, width, 3] as a WebP data URI."""
  return _encode(pixels.tobytes(), pixels.shape[1], pixels.shape[0])


@functools.lru_cache(maxsize=256)  # rollouts share pictures
def _encode(data: bytes, width: int, height: int) -> str:
  buffer = io.BytesIO()
  Image.frombytes("RGB", (width, height), data).save(buffer, format="webp", quality=88)
  return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
