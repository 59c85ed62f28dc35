"""Drawing operations -> new images, with Pillow: the same operations always give the same pixels.

    images 1 .. n      turn draws on 3 and 17      images n + 1 (copy of 3), n + 2 (copy of 17)

Every distinct index of a turn gives one new image: a copy of the target image, on which the whole
merged list of operations is drawn again. A box that is moved on the original image leaves no old
lines. A box that is moved on a drawn image leaves its old lines there.

Source: ViLaSR, arXiv:2506.09965 (order, merging, colours and sizes as in its released code).
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from spatial_jax.checks import is_whole
from spatial_jax.config import check_field, check_whole
from spatial_jax.types import Operation

COLOURS = (
  "red", "green", "blue", "yellow", "orange", "pink", "purple", "brown", "gray", "beige",
  "turquoise", "cyan", "magenta", "lime", "navy", "maroon", "teal", "olive", "coral", "lavender",
  "violet", "gold", "silver", *ImageColor.colormap,
)  # fmt: skip

MAX_PX = 1000  # of a size; Pillow's time and memory grow with it


@dataclasses.dataclass(frozen=True)
class Style:
  """Sizes in pixels, up to MAX_PX."""

  line_px: int  # width of box outlines and lines, >= 1
  dot_px: int  # radius of the dots at both ends of a line, >= 0
  font_px: int  # size of labels, >= 1
  label_offset_px: tuple[int, int]  # (right, down) from the upper left corner of a box to its label

  def __post_init__(self):
    check_whole(self, "line_px", "font_px", at_least=1, at_most=MAX_PX)
    check_whole(self, "dot_px", at_least=0, at_most=MAX_PX)
    offset = self.label_offset_px
    is_pair = isinstance(offset, tuple) and len(offset) == 2
    valid = is_pair and all(is_whole(part, -MAX_PX, MAX_PX) for part in offset)
    check_field(self, "label_offset_px", valid, f"be two whole numbers up to {MAX_PX}")


PUBLISHED_STYLE = Style(4, 4, 10, (8, 6))  # ViLaSR's, for images of 448 pixels


@dataclasses.dataclass(frozen=True, eq=False)
class DrawnImage:
  """An image and the operations that are drawn on it.

  Raises:
    ValueError: if the pixels have another dtype or shape.
  """

  pixels: np.ndarray  # uint8 [height, width, 3]
  operations: tuple[Operation, ...]  # empty for an original image

  def __post_init__(self):
    if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or self.pixels.shape[2] != 3:
      found = f"{self.pixels.dtype} {list(self.pixels.shape)}"
      raise ValueError(f"expected pixels uint8 [height, width, 3], got {found}")


def draw(
  images: Sequence[DrawnImage], operations: Sequence[Operation], style: Style = PUBLISHED_STYLE
) -> tuple[DrawnImage, ...]:
  """Returns the new images of one turn, one per distinct index, in the order of `targets`.

  Args:
    images: all images so far; operation index 1 is the first.
    operations: of one turn, as `parser.parse` returns them for these images.
    style: sizes; the published ones for a caller without a config.

  Raises:
    IndexError: if an operation names an image that does not exist.
  """
  return tuple(
    DrawnImage(paint(image.pixels, image.operations, style), image.operations)
    for image in plan(images, operations)
  )


def targets(operations: Sequence[Operation]) -> tuple[int, ...]:
  """Returns the distinct image indices in the order of the new images: boxes first, then lines."""
  return tuple(dict.fromkeys(o.image for o in (*_of("box", operations), *_of("line", operations))))


def plan(images: Sequence[DrawnImage], operations: Sequence[Operation]) -> tuple[DrawnImage, ...]:
  """Returns the new images before they are painted: old pixels and all operations to draw."""
  return tuple(
    DrawnImage(
      images[index - 1].pixels,
      merge(images[index - 1].operations, [o for o in operations if o.image == index]),
    )
    for index in targets(operations)
  )


def merge(old: Sequence[Operation], new: Sequence[Operation]) -> tuple[Operation, ...]:
  """Returns all boxes, then all lines; a new operation replaces the old one with its label.

      old   table@1  chair@2      new   chair@5  lamp@6      merged   table@1  chair@5  lamp@6

  If labels in `new` are equal, the last one counts.
  """
  merged: list[Operation] = []
  for tool in ("box", "line"):
    by_label = {o.label: o for o in _of(tool, old)}
    by_label.update({o.label: o for o in _of(tool, new)})
    merged += by_label.values()
  return tuple(merged)


def paint(pixels: np.ndarray, operations: Sequence[Operation], style: Style) -> np.ndarray:
  """Returns a copy of the pixels, not writable, with boxes, their labels and then lines on it."""
  image = Image.fromarray(pixels)
  pen = ImageDraw.Draw(image)
  right, down = style.label_offset_px
  for number, box in enumerate(_of("box", operations)):
    x1, y1, x2, y2 = (int(point) for point in box.points_4)
    (x1, x2), (y1, y2) = sorted((x1, x2)), sorted((y1, y2))
    colour = COLOURS[number % len(COLOURS)]
    pen.rectangle((x1, y1, x2, y2), outline=colour, width=style.line_px)
    pen.text((x1 + right, y1 + down), box.label, fill=colour, font=_font(style.font_px))
  for line in _of("line", operations):
    x1, y1, x2, y2 = (int(point) for point in line.points_4)
    pen.line((x1, y1, x2, y2), fill="black", width=style.line_px)
    _dot(pen, x1, y1, style.dot_px, "red")
    _dot(pen, x2, y2, style.dot_px, "blue")
  return np.asarray(image)


def _dot(pen: ImageDraw.ImageDraw, x: int, y: int, radius: int, colour: str) -> None:
  pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _of(tool: str, operations: Sequence[Operation]) -> list[Operation]:
  return [operation for operation in operations if operation.tool == tool]


@functools.cache
def _font(size_px: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
  """Pillow's own font, so that fonts of the machine cannot change an image."""
  return ImageFont.load_default(size_px)
