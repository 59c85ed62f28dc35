"""The structure of one turn, which the prompt form states: reasoning, action line, answer, drawing.

    ViLaSR     <think> The table is cut off. </think> Action: Object Mapper      a turn that draws
               <think> There is one table. </think> Action: Answer               the last turn
               <answer> 1 </answer>
    vsGRPO     <think> There is one table. </think><answer> 1 </answer>
    VSI-Bench  1

Drawing (does this turn end the rollout?) and reward (what is the answer?) share these functions.

Source: ViLaSR, arXiv:2506.09965; vsGRPO, arXiv:2504.00883. ViLaSR's released code finds the tags
anywhere in the text; here an answer block inside the reasoning is no answer.
"""

import dataclasses
import re

from spatial_jax.config import check_field

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_NAME = re.compile(r"(?:[a-z][a-z_]*)?")
_ANY_TAG = re.compile(r"</?[a-z][a-z_]*>", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Grammar:
  """The structure of the turns of one prompt form."""

  reasoning: str  # tag of the reasoning ("think", "observe"); "" for none
  action: bool  # the line "Action: ..." follows the reasoning, as in ViLaSR
  answer: str  # tag of the answer ("answer"); "": all the text after the reasoning is the answer
  draws: bool  # the policy may draw; otherwise its first turn is the last

  def __post_init__(self):
    rule = 'be the name of a tag in small letters, such as "think", or ""'
    for name in ("reasoning", "answer"):
      check_field(self, name, _NAME.fullmatch(vars(self)[name]) is not None, rule)
    other = not self.answer or self.answer != self.reasoning
    check_field(self, "answer", other, "differ from the tag of the reasoning")
    closed = bool(self.reasoning and self.answer)
    check_field(self, "action", closed or not self.action, "be false without both tags")
    rule = "be false without a tag of the answer: every turn would be an answer"
    check_field(self, "draws", bool(self.answer) or not self.draws, rule)


VILASR = Grammar(reasoning="think", action=True, answer="answer", draws=True)


def answer_of(text: str, grammar: Grammar) -> str | None:
  """Returns the text of the last answer block after the reasoning, or None without one.

      <think> a </think> Action: Answer <answer> 3 </answer>                   "3"
      <think> a <answer> 2 </answer> </think> Action: Answer                   None
      <think> a </think> Action: Answer <answer> 3 </answer> <answer> 4 </answer>    "4"
      <think> not closed <answer> 2 </answer>                                  None
      <answer> 3 </answer>                                                     "3"

  Without a tag of the answer, all the text after the reasoning is the answer, unless it is empty.

  Args:
    text: one turn of the policy, of any content.
    grammar: of its prompt form.
  """
  after, tag = text, grammar.reasoning
  if tag:
    after = text.rpartition(f"</{tag}>")[2].partition(f"<{tag}>")[0]
  if not grammar.answer:
    return after.strip() or None
  opening, closing = _pair(grammar.answer)
  before_end, end, _ = after.rpartition(closing)
  _, start, answer = before_end.rpartition(opening)
  return answer.partition(closing)[0].strip() if start and end else None


def is_well_formed(text: str, grammar: Grammar) -> bool:
  """Returns whether the turn has the parts of the grammar, each once, and nothing after the answer.

  The answer may be missing if the policy may draw. Drawing blocks are not checked.

  Args:
    text: one turn of the policy, of any content.
    grammar: of its prompt form.
  """
  reasoning, answer = _pair(grammar.reasoning), _pair(grammar.answer)
  tags = [tag for tag in _ANY_TAG.findall(text) if tag in (*reasoning, *answer)]
  answers = tags == [*reasoning, *answer]
  if not answers and not (grammar.draws and tags == [*reasoning]):
    return False
  if not text.startswith(tags[0] if tags else ""):
    return False
  rest = text.partition(reasoning[1])[2] if reasoning else text
  if not answer:
    return bool(rest.strip()) and _ANY_TAG.search(rest) is None
  before = rest.partition(answer[0])[0].strip()
  if grammar.action and not before.startswith("Action:"):
    return False
  if answers and not grammar.action and before:
    return False
  return not answers or not rest.rpartition(answer[1])[2].strip()


def _pair(tag: str) -> tuple[str, ...]:
  """The opening and the closing form of a tag; () for no tag."""
  return (f"<{tag}>", f"</{tag}>") if tag else ()
