"""Ranking of several rollouts of one prompt by their likelihood under the policy."""

from collections.abc import Sequence

from spatial_jax.types import Trajectory


def mean_logp(trajectory: Trajectory) -> float:
  """Mean log-probability of the sampled tokens, nats."""
  return float(trajectory.logp_T[trajectory.trained_T].mean())


def rank(end_reason: str, logp: float) -> tuple[bool, float]:
  """Sort key, smaller is better: rollouts that ended with an answer first, then by likelihood.

  Likelihood alone would prefer rollouts that repeat themselves until the token limit.
  """
  return end_reason != "answer", -logp


def most_likely(group: Sequence[Trajectory], count: int) -> list[Trajectory]:
  """The `count` best rollouts of a group by `rank`, best first."""
  return sorted(group, key=lambda t: rank(t.end_reason, mean_logp(t)))[:count]
