"""Text of one turn -> drawing operations and typed errors.

    <think> The table is cut off. </think> Action: Object Mapper
    ```json
    [{"index": 3, "bbox_2d": [120, 80, 342, 214], "label": "table"}]
    ```

A line, under Action: Path Tracer, is {"index": 3, "start_point_2d": [x, y], "end_point_2d": [x, y],
"label": "path"}; the last turn is <think> ... </think> Action: Answer and <answer> 4 </answer>.
Model output is data: `lenient_json` reads it and nothing evaluates it. Every block or item that is
not drawn gives one error code:

    bad_json, too_deep                    the block has no single obvious reading
    block_too_long, too_many_blocks,
    too_many_operations, label_too_long   over a limit
    not_an_object, unknown_item           an item that is neither box nor line
    missing_index, bad_index,
    no_such_image                         index is not a whole number, or not that of an image
    bad_points, not_a_number, not_finite,
    huge_number, outside_image            the points
    missing_label, bad_label              the label

Source: ViLaSR, arXiv:2506.09965 (notation and grammar as in its released code). Its reader takes
Python literals only and drops unreadable blocks; this one repairs obvious mistakes and reports the
others.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

from spatial_jax.config import check_whole
from spatial_jax.drawing.lenient_json import Rejected, read_items
from spatial_jax.grammar import VILASR, Grammar, answer_of, is_well_formed
from spatial_jax.types import Operation, OperationError

FENCE = re.compile(r"^[ \t]*```[ \t]*json\b", re.MULTILINE | re.IGNORECASE)

Points = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of one turn, at least 1; counts, so that the same text always gives the same result."""

  blocks: int  # fenced blocks that are read
  block_chars: int  # length of a block
  depth: int  # brackets that are open at once, at most 100: the reader calls itself for each
  operations: int  # items, drawn or rejected
  label_chars: int  # length of a label
  digits: int  # of a coordinate before its decimal point, at most 15

  def __post_init__(self):
    check_whole(self, "blocks", "block_chars", "operations", "label_chars", at_least=1)
    check_whole(self, "depth", at_least=1, at_most=100)
    check_whole(self, "digits", at_least=1, at_most=15)


WIDE_LIMITS = Limits(  # for a caller without a config
  blocks=16, block_chars=20_000, depth=16, operations=64, label_chars=200, digits=6
)


@dataclasses.dataclass(frozen=True)
class Coordinates:
  """The coordinate unit of a model family and the sizes of the images; the only conversion.

  The unit is pixels of the resized image that the policy gets (Qwen2.5-VL), or a thousandth of its
  width and height (0-1000, Qwen3-VL).
  """

  unit: Literal["pixels", "per_mille"]
  sizes: tuple[tuple[int, int], ...]  # (width, height) in pixels of each image, drawn ones last

  def to_pixels(self, written_4: Points, image: int) -> Points:
    """Converts two written points to pixels of image number `image`, from 1."""
    x1, y1, x2, y2 = written_4
    x, y = self._scale(image)
    return (x1 * x, y1 * y, x2 * x, y2 * y)

  def from_pixels(self, points_4: Points, image: int) -> tuple[int, int, int, int]:
    """Converts two points in pixels to the whole numbers that the model writes."""
    x1, y1, x2, y2 = points_4
    x, y = self._scale(image)
    return (round(x1 / x), round(y1 / y), round(x2 / x), round(y2 / y))

  def _scale(self, image: int) -> tuple[float, float]:
    width, height = self.sizes[image - 1]
    return (1.0, 1.0) if self.unit == "pixels" else (width / 1000, height / 1000)


@dataclasses.dataclass(frozen=True)
class Parsed:
  """The content of one turn."""

  operations: tuple[Operation, ...]  # in order of the text; boxes have x1 <= x2 and y1 <= y2
  errors: tuple[OperationError, ...]  # one for every item or block that gives no operation
  answer_text: str | None  # the answer, stripped; see `grammar.answer_of`
  well_formed: bool  # the turn follows the grammar, whatever is in its drawing blocks

  @property
  def has_answer(self) -> bool:
    """Whether the turn has an answer, which ends the rollout."""
    return self.answer_text is not None


def parse(
  text: str, coordinates: Coordinates, limits: Limits = WIDE_LIMITS, grammar: Grammar = VILASR
) -> Parsed:
  """Reads one turn of model output; never raises, for any text.

  A box that extends beyond the border is cut there; a box completely outside and a line with an end
  outside are errors. A block that cannot be read gives no operations.

  Args:
    text: output of the policy between two observations, of any content.
    coordinates: unit, and images that exist before this turn.
    limits: counts.
    grammar: of the prompt form; if the policy may not draw, drawing blocks are not read.
  """
  items, errors = _read_blocks(text, limits) if grammar.draws else ([], [])
  results = [_read_item(item, coordinates, limits) for item in items[: limits.operations]]
  errors += [result for result in results if isinstance(result, OperationError)]
  if len(items) > limits.operations:
    detail = f"{len(items)} in a turn, at most {limits.operations}"
    errors.append(OperationError("too_many_operations", detail))
  return Parsed(
    tuple(result for result in results if isinstance(result, Operation)),
    tuple(errors),
    answer_of(text, grammar),
    is_well_formed(text, grammar),
  )


