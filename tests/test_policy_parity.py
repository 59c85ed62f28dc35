"""The policy against outputs of transformers in golden files (live: test_parity_hf)."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax.policy.qwen_vl import make_policy
from tests import policy_fixtures as fixtures

PATH = pathlib.Path(__file__).parent / "golden" / "parity.npz"
GOLDEN = ("qwen2_vl/untied", "qwen2_5_vl/tied", "qwen3_vl/odd")  # one shape of each family
CASES = {case.name: case for case in fixtures.cases()}


def assert_parity(case: fixtures.Case, reference) -> None:
  """Positions are equal, logits within 1e-4 of their deviation, greedy tokens up to a near tie."""
  policy = make_policy(case.cfg, jnp.float32)
  np.testing.assert_array_equal(case.sequence().positions, reference["positions"])
  logits, greedy = fixtures.run_case(case, policy, fixtures.small_params(policy.cfg))
  scale = reference["logits"].std()
  np.testing.assert_allclose(logits / scale, reference["logits"] / scale, rtol=0, atol=1e-4)
  steps = fixtures.compared_steps(reference["margins"])
  assert steps >= 28
  np.testing.assert_array_equal(greedy[:steps], reference["greedy"][:steps])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.config in GOLDEN])
def test_policy_equals_the_golden_reference(name):
  with np.load(PATH) as golden:
    keys = ("positions", "logits", "greedy", "margins")
    assert_parity(CASES[name], {key: golden[f"{name}/{key}"] for key in keys})


def test_every_golden_entry_is_used():
  with np.load(PATH) as golden:
    found = {key.rpartition("/")[0] for key in golden}
  assert found == {name for name, case in CASES.items() if case.config in GOLDEN}
