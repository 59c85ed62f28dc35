"""Patched images -> one batch of the vision tower: contiguous windows, frames in padded rows.

PatchedImage ──plan_vision──► VisionBatch + the indices of the features of every image
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spatial_jax.checks import is_ascending
from spatial_jax.config import check_field
from spatial_jax.errors import DataError
from spatial_jax.types import PatchedImage, VisionBatch

MERGE = 2  # patches per side of a merged token


@dataclasses.dataclass(frozen=True)
class VisionBuckets:
  """Sizes of a VisionBatch, ascending; the first that fits is used, with one trace per triple.

  An image is one frame, a clip has one per pair of frames. A row of S patches may hold several.
  """

  windows: tuple[int, ...]  # W, slots of one whole attention window or of several smaller ones
  frames: tuple[int, ...]  # N, rows of frames
  patches: tuple[int, ...]  # S, patches of the largest frame

  def __post_init__(self):
    for name, sizes in vars(self).items():
      rule = "list at least one size, ascending from 1 or more"
      check_field(self, name, is_ascending(sizes, 1), rule)


def bucket(count: int, sizes: Sequence[int], name: str) -> int:
  """The first of the ascending `sizes` that is `count` or more.

  Raises:
    DataError: if none is; the message contains `name`.
  """
  for size in sizes:
    if size >= count:
      return size
  raise DataError(f"{count} {name} exceed the largest bucket {sizes[-1]}")


def geometric_buckets(smallest: int, largest: int) -> tuple[int, ...]:
  """Ascending sizes smallest * (1, 1.5, 2, 3, 4, 6, ...), the last one >= largest."""
  sizes, power = [smallest], smallest
  while sizes[-1] < largest:
    middle, power = power * 3 // 2, power * 2
    sizes += [middle] if sizes[-1] < middle else []
    sizes += [power] if sizes[-1] < largest else []
  return tuple(sizes)


def distinct(images_by_row: Sequence[Sequence[PatchedImage]]) -> dict[str, PatchedImage]:
  """Each image once, by content hash, in order of appearance."""
  return {image.content_hash: image for images in images_by_row for image in images}


class ImageNeeds(NamedTuple):
  """The space that images take in a VisionBatch."""

  windows: int  # slots
  frames: tuple[int, ...]  # patches of each frame

  def rows(self, patches: int) -> int:
    """Rows of `patches` patches that the frames fill."""
    return first_fit(self.frames, patches)[1]


def needs_of(grids: Iterable[tuple[int, int, int]], window_blocks: int) -> ImageNeeds:
  """The space of images with these grids (time, height, width in patches), together."""
  grids = list(grids)
  return ImageNeeds(
    sum(window_layout(grid, window_blocks).slots for grid in grids),
    tuple(h * w for t, h, w in grids for _ in range(t)),
  )


def fits(
  images: Sequence[PatchedImage], window_blocks: int, buckets: VisionBuckets, encoded: bool
) -> bool:
  """Whether the largest buckets hold distinct images.

  Args:
    encoded: the batch holds features, not patches (`pack_features`): only merged tokens count.
  """
  if not images:
    return True
  if encoded:
    return sum(image.tokens for image in images) <= buckets.windows[-1] * window_blocks**2
  needs = needs_of((image.grid_3 for image in images), window_blocks)
  size = next((size for size in buckets.patches if size >= max(needs.frames)), None)
  if size is None or needs.windows > buckets.windows[-1]:
    return False
  return needs.rows(size) <= buckets.frames[-1]


def plan_vision(
  images: Sequence[PatchedImage], window_blocks: int, buckets: VisionBuckets
) -> tuple[VisionBatch, tuple[np.ndarray, ...]]:
  """Packs images into one VisionBatch, in the order the tower computes (and returns) them.

  One frame of 3 x 5 merged tokens with windows of 2 x 2, and the window of each token:

      1 1 | 2 2 | 3        slots    1 1 1 1    2 2 2 2    3 3 4 4    5 5 6 -
      1 1 | 2 2 | 3
      ----+-----+--        windows that the border cuts share a slot;
      4 4 | 5 5 | 6        a token is 4 patches, so a slot is 16 rows of patches_PX

  Layers with full attention read frames as rows; small frames share a row. The tower returns
  features in the order of slots; the decoder gathers them by index, without a permutation.

  Args:
    images: each distinct image once, at least one.
    window_blocks: side of an attention window in merged tokens.

  Returns:
    The batch (NumPy), and for each image int32 [tokens]: the rows of features_MYD that hold its
    tokens, in token order.

  Raises:
    DataError: if there are no images or they exceed the largest bucket.
  """
  if not images:
    raise DataError("no images to plan a vision batch for; a batch of text needs none")
  layouts = [window_layout(image.grid_3, window_blocks) for image in images]
  first_slot = np.cumsum([0] + [layout.slots for layout in layouts])
  token_of = tuple(
    (layout.place_T + first * window_blocks**2).astype(np.int32)
    for layout, first in zip(layouts, first_slot[:-1], strict=True)
  )
  sizes = [h * w for t, h, w in (image.grid_3 for image in images) for _ in range(t)]
  windows = bucket(int(first_slot[-1]), buckets.windows, "attention windows")
  patches = bucket(max(sizes), buckets.patches, "patches in one frame")
  places, rows = first_fit(sizes, patches)
  frames = bucket(rows, buckets.frames, "frames")
  slots, values = windows * window_blocks**2 * MERGE**2, images[0].patches_PX.shape[1]
  batch = VisionBatch.build(np.zeros, slots, values, frames, patches)
  batch.position_P4[:] = 1
  batch.frame_NS[:] = slots  # out of range: no patch
  frame = 0
  for image, tokens, layout in zip(images, token_of, layouts, strict=True):
    end = frame + image.grid_3[0]
    _place(batch, image, tokens, places[frame:end], frame)
    batch.window_P.reshape(-1, MERGE**2)[tokens] = layout.window_T[:, None]
    frame = end
  return batch, token_of


def pack_features(
  images: Sequence[PatchedImage],
  image_features: Mapping[str, np.ndarray],
  window_blocks: int,
  buckets: VisionBuckets,
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
  """Packs computed features of images, one image after the other, without the vision tower.

  Args and errors are as in `plan_vision`, which also determines the number of rows M.
  `image_features` are [tokens, Y, D] by content hash.

  Returns:
    [M, Y, D], and for each image the rows of its tokens, as in `plan_vision`.
  """
  if not images:
    raise DataError("no images to pack features of; a batch of text needs none")
  parts = [image_features[image.content_hash] for image in images]
  ends = np.cumsum([len(part) for part in parts], dtype=np.int32)
  windows = bucket(-(-int(ends[-1]) // window_blocks**2), buckets.windows, "attention windows")
  packed_MYD = np.zeros((windows * window_blocks**2, *parts[0].shape[1:]), parts[0].dtype)
  packed_MYD[: ends[-1]] = np.concatenate(parts)
  return packed_MYD, tuple(np.split(np.arange(ends[-1], dtype=np.int32), ends[:-1]))


def _place(
  batch: VisionBatch,
  image: PatchedImage,
  tokens: np.ndarray,
  places: Sequence[tuple[int, int]],
  frame: int,
) -> None:
  """Writes one image into the (NumPy) arrays of the batch; `places` are (row, start) per frame."""
  time, height, width = image.grid_3
  _, row, column = np.indices((time, height // MERGE, width // MERGE)).reshape(3, -1, 1)
  inner = np.arange(MERGE**2)  # patch within its 2x2 block
  index_P = (tokens[:, None] * MERGE**2 + inner).reshape(-1)
  batch.patches_PX[index_P] = image.patches_PX
  batch.position_P4[index_P, 0] = (row * MERGE + inner // MERGE).reshape(-1)
  batch.position_P4[index_P, 1] = (column * MERGE + inner % MERGE).reshape(-1)
  batch.position_P4[index_P, 2:] = (height, width)
  patches = height * width
  for number, (index_S, (at, start)) in enumerate(
    zip(index_P.reshape(time, patches), places, strict=True), frame + 1
  ):
    batch.frame_P[index_S] = number
    batch.frame_NS[at, start : start + patches] = index_S
    batch.slot_P[index_S] = at * batch.frame_NS.shape[1] + start + np.arange(patches)


# --- windows of one image ----------------------------------------------------------------------


def first_fit(sizes: Sequence[int], room: int) -> tuple[list[tuple[int, int]], int]:
  """Packs items (<= room) into rows, the largest first, each into the first row that has room.

  Returns:
    (row, start) of each item, and the number of rows.
  """
  places = [(0, 0)] * len(sizes)
  used: list[int] = []
  open_rows: list[int] = []
  for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    row = next((row for row in open_rows if used[row] + sizes[item] <= room), len(used))
    if row == len(used):
      used.append(0)
      open_rows.append(row)
    places[item] = (row, used[row])
    used[row] += sizes[item]
    if used[row] == room:
      open_rows.remove(row)
  return places, len(used)


class WindowLayout(NamedTuple):
  """Positions of the merged tokens of an image in its slots, in token order."""

  place_T: np.ndarray  # int32, index over the slots of the image
  window_T: np.ndarray  # int32, the window of each token, from 1
  slots: int  # number of slots


@functools.lru_cache(maxsize=1024)
def window_layout(grid_3: tuple[int, int, int], window_blocks: int) -> WindowLayout:
  """Assigns slots to windows: a whole window fills a slot, windows cut by the border share slots.

  Args:
    grid_3: (time, height, width) in patches.
    window_blocks: side of a window in merged tokens; a slot holds its square.
  """
  time, height, width = grid_3[0], grid_3[1] // MERGE, grid_3[2] // MERGE
  columns = -(-width // window_blocks)
  t, row, column = np.indices((time, height, width)).reshape(3, -1)
  window_T = (t * -(-height // window_blocks) + row // window_blocks) * columns
  window_T += column // window_blocks
  sizes = np.bincount(window_T)
  places, slots = first_fit(sizes.tolist(), window_blocks**2)
  start = np.asarray([slot * window_blocks**2 + first for slot, first in places])
  # The tokens of a window are contiguous, row by row.
  window_width = np.minimum(window_blocks, width - column // window_blocks * window_blocks)
  inside = row % window_blocks * window_width + column % window_blocks
  return WindowLayout(start[window_T] + inside, (window_T + 1).astype(np.int32), slots)
