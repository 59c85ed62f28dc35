"""A demonstrated conversation as a trajectory: in the form of a sampled one, read by one loss."""

import dataclasses
from collections.abc import Sequence

from spatial_jax.data.tokenizer import IM_END
from spatial_jax.drawing.canvas import Picture, Style, draw
from spatial_jax.drawing.parser import Coordinates, write_answer, write_turn
from spatial_jax.rollout.conversation import Conversation, Episode
from spatial_jax.synthetic.oracle import ScriptTurn
from spatial_jax.types import Operation, Prompt, Trajectory


def play(
  conversation: Conversation, prompt: Prompt, script: Sequence[ScriptTurn], style: Style
) -> Trajectory:
  """Writes out a script, drawing as it says; every token of its turns counts as trained.

  Args:
    conversation: words and tokenizer.
    prompt: of the task.
    script: drawing turns (in pixels of the task's own pictures), then one answer.
    style: of the drawings.

  Returns:
    A trajectory whose log-probabilities are 0: nobody sampled it.
  """
  tokenizer, unit = conversation.tokenizer, conversation.policy.coordinates
  episode = Episode(prompt, 0, (), 1.0, conversation.forbidden_ids)
  pictures = [Picture(image.pixels, ()) for image in prompt.images]
  for number, turn in enumerate(script):
    sizes = tuple((p.pixels.shape[1], p.pixels.shape[0]) for p in pictures)
    coordinates = Coordinates(unit, sizes)
    operations = tuple(_as_read(o, prompt, coordinates) for o in turn.operations)
    if turn.answer is None:
      text = write_turn(turn.think, operations, coordinates)
    else:
      text = write_answer(turn.think, turn.answer)
    ids = [*tokenizer.encode(text), tokenizer.id(IM_END)]
    episode.add_turn(ids, [0.0] * len(ids), 0, text, operations, ())
    if turn.answer is None:
      drawn = draw(pictures, operations, style)
      last = number == len(script) - 2
      episode.add_observation(
        conversation.observation(len(pictures) + 1, [p.pixels for p in drawn], last)
      )
      pictures += drawn
  return episode.finish("answer")


def _as_read(operation: Operation, prompt: Prompt, coordinates: Coordinates) -> Operation:
  """The operation as it will be read back: on the resized picture, in whole written numbers."""
  x1, y1, x2, y2 = operation.points_4
  if operation.image <= len(prompt.images):  # a drawn picture has the size the policy sees
    height, width = prompt.task.images[operation.image - 1].shape[:2]
    shown_width, shown_height = coordinates.sizes[operation.image - 1]
    x, y = shown_width / width, shown_height / height
    x1, y1, x2, y2 = x1 * x, y1 * y, x2 * x, y2 * y
  a, b, c, d = coordinates.from_pixels((x1, y1, x2, y2), operation.image)
  points_4 = coordinates.to_pixels((float(a), float(b), float(c), float(d)), operation.image)
  return dataclasses.replace(operation, points_4=points_4)
