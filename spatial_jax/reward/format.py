"""The answer of a rollout and its format reward: every turn well formed, every drawing executed.

The grammar is that of the prompt form, see `spatial_jax.grammar`. With ViLaSR's:

<think> ... </think> Action: Object Mapper
```json
[...]
```                                              any number of drawing turns, then
<think> ... </think> Action: Answer
<answer> ... </answer>                           the last turn, and only the last
"""

from collections.abc import Sequence

from spatial_jax.grammar import Grammar, answer_of, is_well_formed
from spatial_jax.types import Trajectory, Turn


def final_answer(trajectory: Trajectory) -> str | None:
  """Returns the answer of the last turn; None without one, or after an early end.

  An answer inside the reasoning does not count; of several answer blocks the last one counts.

  Source: ViLaSR (arXiv:2506.09965): a rollout that ended early is rewarded 0.
  """
  if trajectory.end_reason != "answer":
    return None
  return answer_of(trajectory.turns[-1].text, trajectory.grammar)


def format_reward(trajectory: Trajectory) -> float:
  """Returns 1.0 if the rollout keeps the grammar and every drawing was executed, else 0.0.

  Source: ViLaSR (arXiv:2506.09965), S_format of Eq. 2, and verl/utils/reward_score/gcot.py.
  """
  if trajectory.end_reason != "answer":
    return 0.0
  return format_of_turns(trajectory.turns, trajectory.grammar)


def format_of_turns(turns: Sequence[Turn], grammar: Grammar) -> float:
  """Returns the format reward of the turns of a rollout that ended with an answer.

  1.0 if each turn follows the grammar, exactly the last turn has an answer, no drawing block has an
  error, and every operation was executed; else 0.0.
  """
  answers = [answer_of(turn.text, grammar) is not None for turn in turns]
  answers_last = answers == [False] * (len(turns) - 1) + [True]
  return float(answers_last and all(_is_right(turn, grammar) for turn in turns))


def _is_right(turn: Turn, grammar: Grammar) -> bool:
  return is_well_formed(turn.text, grammar) and turn.executable and not turn.errors
