"""What a policy does on the way to its answers: drawing, looking, stopping."""

from collections import Counter
from collections.abc import Sequence

from spatial_jax.evaluate.predictions import Prediction


def behaviour(answers: Sequence[Prediction]) -> dict[str, float]:
  """Statistics of one sheet; faults of the machinery are left out but counted.

  Returns:
    drawing_share: answers with at least one drawn picture, in [0, 1];
    operations: boxes and lines per answer;
    executable_share: drawing turns of which every item was valid and drawn, in [0, 1], 0 when
      nothing was drawn;
    turns, tokens, pictures: per answer;
    parsed_share: answers that could be read, in [0, 1];
    faults: answers left out;
    end/REASON: share of answers that ended so, in [0, 1].
  """
  valid = [a for a in answers if a.valid]
  count = max(len(valid), 1)
  turns = [turn for a in valid for turn in a.turns]
  drawing = [turn for turn in turns if turn.operations or turn.errors]
  ends = Counter(a.end_reason for a in valid)
  return {
    "drawing_share": sum(any(t.produced for t in a.turns) for a in valid) / count,
    "operations": sum(len(turn.operations) for turn in turns) / count,
    "executable_share": sum(turn.executable for turn in drawing) / max(len(drawing), 1),
    "turns": len(turns) / count,
    "tokens": sum(a.tokens for a in valid) / count,
    "pictures": sum(a.pictures for a in valid) / count,
    "parsed_share": sum(a.parsed for a in valid) / count,
    "faults": float(len(answers) - len(valid)),
  } | {f"end/{reason}": ends[reason] / count for reason in sorted(ends)}
