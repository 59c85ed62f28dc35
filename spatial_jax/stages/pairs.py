"""Pairs of responses for DPO: the true answer, and the same answer made wrong.

    number   3.2       5.1     times or divided by 1.3 to 2.5
    choice   B         D       another option
    words    left      right   another answer to the same question type

Source: vsGRPO (arXiv:2504.00883): "chosen = correct answer, rejected = answer modified to a wrong
one"; how it is modified is not stated.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping

import numpy as np

from spatial_jax.errors import DataError
from spatial_jax.grammar import Grammar
from spatial_jax.rollout.demonstration import Demonstrator, answer_turn
from spatial_jax.types import Task, Trajectory

_FACTORS = (1.3, 2.5)  # of a wrong number
_PAIR_STREAM = 8  # of random numbers


def answers_by_type(tasks: Iterable[Task]) -> dict[str, tuple[str, ...]]:
  """The different answers in words of each question type, sorted."""
  found: dict[str, set[str]] = {}
  for task in tasks:
    if task.answer_kind == "words":
      found.setdefault(task.question_type, set()).add(task.answer)
  return {name: tuple(sorted(answers)) for name, answers in found.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class CorruptedPairs:
  """Task -> a pair: the true answer, and a wrong one; always the same for a task.

  A solver writes the reasoning of both, if there is one.
  """

  demonstrator: Demonstrator
  words: Mapping[str, tuple[str, ...]]  # answers of each question type, for answers in words
  seed: int

  def __call__(self, task: Task) -> tuple[Trajectory, Trajectory]:
    """Returns preferred and rejected response.

    Raises:
      DataError: if the task has no wrong answer, or the form asks for reasoning.
    """
    solver = self.demonstrator.solver
    key = (self.seed, zlib.crc32(task.task_id.encode()), _PAIR_STREAM)
    wrong = wrong_answer(task, self.words, np.random.default_rng(key))
    if solver is not None:
      *first, last = solver(task)
      scripts = [(*first, dataclasses.replace(last, answer=a)) for a in (last.answer, wrong)]
      right, bad = (self.demonstrator.of_script(task, script) for script in scripts)
      return right, bad
    grammar: Grammar = self.demonstrator.conversation.form.grammar
    right_turn = answer_turn(task, grammar)
    wrong_turn = answer_turn(dataclasses.replace(task, answer=wrong), grammar)
    return self.demonstrator.pair(
      dataclasses.replace(task, turns=(right_turn,), rejected=(wrong_turn,))
    )


def wrong_answer(task: Task, words: Mapping[str, tuple[str, ...]], rng: np.random.Generator) -> str:
  """Returns an answer that differs from the true one.

  Raises:
    DataError: if there is none.
  """
  if task.answer_kind == "choice":
    letters = [option[0] for option in task.options or () if option[0] != task.answer]
    return str(rng.choice(letters))
  if task.answer_kind == "words":
    others = [answer for answer in words.get(task.question_type, ()) if answer != task.answer]
    if not others:
      raise DataError(f"task {task.task_id}: no other answer of type {task.question_type} is known")
    return str(rng.choice(others))
  truth = float(task.answer)
  decimals = len(task.answer.partition(".")[2])
  factor = float(np.exp(rng.uniform(*np.log(_FACTORS))))
  larger, smaller = truth * factor, truth / factor
  for value in (larger, smaller) if rng.random() < 0.5 else (smaller, larger):
    text = f"{value:.{decimals}f}"
    if float(text) not in (truth, 0.0):
      return text
  return f"{truth + 1:.{decimals}f}"
