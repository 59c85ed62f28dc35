"""Drawing operations -> new pictures, with Pillow: the same operations always give the same pixels.

    images 1 .. n      turn draws on 3 and 17      images n + 1 (copy of 3), n + 2 (copy of 17)

Every distinct index of a turn gives one new picture: a copy of the *target* picture, on which the
whole merged list is drawn again. So a box that is moved on the original leaves nothing behind, and
one that is moved on a picture already drawn upon leaves its old lines.

Source: ViLaSR, arXiv:2506.09965 (order, merging, colours and sizes as in its released code).
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from spatial_jax.types import Operation

COLOURS = (
  "red", "green", "blue", "yellow", "orange", "pink", "purple", "brown", "gray", "beige",
  "turquoise", "cyan", "magenta", "lime", "navy", "maroon", "teal", "olive", "coral", "lavender",
  "violet", "gold", "silver", *ImageColor.colormap,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Style:
  """Sizes in pixels; ViLaSR draws 448-pixel pictures with 4, 4, 10 and (8, 6).

  Attributes:
    line_px: width of box outlines and lines.
    dot_px: radius of the dots at both ends of a line.
    font_px: size of labels.
    label_offset_px: from the upper left corner of a box to its label.
  """

  line_px: int
  dot_px: int
  font_px: int
  label_offset_px: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
  """Pixels, uint8 [height, width, 3], and what was drawn on them (nothing on an original).

  Raises ValueError (host) for pixels of another form.
  """

  pixels: np.ndarray
  drawn: tuple[Operation, ...]

  def __post_init__(self):
    if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or self.pixels.shape[2] != 3:
      found = f"{self.pixels.dtype} {list(self.pixels.shape)}"
      raise ValueError(f"expected pixels uint8 [height, width, 3], got {found}")


def draw(
  images: Sequence[Picture], operations: Sequence[Operation], style: Style
) -> tuple[Picture, ...]:
  """The new pictures of one turn, one for every distinct index, in the order of `targets`.

  Args:
    images: all pictures so far; operation index 1 is the first.
    operations: of one turn, as `protocol.parse` gives them for these images.
    style: sizes.

  Raises:
    IndexError: on the host, when an operation names no image.
  """
  return tuple(
    Picture(paint(picture.pixels, picture.drawn, style), picture.drawn)
    for picture in plan(images, operations)
  )


def targets(operations: Sequence[Operation]) -> tuple[int, ...]:
  """The distinct indices in the order of their new pictures: those of boxes first, then lines."""
  return tuple(dict.fromkeys(o.image for o in (*_of("box", operations), *_of("line", operations))))


def plan(images: Sequence[Picture], operations: Sequence[Operation]) -> tuple[Picture, ...]:
  """The pictures to be: pixels of the target still, and all that has to be drawn on them."""
  return tuple(
    Picture(
      images[index - 1].pixels,
      merge(images[index - 1].drawn, [o for o in operations if o.image == index]),
    )
    for index in targets(operations)
  )


def merge(old: Sequence[Operation], new: Sequence[Operation]) -> tuple[Operation, ...]:
  """All boxes, then all lines: an old one gives way in place to the new one with its label.

      old   table@1  chair@2      new   chair@5  lamp@6      merged   table@1  chair@5  lamp@6

  Within `new` the last of equal labels counts.
  """
  merged: list[Operation] = []
  for tool in ("box", "line"):
    by_label = {o.label: o for o in _of(tool, old)}
    by_label.update({o.label: o for o in _of(tool, new)})
    merged += by_label.values()
  return tuple(merged)


def paint(pixels: np.ndarray, operations: Sequence[Operation], style: Style) -> np.ndarray:
  """A copy of the pixels with boxes, their labels, and then lines drawn on it.

  Args:
    pixels: uint8 [height, width, 3].
    operations: points in pixels of this picture, clipped to it.
    style: sizes.

  Returns:
    uint8 [height, width, 3], not writable.
  """
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
  """Pillow's own font: no file of the machine can change a picture."""
  return ImageFont.load_default(size_px)
