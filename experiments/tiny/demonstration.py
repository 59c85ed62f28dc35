"""Demonstrations as trajectories, in the same form as sampled ones, so that one loss reads both."""

import dataclasses
from collections.abc import Sequence

from spatial_jax.data.tokenizer import IM_END
from spatial_jax.drawing.canvas import DrawnImage, Style, draw
from spatial_jax.drawing.parser import Coordinates, write_answer, write_turn
from spatial_jax.rollout.conversation import Conversation, TrajectoryBuilder
from spatial_jax.synthetic.oracle import ScriptTurn
from spatial_jax.types import Operation, Prompt, Trajectory


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
    height, width = prompt.task.images[operation.image - 1].shape[:2]
    shown_width, shown_height = coordinates.sizes[operation.image - 1]
    x, y = shown_width / width, shown_height / height
    x1, y1, x2, y2 = x1 * x, y1 * y, x2 * x, y2 * y
  a, b, c, d = coordinates.from_pixels((x1, y1, x2, y2), operation.image)
  points_4 = coordinates.to_pixels((float(a), float(b), float(c), float(d)), operation.image)
  return dataclasses.replace(operation, points_4=points_4)
