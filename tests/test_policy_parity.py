"""The policy against what transformers computed (golden files; live: test_parity_hf)."""

import pathlib

import numpy as np
import pytest

from tests import policy_fixtures as fixtures

GOLDEN = pathlib.Path(__file__).parent / "golden" / "parity.npz"
CASES = {case.name: case for case in fixtures.cases()}


def assert_parity(case: fixtures.Case, reference) -> None:
  """Positions equal, logits within 1e-4 of their deviation, greedy tokens up to a near tie."""
  policy = fixtures.small_policy(case.tied)
  np.testing.assert_array_equal(case.sequence(policy.cfg).positions, reference["positions"])
  logits, greedy = fixtures.run_case(case, policy, fixtures.small_params(policy.cfg))
  scale = reference["logits"].std()
  np.testing.assert_allclose(logits / scale, reference["logits"] / scale, rtol=0, atol=1e-4)
  steps = fixtures.compared_steps(reference["margins"])
  assert steps >= 28
  np.testing.assert_array_equal(greedy[:steps], reference["greedy"][:steps])


@pytest.mark.parametrize("name", CASES)
def test_equals_the_golden_reference(name):
  with np.load(GOLDEN) as golden:
    keys = ("positions", "logits", "greedy", "margins")
    assert_parity(CASES[name], {key: golden[f"{name}/{key}"] for key in keys})


def test_every_golden_entry_is_used():
  with np.load(GOLDEN) as golden:
    assert {key.split("/")[0] for key in golden} == set(CASES)
