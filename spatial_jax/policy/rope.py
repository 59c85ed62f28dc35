"""Rotary positions: axes time, height, width in the decoder; row, column in the vision tower.

Positions of prompts are computed with NumPy on the host, angles on the device.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.policy.config import QwenVLConfig

VideoRule = Literal["max", "hf5"]

_VISION_THETA = 10000.0


def mrope_positions(
  token_ids: np.ndarray,
  grids: Sequence[tuple[int, int, int]],
  cfg: QwenVLConfig,
  second_per_grid: Sequence[float],
  rule: VideoRule,
) -> tuple[np.ndarray, int]:
  """Rotary positions: text counts up by 1, an image or clip spans a (time, height, width) box.

      text text | image of 2 x 3 tokens | text        (rule "max")
      t  0  1     2  2  2  2  2  2        5
      h  0  1     2  2  2  3  3  3        5
      w  0  1     2  3  4  2  3  4        5
  After a clip, rule "max" continues after its largest position (the paper, transformers < 5.3).
  Rule "hf5" continues after max(height, width), without time (transformers >= 5.3). The rules agree
  for images.
  Args:
    token_ids: int [T], pads expanded to one per merged token.
    grids: (time, height, width) in patches of each image and clip, in order of appearance.
    cfg: ids, merge size and tokens per second.
    second_per_grid: seconds per temporal patch of each clip; read if `cfg.video_time` is "seconds".
    rule: see above.
  Returns:
    int32 [T, 3] and the position of the next text token.
  Raises:
    ValueError: if pad tokens, grids and second_per_grid do not match.
  Source: Qwen2.5-VL, arXiv:2502.13923; get_rope_index of transformers' three families.
  """
  seconds = iter(second_per_grid)
  if cfg.video_time == "text":  # text with the time precedes every frame: one grid per frame
    grids = [(1, h, w) for t, h, w in grids for _ in range(t)]
  parts, cursor, position = [], 0, 0
  is_pad = (token_ids == cfg.image_pad_id) | (token_ids == cfg.video_pad_id)
  for number, grid_3 in enumerate(grids):
    t, h, w = grid_3[0], grid_3[1] // cfg.vision.merge_size, grid_3[2] // cfg.vision.merge_size
    start = _run_of_pads(is_pad, cursor, t * h * w, f"image {number} of grid {grid_3}")
    parts.append(_text(position, start - cursor))
    position += start - cursor
    step = _time_step(token_ids[start] == cfg.video_pad_id, seconds, cfg)
    parts.append(position + _box(t, h, w, step))
    position = int(parts[-1].max()) + 1 if rule == "max" else position + max(h, w)
    cursor = start + t * h * w
  if is_pad[cursor:].any():
    raise ValueError(
      f"{is_pad[cursor:].sum()} pad tokens follow the last of {len(grids)} grids; "
      "pass one grid for every image and clip"
    )
  parts.append(_text(position, len(token_ids) - cursor))
  return np.concatenate(parts).astype(np.int32), position + len(token_ids) - cursor


def _run_of_pads(is_pad: np.ndarray, cursor: int, length: int, name: str) -> int:
  """Index of the next pad token; it must start a run of `length` pad tokens."""
  start = cursor + int(np.argmax(np.append(is_pad[cursor:], True)))
  if start + length > len(is_pad) or not is_pad[start : start + length].all():
    raise ValueError(f"{name} needs {length} consecutive pad tokens, the ids do not contain them")
  return start


def _time_step(is_video: bool, seconds: Iterator[float], cfg: QwenVLConfig) -> np.float32:
  """Rotary time from one temporal patch to the next."""
  if not is_video or cfg.video_time != "seconds":
    return np.float32(1)
  try:
    return np.float32(cfg.tokens_per_second) * np.float32(next(seconds))
  except StopIteration as error:
    raise ValueError("second_per_grid needs one entry for every clip, it has fewer") from error


def _text(start: int, length: int) -> np.ndarray:
  return np.repeat(np.arange(start, start + length)[:, None], 3, axis=1)


def _box(t: int, h: int, w: int, step: np.float32) -> np.ndarray:
  """Positions of t x h x w tokens from 0; time is multiplied by `step` and floored in float32."""
  box = np.indices((t, h, w)).reshape(3, -1).T
  box[:, 0] = np.floor(box[:, 0].astype(np.float32) * step)
  return box


def mrope_angles(
  position_RTA: jax.Array, theta: float, sections: tuple[int, int, int], interleaved: bool
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of the decoder's rotary angles.

  Frequency j of C/2 is theta^(-2j/C) and multiplies the position on one axis. For sections
  (4, 2, 2) the axes are:

      interleaved false   t t t t h h w w
      interleaved true    t h w t h w t t

  Positions are int32 [..., 3]; the results float32 [..., C/2].
  """
  half = sum(sections)
  axis_C = np.repeat(np.arange(3), sections)
  if interleaved:
    axis_C = np.zeros(half, np.int64)
    for axis in (1, 2):
      axis_C[axis : 3 * sections[axis] : 3] = axis
  return _angles(position_RTA[..., axis_C], _frequencies(theta, half))


def vision_angles(position_P2: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of the vision tower's angles: half for the row, half for the column.

  Positions are int32 [..., 2] in patches; the results float32 [..., C/2], C a multiple of 4.
  """
  quarter = head_dim // 4
  axis_C = np.repeat(np.arange(2), quarter)
  return _angles(position_P2[..., axis_C], np.tile(_frequencies(_VISION_THETA, quarter), 2))


def _frequencies(theta: float, count: int) -> np.ndarray:
  """float32, theta^(-j / count) for j < count."""
  return theta ** -(np.arange(count, dtype=np.float32) / np.float32(count))


def _angles(position_C: jax.Array, frequency_C: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of the products, float32; positions are int32 [..., C/2]."""
  shape = (1,) * (position_C.ndim - 1) + (-1,)
  angle = position_C.astype(jnp.float32) * frequency_C.astype(np.float32).reshape(shape)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the pairs (j, j + C/2) of x [..., C], in float32; the result has the dtype of x.

  `cos` and `sin` are float32, broadcastable to [..., C/2] (size-1 axes, same rank).
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)
