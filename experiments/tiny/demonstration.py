"""Demonstrations as text, and as trajectories in the same form as sampled ones."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from spatial_jax.data.tokenizer import IM_END
from spatial_jax.drawing.canvas import DrawnImage, Style, draw
from spatial_jax.drawing.parser import Coordinates
from spatial_jax.grammar import TAGS
from spatial_jax.rollout.conversation import Conversation, TrajectoryBuilder
from spatial_jax.synthetic.oracle import ScriptTurn
from spatial_jax.types import Operation, Prompt, Trajectory

TOOL_NAMES = {"box": "Object Mapper", "line": "Path Tracer"}


def write_turn(think: str, operations: Sequence[Operation], coordinates: Coordinates) -> str:
  """Returns the text of a drawing turn; `parse` returns the same operations.

  Args:
    think: the reasoning, without tags or fences.
    operations: at least one, all of one tool; written coordinates are rounded to whole numbers.
    coordinates: unit and images.

  Raises:
    ValueError: if `parse` could not read the turn.
  """
  tools = {operation.tool for operation in operations}
  if len(tools) != 1:
    raise ValueError(f"a turn draws with exactly one tool, got {sorted(tools)}")
  items = [_item(operation, coordinates) for operation in operations]
  block = json.dumps(items, ensure_ascii=False)
  if "```" in block:
    raise ValueError("a label must not contain a fence (```)")
  return f"{_think_and_action(think, TOOL_NAMES[tools.pop()])}\n```json\n{block}\n```"


def write_answer(think: str, answer: str) -> str:
  """Returns the text of the last turn. Raises ValueError if a text contains a tag."""
  for tag in TAGS:
    if tag in answer:
      raise ValueError(f"an answer must not contain {tag}")
  return f"{_think_and_action(think, 'Answer')}\n<answer> {answer} </answer>"


def _think_and_action(think: str, action: str) -> str:
  for tag in (*TAGS, "```"):
    if tag in think:
      raise ValueError(f"the reasoning must not contain {tag}")
  return f"<think> {think} </think> Action: {action}"


def _item(operation: Operation, coordinates: Coordinates) -> dict[str, Any]:
  written = coordinates.from_pixels(operation.points_4, operation.image)
  if operation.tool == "box":
    points = {"bbox_2d": list(written)}
  else:
    points = {"start_point_2d": list(written[:2]), "end_point_2d": list(written[2:])}
  return {"index": operation.image, **points, "label": operation.label}


def demonstration_trajectory(
  conversation: Conversation, prompt: Prompt, script: Sequence[ScriptTurn], style: Style
) -> Trajectory:
  """Writes a script as a trajectory and makes its drawings; every token of its turns is trained.

  Args:
    conversation: encodes turns and observations.
    prompt: of the task.
    script: drawing turns (in pixels of the images of the task), then one answer.
    style: of the drawings.

  Returns:
    The trajectory. Its log-probabilities are 0, because no policy sampled it.
  """
  tokenizer, unit = conversation.tokenizer, conversation.policy.coordinates
  builder = TrajectoryBuilder(prompt, 0, (), 1.0, conversation.forbidden_ids)
  images = [DrawnImage(image.pixels, ()) for image in prompt.images]
  for number, turn in enumerate(script):
    sizes = tuple((image.pixels.shape[1], image.pixels.shape[0]) for image in images)
    coordinates = Coordinates(unit, sizes)
    operations = tuple(_as_parsed(o, prompt, coordinates) for o in turn.operations)
    if turn.answer is None:
      text = write_turn(turn.think, operations, coordinates)
    else:
      text = write_answer(turn.think, turn.answer)
    ids = [*tokenizer.encode(text), tokenizer.id(IM_END)]
    builder.add_turn(ids, [0.0] * len(ids), 0, text, operations, ())
    if turn.answer is None:
      drawn = draw(images, operations, style)
      last = number == len(script) - 2
      builder.add_observation(
        conversation.observation(len(images) + 1, [image.pixels for image in drawn], last)
      )
      images += drawn
  return builder.finish("answer")


def _as_parsed(operation: Operation, prompt: Prompt, coordinates: Coordinates) -> Operation:
  """The operation as it is parsed from the turn: on the resized image, in whole written numbers."""
  x1, y1, x2, y2 = operation.points_4
  if operation.image <= len(prompt.images):  # drawn images are not resized
    height, width = prompt.original_sizes[operation.image - 1]
    shown_width, shown_height = coordinates.sizes[operation.image - 1]
    x, y = shown_width / width, shown_height / height
    x1, y1, x2, y2 = x1 * x, y1 * y, x2 * x, y2 * y
  a, b, c, d = coordinates.from_pixels((x1, y1, x2, y2), operation.image)
  points_4 = coordinates.to_pixels((float(a), float(b), float(c), float(d)), operation.image)
  return dataclasses.replace(operation, points_4=points_4)
