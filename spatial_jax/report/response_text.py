"""The text of a response, cut into thoughts, actions, drawing code and answers."""

import re
from typing import NamedTuple

_BLOCKS = re.compile(
  r"<think>(?P<think>.*?)(?:</think>|(?=```|<answer>)|\Z)"
  r"|Action:(?P<action>[^\n<`]*)"
  r"|```(?:json)?(?P<code>.*?)(?:```|\Z)"
  r"|<answer>(?P<answer>.*?)</answer>",
  re.DOTALL,
)


class Piece(NamedTuple):
  """A part of a response without its tags.

  Attributes:
    kind: "think", "action", "code", "answer", or "plain" for everything else.
    given: first words of the part that were given to the policy, "" if it sampled all of them.
    text: the other words.
  """

  kind: str
  given: str
  text: str


def pieces(text: str, prefix: str) -> list[Piece]:
  """Cuts a response; only tags and outer blanks are dropped.

      "<think> far </think> Action: Answer\\n<answer> 2 </answer>"
      -> think "far", action "Answer", answer "2"

  Args:
    text: of one turn, as the policy wrote it.
    prefix: given words that the text begins with, "" for none.
  """
  given = len(prefix) if text.startswith(prefix) else 0
  spans, end = [], 0
  for match in _BLOCKS.finditer(text):
    kind = str(match.lastgroup)
    spans += [("plain", end, match.start()), (kind, *match.span(kind))]
    end = match.end()
  spans.append(("plain", end, len(text)))
  cut = [(kind, start, min(max(start, given), stop), stop) for kind, start, stop in spans]
  return [
    Piece(kind, text[start:sampled].strip(), text[sampled:stop].strip())
    for kind, start, sampled, stop in cut
    if text[start:stop].strip()
  ]
