"""Accuracy of an answer: mean relative accuracy, exact match, ratio rewards.

All are pure, elementwise, float32, and work under jit and vmap.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax.types import Array

# 1 - c for the published confidences c = .50, .55, ..., .95, computed in float32.
MRA_TOLERANCES = np.float32(1) - np.linspace(0.5, 0.95, 10).astype(np.float32)

# Avoids a division by 0; below the resolution of float32, because small truths are enlarged first.
MRA_EPSILON = 1e-8

RatioForm = Literal["linear", "inverse", "exponential"]


def mean_relative_accuracy(
  answer: float | Array, truth: float | Array, strict: bool = False
) -> jax.Array:
  """Returns the fraction of the tolerances 50 %, 45 %, ..., 5 % that the relative error is within.

  MRA = mean over c in {.50, .55, ..., .95} of [ |answer - truth| / |truth| <= 1 - c ]

  Args:
    answer, truth: float32 of equal shape, in the same unit.
    strict: compares with < instead of <=.

  Returns:
    float32 in {0, .1, ..., 1}. An error equal to a tolerance can round to the other side of it than
    in float64: of the pairs of whole numbers up to 60, 0.8 % differ by one step of .1.

  Source: VSI-Bench (arXiv:2412.14171) has <=; the training reward of ViLaSR (arXiv:2506.09965,
  Eq. 3) has <. The benchmark divides by the truth, not by its magnitude: see
  `evaluate.benchmarks.vsi_bench`.
  """
  answer, truth = jnp.asarray(answer, jnp.float32), jnp.asarray(truth, jnp.float32)
  error = (jnp.abs(answer - truth) / (jnp.abs(truth) + MRA_EPSILON))[None]
  tolerances = jnp.asarray(MRA_TOLERANCES).reshape((-1,) + (1,) * (error.ndim - 1))
  within = error < tolerances if strict else error <= tolerances
  return jnp.mean(within.astype(jnp.float32), axis=0)


def exact_match(answer: float | Array, truth: float | Array) -> jax.Array:
  """Returns 1 where the answer equals the truth, else 0.

  Args:
    answer, truth: numbers of the chosen and of the right option.

  Returns:
    float32, 0 or 1.
  """
  return (jnp.asarray(answer) == jnp.asarray(truth)).astype(jnp.float32)


def within(answer: float | Array, truth: float | Array, tolerance: float | Array) -> jax.Array:
  """Returns 1 where the relative error is at most the tolerance, else 0.

  Args:
    answer, truth: float32, in the same unit.
    tolerance: relative. PhyX's judge accepts 0.49 for 0.5 (2 %) and rejects 11.3 for 12 (5.8 %).

  Returns:
    float32, 0 or 1.
  """
  answer, truth = jnp.asarray(answer, jnp.float32), jnp.asarray(truth, jnp.float32)
  # One rounding step of slack, so that an error equal to the tolerance counts on every processor.
  limit = jnp.asarray(tolerance, jnp.float32) * jnp.abs(truth) * np.float32(1 + 1e-6)
  return (jnp.abs(answer - truth) <= limit).astype(jnp.float32)


def ratio(answer: float | Array, truth: float | Array, form: RatioForm = "linear") -> jax.Array:
  """Returns a reward of the ratio of answer and truth, equal for over- and underestimates.

  With q = |answer - truth| / min(answer, truth) = max / min - 1 the reward is

      linear       max(0, 1 - q)     recommended: 0 from a factor of 2 in either direction
      inverse      1 / (1 + q) = min / max
      exponential  exp(-q)

  Args:
    answer, truth: float32. If the smaller one is <= 0 the reward is 0; if both are 0 it is 1.
    form: the mapping from q to a reward.

  Returns:
    float32 in [0, 1].

  Source: vsGRPO (arXiv:2504.00883) states q; its mapping to a reward is not stated, the three forms
  are ours.
  """
  answer, truth = jnp.asarray(answer, jnp.float32), jnp.asarray(truth, jnp.float32)
  smaller, larger = jnp.minimum(answer, truth), jnp.maximum(answer, truth)
  positive = smaller > 0.0
  q = larger / jnp.where(positive, smaller, 1.0) - 1.0
  match form:
    case "linear":
      reward = jnp.maximum(0.0, 1.0 - q)
    case "inverse":
      reward = 1.0 / (1.0 + q)
    case "exponential":
      reward = jnp.exp(-q)
  both_zero = ((answer == 0.0) & (truth == 0.0)).astype(jnp.float32)
  return jnp.where(positive, reward, both_zero)
