"""The best of several rollouts of a prompt, by what the policy itself thinks of them."""

from collections.abc import Sequence

from spatial_jax.types import Trajectory


def mean_logp(trajectory: Trajectory) -> float:
  """Mean log-probability of the tokens that the policy said."""
  return float(trajectory.logp_T[trajectory.trained_T].mean())


def rank(end_reason: str, logp: float) -> tuple[bool, float]:
  """Smaller is better: an answer goes before none, whatever the likelihood; then the likelier.

  To babble in circles is likely, too.
  """
  return end_reason != "answer", -logp


def most_likely(group: Sequence[Trajectory], count: int) -> list[Trajectory]:
  """The `count` best of a group, by `rank`, best first."""
  return sorted(group, key=lambda t: rank(t.end_reason, mean_logp(t)))[:count]
