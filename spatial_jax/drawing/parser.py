"""Text of one turn -> drawing operations and typed errors, and back: all that knows the notation.

    <think> The table is cut off. </think> Action: Object Mapper
    ```json
    [{"index": 3, "bbox_2d": [120, 80, 342, 214], "label": "table"}]
    ```

A line, under Action: Path Tracer, is {"index": 3, "start_point_2d": [x, y], "end_point_2d": [x, y],
"label": "path"}; the last turn is <think> ... </think> Action: Answer and <answer> 4 </answer>.
Model output is data: our own reader reads it, nothing evaluates it, and every piece that is not
drawn leaves one error code:

    bad_json, too_deep                    the block has no one obvious reading
    block_too_long, too_many_blocks,
    too_many_operations, label_too_long   over a limit
    not_an_object, unknown_item           an item that is neither box nor line
    missing_index, bad_index,
    no_such_image                         index is not a whole number, or names no image
    bad_points, not_a_number, not_finite,
    huge_number, outside_image            the points
    missing_label, bad_label              the label

Source: ViLaSR, arXiv:2506.09965 (notation and grammar as in its released code). Its reader takes
Python literals only and drops what it cannot read; ours mends and reports.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from spatial_jax.drawing.lenient_json import Rejected, read_items
from spatial_jax.types import Operation, OperationError

TURN = re.compile(r"<think>(.*?)</think>\s*Action:\s*(.*?)(?=\n|$)", re.DOTALL)
FENCE = re.compile(r"^[ \t]*```[ \t]*json\b", re.MULTILINE | re.IGNORECASE)
TOOL_NAMES = {"box": "Object Mapper", "line": "Path Tracer"}

Points = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one turn may hold, by count, so that the same text always gives the same result.

  Attributes:
    blocks: fenced blocks that are read.
    block_chars: length of a block.
    depth: brackets open at once.
    operations: items, drawn or rejected.
    label_chars: length of a label.
    digits: digits of a coordinate before its decimal point.
  """

  blocks: int
  block_chars: int
  depth: int
  operations: int
  label_chars: int
  digits: int


@dataclasses.dataclass(frozen=True)
class Coordinates:
  """How a model family writes coordinates, and the images that it may name; the only conversion.

  Attributes:
    unit: "pixels" of the image as the policy sees it (Qwen2.5-VL), or "per_mille" of its width
      and height (0-1000, Qwen3-VL).
    sizes: (width, height) in pixels of each image so far: prompt first, then drawn.
  """

  unit: Literal["pixels", "per_mille"]
  sizes: tuple[tuple[int, int], ...]

  def to_pixels(self, written_4: Points, image: int) -> Points:
    """Two written points as pixels of image number `image`, from 1."""
    x1, y1, x2, y2 = written_4
    x, y = self._scale(image)
    return (x1 * x, y1 * y, x2 * x, y2 * y)

  def from_pixels(self, points_4: Points, image: int) -> tuple[int, int, int, int]:
    """Two points in pixels as the model writes them: whole numbers."""
    x1, y1, x2, y2 = points_4
    x, y = self._scale(image)
    return (round(x1 / x), round(y1 / y), round(x2 / x), round(y2 / y))

  def _scale(self, image: int) -> tuple[float, float]:
    width, height = self.sizes[image - 1]
    return (1.0, 1.0) if self.unit == "pixels" else (width / 1000, height / 1000)


@dataclasses.dataclass(frozen=True)
class Parsed:
  """What one turn says.

  Attributes:
    operations: in order of the text; boxes have x1 <= x2 and y1 <= y2.
    errors: one for every item or block that gives no operation.
    answer_text: what stands between the first answer tags, stripped; None without tags.
    well_formed: the turn fullmatches the grammar; says nothing about its blocks.
  """

  operations: tuple[Operation, ...]
  errors: tuple[OperationError, ...]
  answer_text: str | None
  well_formed: bool

  @property
  def has_answer(self) -> bool:
    return self.answer_text is not None


def parse(text: str, coordinates: Coordinates, limits: Limits) -> Parsed:
  """Reads one turn of model output; never raises, whatever the text.

  A box that reaches over the border is cut at it; a box wholly outside and a line with an end
  outside are errors. A block that cannot be read gives no operation at all.

  Args:
    text: what the policy said between two observations, of any content.
    coordinates: unit and images that exist when the turn begins.
    limits: counts.

  Returns:
    Operations in pixels and the errors; a function of the arguments alone.
  """
  items, errors = _read_blocks(text, limits)
  results = [_read_item(item, coordinates, limits) for item in items[: limits.operations]]
  errors += [result for result in results if isinstance(result, OperationError)]
  if len(items) > limits.operations:
    detail = f"{len(items)} in a turn, at most {limits.operations}"
    errors.append(OperationError("too_many_operations", detail))
  return Parsed(
    tuple(result for result in results if isinstance(result, Operation)),
    tuple(errors),
    _answer(text),
    TURN.fullmatch(text) is not None,
  )


