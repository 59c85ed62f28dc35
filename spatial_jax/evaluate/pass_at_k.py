"""pass@k: the probability that at least one of k samples is right, without bias.

    pass@k = mean over questions of 1 - C(n - c, k) / C(n, k)      c of n samples are right

Source: Chen et al. (arXiv:2107.03374, Eq. 1).
"""

from collections.abc import Sequence

import numpy as np

from spatial_jax.evaluate.predictions import Prediction

RIGHT = 0.5  # a score above it is right: an exact match, or a number with an MRA above one half


def pass_at_k(right_NG: np.ndarray, k: int) -> float:
  """Returns pass@k of questions with the same number of samples.

  Args:
    right_NG: bool, [questions, samples].
    k: from 1 to the number of samples.

  Raises:
    ValueError: if k is out of range, or there is no question.
  """
  questions, samples = right_NG.shape
  if not 1 <= k <= samples or not questions:
    raise ValueError(f"k is {k} and must be from 1 to the {samples} samples of each question")
  wrong_N = samples - right_NG.sum(axis=1)
  # C(n - c, k) / C(n, k) as a product of k factors, each at most 1.
  factor_NK = (wrong_N[:, None] - np.arange(k)) / (samples - np.arange(k))
  return float(np.mean(1 - np.prod(np.maximum(factor_NK, 0), axis=1)))


def passes(samples: Sequence[Sequence[Prediction]]) -> dict[str, float]:
  """pass@k for k = 1, 2, 4, ... of predictions [samples][questions]; faults are left out.

  Returns:
    "pass@1", "pass@2", ...: in [0, 1]; {} if no question is left.
  """
  rows = [row for row in zip(*samples, strict=True) if all(p.valid for p in row)]
  if not rows:
    return {}
  right_NG = np.array([[p.score > RIGHT for p in row] for row in rows])
  powers = [2**i for i in range(len(samples).bit_length()) if 2**i <= len(samples)]
  return {f"pass@{k}": pass_at_k(right_NG, k) for k in powers}
