"""Images for the page, and the boxes that a policy drew on them."""

import base64
import functools
import io
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from spatial_jax.drawing import canvas
from spatial_jax.rollout.saved_groups import TrueBox
from spatial_jax.types import Operation, Trajectory

_CRISP_PX = 504  # a smaller image is enlarged by a whole factor, without smoothing, to about this

Box = tuple[float, float, float, float]


class ImageView(NamedTuple):
  """An image of the page."""

  number: int  # in the conversation, from 1
  uri: str  # data URI
  width: int  # of the original, pixels
  height: int
  true_boxes: list[Box]  # (x, y, width, height) in pixels, drawn over the image


class OperationView(NamedTuple):
  """A drawn box or line."""

  tool: str  # "box" or "line"
  label: str  # that the policy gave it
  image: int  # number of the image that it was drawn on, from 1
  colour: str  # that it was drawn in, a CSS colour
  iou: float | None  # with the best true box of the same label, None without one


class TurnDrawings(NamedTuple):
  """The operations of one turn and the images that they gave."""

  operations: list[OperationView]
  images: list[ImageView]


class _Shown(NamedTuple):
  """An image of the conversation: what is drawn on it, and the prompt image below, from 0."""

  image: canvas.DrawnImage
  source: int


def image_view(pixels: np.ndarray, number: int, true_boxes: list[Box]) -> ImageView:
  """uint8 [height, width, 3] as a data URI."""
  height, width, _ = pixels.shape
  return ImageView(number, _encode(pixels.tobytes(), width, height), width, height, true_boxes)


def drawings(trajectory: Trajectory, boxes: Sequence[TrueBox]) -> list[TurnDrawings]:
  """The operations and new images of each turn; `boxes` are those of the question."""
  pixels = {image.content_hash: image.pixels for image in trajectory.images}
  prompt = trajectory.images[: trajectory.prompt_images]
  shown = [_Shown(canvas.DrawnImage(image.pixels, ()), i) for i, image in enumerate(prompt)]
  turns = []
  for turn in trajectory.turns:
    operations = [o for o in turn.operations if 1 <= o.image <= len(shown)]
    planned = canvas.plan([s.image for s in shown], operations)
    targets = canvas.targets(operations)
    new = [_Shown(made, shown[i - 1].source) for made, i in zip(planned, targets, strict=True)]
    by_target = dict(zip(targets, new, strict=True))
    views = [_operation_view(o, by_target[o.image], boxes) for o in operations]
    images = []
    for name, made in zip(turn.produced, new, strict=False):  # fewer if the image limit was reached
      shown.append(made)
      images.append(image_view(pixels[name], len(shown), _true_boxes(made, boxes)))
    turns.append(TurnDrawings(views, images))
  return turns


def iou(a: Box, b: Box) -> float:
  """Intersection over union of two boxes (x1, y1, x2, y2), in [0, 1]."""
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  shared = max(width, 0.0) * max(height, 0.0)
  union = _area(a) + _area(b) - shared
  return shared / union if union > 0 else 0.0


def _operation_view(operation: Operation, made: _Shown, boxes: Sequence[TrueBox]) -> OperationView:
  """The colour of a box is that of its place in the list that is drawn; a line is black."""
  colour, best = "black", None
  if operation.tool == "box":
    labels = [o.label for o in made.image.operations if o.tool == "box"]
    colour = canvas.COLOURS[labels.index(operation.label) % len(canvas.COLOURS)]
    found = [iou(_ordered(operation.points_4), b.box) for b in _same(operation, made, boxes)]
    best = max(found, default=None)
  return OperationView(operation.tool, operation.label, operation.image, colour, best)


def _true_boxes(made: _Shown, boxes: Sequence[TrueBox]) -> list[Box]:
  """True boxes of the labels that are drawn on an image."""
  drawn = [o for o in made.image.operations if o.tool == "box"]
  found = dict.fromkeys(b.box for o in drawn for b in _same(o, made, boxes))
  return [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in found]


def _same(operation: Operation, made: _Shown, boxes: Sequence[TrueBox]) -> list[TrueBox]:
  """True boxes with the label of an operation ("chair 2": chair), in the image drawn on."""
  label = re.sub(r" \d+$", "", operation.label.strip().casefold())
  return [b for b in boxes if b.image == made.source and b.label.casefold() == label]


def _ordered(box: Box) -> Box:
  x1, y1, x2, y2 = box
  return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _area(box: Box) -> float:
  return (box[2] - box[0]) * (box[3] - box[1])


@functools.lru_cache(maxsize=256)  # rollouts share images
def _encode(data: bytes, width: int, height: int) -> str:
  image = Image.frombytes("RGB", (width, height), data)
  if max(image.size) < _CRISP_PX / 1.5:
    factor = math.ceil(_CRISP_PX / max(image.size))
    image = image.resize((factor * width, factor * height), Image.Resampling.NEAREST)
  buffer = io.BytesIO()
  image.save(buffer, format="webp", quality=82)
  return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
