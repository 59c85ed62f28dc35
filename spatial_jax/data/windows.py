"""How an image's merged tokens lie in the slots of attention windows, and rows are filled."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MERGE = 2  # patches per side of a merged token


def first_fit(sizes: Sequence[int], room: int) -> tuple[list[tuple[int, int]], int]:
  """Packs things into rows, the largest first, each into the first row that has room for it.

  Args:
    sizes: of each thing, at most `room`.
    room: of a row.

  Returns:
    (row, start) of each thing, and how many rows there are.
  """
  places = [(0, 0)] * len(sizes)
  used: list[int] = []
  open_rows: list[int] = []
  for thing in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    row = next((row for row in open_rows if used[row] + sizes[thing] <= room), len(used))
    if row == len(used):
      used.append(0)
      open_rows.append(row)
    places[thing] = (row, used[row])
    used[row] += sizes[thing]
    if used[row] == room:
      open_rows.remove(row)
  return places, len(used)


class WindowLayout(NamedTuple):
  """Where the merged tokens of an image lie, in token order.

  Attributes:
    place_T: int32, counted over the image's slots.
    window_T: int32, the window of each, from 1.
    slots: how many there are.
  """

  place_T: np.ndarray
  window_T: np.ndarray
  slots: int


@functools.lru_cache(maxsize=1024)
def window_layout(grid_3: tuple[int, int, int], window_blocks: int) -> WindowLayout:
  """Whole windows have a slot each, those cut by a border share some.

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
  # Tokens of a window lie behind one another, row by row.
  window_width = np.minimum(window_blocks, width - column // window_blocks * window_blocks)
  inside = row % window_blocks * window_width + column % window_blocks
  return WindowLayout(start[window_T] + inside, (window_T + 1).astype(np.int32), slots)