def _blocks(text: str) -> Iterator[str]:
  """The text after each opening fence, up to the next fence, else </think>, else the end."""
  for fence in FENCE.finditer(text):
    end = text.find("```", fence.end())
    if end < 0:
      end = text.find("</think>", fence.end())
    yield text[fence.end() : end] if end >= 0 else text[fence.end() :]


def _read_blocks(text: str, limits: Limits) -> tuple[list[Any], list[OperationError]]:
  """Returns the items of all blocks, and an error for each block that could not be read."""
  items: list[Any] = []
  errors: list[OperationError] = []
  for number, block in enumerate(_blocks(text)):
    if number == limits.blocks:
      errors.append(OperationError("too_many_blocks", f"at most {limits.blocks} in a turn"))
      break
    if len(block) > limits.block_chars:
      detail = f"{len(block)} characters, at most {limits.block_chars}"
      errors.append(OperationError("block_too_long", detail))
      continue
    try:
      items += read_items(block, limits.depth)
    except Rejected as rejected:
      errors.append(rejected.error)
  return items, errors


def _read_item(item: Any, coordinates: Coordinates, limits: Limits) -> Operation | OperationError:
  try:
    return _operation(item, coordinates, limits)
  except Rejected as rejected:
    return rejected.error


def _operation(item: Any, coordinates: Coordinates, limits: Limits) -> Operation:
  if not isinstance(item, dict):
    raise Rejected("not_an_object", _short(item))
  tool: Literal["box", "line"]
  if "bbox_2d" in item:
    tool, written = "box", _numbers(item["bbox_2d"], 4, limits)
  elif "start_point_2d" in item and "end_point_2d" in item:
    start, end = item["start_point_2d"], item["end_point_2d"]
    tool, written = "line", _numbers(start, 2, limits) + _numbers(end, 2, limits)
  else:
    raise Rejected("unknown_item", f"neither box nor line: {_short(list(item))}")
  label = _label(item, limits)
  image = _image(item, len(coordinates.sizes))
  x1, y1, x2, y2 = written
  points_4 = coordinates.to_pixels((x1, y1, x2, y2), image)
  return Operation(tool, image, _inside(tool, points_4, coordinates.sizes[image - 1]), label)


def _numbers(value: Any, count: int, limits: Limits) -> tuple[float, ...]:
  if not isinstance(value, list) or len(value) != count:
    raise Rejected("bad_points", f"expected {count} numbers, got {_short(value)}")
  for number in value:
    if not isinstance(number, float):
      raise Rejected("not_a_number", _short(number))
    if not math.isfinite(number):
      raise Rejected("not_finite", _short(number))
    if abs(number) >= 10**limits.digits:
      raise Rejected("huge_number", f"{number:g} has more than {limits.digits} digits")
  return tuple(value)


def _label(item: dict[str, Any], limits: Limits) -> str:
  if "label" not in item:
    raise Rejected("missing_label", _short(item))
  label = item["label"]
  if not isinstance(label, str) or not label.isprintable():
    raise Rejected("bad_label", f"expected printable text, got {_short(label)}")
  if len(label) > limits.label_chars:
    raise Rejected("label_too_long", f"{len(label)} characters, at most {limits.label_chars}")
  return label


def _image(item: dict[str, Any], images: int) -> int:
  if "index" not in item:
    raise Rejected("missing_index", _short(item))
  index = item["index"]
  if not isinstance(index, float) or not index.is_integer():
    raise Rejected("bad_index", f"expected a whole number, got {_short(index)}")
  if not 1 <= index <= images:
    raise Rejected("no_such_image", f"there are images 1 to {images}, not {index:g}")
  return int(index)


def _inside(tool: str, points_4: Points, size: tuple[int, int]) -> Points:
  """The part of a box inside the image; a line unchanged, if both ends are inside."""
  (x1, y1, x2, y2), (width, height) = points_4, size
  if tool == "box":
    (x1, x2), (y1, y2) = sorted((x1, x2)), sorted((y1, y2))
    outside = x2 < 0 or y2 < 0 or x1 > width or y1 > height
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
  else:
    outside = not (0 <= min(x1, x2) <= max(x1, x2) <= width)
    outside = outside or not (0 <= min(y1, y2) <= max(y1, y2) <= height)
  if outside:
    raise Rejected("outside_image", f"{_short(points_4)} in an image of {width} x {height}")
  return (x1, y1, x2, y2)


def _short(value: Any) -> str:
  """Model output for the detail of an error: short and on one line."""
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."
