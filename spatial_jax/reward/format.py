"""Format reward: every turn well formed and every drawing operation executable.

<think> ... </think> Action: Object Mapper
```json
[...]
```                                              any number of drawing turns, then
<think> ... </think> Action: Answer
<answer> ... </answer>                           the last turn, and only the last
"""

import re

from spatial_jax.types import Trajectory, Turn

_TURN = re.compile(r"<think>.*?</think>\s*Action:", re.DOTALL)


def final_answer(trajectory: Trajectory) -> str | None:
  """What stands between the answer tags of a finished rollout.

  Returns:
    The text, or None where the rollout ended early or its last turn has not exactly one answer.

  Source: ViLaSR (arXiv:2506.09965): early termination is rewarded 0, whatever was written.
  """
  if trajectory.end_reason != "answer":
    return None
  text = trajectory.turns[-1].text
  if text.count("<answer>") != 1 or text.count("</answer>") != 1:
    return None
  answer, closed, _ = text.partition("<answer>")[2].partition("</answer>")
  return answer.strip() if closed else None


def format_reward(trajectory: Trajectory) -> float:
  """1.0 when the rollout keeps the grammar and everything it drew could be drawn, else 0.0.

  Each turn is <think>...</think> Action: ...; the last one answers, no earlier one does; no block
  is unreadable and no item foreign (`Turn.errors`); every operation was executed
  (`Turn.executable`, vacuously true where a turn draws nothing).

  Args:
    trajectory: with the flags of its turns as the drawing protocol set them.

  Returns:
    1.0 or 0.0.

  Source: ViLaSR (arXiv:2506.09965), S_format of Eq. 2, and verl/utils/reward_score/gcot.py.
  """
  if final_answer(trajectory) is None:
    return 0.0
  early_answer = any("answer>" in turn.text for turn in trajectory.turns[:-1])
  return float(not early_answer and all(map(_well_formed, trajectory.turns)))


def _well_formed(turn: Turn) -> bool:
  return bool(_TURN.match(turn.text)) and turn.executable and not turn.errors
