"""The structure of one turn: a think block, an action and, in the last turn, one answer block.

    <think> The table is cut off. </think> Action: Object Mapper      a turn that draws
    <think> There is one table. </think> Action: Answer               the last turn
    <answer> 1 </answer>

Drawing (does this turn end the rollout?) and reward (what is the answer?) share these functions.

Source: ViLaSR, arXiv:2506.09965. Its released code finds the tags anywhere in the text; here an
answer block inside the reasoning is no answer.
"""

import re

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_TAG = re.compile("|".join(TAGS))


def answer_of(text: str) -> str | None:
  """Returns the text of the last answer block after the reasoning, or None without one.

      <think> a </think> Action: Answer <answer> 3 </answer>                   "3"
      <think> a <answer> 2 </answer> </think> Action: Answer                   None
      <think> a </think> Action: Answer <answer> 3 </answer> <answer> 4 </answer>    "4"
      <think> not closed <answer> 2 </answer>                                  None
      <answer> 3 </answer>                                                     "3"

  Args:
    text: one turn of the policy, of any content.
  """
  after = text.rpartition("</think>")[2].partition("<think>")[0]
  before_end, end, _ = after.rpartition("</answer>")
  _, start, answer = before_end.rpartition("<answer>")
  return answer.partition("</answer>")[0].strip() if start and end else None


def is_well_formed(text: str) -> bool:
  """Returns whether the turn is one think block, an action and at most one answer block at its end.

  Drawing blocks are not checked.

  Args:
    text: one turn of the policy, of any content.
  """
  tags = _TAG.findall(text)
  if not text.startswith("<think>") or tags not in (list(TAGS[:2]), list(TAGS)):
    return False
  has_action = text.partition("</think>")[2].lstrip().startswith("Action:")
  text_after_answer = text.rpartition("</answer>")[2] if len(tags) > 2 else ""
  return has_action and not text_after_answer.strip()
