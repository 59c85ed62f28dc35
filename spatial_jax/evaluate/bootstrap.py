"""Bootstrap intervals: how sure a mean over questions is."""

import numpy as np

from spatial_jax.evaluate.results import Cell

RESAMPLES = 10_000
_CHUNK = 2_000_000  # drawn indices in memory at once: 16 MB of int64


def bootstrap_interval(values: np.ndarray, seed: int) -> Cell:
  """The mean of `values` with its 95 % percentile bootstrap interval.

  Questions are drawn with replacement 10,000 times; low and high are the 2.5 % and 97.5 %
  quantiles of the means.

  Args:
    values: float [n], one score per question, finite.
    seed: of the resampling; the same seed and values give the same interval.

  Raises:
    ValueError: on the host, when there is no value or one is not finite.

  Source: Efron, Bootstrap Methods: Another Look at the Jackknife, Annals of Statistics 1979.
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not values.size:
    raise ValueError(f"expected scores [n] with n >= 1, got shape {list(values.shape)}")
  if not np.isfinite(values).all():
    raise ValueError(f"score {int(np.argmin(np.isfinite(values)))} of {values.size} is not finite")
  generator = np.random.default_rng(seed)
  chunk = max(1, _CHUNK // values.size)
  sizes = [(min(chunk, RESAMPLES - done), values.size) for done in range(0, RESAMPLES, chunk)]
  means = [values[generator.integers(values.size, size=size)].mean(1) for size in sizes]
  low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
  return Cell(float(values.mean()), float(low), float(high))


def paired_interval(after: np.ndarray, before: np.ndarray, seed: int) -> Cell:
  """The mean of `after - before` with its 95 % bootstrap interval.

  Args:
    after, before: float [n] scores of the same questions in the same order.
    seed: of the resampling.

  Returns:
    `low > 0` says that `after` is better.

  Raises:
    ValueError: on the host, when the two differ in length or a score is not finite.
  """
  after, before = np.asarray(after, np.float64), np.asarray(before, np.float64)
  if after.shape != before.shape:
    raise ValueError(f"paired scores differ in shape: {list(after.shape)}, {list(before.shape)}")
  return bootstrap_interval(after - before, seed)
