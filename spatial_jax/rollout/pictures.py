"""What rollouts see: room for all they may draw, and features, of each image once."""

from collections.abc import Callable, Sequence

import numpy as np

from spatial_jax.data.vision import VisionBuckets, bucket, distinct, pack_features, plan_vision
from spatial_jax.data.windows import window_layout
from spatial_jax.drawing.monitor import StopLimits
from spatial_jax.types import Array, Params, PatchedImage, Prompts, VisionBatch

Known = dict[str, np.ndarray]  # [tokens, Y, D] of images seen with one tower, by content hash


def encode(
  run: Callable[[Params, VisionBatch], Array],
  params: Params,
  images_by_row: Sequence[Sequence[PatchedImage]],
  window_blocks: int,
  buckets: VisionBuckets,
  known: Known | None,
) -> tuple[Array, dict[str, np.ndarray]]:
  """Features of all distinct images, and where each one's tokens lie in them, by content hash.

  Args:
    run: the tower, (params, VisionBatch) -> features_MYD.
    params: decode parameters.
    images_by_row: at least one image.
    window_blocks, buckets: as in `plan_vision`.
    known: images in it are not looked at again, the others are put into it. None: all are.
  """
  images = distinct(images_by_row)
  if known is None:
    vision, plan = plan_vision(list(images.values()), window_blocks, buckets)
    return run(params, vision), dict(zip(images, plan, strict=True))
  unseen = [image for name, image in images.items() if name not in known]
  if unseen:
    vision, plan = plan_vision(unseen, window_blocks, buckets)
    seen_MYD = np.asarray(run(params, vision))
    known |= {image.content_hash: seen_MYD[at] for image, at in zip(unseen, plan, strict=True)}
  features_MYD, plan = pack_features(list(images.values()), known, window_blocks, buckets)
  return features_MYD, dict(zip(images, plan, strict=True))


def check_room(
  prompts: Prompts, group: int, stop: StopLimits, window_blocks: int, buckets: VisionBuckets
) -> None:
  """What the policy could draw has to fit the vision buckets, so that no drawing ends a run.

  Raises:
    DataError: on the host, saying what to raise.
  """
  frames = windows = 0
  for prompt in prompts:
    drawn, grids = group * most_drawn(len(prompt.images), stop), [i.grid_3 for i in prompt.images]
    of_frame = [window_layout((1, h, w), window_blocks).slots for _, h, w in grids]
    frames += drawn + sum(time for time, _, _ in grids)
    windows += drawn * max(of_frame, default=0)
    windows += sum(window_layout(grid, window_blocks).slots for grid in grids)
  name = "shown and possibly drawn; raise config.rollout.vision:"
  bucket(frames, buckets.frames, f"frames {name} they")
  bucket(windows, buckets.windows, f"attention windows {name} they")


def most_drawn(images: int, stop: StopLimits) -> int:
  """How many pictures a rollout can draw: each turn but the last may draw on all there are."""
  return max(min(stop.images, images * 2 ** (stop.turns - 1)) - images, 0)
