"""Accuracy as ViLaSR's released code computes it, with its quirks.

A rollout without an answer block is scored too: the first number anywhere in its text counts. A
choice must be equal to the key in every character.

Source: ViLaSR (arXiv:2506.09965), verl/utils/reward_score/gcot.py of its repository.
"""

import re

import numpy as np

from spatial_jax.types import Task

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FIRST_NUMBER = re.compile(r"([-+]?\d*\.?\d+)")
_THRESHOLDS = np.arange(0.5, 0.975, 0.05).astype(np.float32)
_EPSILON = 1e-8


def release_accuracy(text: str, task: Task) -> float:
  """Returns the accuracy of a whole response, in [0, 1].

  Args:
    text: all turns.
    task: with a choice or a number; words are rewarded 0, as every other kind there.
  """
  match = _ANSWER.search(text)
  content = (match[1] if match else text).strip()
  if task.answer_kind == "choice":
    return float(content == task.answer.strip())
  if task.answer_kind != "number":
    return 0.0
  found, truth = _FIRST_NUMBER.search(content), _FIRST_NUMBER.search(task.answer)
  if not found or not truth:
    return 0.0
  answer, right = np.float32(found[1]), np.float32(truth[1])
  error = abs(answer - right) / (abs(right) + np.float32(_EPSILON))
  return float(np.mean(error < 1 - _THRESHOLDS))
