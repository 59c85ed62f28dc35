"""The rubric for physical reasoning: five terms, each 0 or 1 or between, weighted.

    correctness   the score of the answer
    principle     the reasoning names the principle of the problem, see `reward.principles`
    unit          the unit of the answer has the dimension of the right one
    format        the response keeps its format
    structure     the reasoning states what is given, writes an equation and reaches the answer

    rubric = sum_j w_j * term_j

Source: "Reward design for physical reasoning" (arXiv:2604.13993) names correctness, principle and
unit consistency; its formulas were not available. Format and structure, the tests of all terms and
the weights are ours.
"""

import re
from typing import NamedTuple

import numpy as np

from spatial_jax.grammar import answer_of
from spatial_jax.reward.config import RUBRIC_TERMS, RubricConfig
from spatial_jax.reward.custom import Response, custom_reward
from spatial_jax.reward.parse import expected_of, read_as
from spatial_jax.reward.principles import names_principle
from spatial_jax.reward.quantity import COUNT, is_metric, parse_number
from spatial_jax.reward.units import dimension, read_measure
from spatial_jax.types import Array, Task, Trajectory

_EQUATION = re.compile(r"[A-Za-z0-9)\]]\s*=\s*[-+(\[A-Za-z0-9.]")
_GIVEN = re.compile(
  r"\b(?:given|known|the (?:image|diagram|figure) shows|i read|is labell?ed)\b", re.I
)
_MIN_STEPS = 2  # sentences or lines


class RubricTerms(NamedTuple):
  """The terms that are read from text, float32 in [0, 1]; arrays [B, G] for a whole step."""

  principle: Array
  unit: Array
  structure: Array
  judged: Array  # of the judge; NaN without one


def rubric_terms(
  trajectory: Trajectory, task: Task, answer: str | None, cfg: RubricConfig
) -> RubricTerms:
  """Reads the terms of one response.

  Args:
    trajectory: the rollout.
    task: `extra` may have subfield and principle.
    answer: of the rollout, None without one.

  Raises:
    UserError: if the judge fails.
  """
  text = trajectory.text
  extra = task.extra
  judged = np.nan
  if cfg.judge:
    response = Response(
      text=text,
      answer=answer,
      task=task,
      turns=trajectory.turns,
      tokens=int(trajectory.trained_T.sum()),
      end_reason=trajectory.end_reason,
      sample=trajectory.sample,
    )
    judged = float(np.clip(custom_reward(cfg.judge, response), 0.0, 1.0))
  subfield, principle = (str(extra.get(name) or "") for name in ("subfield", "principle"))
  return RubricTerms(
    principle=_scalar(names_principle(_reasoning(trajectory), subfield, principle)),
    unit=_scalar(unit_term(answer, task)),
    structure=_scalar(structure_term(_reasoning(trajectory), answer)),
    judged=_scalar(judged),
  )


def rubric(score: Array, format_score: Array, terms: RubricTerms, cfg: RubricConfig) -> Array:
  """The weighted sum of the five terms; elementwise, works under jit and vmap."""
  values: dict[str, Array] = {
    "correctness": score,
    "principle": terms.principle,
    "unit": terms.unit,
    "format": format_score,
    "structure": terms.structure,
  }
  if cfg.judge:
    values[cfg.judged_term] = terms.judged
  total: Array = cfg.correctness * values["correctness"]
  for name in RUBRIC_TERMS[1:]:
    total = total + vars(cfg)[name] * values[name]
  return total


def _scalar(value: float) -> np.ndarray:
  return np.array(value, np.float32)


def unit_term(answer: str | None, task: Task) -> float:
  """Returns 1.0 if the unit of the answer has the dimension of the right one, else 0.0.

  The right unit is that of the task or of its question, else that of the true answer. Lengths,
  areas and counts are read as the accuracy reads them, but a length or an area without a unit earns
  0. A choice is judged by the text of the option that the answer repeats ("B. 3 m/s"); a letter
  alone has no unit.
  """
  if answer is None:
    return 0.0
  if task.answer_kind == "choice":
    by_letter = {option[:1]: option[2:].strip() for option in task.options or ()}
    wanted = read_measure(by_letter.get(task.answer, ""))
    given = read_measure(answer[2:].strip() if answer[1:2] in (".", ")", ":") else answer)
  else:
    expected = expected_of(task)
    if expected.unit and is_metric(expected.unit):  # a count, a length or an area
      bare = expected.unit != COUNT and parse_number(answer, COUNT, "") is not None
      return float(read_as(answer, expected).parsed and not bare)
    wanted = read_measure(f"1 {expected.unit}" if expected.unit else task.answer)
    given = read_measure(answer)
  if wanted is None or given is None:
    return 0.0
  return float(dimension(given.unit) == dimension(wanted.unit))


def structure_term(reasoning: str, answer: str | None) -> float:
  """Returns a third for each of: what is given, an equation in steps, the answer reached."""
  steps = [part for part in re.split(r"[.;\n]\s+|\n", reasoning) if part.strip()]
  number = re.search(r"\d+(?:\.\d+)?", answer or "")
  tail = reasoning[len(reasoning) // 2 :]
  reached = number is not None and number[0] in tail
  found = (
    _GIVEN.search(reasoning) is not None,
    _EQUATION.search(reasoning) is not None and len(steps) >= _MIN_STEPS,
    reached,
  )
  return sum(found) / len(found)


def _reasoning(trajectory: Trajectory) -> str:
  """The text of the turns without the answer blocks."""
  grammar, texts = trajectory.grammar, []
  for turn in trajectory.turns:
    answer = answer_of(turn.text, grammar) if grammar.answer else None
    text = turn.text if answer is None else turn.text.rpartition(f"<{grammar.answer}>")[0]
    texts.append(re.sub(r"</?[a-z_]+>", " ", text))
  return "\n".join(texts)
