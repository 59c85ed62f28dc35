import dataclasses

import numpy as np
import pytest

from spatial_jax.evaluate.bootstrap import bootstrap_interval, paired_interval


def test_interval_matches_the_normal_approximation():
  values = np.random.default_rng(0).normal(0.4, 0.3, 400)
  cell = bootstrap_interval(values, seed=1)
  half = 1.96 * values.std() / np.sqrt(values.size)
  assert cell.mean == pytest.approx(values.mean())
  assert cell.low == pytest.approx(values.mean() - half, abs=0.15 * half)
  assert cell.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_interval_covers_the_truth_about_95_times_of_100():
  generator = np.random.default_rng(0)
  covered = 0
  for trial in range(100):
    cell = bootstrap_interval(generator.binomial(1, 0.3, 60).astype(float), seed=trial)
    covered += cell.low <= 0.3 <= cell.high
  assert 88 <= covered <= 100


def test_same_seed_same_interval_whatever_the_chunk(monkeypatch):
  values = np.random.default_rng(0).uniform(size=50)
  first = bootstrap_interval(values, seed=3)
  assert first == bootstrap_interval(values, seed=3)
  assert first != bootstrap_interval(values, seed=4)
  monkeypatch.setattr("spatial_jax.evaluate.bootstrap._CHUNK", 777)
  assert first == bootstrap_interval(values, seed=3)


def test_pairing_removes_what_both_share():
  generator = np.random.default_rng(0)
  before = generator.uniform(size=200)
  after = before + 0.02 + generator.normal(0, 0.01, 200)
  paired = paired_interval(after, before, seed=0)
  assert 0.015 < paired.low < paired.mean < paired.high < 0.025
  assert bootstrap_interval(after, 0).low < bootstrap_interval(before, 0).mean  # unpaired: unsure


def test_one_constant_value_has_an_interval_of_no_width():
  assert dataclasses.astuple(bootstrap_interval(np.array([0.5]), seed=0)) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
  ("values", "message"),
  [([], "n >= 1"), ([[0.1]], r"\[1, 1\]"), ([0.1, np.nan], "score 1 of 2 is not finite")],
)
def test_unusable_scores_are_named(values, message):
  with pytest.raises(ValueError, match=message):
    bootstrap_interval(np.array(values), seed=0)


def test_paired_scores_of_different_length():
  with pytest.raises(ValueError, match=r"differ in shape: \[3\], \[2\]"):
    paired_interval(np.zeros(3), np.zeros(2), seed=0)
