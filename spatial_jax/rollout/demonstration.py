"""A demonstrated conversation as a trajectory: the same form as a sampled one, so that one loss reads both."""

from collections.abc import Sequence

from spatial_jax.data.demonstrations import ScriptTurn
from spatial_jax.data.text import IM_END
from spatial_jax.drawing.canvas import Picture, Style, draw
from spatial_jax.drawing.protocol import Coordinates, write_answer, write_turn
from spatial_jax.rollout.conversation import Conversation, Episode
from spatial_jax.types import Prompt, Trajectory


def play(
  conversation: Conversation, prompt: Prompt, script: Sequence[ScriptTurn], style: Style
) -> Trajectory:
  """Writes out a script, drawing as it says; every token of its turns counts as trained.

  Args:
    conversation: words and tokenizer.
    prompt: of the task.
    script: drawing turns, then one answer.
    style: of the drawings.

  Returns:
    A trajectory whose log-probabilities are 0: nobody sampled it.
  """
  tokenizer, unit = conversation.tokenizer, conversation.policy.coordinates
  episode = Episode(prompt, 0, (), 1.0, conversation.forbidden_ids)
  pictures = [Picture(image.pixels, ()) for image in prompt.images]
  for number, turn in enumerate(script):
    sizes = tuple((p.pixels.shape[1], p.pixels.shape[0]) for p in pictures)
    if turn.answer is None:
      text = write_turn(turn.think, turn.operations, Coordinates(unit, sizes))
    else:
      text = write_answer(turn.think, turn.answer)
    ids = [*tokenizer.encode(text), tokenizer.id(IM_END)]
    episode.add_turn(ids, [0.0] * len(ids), 0, text, turn.operations, (), True)
    if turn.answer is None:
      drawn = draw(pictures, turn.operations, style)
      last = number == len(script) - 2
      episode.add_observation(
        conversation.observation(len(pictures) + 1, [p.pixels for p in drawn], last)
      )
      pictures += drawn
  return episode.finish("answer")
