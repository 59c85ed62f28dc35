"""The best of several rollouts of a prompt, by what the policy itself thinks of them."""

from collections.abc import Sequence

from spatial_jax.types import Trajectory


def mean_logp(trajectory: Trajectory) -> float:
  """Mean log-probability of the tokens that the policy said."""
  return float(trajectory.logp_T[trajectory.trained_T].mean())


def likeliest(group: Sequence[Trajectory], count: int) -> list[Trajectory]:
  """The `count` of a group that the policy finds likeliest, best first.

  Those that came to an answer go before those that did not, whatever their likelihood: to babble in
  circles is likely, too.
  """

  def rank(trajectory: Trajectory) -> tuple[bool, float]:
    return trajectory.end_reason != "answer", -mean_logp(trajectory)

  return sorted(group, key=rank)[:count]
