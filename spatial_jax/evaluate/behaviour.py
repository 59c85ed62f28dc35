"""Statistics of how a policy answers: drawing, turns, tokens, reasons to stop."""

from collections import Counter
from collections.abc import Sequence

from spatial_jax.evaluate.predictions import Prediction
from spatial_jax.reward.reflection import reflections


def behaviour(predictions: Sequence[Prediction]) -> dict[str, float]:
  """Statistics of the predictions of one policy; internal faults are left out and counted.

  Returns:
    drawing_share: answers with at least one drawn image, in [0, 1];
    boxes, lines, operations: of both, per answer;
    reflections: operations that revise an earlier one, per answer;
    executable_share: drawing turns in which every operation was valid and drawn, in [0, 1]; 0
      without drawing turns;
    turns, tokens, images: per answer;
    parsed_share: answers that could be read, in [0, 1];
    faults: number of answers left out;
    end/REASON: share of answers with this end reason, in [0, 1].
  """
  valid = [p for p in predictions if p.valid]
  count = max(len(valid), 1)
  turns = [turn for p in valid for turn in p.turns]
  drawing = [turn for turn in turns if turn.operations or turn.errors]
  ends = Counter(p.end_reason for p in valid)
  return {
    "drawing_share": sum(any(t.produced for t in p.turns) for p in valid) / count,
    "boxes": sum(o.tool == "box" for turn in turns for o in turn.operations) / count,
    "lines": sum(o.tool == "line" for turn in turns for o in turn.operations) / count,
    "operations": sum(len(turn.operations) for turn in turns) / count,
    "reflections": sum(reflections(p.turns) for p in valid) / count,
    "executable_share": sum(turn.executable for turn in drawing) / max(len(drawing), 1),
    "turns": len(turns) / count,
    "tokens": sum(p.tokens for p in valid) / count,
    "images": sum(p.images for p in valid) / count,
    "parsed_share": sum(p.parsed for p in valid) / count,
    "faults": float(len(predictions) - len(valid)),
  } | {f"end/{reason}": ends[reason] / count for reason in sorted(ends)}
