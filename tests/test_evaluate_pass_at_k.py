"""pass@k against the definition, by enumeration of all draws."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.evaluate.pass_at_k import pass_at_k, passes
from spatial_jax.evaluate.predictions import Prediction


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_it_is_the_mean_over_all_draws_of_k_samples(rows):
  right = np.array(rows)
  for k in range(1, 7):
    draws = [right[:, list(chosen)].any(axis=1) for chosen in itertools.combinations(range(6), k)]
    assert pass_at_k(right, k) == pytest.approx(np.mean(draws))


def test_it_grows_with_k_and_is_bounded():
  right = np.random.default_rng(0).uniform(size=(40, 8)) < 0.3
  found = [pass_at_k(right, k) for k in range(1, 9)]
  assert found == sorted(found)
  assert found[0] == pytest.approx(right.mean())
  assert found[-1] == pytest.approx(right.any(axis=1).mean())


@pytest.mark.parametrize("k", [0, 9])
def test_k_out_of_range_is_refused(k):
  with pytest.raises(ValueError, match="k is"):
    pass_at_k(np.ones((2, 8), bool), k)


def prediction(score, end_reason="answer"):
  return Prediction(
    task_id="t",
    question_type="size",
    answer_kind="number",
    question="?",
    truth="1",
    benchmark=None,
    answer="1",
    score=score,
    reward=score,
    parsed=True,
    end_reason=end_reason,
  )


def test_a_question_with_a_fault_is_left_out():
  samples = [
    [prediction(1.0), prediction(0.0, "fault")],
    [prediction(0.2), prediction(1.0)],
  ]
  assert passes(samples) == {"pass@1": 0.5, "pass@2": 1.0}
  assert passes([[prediction(1.0, "fault")]]) == {}