def write_turn(think: str, operations: Sequence[Operation], coordinates: Coordinates) -> str:
  """A drawing turn as a demonstration writes it; `parse` gives the operations back.

  Args:
    think: the reasoning, without tags or fences.
    operations: at least one, of one tool; coordinates are rounded to whole written numbers.
    coordinates: unit and images.

  Raises:
    ValueError: on the host, when `parse` could not read the turn back.
  """
  tools = {operation.tool for operation in operations}
  if len(tools) != 1:
    raise ValueError(f"a turn draws with exactly one tool, got {sorted(tools)}")
  items = [_item(operation, coordinates) for operation in operations]
  block = json.dumps(items, ensure_ascii=False)
  if "```" in block:
    raise ValueError("a label must not hold a fence (```)")
  return f"{_opening(think, TOOL_NAMES[tools.pop()])}\n```json\n{block}\n```"


def write_answer(think: str, answer: str) -> str:
  """The last turn as a demonstration writes it. Raises ValueError for text that holds a tag."""
  if "</answer>" in answer:
    raise ValueError("an answer must not hold </answer>")
  return f"{_opening(think, 'Answer')}\n<answer> {answer} </answer>"


def _opening(think: str, action: str) -> str:
  for tag in ("</think>", "<answer>", "```"):
    if tag in think:
      raise ValueError(f"the reasoning must not hold {tag}")
  return f"<think> {think} </think> Action: {action}"


def _item(operation: Operation, coordinates: Coordinates) -> dict[str, Any]:
  written = coordinates.from_pixels(operation.points_4, operation.image)
  if operation.tool == "box":
    points = {"bbox_2d": list(written)}
  else:
    points = {"start_point_2d": list(written[:2]), "end_point_2d": list(written[2:])}
  return {"index": operation.image, **points, "label": operation.label}


def _answer(text: str) -> str | None:
  """What stands between the first <answer> and the </answer> behind it."""
  start = text.find("<answer>")
  end = text.find("</answer>", start)
  return None if start < 0 or end < 0 else text[start + len("<answer>") : end].strip()


def _blocks(text: str) -> Iterator[str]:
  """What stands behind each opening fence, up to the next fence, else </think>, else the end."""
  for fence in FENCE.finditer(text):
    end = text.find("```", fence.end())
    if end < 0:
      end = text.find("</think>", fence.end())
    yield text[fence.end() : end] if end >= 0 else text[fence.end() :]


def _read_blocks(text: str, limits: Limits) -> tuple[list[Any], list[OperationError]]:
  """The items of all blocks, and an error for each block that could not be read."""
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
    raise Rejected("not_an_object", _shown(item))
  tool: Literal["box", "line"]
  if "bbox_2d" in item:
    tool, written = "box", _numbers(item["bbox_2d"], 4, limits)
  elif "start_point_2d" in item and "end_point_2d" in item:
    start, end = item["start_point_2d"], item["end_point_2d"]
    tool, written = "line", _numbers(start, 2, limits) + _numbers(end, 2, limits)
  else:
    raise Rejected("unknown_item", f"neither box nor line: {_shown(list(item))}")
  label = _label(item, limits)
  image = _image(item, len(coordinates.sizes))
  x1, y1, x2, y2 = written
  points_4 = coordinates.to_pixels((x1, y1, x2, y2), image)
  return Operation(tool, image, _inside(tool, points_4, coordinates.sizes[image - 1]), label)


def _numbers(value: Any, count: int, limits: Limits) -> tuple[float, ...]:
  if not isinstance(value, list) or len(value) != count:
    raise Rejected("bad_points", f"expected {count} numbers, got {_shown(value)}")
  for number in value:
    if not isinstance(number, float):
      raise Rejected("not_a_number", _shown(number))
    if not math.isfinite(number):
      raise Rejected("not_finite", _shown(number))
    if abs(number) >= 10**limits.digits:
      raise Rejected("huge_number", f"{number:g} has more than {limits.digits} digits")
  return tuple(value)


def _label(item: dict[str, Any], limits: Limits) -> str:
  if "label" not in item:
    raise Rejected("missing_label", _shown(item))
  label = item["label"]
  if not isinstance(label, str) or not label.isprintable():
    raise Rejected("bad_label", f"expected printable text, got {_shown(label)}")
  if len(label) > limits.label_chars:
    raise Rejected("label_too_long", f"{len(label)} characters, at most {limits.label_chars}")
  return label


def _image(item: dict[str, Any], images: int) -> int:
  if "index" not in item:
    raise Rejected("missing_index", _shown(item))
  index = item["index"]
  if not isinstance(index, float) or not index.is_integer():
    raise Rejected("bad_index", f"expected a whole number, got {_shown(index)}")
  if not 1 <= index <= images:
    raise Rejected("no_such_image", f"{index:g} is not one of the images 1 to {images}")
  return int(index)


def _inside(tool: str, points_4: Points, size: tuple[int, int]) -> Points:
  """The part of a box that lies in the image; a line as it is, when both ends do."""
  (x1, y1, x2, y2), (width, height) = points_4, size
  if tool == "box":
    (x1, x2), (y1, y2) = sorted((x1, x2)), sorted((y1, y2))
    outside = x2 < 0 or y2 < 0 or x1 > width or y1 > height
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
  else:
    outside = not (0 <= min(x1, x2) <= max(x1, x2) <= width)
    outside = outside or not (0 <= min(y1, y2) <= max(y1, y2) <= height)
  if outside:
    raise Rejected("outside_image", f"{_shown(points_4)} in an image of {width} x {height}")
  return (x1, y1, x2, y2)


def _shown(value: Any) -> str:
  """Model output in an error's detail: short and on one line."""
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."
